"""A finished run as an ONNX file: a fifth of the float network's size, and about as fast.

    python -m tools.export runs/NAME/last.pt net.onnx            for onnxruntime 1.23 or newer
    python -m tools.export runs/NAME/last.pt net.onnx --int8     for 1.19 or newer, twice as large

Quantizing costs a runtime time unless it computes in integers, and onnxruntime does that where it
finds one pattern only: DequantizeLinear, Conv and QuantizeLinear in a row, all of 8 bits. So the
file is written in these steps:

    trace               ONNX's nodes, with placeholders for quantized weights and inputs
    fold_batch_norms    BN becomes scale and bias of the convolution before it
    absorb_limits       ReLU and ReLU6 become limits of the quantizers after them
    write_weights       as integers for the pattern; elsewhere as integers that load as floats
    write_inputs        a quantizer becomes QuantizeLinear, Clip and DequantizeLinear
"""

import argparse
import copy
import io
import json
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

import train
from osc_qat import quant_layers

try:
    import onnx
except ImportError:  # optional: only export_onnx needs it
    onnx = None

# --- The traced network ---------------------------------------------------------------------------

class Placeholder(torch.autograd.Function):
    """A node of ONNX's graph that stands for the quantizer of a layer's weight or input."""

    @staticmethod
    def forward(ctx, op, layer, x):
        return x.clone()

    @staticmethod
    def symbolic(g, op, layer, x):
        return g.op(f"osc_qat::{op}", x, layer_s=layer).setType(x.type())


@dataclass
class Weight:
    """A layer's weight w_int * scale; a convolution's bias, too, since BN changes both."""

    layer: str
    w_int: np.ndarray  # W, int64
    scale: np.ndarray  # (C_out,), float64; BN may make it negative or 0
    bias: np.ndarray  # (C_out,), float64


@dataclass
class Input:
    """A layer's input scale * clip(round(x / scale), low, high)."""

    layer: str
    scale: np.float32
    low: int
    high: int
    guarded: bool = False

    def to_int(self, x: float) -> int:
        """The integer of a number, rounded as osc_qat.quantize_to_int rounds."""
        return int(np.clip(np.rint(np.float32(x) / self.scale), self.low, self.high))

    def zero(self) -> int:
        """What stands for 0 in the file, where all inputs are uint8, those with a sign as well.

        onnxruntime's integer convolution wants one type for input and output, and the signed output
        of a bottleneck goes into a convolution whose own output is unsigned.
        """
        return 128 if self.low < 0 else 0


def trace(net: nn.Module, image_shape: tuple) -> bytes:
    """A network in evaluation mode as an ONNX file for images (N, *image_shape), N free."""
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecated; torch's new exporter takes 30 times as long
        torch.onnx.export(net, torch.zeros(2, *image_shape), file, dynamo=False, opset_version=20,
                          input_names=["images"], output_names=["logits"],
                          dynamic_axes=dict.fromkeys(["images", "logits"], {0: "N"}))
    return file.getvalue()


def float_onnx(model: nn.Module, image_shape: tuple) -> bytes:
    """The network with its quantizers off: a float network's file, to measure against."""
    net = copy.deepcopy(model).cpu().float().eval()
    for layer in quant_layers(net).values():
        layer.weight_hat = partial(getattr, layer, "weight")
        layer.input_quantizer = None
    return trace(net, image_shape)


class Graph:
    """The traced network: ONNX nodes in the order of computation, and what placeholders stand for.

    weights and inputs hold a Weight or an Input by the name of the placeholder's output.
    """

    def __init__(self, model: nn.Module, image_shape: tuple):
        net = copy.deepcopy(model).cpu().float().eval()
        layers = quant_layers(net)
        for name, layer in layers.items():
            layer.weight_hat = partial(Placeholder.apply, "Weight", name, layer.weight)
            if layer.input_quantizer:
                layer.input_hat = partial(Placeholder.apply, "Input", name)
        self.proto = onnx.load_from_string(trace(net, image_shape))
        self.nodes = list(self.proto.graph.node)
        self.tensors = {each.name: each for each in self.proto.graph.initializer}
        self.weights, self.inputs = {}, {}
        for node in self.nodes:
            if node.domain == "osc_qat":
                name = node.attribute[0].s.decode()
                kind, known = (weight_of, self.weights) if node.op_type == "Weight" else \
                    (input_of, self.inputs)
                known[node.output[0]] = kind(name, layers[name])

    def readers(self, name: str) -> list:
        """Nodes that read a tensor; None among them where the network returns it."""
        outputs = [None for output in self.proto.graph.output if output.name == name]
        return [node for node in self.nodes if name in node.input] + outputs

    def producer(self, name: str):
        """The node that computes a tensor, or None."""
        return next((node for node in self.nodes if name in node.output), None)

    def value(self, name: str) -> np.ndarray | None:
        """A constant, or None for what is computed from images."""
        if name in self.tensors:
            return onnx.numpy_helper.to_array(self.tensors[name])
        node = self.producer(name)
        if node is not None and node.op_type == "Identity":  # torch keeps one of equal tensors
            return self.value(node.input[0])
        if node is not None and node.op_type == "Constant":
            return onnx.numpy_helper.to_array(node.attribute[0].t)
        return None

    def constant(self, name: str, value: np.ndarray, four_bits: bool = False) -> str:
        """Adds a tensor to the file; returns its name, which differs where that one is taken."""
        while name in self.tensors:  # a module that the network calls twice
            name += "_"
        tensor = onnx.numpy_helper.from_array(np.asarray(value), name)
        if four_bits:  # two integers a byte, the lower half first
            pairs = np.pad(value.ravel(), (0, value.size % 2)).reshape(-1, 2)
            tensor.data_type = onnx.TensorProto.INT4
            tensor.raw_data = (pairs[:, 0] & 15 | pairs[:, 1] << 4).tobytes()
        self.tensors[name] = tensor
        return name

    def replace(self, old, new: list) -> None:
        """Puts nodes in the place of one."""
        index = next(k for k, node in enumerate(self.nodes) if node is old)
        self.nodes[index:index + 1] = new

    def serialized(self) -> bytes:
        """The file, without what nothing reads any more."""
        read = {output.name for output in self.proto.graph.output}
        for node in reversed(self.nodes):
            if not read.isdisjoint(node.output):
                read.update(node.input)
        del self.proto.graph.node[:], self.proto.graph.initializer[:], self.proto.opset_import[:]
        del self.proto.graph.value_info[:]
        self.proto.graph.node.extend(node for node in self.nodes if not read.isdisjoint(node.output))
        self.proto.graph.initializer.extend(self.tensors[name] for name in self.tensors if name in read)
        self.proto.opset_import.append(onnx.helper.make_opsetid("", 21))
        self.proto.ir_version = 10  # both are the first that know INT4
        return self.proto.SerializeToString()


def weight_of(name: str, layer: nn.Module) -> Weight:
    """Integers, scale and bias of a layer from osc_qat."""
    channels = len(layer.weight)
    scale = layer.weight_quantizer.usable_scale(1).detach().double().expand(channels).numpy()
    bias = torch.zeros(channels) if layer.bias is None else layer.bias.detach()
    return Weight(name, layer.weight_int().long().numpy(), scale, bias.double().numpy())


def input_of(name: str, layer: nn.Module) -> Input:
    """The grid of a layer's input."""
    q = layer.input_quantizer
    return Input(name, q.usable_scale(1).detach().numpy()[0], q.int_min, q.int_max)


# --- The steps ------------------------------------------------------------------------------------

def fold_batch_norms(graph: Graph) -> None:
    """Takes BN after a convolution into its scale and bias: the same integers, no node.

    BN is a x + b per channel, and a (s w_int x + c) + b = (a s) w_int x + (a c + b). A BN that
    follows anything else stays.
    """
    for bn in [node for node in graph.nodes if node.op_type == "BatchNormalization"]:
        conv = graph.producer(bn.input[0])
        if conv is None or conv.op_type != "Conv" or len(graph.readers(bn.input[0])) > 1:
            continue
        gamma, beta, mean, variance = (graph.value(name).astype(float) for name in bn.input[1:])
        epsilon = next(each.f for each in bn.attribute if each.name == "epsilon")
        a = gamma / np.sqrt(variance + epsilon)
        weight = graph.weights[conv.input[1]]
        weight.scale, weight.bias = a * weight.scale, a * (weight.bias - mean) + beta
        conv.output[0] = bn.output[0]
        graph.replace(bn, [])


def absorb_limits(graph: Graph) -> None:
    """Drops a ReLU or ReLU6 that only quantizers read, and gives them its limits as integers.

    Rounding and clipping are monotone: Q(min(max(x, 0), 6)) = min(max(Q(x), Q(0)), Q(6)).
    """
    for node in [node for node in graph.nodes if node.op_type in ("Relu", "Clip")]:
        readers = graph.readers(node.output[0])
        if any(each is None or each.output[0] not in graph.inputs for each in readers):
            continue
        limits = [0, None] if node.op_type == "Relu" else map(graph.value, node.input[1:])
        lowest, highest = limits
        for reader in readers:
            grid = graph.inputs[reader.output[0]]
            if lowest is not None:
                grid.low = grid.to_int(lowest)
            if highest is not None:
                grid.high = grid.to_int(highest)
            reader.input[0] = node.input[0]
        graph.replace(node, [])


@dataclass
class Integers:
    """A Weight as an integer convolution needs it: w_int 2^shift * scale, and a bias in steps."""

    w_int: np.ndarray  # W
    shift: int
    zero: int  # what stands for 0 in the file
    scale: np.ndarray  # (C_out,), float32, above 0
    bias: np.ndarray  # (C_out,), int32, in steps of input scale times scale


def in_integers(weight: Weight, grid: Input) -> Integers | None:
    """A convolution's integers for an input of this grid, or None where they do not fit.

    The values are the same but for the bias, which is rounded to one step.
    """
    w_int = (weight.w_int.T * np.where(weight.scale < 0, -1, 1)).T  # a scale is positive
    unit = float(grid.scale) * np.abs(weight.scale)
    # What float32 would lose beside the bias goes: BN's factor is 0 or next to it. No scale is 0.
    reach = np.abs(w_int).reshape(len(w_int), -1).sum(1) * max(-grid.low, grid.high)
    lost = reach * unit <= np.abs(weight.bias) * 2.0**-25
    w_int[lost] = 0
    unit[lost] = np.where(weight.bias == 0, 1, np.abs(weight.bias) * 2.0**-24)[lost]
    # x86 processors without VNNI sum two products of uint8 inputs and int8 weights in 16 bits: up
    # to 64 they fit, as 2 * 255 * 64 < 2^15. Larger weights, of 8 bits, go as uint8, for which the
    # runtime has other code. Smaller ones are doubled up to 64: the bias has finer steps then.
    largest = int(np.abs(w_int).max())
    shift = max(64 // max(largest, 1), 1).bit_length() - 1
    zero = 0 if largest <= 64 else 128 if w_int.max() < 128 else 127  # 128 is -(-128)
    unit = unit / 2**shift
    bias, scale = np.rint(weight.bias / unit), (unit / float(grid.scale)).astype(np.float32)
    fits = not zero or 0 <= w_int.min() + zero and w_int.max() + zero <= 255
    fits &= (reach * 2**shift + np.abs(bias)).max() < 2**31
    fits &= (scale * grid.scale).min() >= np.finfo(np.float32).tiny
    return Integers(w_int, shift, zero, scale, bias.astype(np.int32)) if fits else None


def write_weights(graph: Graph, int4: bool) -> None:
    """Writes each layer's weight, for an integer convolution where a quantizer follows it."""
    for placeholder in [node for node in graph.nodes if node.output[0] in graph.weights]:
        output = placeholder.output[0]
        weight, (layer,) = graph.weights[output], graph.readers(output)
        grid, after = graph.inputs.get(layer.input[0]), graph.readers(layer.output[0])
        integers = None
        if layer.op_type == "Conv":
            del layer.input[2:]  # its bias is written with the weight
            if grid and len(after) == 1 and after[0] is not None and \
                    after[0].output[0] in graph.inputs:
                integers = in_integers(weight, grid)
        if integers:
            nodes = integer_weight(graph, weight.layer, layer, integers, grid, int4)
        else:
            nodes = float_weight(graph, weight, layer, int4)
            if grid and len(after) == 1 and after[0] is not None:
                grid.guarded = after[0].output[0] in graph.inputs or after[0].op_type in MOVES
        graph.replace(placeholder, nodes)


# onnxruntime moves a quantizer that follows these to the front of them.
MOVES = {"Flatten", "MaxPool", "Reshape", "Squeeze", "Slice", "Transpose", "Unsqueeze"}


def stored(graph: Graph, name: str, w_int: np.ndarray, int4: bool) -> str:
    """Adds integers as INT4 where they fit, else as INT8."""
    return graph.constant(f"{name}.w_int", w_int.astype(np.int8),
                          int4 and w_int.min() >= -8 and w_int.max() <= 7)


def integer_weight(graph, name, conv, integers, grid, int4) -> list:
    """DequantizeLinear of weight and bias, in which onnxruntime recognises its integer convolution."""
    node, output, zero = onnx.helper.make_node, conv.input[1], integers.zero
    scale = graph.constant(f"{name}.scale", integers.scale)
    w_int, nodes = integers.w_int, []
    if int4 and w_int.min() >= -8 and w_int.max() <= 7:
        factor = graph.constant(f"{name}.factor", np.float32(2**integers.shift))
        nodes = [node("Cast", [stored(graph, name, w_int, True)], [f"{output}.float"], to=1),
                 node("Mul", [f"{output}.float", factor], [f"{output}.product"]),
                 node("Cast", [f"{output}.product"], [f"{output}.int8"], to=3)]
        tensor = f"{output}.int8"
    else:
        kind = np.uint8 if zero else np.int8
        tensor = graph.constant(f"{name}.w_int", (w_int * 2**integers.shift + zero).astype(kind))
    zeros = graph.constant(f"{name}.zero", np.full(len(w_int), zero, np.uint8 if zero else np.int8))
    nodes += [node("DequantizeLinear", [tensor, scale, zeros], [output], axis=0)]
    if integers.bias.any():
        bias = graph.constant(f"{name}.bias_int", integers.bias)
        step = graph.constant(f"{name}.bias_scale", integers.scale * grid.scale)
        nodes += [node("DequantizeLinear", [bias, step], [f"{output}.bias"], axis=0)]
        conv.input.append(f"{output}.bias")
    return nodes


def float_weight(graph, weight, layer, int4) -> list:
    """Cast and Mul, which the runtime computes once, while it loads the file."""
    node, name, output = onnx.helper.make_node, weight.layer, layer.input[1]
    output = next(n for n in layer.input if n in graph.weights)
    shape = (-1, *[1] * (weight.w_int.ndim - 1))
    scale = graph.constant(f"{name}.scale", weight.scale.astype(np.float32).reshape(shape))
    if layer.op_type == "Conv" and weight.bias.any():
        layer.input.append(graph.constant(f"{name}.bias", weight.bias.astype(np.float32)))
    return [node("Cast", [stored(graph, name, weight.w_int, int4)], [f"{output}.float"], to=1),
            node("Mul", [f"{output}.float", scale], [output])]


def write_inputs(graph: Graph) -> None:
    """Writes each quantizer as QuantizeLinear to uint8, Clip to its grid, and DequantizeLinear."""
    node = onnx.helper.make_node
    for placeholder in [node for node in graph.nodes if node.output[0] in graph.inputs]:
        output = placeholder.output[0]
        grid = graph.inputs[output]
        zero, name = grid.zero(), grid.layer
        scale = graph.constant(f"{name}.input_scale", grid.scale)
        zp = graph.constant(f"{name}.input_zero", np.uint8(zero))
        low, high = grid.low + zero, grid.high + zero
        nodes, last = [node("QuantizeLinear", [placeholder.input[0], scale, zp], [f"{output}.int"])], f"{output}.int"
        if (low, high) != (0, 255):
            limits = [graph.constant(f"{name}.input_low", np.uint8(low)), graph.constant(f"{name}.input_high", np.uint8(high))]
            nodes += [node("Clip", [last, *limits], [f"{output}.clipped"])]
            last = f"{output}.clipped"
        if grid.guarded:
            one = graph.constant(f"{name}.one", np.float32(1))
            nodes += [node("DequantizeLinear", [last, one, zp], [f"{output}.steps"]),
                      node("Mul", [f"{output}.steps", scale], [output])]
        else:
            nodes += [node("DequantizeLinear", [last, scale, zp], [output])]
        graph.replace(placeholder, nodes)


def export_onnx(model: nn.Module, image_shape: tuple, metadata: dict[str, str],
                int4: bool = True) -> bytes:
    if onnx is None or not hasattr(onnx.TensorProto, "INT4"):
        raise ImportError("onnx 1.16 or newer")
    graph = Graph(model, image_shape)
    fold_batch_norms(graph)
    absorb_limits(graph)
    write_weights(graph, int4)
    write_inputs(graph)
    onnx.helper.set_model_props(graph.proto, {"image_shape": str(image_shape), **metadata})
    return graph.serialized()
