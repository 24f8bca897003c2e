"""A finished run as an ONNX file: at most a fifth of the float network's size, and about as fast.

    python -m tools.export runs/NAME/last.pt net.onnx            for onnxruntime 1.23 or newer
    python -m tools.export runs/NAME/last.pt net.onnx --int8     for 1.19 or newer; 4 bits take 8

Quantizing saves a runtime time only where it computes in integers, and onnxruntime does that where
it finds one pattern: 8-bit DequantizeLinear, Conv and QuantizeLinear in a row. Everywhere else the
quantizers cost extra time. These steps turn the traced network into that pattern:

    Graph               ONNX's nodes, with placeholders for the quantizers of weights and inputs
    fold_batch_norms    BN becomes scale and bias of the convolution before it
    absorb_limits       ReLU and ReLU6 become limits of the quantizers after them
    write_weights       as integers for the pattern, or as small integers that load as floats
    write_inputs        a quantizer becomes QuantizeLinear, Clip and DequantizeLinear
"""

import argparse
import copy
import io
import json
import os
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
from tools.common import tool_parser

try:
    import onnx
except ImportError:  # optional: export_onnx reports it
    onnx = None

INT4_NEEDS, INT8_NEEDS = "1.23", "1.19"  # onnxruntime: older ones cannot cast INT4; opset 21

# --- The traced network ---------------------------------------------------------------------------

class Placeholder(torch.autograd.Function):
    """A node of ONNX's graph that stands for the quantizer of a layer's weight or input."""

    @staticmethod
    def forward(ctx, kind, layer, x):
        return x.clone()

    @staticmethod
    def symbolic(g, kind, layer, x):
        return g.op(f"osc_qat::{kind}", x, layer_s=layer).setType(x.type())


@dataclass
class Weight:
    """A layer's weight w_int * scale; a convolution's bias as well, since BN changes both."""

    layer: str
    w_int: np.ndarray  # W, int64
    scale: np.ndarray  # (C_out,), float64; BN may make it negative or 0
    bias: np.ndarray  # (C_out,), float64

    def four_bits(self) -> bool:
        """Whether its integers fit into INT4."""
        return self.w_int.min() >= -8 and self.w_int.max() <= 7


@dataclass
class Input:
    """A layer's input scale * clip(round(x / scale), low, high)."""

    layer: str
    scale: np.float32
    low: int
    high: int
    hidden: bool = False  # from the runtime, see float_weight

    def to_int(self, x: float) -> int:
        """The integer of a number, rounded as osc_qat.quantize_to_int rounds."""
        return int(np.clip(np.rint(np.float32(x) / self.scale), self.low, self.high))

    def zero(self) -> int:
        """The integer that stands for 0 in the file, where all inputs are uint8, also signed ones.

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
    """The ONNX file of the network without its quantizers, to measure size and time against."""
    net = copy.deepcopy(model).cpu().float().eval()
    for layer in quant_layers(net).values():
        layer.weight_hat, layer.input_quantizer = partial(getattr, layer, "weight"), None
    return trace(net, image_shape)


class Graph:
    """The traced network: ONNX nodes in the order of computation, and tensors by name.

    weights and inputs hold what the placeholders stand for, by the name of a placeholder's output.
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
        self.tensors = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self.weights, self.inputs = {}, {}
        for node in self.nodes:
            if node.domain == "osc_qat":
                name = node.attribute[0].s.decode()
                known, read = {"Weight": (self.weights, read_weight),
                               "Input": (self.inputs, read_input)}[node.op_type]
                known[node.output[0]] = read(name, layers[name])

    def readers(self, tensor: str) -> list:
        """Nodes that read a tensor; None is among them if the network returns it."""
        returned = [None for output in self.proto.graph.output if output.name == tensor]
        return [node for node in self.nodes if tensor in node.input] + returned

    def producer(self, tensor: str):
        """The node that computes a tensor, or None."""
        return next((node for node in self.nodes if tensor in node.output), None)

    def value(self, tensor: str) -> np.ndarray | None:
        """A constant's value; None if the tensor depends on the images, or has no name."""
        if tensor in self.tensors:
            return onnx.numpy_helper.to_array(self.tensors[tensor])
        node = self.producer(tensor) if tensor else None
        if node and node.op_type == "Identity":  # torch keeps one of equal tensors
            return self.value(node.input[0])
        return onnx.numpy_helper.to_array(node.attribute[0].t) if node and \
            node.op_type == "Constant" else None

    def constant(self, name: str, value: np.ndarray, four_bits: bool = False) -> str:
        """Adds a tensor; returns its name, a longer one if that is taken (a layer called twice)."""
        while name in self.tensors or self.producer(name):
            name += "_"
        tensor = self.tensors[name] = onnx.numpy_helper.from_array(np.asarray(value), name)
        if four_bits:  # two integers a byte, the lower half first
            pairs = np.pad(value.ravel(), (0, value.size % 2)).reshape(-1, 2)
            tensor.data_type = onnx.TensorProto.INT4
            tensor.raw_data = (pairs[:, 0] & 15 | pairs[:, 1] << 4).tobytes()
        return name

    def replace(self, old, new: list) -> None:
        """Puts nodes in the place of one."""
        index = next(k for k, node in enumerate(self.nodes) if node is old)
        self.nodes[index:index + 1] = new

    def file(self, metadata: dict[str, str]) -> bytes:
        """The ONNX file, without nodes and tensors that nothing reads any more."""
        read, kept = {output.name for output in self.proto.graph.output}, []
        for node in reversed(self.nodes):
            if not read.isdisjoint(node.output):
                kept.insert(0, node)
                read.update(node.input)
        tensors = [tensor for name, tensor in self.tensors.items() if name in read]
        graph = onnx.helper.make_graph(kept, "osc_qat", self.proto.graph.input,
                                       self.proto.graph.output, tensors)
        file = onnx.helper.make_model(  # the first opset and version of the format with INT4
            graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
        onnx.helper.set_model_props(file, metadata)
        return file.SerializeToString()


def read_weight(name: str, layer: nn.Module) -> Weight:
    """The integers, scale and bias of a layer; frozen weights have their frozen integers."""
    channels = len(layer.weight)
    scale = layer.weight_quantizer.usable_scale(1).detach().double().expand(channels)
    bias = torch.zeros(channels) if layer.bias is None else layer.bias.detach()
    return Weight(name, layer.weight_int().long().numpy(), scale.numpy(), bias.double().numpy())


def read_input(name: str, layer: nn.Module) -> Input:
    """The grid of a layer's input."""
    q = layer.input_quantizer
    return Input(name, q.usable_scale(1).detach().numpy()[0], q.int_min, q.int_max)


# --- The steps ------------------------------------------------------------------------------------

def export_onnx(model: nn.Module, image_shape: tuple, metadata: dict[str, str],
                int4: bool = True) -> bytes:
    """A network from quantize_model as an ONNX file, opset 21, for images (N, *image_shape).

    Args:
        model: any mode, device and dtype; it stays as it is. N is free in the file.
        image_shape: (3, H, W) for a network of pictures.
        metadata: for the file's metadata, beside image_shape.
        int4: store weights of up to 4 bits as INT4, in half the space; needs onnxruntime 1.23.
    Raises ImportError without onnx 1.16 or newer.
    """
    if not hasattr(getattr(onnx, "TensorProto", None), "INT4"):
        raise ImportError("the export needs onnx 1.16 or newer")
    graph = Graph(model, image_shape)
    fold_batch_norms(graph)
    absorb_limits(graph)
    write_weights(graph, int4)
    write_inputs(graph)
    return graph.file({"image_shape": str(image_shape), **metadata})


def fold_batch_norms(graph: Graph) -> None:
    """Makes BN a part of the convolution before it; a BN after anything else stays.

    Exact: BN is a y + b per channel, and a (s w_int x + c) + b = (a s) w_int x + (a c + b) has the
    same integers.
    """
    for bn in [node for node in graph.nodes if node.op_type == "BatchNormalization"]:
        conv = graph.producer(bn.input[0])
        weight = graph.weights.get(conv.input[1]) if conv and conv.op_type == "Conv" else None
        if not weight or len(graph.readers(bn.input[0])) > 1:
            continue
        gamma, beta, mean, variance = (graph.value(name).astype(float) for name in bn.input[1:])
        epsilon = next(each.f for each in bn.attribute if each.name == "epsilon")
        a = gamma / np.sqrt(variance + epsilon)
        weight.scale, weight.bias = a * weight.scale, a * (weight.bias - mean) + beta
        conv.output[0] = bn.output[0]
        graph.replace(bn, [])


def absorb_limits(graph: Graph) -> None:
    """Removes each ReLU and ReLU6 that only quantizers read, and gives them its limits.

    Exact, since rounding and clipping are monotone: Q(min(max(x, 0), 6)) = clip(Q(x), Q(0), Q(6)).
    """
    for node in [node for node in graph.nodes if node.op_type in ("Relu", "Clip")]:
        readers = graph.readers(node.output[0])
        if not all(reader and reader.output[0] in graph.inputs for reader in readers):
            continue
        limits = [0] if node.op_type == "Relu" else [graph.value(name) for name in node.input[1:]]
        lowest, highest = [*limits, None, None][:2]
        for reader in readers:
            grid = graph.inputs[reader.output[0]]
            grid.low = grid.low if lowest is None else grid.to_int(lowest)
            grid.high = grid.high if highest is None else grid.to_int(highest)
            reader.input[0] = node.input[0]
        graph.replace(node, [])


# Nodes in front of which onnxruntime moves a quantizer that follows them.
MOVES = {"Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


def write_weights(graph: Graph, int4: bool) -> None:
    """Writes weights: integers for a convolution that one quantizer follows, else floats."""
    for placeholder in [node for node in graph.nodes if node.output[0] in graph.weights]:
        weight = graph.weights[placeholder.output[0]]
        layer, = graph.readers(placeholder.output[0])
        grid = graph.inputs.get(layer.input[0])
        reader, *others = graph.readers(layer.output[0])
        followed = reader and not others and reader.output[0] in graph.inputs
        integers = None
        if layer.op_type == "Conv":
            del layer.input[2:]  # the bias is written with the weight
            integers = in_integers(weight, grid) if grid and followed else None
        if integers:
            nodes = integer_weight(graph, placeholder, layer, integers, grid, int4)
        else:
            nodes = float_weight(graph, placeholder, layer, weight, int4)
            if grid and not others:
                grid.hidden = followed or bool(reader) and reader.op_type in MOVES
        graph.replace(placeholder, nodes)


@dataclass
class Integers(Weight):
    """A Weight for an integer convolution: the weight is w_int 2^shift scale, scale above 0."""

    shift: int
    zero: int  # the integer that stands for 0 in the file

    def bias_int(self, grid: Input) -> np.ndarray:
        """The bias in steps of both scales' product, (C_out,)."""
        return np.rint(self.bias / (self.scale * float(grid.scale)))


def in_integers(weight: Weight, grid: Input) -> Integers | None:
    """The weight for an integer convolution of this input, or None if its integers do not fit.

    Exact but for the bias, which the convolution adds as an integer: it is rounded to a step.
    """
    w_int = (weight.w_int.T * np.where(weight.scale < 0, -1, 1)).T
    scale, most = np.abs(weight.scale), max(-grid.low, grid.high)
    # A convolution that float32 would lose beside its bias is left out: BN's factor is 0, or tiny.
    reach = np.abs(w_int).reshape(len(w_int), -1).sum(1) * most
    lost = reach * scale * grid.scale <= np.abs(weight.bias) * 2.0**-25
    small = np.abs(weight.bias) * 2.0**-24 / grid.scale
    w_int[lost], scale[lost] = 0, np.where(weight.bias == 0, 1, small)[lost]
    # x86 processors without VNNI add two products of uint8 inputs and int8 weights in 16 bits: with
    # inputs up to 255, weights up to 64 fit. Larger ones go as uint8, for which the runtime has
    # other code (as fast with VNNI). Smaller ones are doubled: the bias is rounded to finer steps.
    largest, room = np.abs(w_int).max(), min(2**15 // (2 * (grid.high + grid.zero()) + 1), 127)
    shift = int(np.log2(max(room // max(largest, 1), 1)))
    zero = 0 if largest <= room else 128 if w_int.max() < 128 else 127  # 128 is -(-128)
    integers = Integers(weight.layer, w_int, scale / 2**shift, weight.bias, shift, zero)
    fits = (reach * 2**shift + np.abs(integers.bias_int(grid))).max() < 2**31
    fits &= (integers.scale * grid.scale).min() > np.finfo(np.float32).tiny
    return integers if fits and (not zero or w_int.min() + zero >= 0) else None


def integer_weight(graph: Graph, placeholder, conv, weight: Integers, grid: Input,
                   int4: bool) -> list:
    """Weight and bias behind DequantizeLinear, which onnxruntime fuses with the convolution."""
    node, name, output = onnx.helper.make_node, weight.layer, placeholder.output[0]
    kind, nodes = np.uint8 if weight.zero else np.int8, []
    if int4 and weight.four_bits():  # the runtime computes these nodes while it loads the file
        stored = graph.constant(f"{name}.w_int", weight.w_int.astype(np.int8), four_bits=True)
        factor = graph.constant(f"{name}.factor", np.float32(2**weight.shift))
        w_int = f"{output}.int8"
        nodes = [node("Cast", [stored], [f"{output}.small"], to=onnx.TensorProto.FLOAT),
                 node("Mul", [f"{output}.small", factor], [f"{output}.large"]),
                 node("Cast", [f"{output}.large"], [w_int], to=onnx.TensorProto.INT8)]
    else:
        w_int = weight.w_int * 2**weight.shift + weight.zero
        w_int = graph.constant(f"{name}.w_int", w_int.astype(kind))
    scale = graph.constant(f"{name}.scale", weight.scale.astype(np.float32))
    zero = graph.constant(f"{name}.zero", np.full(len(weight.scale), weight.zero, kind))
    nodes += [node("DequantizeLinear", [w_int, scale, zero], [output], axis=0)]
    if weight.bias.any():
        # As int32: with a float bias, onnxruntime before 1.23 does not fuse.
        bias = graph.constant(f"{name}.bias_int", weight.bias_int(grid).astype(np.int32))
        step = (weight.scale * float(grid.scale)).astype(np.float32)
        step = graph.constant(f"{name}.bias_scale", step)
        nodes += [node("DequantizeLinear", [bias, step], [f"{output}.bias"], axis=0)]
        conv.input.append(f"{output}.bias")
    return nodes


def float_weight(graph: Graph, placeholder, layer, weight: Weight, int4: bool) -> list:
    """The weight as integers behind Cast and Mul, which the runtime computes while it loads.

    Exact. A DequantizeLinear would be computed for every image. If a quantizer follows the layer,
    onnxruntime from 1.22 on would quantize these weights anew, to 8 bits of its own; it does so
    behind a DequantizeLinear, so the layer's input is hidden from it (write_inputs).
    """
    node, name, output = onnx.helper.make_node, weight.layer, placeholder.output[0]
    stored = graph.constant(f"{name}.w_int", weight.w_int.astype(np.int8),
                            four_bits=int4 and weight.four_bits())
    scale = weight.scale.reshape(-1, *[1] * (weight.w_int.ndim - 1)).astype(np.float32)
    scale = graph.constant(f"{name}.scale", scale)
    if layer.op_type == "Conv" and weight.bias.any():
        layer.input.append(graph.constant(f"{name}.bias", weight.bias.astype(np.float32)))
    return [node("Cast", [stored], [f"{output}.int"], to=onnx.TensorProto.FLOAT),
            node("Mul", [f"{output}.int", scale], [output])]


def write_inputs(graph: Graph) -> None:
    """Writes quantizers: QuantizeLinear to uint8, Clip to the grid if it is smaller, and back.

    Exact: clip(round(x / s), n, p) as in Eq. 1. A 4-bit type would keep the runtime from fusing.
    """
    node = onnx.helper.make_node
    for placeholder in [node for node in graph.nodes if node.output[0] in graph.inputs]:
        output, grid = placeholder.output[0], graph.inputs[placeholder.output[0]]
        scale = graph.constant(f"{grid.layer}.input_scale", grid.scale)
        zero = graph.constant(f"{grid.layer}.input_zero", np.uint8(grid.zero()))
        x_int = f"{output}.int"
        nodes = [node("QuantizeLinear", [placeholder.input[0], scale, zero], [x_int])]
        low, high = grid.low + grid.zero(), grid.high + grid.zero()
        if (low, high) != (0, 255):
            limits = [graph.constant(f"{grid.layer}.input_{end}", np.uint8(limit))
                      for end, limit in (("low", low), ("high", high))]
            nodes += [node("Clip", [x_int, *limits], [f"{output}.clipped"])]
            x_int = f"{output}.clipped"
        if grid.hidden:
            one = graph.constant(f"{grid.layer}.one", np.float32(1))
            nodes += [node("DequantizeLinear", [x_int, one, zero], [f"{output}.steps"]),
                      node("Mul", [f"{output}.steps", scale], [output])]
        else:
            nodes += [node("DequantizeLinear", [x_int, scale, zero], [output])]
        graph.replace(placeholder, nodes)


# --- The command ----------------------------------------------------------------------------------

def metadata_of(run: train.Run) -> dict[str, str]:
    """What a program that runs the file must know of its pictures and classes, as JSON."""
    args = run.args
    preprocessing = run.model.preprocessing | ({} if args.data else train.PATTERNS)
    content = {**preprocessing, "classes": run.dataset_info["classes"],
               "resize": round(args.image_size * preprocessing["resize"]),
               "image_size": args.image_size, "weight_bits": args.bits, "act_bits": args.act_bits}
    return {key: json.dumps(value) for key, value in content.items()}


def open_session(content: bytes):
    """The file in onnxruntime on one thread; None if it is missing or too old for the file."""
    try:
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except Exception as error:
        if not isinstance(error, ImportError):
            print(f"onnxruntime {onnxruntime.__version__} cannot load the file: not measured")
        return None


def milliseconds(sessions: list, image: np.ndarray, seconds: float = 2.0) -> list[float]:
    """The median time of one image on each session, all in turn, after one run to warm up."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 6 or time.perf_counter() < end:
        times.append([])
        for session in sessions:
            begun = time.perf_counter()
            session.run(None, {"images": image})
            times[-1].append(1000 * (time.perf_counter() - begun))
    return [median(each) for each in zip(*times[1:])]


def report(run: train.Run, content: bytes, path: str, top1: float | None) -> None:
    """Prints size, time and top-1 of the float network, of the checkpoint, and of the file.

    A checkpoint keeps the float network's score, not its weights. Its size and time are those of
    the same network without quantizers.
    """
    shape = 3, run.args.image_size, run.args.image_size
    floats = float_onnx(run.model, shape)
    sessions = [open_session(each) for each in (floats, content)]
    times, file_top1 = [None, None], None
    if all(sessions):
        times = milliseconds(sessions, np.zeros((1, *shape), np.float32))
        if top1 is not None:
            run.forward = lambda model, images: torch.from_numpy(
                sessions[1].run(None, {"images": images.cpu().numpy()})[0]).to(run.device)
            file_top1 = train.validate(run)[0]
    rows = [{"": "float network", "MB": len(floats) / 1e6, "ms an image": times[0],
             "top-1": run.fp32_top1},
            {"": "checkpoint", "MB": None, "ms an image": None, "top-1": top1},
            {"": path, "MB": len(content) / 1e6, "ms an image": times[1], "top-1": file_top1}]
    train.print_table([{key: "–" if cell is None else cell for key, cell in row.items()}
                       for row in rows])


def export(args: argparse.Namespace) -> None:
    """Writes the ONNX file of a checkpoint, and reports what one gained."""
    run, top1 = train.stored_run(args.checkpoint, "CHECKPOINT", args), None
    if len(run.val_set) or args.data:
        top1 = train.scores(run)["post_bn_top1"]
    else:
        train.reestimate(run)
        print(f"{run.args.data} has no val/CLASS/*.jpg: exported, but not scored")
    shape = 3, run.args.image_size, run.args.image_size
    with train.user_error("the export needs a package: pip install onnx", ImportError):
        content = export_onnx(run.model, shape, metadata_of(run), int4=not args.int8)
    train.save_atomically(Path(args.file), content, "FILE")
    report(run, content, args.file, top1)
    four_bits = not args.int8 and run.args.bits <= 4
    print(f"{args.file} needs onnxruntime {INT4_NEEDS if four_bits else INT8_NEEDS} or newer"
          f"{'; --int8 writes one for ' + INT8_NEEDS if four_bits else ''}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    p = tool_parser("export", "Writes a finished run as an ONNX file, and prints size, time and "
                    "top-1 beside the\nfloat network's.", "runs/NAME/last.pt net.onnx")
    p.add_argument("checkpoint", type=train.a_path, metavar="CHECKPOINT",
                   help="last.pt or best.pt of a run of train.py")
    p.add_argument("file", type=train.a_path, metavar="FILE.onnx", help="file to write")
    p.add_argument("--data", type=train.a_path, metavar="DIR",
                   help="pictures, if they are no longer where the run found them")
    p.add_argument("--int8", action="store_true",
                   help="store weights of up to 4 bits in 8 bits, for onnxruntime "
                   f"{INT8_NEEDS} and newer, not {INT4_NEEDS}")
    p.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu",
                   workers=min(8, os.cpu_count() or 1))
    args = p.parse_args(argv)
    if not args.file.endswith(".onnx"):
        p.error("FILE.onnx: the export writes ONNX; give a name that ends in .onnx")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on standard error."""
    return train.exit_status("python -m tools.export", parse, export, argv)


if __name__ == "__main__":
    train.run_script(main)
