"""Overcoming Oscillations in Quantization-Aware Training: the method of the paper, in its order.

Nagel, Fournarakis, Bondarenko, Blankevoort, ICML 2022 (PMLR 162:16318-16330, arXiv 2203.11086).

In quantization-aware training (QAT) a weight is kept in floating point and rounded in every forward
pass. Rounding has no useful derivative, so its gradient is passed straight through. If the optimum
lies between two grid points, the gradient has one sign on the lower point and the other sign on the
upper one: the weight moves to the rounding threshold between them and oscillates across it for the
rest of training. The running statistics of batch norm (BN) cannot follow, and it is a matter of
chance on which of the two points an oscillating weight ends. This file contains the quantizer, the
measure of oscillation (Eq. 4) and two methods that stop it (Eq. 5 and Algorithm 1).

    paper        here              shape       meaning                        paper's value
    w            w, layer.weight   W           latent (shadow) weight
    s            scale             1 or C_out  step size of the grid          learned
    n, p         int_min, int_max              integer limits, signed grid    -2^(b-1), 2^(b-1) - 1
                                               the same, unsigned grid        0, 2^b - 1
    w_int        w_int             W           round(w / s), clipped
    q(w), w_hat  w_hat             W           s * w_int: on the grid
    o_t          oscillates        W           1 where w oscillates at t
    f_t          f, frequency()    W           running average (EMA) of o_t   0..1
    m            momentum                      momentum of both averages      0.001 (code)
    f_th         freeze_threshold              a higher f_t freezes w         cos(0.04, 0.01)
    EMA(w_int)   ema_int           W           EMA of the integers
    L_dampen     dampening_loss    scalar      pull to the bin centres        lambda cos(0, 1e-3)

W is the shape of a weight tensor. Integers are integer-valued float tensors. The 1e-3 belongs to
reduction "sum" of dampening_loss. The sections follow the paper's order, with two exceptions: the
quantized networks of section 4 come early, since the other sections use them, and Table 3 comes
last, since it needs the tracker. toy_oscillation.py shows section 2.2.
"""

import copy
import math
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# --- Section 2.1: the quantizer, and the gradients that pass through it ---------------------------

MIN_SCALE = torch.finfo(torch.float32).eps  # lower bound of a scale, far below useful values
MAX_VALUE = 1e15  # a scale is set from values up to this: their squares sum up in float32


def quantize_to_int(x: Tensor, scale: Tensor, int_min: int, int_max: int,
                    frozen: tuple = ()) -> Tensor:
    """Returns the integers clip(round(x / s), n, p) of Eq. 1, in x's shape; half rounds to even.

    Arguments as for fake_quantize, but scale is in float32 or wider. Forward pass, tracker and
    export all round with this function. An oscillating weight lies near a rounding threshold: there
    x * (1/s), which torch's fused kernels compute, can round to the other integer than x / s.
    """
    x = at_least_float32(x)
    if frozen:  # by Algorithm 1: a stored quotient replaces w / s
        mask, numerator, denominator = frozen
        x, scale = torch.where(mask, numerator, x), torch.where(mask, denominator, scale)
    u = x / scale
    if x.is_cuda and torch.compiler.is_compiling():  # its float32 division errs in the last bit
        u = (x.double() / scale.double()).to(x.dtype)
    return u.round_().clamp_(int_min, int_max)


def at_least_float32(x: Tensor) -> Tensor:
    """Returns x, converted to float32 if it is in half precision, whose errors change roundings."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# Gradient estimators, Appendix A.1 (DSQ: Gong et al.). Each maps g = dL/dw_hat and u = w/s to dL/dw
# inside the grid. Each multiplies g by a positive factor: none of them stops oscillation (A.3).
# Deviation: EWGS and PSG measure w - q(w) in steps s. In the unit of w, as in A.1, their effect
# would vanish with the scale, which is about 0.05 in a trained layer.
# Paper silent on the three constants. EWGS's delta is the released code's. DSQ's k and PSG's eps
# are ours: the released k = 0.5 makes DSQ hardly different from STE, and no PSG was released.
EWGS_DELTA, PSG_EPS, DSQ_K = 0.2, 0.01, 5.0

ESTIMATORS = {
    # Straight-through estimator, Eq. 2: g. Bengio et al. 2013
    "ste": lambda g, u: g,
    # Element-wise gradient scaling: g (1 + delta sign(g) (u - round(u))). Lee et al. 2021
    "ewgs": lambda g, u: g * (1 + EWGS_DELTA * g.sign() * (u - u.round())),
    # Differentiable soft quantization, the slope of a tanh in each bin. Gong et al. 2019
    # g k/2 sech^2(k (u - floor(u) - 1/2)) / tanh(k/2)
    "dsq": lambda g, u: (g * DSQ_K / 2 / math.tanh(DSQ_K / 2)
                         / torch.cosh(DSQ_K * (u - u.floor() - 0.5)).square()),
    # Position-based scaled gradient: g (|u - round(u)| + eps). Kim et al. 2020
    "psg": lambda g, u: g * ((u - u.round()).abs() + PSG_EPS),
}


def check_estimator(name: str) -> None:
    """Raises ValueError if ESTIMATORS has no entry of this name."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator {name!r} is unknown; choose from {', '.join(ESTIMATORS)}")


class FakeQuantize(torch.autograd.Function):
    """Forward: Eq. 1. Backward: Eq. 2 for x, LSQ (Esser et al. 2020) for the scale."""

    @staticmethod
    def forward(ctx, x, scale, int_min, int_max, estimator, *frozen):
        # w_hat = s clip(round(w / s), n, p)                                                 Eq. 1
        x_hat = quantize_to_int(x, scale, int_min, int_max, frozen).mul_(scale).to(x.dtype)
        if torch.compiler.is_compiling():  # in torch 2.11 the in-place results alias the output
            x_hat = x_hat.clone()  # and receive its gradient; a copy breaks the alias
        ctx.save_for_backward(x, x_hat, scale, *frozen)
        ctx.grid = int_min, int_max, estimator
        return x_hat

    @staticmethod
    @once_differentiable  # these gradients have no gradient themselves
    def backward(ctx, g):
        x, x_hat, scale, *frozen = ctx.saved_tensors
        int_min, int_max, estimator = ctx.grid
        if x.dtype != scale.dtype:  # half precision rounds x_hat by as much as x_hat - x
            x, g = at_least_float32(x), at_least_float32(g)
            x_hat = quantize_to_int(x, scale, int_min, int_max, frozen).mul_(scale)
        # 1[n <= w/s <= p] is 1.0 where clip(w, s n, s p) = w
        # Deviation: Eq. 2's mask for both gradients. The released code clips after rounding: under
        # its torch 1.9 the mask is half a bin wider on each side (newer versions of clamp pass no
        # gradient at the bounds). At w/s = 3.3, p = 3 its dw_hat/ds is -0.3; ours is 3.
        clipped = x.clamp(scale * int_min, scale * int_max)
        inside = torch.eq(clipped, x, out=torch.empty_like(x))
        if frozen:  # a frozen weight is a constant; the gradient to the scale is its integer
            inside.masked_fill_(frozen[0], 0)
        # Below, results overwrite tensors that are not read again: a new one costs a CPU more time.
        # dw_hat/ds = round(w/s) - w/s inside the grid, n or p where clipped                   LSQ
        # This equals (w_hat - w) / s inside, w_hat / s where clipped: no second rounding.
        # Deviation: no factor 1/sqrt(numel * p), which LSQ applies (released: none either).
        error = torch.addcmul(x_hat, inside, clipped, value=-1, out=clipped)
        g_scale = error.mul_(g).sum_to_size(scale.shape) / scale
        # dL/dw = dL/dw_hat 1[n <= w/s <= p]                                                 Eq. 2
        g_x = inside.mul_(g)
        if estimator != "ste":
            g_x = ESTIMATORS[estimator](g_x, x / scale)
        return g_x, g_scale, *[None] * (3 + len(frozen))


def fake_quantize(x: Tensor, scale: Tensor, int_min: int, int_max: int,
                  estimator: str = "ste", frozen: tuple = ()) -> Tensor:
    """Quantizes and dequantizes (Eq. 1), with a gradient to x (Eq. 2) and to the scale (LSQ).

    Args:
        x: real tensor of one or more dimensions; half precision is quantized in float32.
        scale: step size s > 0; one element, or broadcastable to x (one per output channel).
        int_min, int_max: integer limits n < p of the grid.
        estimator: name in ESTIMATORS (else ValueError); it changes the gradient to x only.
        frozen: QuantLayer.frozen_state, or () if no element can be frozen.
    Returns:
        Tensor of x's shape and dtype with values on the grid s * {n, ..., p}.
    """
    check_estimator(estimator)
    return FakeQuantize.apply(x, at_least_float32(scale), int_min, int_max, estimator, *frozen)


class Quantizer(nn.Module):
    """Uniform symmetric quantizer with a learned scale (Eq. 1).

    Args:
        bits: 2 to 8 (else ValueError).
        signed: grid -2^(b-1) .. 2^(b-1)-1; unsigned: 0 .. 2^b-1.
        per_channel: number of output channels (dimension 0 of x) with a scale each; 0 = one scale.
        estimator: name in ESTIMATORS (else ValueError).
    """

    def __init__(self, bits: int, signed: bool = True, per_channel: int = 0,
                 estimator: str = "ste"):
        super().__init__()
        if bits not in range(2, 9):
            raise ValueError(f"bits must be 2 to 8, not {bits}")
        check_estimator(estimator)
        self.bits, self.signed = bits, signed
        self.per_channel, self.estimator = per_channel, estimator
        self.scale = nn.Parameter(torch.ones(max(per_channel, 1)))

    @property
    def int_min(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def int_max(self) -> int:
        return self.int_min + 2**self.bits - 1

    def repair(self) -> None:
        """Makes the scale positive, in place, after an optimizer step.

        Deviation: a negative scale is reflected, and MIN_SCALE is the lower bound. The released
        code clamps at 1e-8 in the graph, which passes no gradient below the bound: a scale that
        crosses 0 stays there. NaN and infinity stay and make the loss NaN: replaced, they would
        hide a dead layer. `.data`: autograd must not see a change between forward and backward.
        """
        self.scale.data.abs_().clamp_(min=MIN_SCALE)

    def usable_scale(self, dim: int) -> Tensor:
        """Returns the repaired scale, in float32 or wider, broadcastable over `dim` dimensions."""
        if not torch.compiler.is_compiling():  # it cannot trace this: the training loop repairs
            self.repair()
        scale = at_least_float32(self.scale)
        return scale.view(-1, *[1] * (dim - 1)) if self.per_channel else scale

    @torch.no_grad()
    def to_int(self, x: Tensor, frozen: tuple = ()) -> Tensor:
        """Returns the integers of x (Eq. 1), in x's shape, in float32 or wider, no gradient."""
        return quantize_to_int(x, self.usable_scale(x.dim()), self.int_min, self.int_max, frozen)

    def forward(self, x: Tensor, frozen: tuple = ()) -> Tensor:
        """Returns x on the grid (Eq. 1), in x's shape and dtype, with gradients to x and scale."""
        scale = self.usable_scale(x.dim())
        return fake_quantize(x, scale, self.int_min, self.int_max, self.estimator, frozen)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets the scale that minimizes ||x - x_hat||^2 (section 4: scales are MSE-initialized).

        x is a real tensor of any shape; per channel, (per_channel, ...). If all values are 0, the
        scale is 1. Raises ValueError if x is empty or has values that are NaN or above MAX_VALUE.
        The search rounds x with each of 128 or more scales up to 2 max|x| / p and refits the scale
        to the integers by least squares. The error has many local minima. For 17,000 random tensors
        of 4 to 1,000 values (normal, Laplace, 80 % zeros) the result was within 4 % of the least
        error; on unsigned grids 1 % of the tensors exceeded it by more than 5 %, by 40 % at most.
        """
        if not (x.numel() and (x.abs() <= MAX_VALUE).all()):
            raise ValueError("cannot set a scale from values that are missing, NaN, infinite "
                             f"or above {MAX_VALUE:g}")
        x = at_least_float32(x)
        rows = x.flatten(1) if self.per_channel else x.reshape(1, -1)
        largest = rows.abs().amax(1, keepdim=True) / self.int_max
        best, best_error = torch.full_like(largest, MIN_SCALE), torch.full_like(largest, math.inf)
        tries = max(96, 2 * 2**self.bits)  # the error has more minima on a finer grid
        for k in range(1, tries * 4 // 3 + 1):
            scale = (1.5 * k / tries * largest).clamp_(min=MIN_SCALE)
            x_int = quantize_to_int(rows, scale, self.int_min, self.int_max)
            # Least squares: s = <x, x_int> / <x_int, x_int>; all 0: NaN, which is never the best.
            scale = (rows * x_int).sum(1, keepdim=True) / x_int.square().sum(1, keepdim=True)
            x_hat = quantize_to_int(rows, scale, self.int_min, self.int_max).mul_(scale)
            error = x_hat.sub_(rows).square_().sum(1, keepdim=True)
            best = torch.where(error < best_error, scale, best)
            best_error = torch.fmin(error, best_error)  # the smaller; if one is NaN, the other
        self.scale.copy_(torch.where(largest > 0, best, 1.0).flatten())

    def get_extra_state(self) -> Tensor:
        """Returns the sign of the grid: calibration sets it, so state dicts must contain it."""
        return torch.tensor(self.signed)

    def set_extra_state(self, state: Tensor) -> None:
        self.signed = bool(state)


# --- Section 4 (5 on arXiv), set-up: quantized layers and networks --------------------------------

class QuantLayer:
    """Base of the quantized layers: two quantizers, and the weights that Algorithm 1 froze.

    frozen and frozen_int (real, W) are buffers of the layer and not of the tracker: evaluation,
    export and a reloaded checkpoint need the frozen integers without a tracker. They are (1, w_int)
    for a frozen weight, else (0, 0). If a program averages networks with their buffers (EMA, SWA),
    they become (share, share * w_int), whose quotient is still the integer.
    """

    def __init__(self, layer: nn.Module, weight_quantizer: Quantizer,
                 input_quantizer: Quantizer | None = None):
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"padding_mode {layer.padding_mode!r} is not supported, only 'zeros'")
        nn.Module.__init__(self)  # the __init__ of Conv2d or Linear would create a second weight
        # Copy the float layer's sizes and mode; keep its parameters, the same objects.
        vars(self).update({name: it for name, it in vars(layer).items() if name[0] != "_"})
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer
        self.register_buffer("frozen", torch.zeros_like(layer.weight, requires_grad=False))
        self.register_buffer("frozen_int", torch.zeros_like(self.frozen))
        self.to(layer.weight.device)  # the quantizers
        weight_quantizer.initialize(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.input_hat(x), self.weight_hat())

    def frozen_state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the mask of frozen weights (W, bool), numerator and denominator of w_int."""
        return self.frozen > 0, self.frozen_int, self.frozen

    def weight_int(self) -> Tensor:
        """Returns w_int, W: the stored integer of a frozen weight, else that of the latent one."""
        return self.weight_quantizer.to_int(self.weight, self.frozen_state())

    def weight_in_steps(self) -> Tensor:
        """Returns the latent weight in steps of the grid, w / s: W."""
        scale = self.weight_quantizer.usable_scale(self.weight.dim())
        return at_least_float32(self.weight) / scale

    def weight_hat(self) -> Tensor:
        """Returns w_hat, W. A frozen weight is s * w_int, with gradient 0 to w and w_int to s.

        Its integer is stored and not rounded from w / s: a change of s does not change it.
        """
        return self.weight_quantizer(self.weight, self.frozen_state())

    @torch.no_grad()
    def move_to_centers(self, mask: Tensor, w_int: Tensor) -> None:
        """Moves the latent weights under the mask (W, bool) to the bin centres s * w_int."""
        scale = self.weight_quantizer.usable_scale(mask.dim())
        self.weight.copy_(torch.where(mask, scale * w_int, self.weight))

    def input_hat(self, x: Tensor) -> Tensor:
        """Returns the layer's input on its grid; in float if input_quantizer is None."""
        return x if self.input_quantizer is None else self.input_quantizer(x)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A Conv2d whose weight and, unless input_quantizer is None, input are quantized."""

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantLinear(QuantLayer, nn.Linear):
    """A Linear whose weight and, unless input_quantizer is None, input are quantized."""

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


def quant_layers(model: nn.Module, max_bits: int = 8) -> dict[str, QuantLayer]:
    """Returns the quantized layers with at most `max_bits` weight bits, by name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, QuantLayer) and module.weight_quantizer.bits <= max_bits}


# Layers that multiply their input by weights. (An embedding only selects rows: it stays in float.)
WEIGHTED = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d,
            nn.ConvTranspose2d, nn.ConvTranspose3d, nn.RNNBase, nn.RNNCellBase,
            nn.MultiheadAttention)
SWAPS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}  # further kinds need a `multiply`


def quantize_model(model: nn.Module, weight_bits: int, act_bits: int | None = None,
                   first_last_bits: int = 8, per_channel: bool = False,
                   estimator: str = "ste") -> nn.Module:
    """Replaces every Conv2d and Linear of a classifier by its quantized layer; returns the model.

    All layers' inputs are quantized, those of squeeze-excite layers included. Deviation: not the
    first layer's, the image, which has 8 bits already (released: the same). Weights keep their
    values; their scales are MSE-initialized. Input scales are 1 until `calibrate` sets them.

    Args:
        model: a network; named_modules() must list first the layer that runs first, and last the
            layer that runs last. If its code reads a layer's weight without calling the layer (as
            swin_t's attention does), that weight stays in float, and `calibrate` raises ValueError.
        weight_bits, act_bits: 2 to 8; with act_bits None the inputs stay in float.
        first_last_bits: 2 to 8, for the weights of the first and the last layer and the last
            layer's input (Deviation: the paper states the weights only; released: the same).
        per_channel: one weight scale per output channel (inputs always have one scale).
        estimator: name in ESTIMATORS, for the weights. Paper silent on inputs: they have the
            straight-through estimator. With another one, the factors of all layers would multiply.
    Raises:
        ValueError: if there is no layer to replace, an argument is out of range, or a layer cannot
            be quantized; then the model is unchanged.
    """
    names: dict[nn.Module, list[str]] = {}  # a shared layer has several
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WEIGHTED):
            names.setdefault(module, []).append(name)
    if not names or model in names:
        raise ValueError("the model contains no Conv2d or Linear layer to quantize")
    check_quantizable(model, names)
    (first, *_), (*_, last) = names, names
    swapped = {}
    for layer in names:
        bits = first_last_bits if layer in (first, last) else weight_bits
        weight_quantizer = Quantizer(bits, True, len(layer.weight) if per_channel else 0, estimator)
        input_quantizer = None
        if act_bits is not None and layer is not first:
            bits = first_last_bits if layer is last else act_bits
            input_quantizer = Quantizer(bits)
        swapped[layer] = SWAPS[type(layer)](layer, weight_quantizer, input_quantizer)
    for layer, quantized in swapped.items():
        for name in names[layer]:
            model.set_submodule(name, quantized)
    return model


def check_quantizable(model: nn.Module, names: dict[nn.Module, list[str]]) -> None:
    """Raises ValueError, with names, if some of these layers of the model cannot be quantized."""
    own, unfit = [p for m in model.modules() for p in m.parameters(recurse=False)], []
    for layer, (name, *_) in names.items():
        weight = dict(layer.named_parameters(recurse=False)).get("weight")  # None: computed
        shared = weight is not None and sum(p is weight for p in own) > 1
        padding = getattr(layer, "padding_mode", "zeros")
        # The quantized layer would lose hooks, and a `forward` that was assigned to this object.
        known = type(layer) in SWAPS
        hooks = known and any(it for key, it in vars(layer).items() if key.endswith("_hooks"))
        changed = hooks or "forward" in vars(layer)
        if not known or weight is None or shared or padding != "zeros" or changed:
            note = ", shared weight" * shared + ", hooks" * hooks
            unfit.append(f"{name} ({type(layer).__name__}{note})")
    if unfit:
        raise ValueError(f"cannot quantize {', '.join(unfit[:4])}: a layer must be a plain Conv2d "
                         "or Linear with zero padding and a weight that is neither shared nor "
                         "computed; register hooks after quantize_model")


def images_of(batches: Iterable, model: nn.Module) -> Iterable[Tensor]:
    """Yields the images of batches (images, or tuples that begin with them) on model's device."""
    device = next(model.parameters()).device
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        yield images.to(device, non_blocking=True)


@contextmanager
def evaluation_mode(model: nn.Module):
    """Sets the model to evaluation mode and, at the end, each module back to its own mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable, samples: int = 2**15) -> None:
    """Sets scale and sign of every input quantizer from real batches, and nothing else.

    Runs in evaluation mode. Deviation: with float layer inputs. In the released code's calibration,
    on one batch, the layers upstream are quantized already. A grid is signed if any batch has a
    negative input: on an unsigned grid a linear bottleneck would lose half its values; on a signed
    grid the output of a ReLU would lose one bit.

    Args:
        model: from quantize_model.
        batches: images (N, 3, H, W), or tuples that begin with them.
        samples: number of values of each layer input that a batch adds to the MSE search.
    Raises:
        ValueError: if no batch reaches a layer, or an input is NaN, infinite or above MAX_VALUE.
    """
    layers = quant_layers(model)
    names = {layer.input_quantizer: name for name, layer in layers.items() if layer.input_quantizer}
    values: dict[Quantizer, list[Tensor]] = {quantizer: [] for quantizer in names}
    lowest, reached = dict.fromkeys(names, math.inf), set()

    def record(quantizer, args, x_hat):
        x = args[0].float().flatten()
        if not (x.abs() <= MAX_VALUE).all():
            raise ValueError(f"the input of {names[quantizer]} is NaN, infinite or too large")
        lowest[quantizer] = min(lowest[quantizer], x.min().item())
        # Spread the indices evenly; a fixed stride could read a few columns of the images only.
        spread = min(samples, x.numel())
        index = torch.arange(spread, device=x.device) * (x.numel() - 1) // max(spread - 1, 1)
        values[quantizer].append(x[index])
        return args[0]  # replaces x_hat: the layer reads its input in float

    with ExitStack() as hooks, evaluation_mode(model):
        for quantizer in names:
            hooks.enter_context(quantizer.register_forward_hook(record))
        for layer in layers.values():
            hooks.enter_context(layer.register_forward_pre_hook(lambda it, _: reached.add(it)))
        for images in images_of(batches, model):
            model(images)
    if missed := [name for name, layer in layers.items() if layer not in reached]:
        raise ValueError("calibration needs at least one batch that reaches every layer in "
                         f"evaluation mode; none reached {', '.join(missed[:3])}. Build networks "
                         "without layers that only training uses (auxiliary heads: "
                         "aux_logits=False)")
    for quantizer, samples_seen in values.items():
        quantizer.signed = lowest[quantizer] < 0
        quantizer.initialize(torch.cat(samples_seen))


# --- Section 2.3.1 and Table 1: batch norm under oscillation --------------------------------------

def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the BN layers that keep running statistics, by name."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return {name: module for name, module in model.named_modules()
            if isinstance(module, kinds) and module.track_running_stats}


@contextmanager
def batch_statistics(model: nn.Module, momentum: float | None):
    """Evaluation mode, but BN normalizes by the batch and updates with `momentum` (None = mean).

    At the end, also after an exception, BN's statistics and momenta are restored.
    """
    bns = batch_norms(model).values()
    before = [(bn, bn.momentum, copy.deepcopy(bn.state_dict())) for bn in bns]
    try:
        with evaluation_mode(model):
            for bn in bns:
                bn.train()
                bn.momentum = momentum
            yield bns
    finally:
        for bn, own_momentum, state in before:
            bn.momentum = own_momentum
            bn.load_state_dict(state)


@torch.no_grad()
def reestimate_bn(model: nn.Module, batches: Iterable) -> None:
    """Replaces BN's running statistics by the plain mean of the statistics of the given batches.

    Section 2.3.1: the remedy for running statistics that are stale. Variances are unbiased, as in
    BN itself. Nothing else changes; if a batch raises an exception, BN is restored too. A network
    without running statistics (VGG, SqueezeNet) is left unchanged.

    Args:
        model: any network; a BN layer that no batch reaches keeps its statistics.
        batches: training images (N, 3, H, W), or tuples that begin with them. Paper silent on
            their number: the released code uses 50 batches of 128. Without any: ValueError.
    """
    done = 0
    with batch_statistics(model, None) as bns:
        for bn in bns:
            bn.reset_running_stats()
        for done, images in enumerate(images_of(batches, model), 1):
            model(images)
        means = {bn: (bn.running_mean.clone(), bn.running_var.clone())
                 for bn in bns if bn.num_batches_tracked}
    if not done:
        raise ValueError("BN re-estimation needs at least one batch")
    for bn, (mean, variance) in means.items():
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(variance)


@torch.no_grad()
def bn_kl_divergence(model: nn.Module, batches: Iterable) -> dict[str, Tensor]:
    """Table 1: KL divergence of BN's running statistics q from the population's p, per channel.

    Paper silent on p: here p is mean and variance of all inputs of the layer over all batches,
    while every BN normalizes by the batch. So each layer is measured independently: stale
    statistics of earlier layers do not affect it. The model is unchanged.

    Args:
        model, batches: as for reestimate_bn. If no batch reaches a BN layer: ValueError.
    Returns:
        BN layer name -> D(p, q) >= 0, in nats, of shape (channels,), float32 on the CPU.
    """
    bns = batch_norms(model)
    sums = {bn: torch.zeros(3, bn.num_features, dtype=torch.float64) for bn in bns.values()}

    def record(bn, args):
        x = args[0].cpu().double().transpose(0, 1).flatten(1)  # (channels, rest); MPS: no float64
        count = torch.full_like(x[:, 0], x.shape[1])
        sums[bn] += torch.stack([count, x.sum(1), x.square().sum(1)])

    with ExitStack() as hooks, batch_statistics(model, 0.0):
        for bn in sums:
            hooks.enter_context(bn.register_forward_pre_hook(record))
        for images in images_of(batches, model):
            model(images)
    if any(not total[0].all() for total in sums.values()):
        raise ValueError("the KL divergence needs at least one batch")
    divergence = {}
    for name, bn in bns.items():
        count, total, squares = sums[bn]
        mean_p, mean_q = total / count, bn.running_mean.cpu().double()
        # Deviation: both variances include bn.eps, as in BN: a dead channel's variance is 0.
        var_p = squares / count - mean_p.square() + bn.eps
        var_q = bn.running_var.cpu().double() + bn.eps
        # D(p, q) = log(sigma_q/sigma_p) + (sigma_p^2 + (mu_p - mu_q)^2) / (2 sigma_q^2) - 1/2
        quotient = (var_p + (mean_p - mean_q).square()) / (2 * var_q)
        divergence[name] = ((var_q / var_p).log() / 2 + quotient - 0.5).float()
    return divergence


# --- Section 3 (4 on arXiv), Eq. 4 and Algorithm 1: count oscillations, freeze weights ------------

class OscillationTracker:
    """Oscillation frequency of every low-bit weight (Eq. 4), and iterative freezing (Algorithm 1).

    Call `step` once after each optimizer step, and at no other time. The weights of all layers are
    one flat vector here.
    Deviation: the released code tracks in every forward pass. During evaluation no weight changes
    and f decays, so its f is lower than ours: the f_th that it publishes freeze more weights here.

    Args:
        model: from quantize_model, already on its device.
        momentum: m of both averages, above 0 and at most 1 (else ValueError). Paper silent: the
            released code uses 0.001, for 10^5 and more steps; 10^3 steps need a larger m. A
            reversal adds m (1 - f) to f: a single one can exceed a threshold below m.
        max_bits: layers with more weight bits are not tracked. Paper silent: as released.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.001, max_bits: int = 4):
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, not {momentum}")
        self.layers, self.momentum = quant_layers(model, max_bits), momentum
        self.w_int = self._gather(layer.weight_int() for layer in self.layers.values())
        self.ema_int = self.w_int.clone()
        self.last_change = torch.zeros_like(self.w_int)  # the integer's previous change; 0 = none
        self.f = torch.zeros_like(self.w_int)
        self.any_frozen: bool | None = None  # None: unknown, as after loading a checkpoint

    @torch.no_grad()
    def step(self, freeze_threshold: float | None = None) -> None:
        """Algorithm 1 after its optimizer step. freeze_threshold is f_th, 0..1; None = no freezing.

        A frozen weight stays frozen at any f_th: its latent weight moves back to its bin centre.
        """
        m = self.momentum
        w_int = self._gather(layer.weight_int() for layer in self.layers.values())
        # o_t = 1 where w_int changed, in the direction opposite to its previous change     Eq. 4
        # Deviation: the first change is not counted (Eq. 4's text and released code: the same).
        # Algorithm 1 as printed starts from 0 and would count it.
        change = w_int - self.w_int
        oscillates = (change * self.last_change).lt_(0)
        # f_t = m o_t + (1 - m) f_{t-1}
        self.f.lerp_(oscillates, m)
        torch.where(change != 0, change, self.last_change, out=self.last_change)
        if freeze_threshold is not None:
            self.any_frozen = True
        elif self.any_frozen is None:  # computed once: the result must wait for a GPU's work
            self.any_frozen = self.frozen_share() > 0
        if self.any_frozen and self.layers:
            above = self.f > (math.inf if freeze_threshold is None else freeze_threshold)
            w_int = self._freeze(above, w_int)
        # EMA_t(w_int) = m w_int + (1 - m) EMA_{t-1}(w_int)
        # Deviation: it starts in the first iteration (released: when freezing starts).
        # Deviation: it averages the integers. Algorithm 1 prints w^{t-1}, but a mean of latent
        # weights does not round to an integer of the grid.
        self.ema_int.lerp_(w_int, m)
        self.w_int.copy_(w_int)

    def _freeze(self, above: Tensor, w_int: Tensor) -> Tensor:
        """Freezes weights above the threshold at round(EMA_{t-1}(w_int)); returns all integers.

        The mean of an oscillating integer is the optimum in steps (section 2.2); rounded, it is the
        nearer of the two states, while the current integer is either by chance. If a weight has
        moved far, its mean lags and can round to an integer that the weight has left.
        """
        frozen = self._gather(layer.frozen for layer in self.layers.values()) > 0
        w_int = torch.where(above & ~frozen, self.ema_int.round(), w_int)
        frozen |= above
        masks, integers = self._split(frozen), self._split(w_int * frozen)
        for layer, mask, frozen_int in zip(self.layers.values(), masks, integers):
            layer.frozen.copy_(mask)
            layer.frozen_int.copy_(frozen_int)
            # Momentum and weight decay still move the latent weight. Back at its bin centre, it
            # rounds to the same integer in programs that read the weights without the mask.
            layer.move_to_centers(mask, frozen_int)
        return w_int

    def _gather(self, tensors: Iterable[Tensor]) -> Tensor:
        parts = [tensor.flatten() for tensor in tensors]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _split(self, flat: Tensor) -> list[Tensor]:
        weights = [layer.weight for layer in self.layers.values()]
        parts = flat.split([weight.numel() for weight in weights])
        return [part.view(weight.shape) for part, weight in zip(parts, weights)]

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.layers, self._split(flat.clone())))

    def frequency(self) -> dict[str, Tensor]:
        """Returns f_t of Eq. 4 by layer: W, reversals per iteration (a cycle of A.2 has two)."""
        return self._by_name(self.f)

    def integers(self) -> dict[str, Tensor]:
        """Returns w_int of the last step by layer: W, integers."""
        return self._by_name(self.w_int)

    def mean_integers(self) -> dict[str, Tensor]:
        """Returns EMA(w_int) by layer: W; its fraction is the share of time in the upper state."""
        return self._by_name(self.ema_int)

    def frozen(self) -> dict[str, Tensor]:
        """Returns masks of the frozen weights by layer: W, bool."""
        return {name: layer.frozen > 0 for name, layer in self.layers.items()}

    def oscillating_masks(self, threshold: float | None = None) -> dict[str, Tensor]:
        """Returns masks of the weights with f_t > threshold that are not frozen: by layer, W, bool.

        None is 5 m: 0.005, the paper's value, at m = 0.001. After k reversals in a row f is
        1 - (1 - m)^k, so that six exceed 5 m. With a reversal every n steps for long, f peaks after
        each of them at m / (1 - (1 - m)^n), above 5 m up to n = 223 if m = 0.001. Since f is at
        most 1, no f exceeds 5 m from m = 0.2 on.
        """
        threshold = 5 * self.momentum if threshold is None else threshold
        frozen = self.frozen()
        return {name: (f > threshold) & ~frozen[name] for name, f in self.frequency().items()}

    def oscillating(self, threshold: float | None = None) -> float:
        """Returns the share of the tracked weights that oscillate, 0..1 (Osc. in Tables 4 and 5).

        Paper silent on frozen weights: they do not oscillate, but count in the denominator.
        """
        return self._share(self.oscillating_masks(threshold))

    def frozen_share(self) -> float:
        """Returns the share of the tracked weights that are frozen, 0..1."""
        return self._share(self.frozen())

    def _share(self, masks: dict[str, Tensor]) -> float:
        return sum(mask.sum().item() for mask in masks.values()) / max(self.f.numel(), 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies of m and, by layer, of the tensors that the model's state dict lacks."""
        state = {"momentum": torch.tensor(self.momentum)}
        for part in ("w_int", "ema_int", "last_change", "f"):
            tensors = self._by_name(getattr(self, part))
            state |= {f"{name}.{part}": tensor for name, tensor in tensors.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads state_dict(). Other layers or momentum: ValueError, and nothing is loaded."""
        saved, own = ({name: tuple(value.shape) or f"{value:.6g}" for name, value in each.items()}
                      for each in (state, self.state_dict()))
        wrong = [f"{name} is {saved.get(name)}, not {own.get(name)}" for name in own | saved
                 if saved.get(name) != own.get(name)]
        if wrong:
            raise ValueError("tracker state has other layers or another momentum: "
                             + "; ".join(wrong[:3]))
        for part in ("w_int", "ema_int", "last_change", "f"):
            getattr(self, part).copy_(self._gather(state[f"{name}.{part}"] for name in self.layers))
        self.any_frozen = None


# --- Section 3 (4 on arXiv), Eq. 5: dampening, and the schedules of both cures --------------------

def dampening_loss(model: nn.Module, reduction: str = "sum", max_bits: int = 4) -> Tensor:
    """Eq. 5 over the layers with at most `max_bits` weight bits: a scalar with gradient to w.

    Args:
        model: from quantize_model.
        reduction: "sum", the squared Frobenius norm of Eq. 5, or the released code's "kernel_mean",
            which divides each layer's sum by its number of weights per output channel. Table 4's
            lambda, 1e-3, belongs to "sum", the released 0.1 to "kernel_mean". Else ValueError.
        max_bits: Deviation: layers with more weight bits have no part in the loss; the released
            code dampens all layers, the 8-bit ones too. On a fine grid the pull is weak.
    """
    if reduction not in ("sum", "kernel_mean"):
        raise ValueError(f"reduction must be 'sum' or 'kernel_mean', not {reduction!r}")
    loss = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)
    for layer in quant_layers(model, max_bits).values():
        w, q = at_least_float32(layer.weight), layer.weight_quantizer
        # L_dampen = || w_hat - clip(w, s n, s p) ||_F^2, no gradient through w_hat            Eq. 5
        # Straight-through gradients through w_hat would cancel those through w: no pull.
        with torch.no_grad():
            s = q.usable_scale(w.dim())
            # Outside the grid w_hat and clip(w) both equal the limit: loss and gradient are 0.
            # Deviation: frozen weights have no part in the loss; they could not follow the pull.
            inside = (w.clamp(s * q.int_min, s * q.int_max) == w) & (layer.frozen == 0)
            w_hat = torch.where(inside, quantize_to_int(w, s, q.int_min, q.int_max).mul_(s), w)
        norm = F.mse_loss(w, w_hat, reduction="sum")
        loss = loss + norm / (w[0].numel() if reduction == "kernel_mean" else 1)
    return loss


def cosine_anneal(start: float, end: float, progress: float, warmup: float = 0.25) -> float:
    """Returns cos(start, end) of Tables 4 and 5, for lambda and f_th: half a cosine.

    Args:
        start, end: values up to progress `warmup`, and at progress 1.
        progress: share of training done, 0..1.
        warmup: share of training before the cosine begins, below 1. Paper silent: in the released
            code freezing is off for the first quarter (here the caller keeps it off). That lambda
            keeps its start value for as long is our choice.
    """
    t = min(max((progress - warmup) / (1 - warmup), 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


# --- Section 2.3.2 and Table 3: what the oscillating weights cost ---------------------------------

@torch.no_grad()
def sample_oscillating_weights(model: nn.Module, tracker: OscillationTracker,
                               generator: torch.Generator | None = None,
                               threshold: float | None = None) -> int:
    """Rounds the oscillating weights at random, in place: the stochastic rounding of Table 3.

    An oscillating weight is set to the upper of its two integers with probability p(w_up), its
    share of time there. The tracker is unchanged: one can sample again. Returns their number.

    Args:
        model: the tracker's model, or a copy of it.
        tracker, threshold: oscillating_masks(threshold) selects the weights.
        generator: generator of the random numbers, on the CPU.
    """
    ema = tracker.mean_integers()
    masks = tracker.oscillating_masks(threshold)
    for name, mask in masks.items():
        lower = ema[name].floor()  # p(w_up) = EMA(w_int) - floor(EMA(w_int))
        upper = torch.rand(mask.shape, generator=generator).to(mask.device) < ema[name] - lower
        model.get_submodule(name).move_to_centers(mask, lower + upper)
    return sum(mask.sum().item() for mask in masks.values())


def optimize_oscillating_weights(model: nn.Module, tracker: OscillationTracker, batches: Iterable,
                                 steps: int = 10_000, lr: float = 0.01, regularizer: float = 1.0,
                                 threshold: float | None = None) -> int:
    """Chooses the states of all oscillating weights together, in place: AdaRound in Table 3.

    Each choice between two integers is relaxed to h in 0..1 (Nagel et al. 2020). Adam minimizes the
    task loss plus a regularizer that drives h to 0 or 1; all else is constant. Meanwhile BN
    normalizes by the batch: re-estimate its statistics afterwards. Returns the number of choices.

    Args:
        model, tracker, threshold: as for sample_oscillating_weights.
        batches: images (N, 3, H, W) and labels (N,), int64. Paper silent on N: a comment in its
            source says 64. With fewer batches than steps: ValueError, and no weight changes.
        steps: number of iterations; the same comment says 10,000.
        lr: Adam's learning rate for the logits of h. Paper silent: ours.
        regularizer: weight of the regularizer's mean over the choices; the first fifth of the steps
            is without it. Paper silent: ours.
    """
    masks = {name: m for name, m in tracker.oscillating_masks(threshold).items() if m.any()}
    if not masks:
        return 0
    # h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1), first h = p(w_up)                    AdaRound, Eq. 23
    ema = tracker.mean_integers()
    lower = {name: ema[name].floor() for name in masks}
    v = {key: torch.logit((ema[key] - lower[key] + 0.1) / 1.2).requires_grad_() for key in masks}
    optimizer = torch.optim.Adam(v.values(), lr)
    device, step, h = next(model.parameters()).device, -1, {}

    def relax(name, quantizer, args, w_hat):
        soft = quantizer.usable_scale(w_hat.dim()) * (lower[name] + h[name])
        return torch.where(masks[name], soft, w_hat)

    with ExitStack() as hooks, batch_statistics(model, 0.0):
        for name in masks:
            quantizer = model.get_submodule(name).weight_quantizer
            hooks.enter_context(quantizer.register_forward_hook(partial(relax, name)))
        for step, (images, labels) in enumerate(islice(batches, steps)):
            h.update({name: (1.2 * v[name].sigmoid() - 0.1).clamp(0, 1) for name in masks})
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            # mean of 1 - |2 h - 1|^beta, beta from 20 to 2                         AdaRound, Eq. 24
            beta = cosine_anneal(20.0, 2.0, step / steps, warmup=0.2)
            if step >= steps / 5:
                choices = torch.cat([h[name][mask] for name, mask in masks.items()])
                loss = loss + regularizer * (1 - (2 * choices - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward(inputs=list(v.values()))
            optimizer.step()
    if step < steps - 1:
        raise ValueError(f"{steps} steps need as many batches; there were only {step + 1}")
    for name, mask in masks.items():
        model.get_submodule(name).move_to_centers(mask, lower[name] + (v[name] > 0))
    return sum(mask.sum().item() for mask in masks.values())
