"""Claims of the paper, each held against something independent: float64 loops, torch's own ops.

Every test names the equation, algorithm or table that it checks. `pytest -q` runs them.
"""

import copy
import io
import math

import pytest
import torch
import torchvision
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import osc_qat
from osc_qat import (ESTIMATORS, OscillationTracker, QuantConv2d, Quantizer, QuantLinear,
                     bn_kl_divergence, calibrate, cosine_anneal, dampening_loss, fake_quantize,
                     quant_layers, quantize_model, reestimate_bn)

GRIDS = pytest.mark.parametrize("bits, signed", [(b, sign) for b in range(2, 9) for sign in (1, 0)])
PER_CHANNEL = pytest.mark.parametrize("per_channel", [False, True])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_net(bits=3, act_bits=None, **options):
    """Four layers with BN; "3" (4 to 8 channels) and "6" (depthwise) have low-bit weights."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return quantize_model(net, bits, act_bits, **options)


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
    inside, gap, k = n <= u <= p, u - round(u), osc_qat.DSQ_K
    factor = {
        "ste": 1,
        "ewgs": 1 + osc_qat.EWGS_DELTA * math.copysign(1, g) * gap,
        "psg": abs(gap) + osc_qat.PSG_EPS,
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


@GRIDS
@PER_CHANNEL
def test_forward_and_straight_through_gradient_are_those_of_torch(bits, signed, per_channel):
    """Eq. 1, Eq. 2; off thresholds (torch has x * (1/s)) and limits (its mask is n - 1/2 <= u)."""
    q = Quantizer(bits, signed, 4 * per_channel)
    q.scale.data.uniform_(0.05, 0.5)
    n, p = q.int_min, q.int_max
    w_int, gap = torch.randint(n - 3, p + 4, (4, 200)), 0.9 * torch.rand(4, 200) - 0.45
    u = w_int + torch.where(w_int == n, gap.abs(), torch.where(w_int == p, -gap.abs(), gap))
    x = (u * q.usable_scale(2)).detach().requires_grad_()
    if per_channel:
        zeros = torch.zeros(4, dtype=torch.int32)
        theirs = torch.fake_quantize_per_channel_affine(x, q.scale.detach(), zeros, 0, n, p)
    else:
        theirs = torch.fake_quantize_per_tensor_affine(x, q.scale.item(), 0, n, p)
    assert_close(q(x), theirs)
    assert_close(*[torch.autograd.grad(y.square().sum(), x)[0] for y in (q(x), theirs)])


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


def test_no_estimator_turns_a_gradient_round():
    """A.3: positive factors, so none stops oscillation; A.1: DSQ's integrates to 1 over a bin."""
    u = torch.linspace(-0.5, 0.4999, 10001, dtype=torch.float64)
    for estimator in ESTIMATORS.values():
        assert (estimator(torch.ones_like(u), u) > 0).all()
        assert (estimator(-torch.ones_like(u), u) < 0).all()
    assert ESTIMATORS["dsq"](torch.ones_like(u), u).mean().item() == pytest.approx(1, rel=1e-3)


@GRIDS
def test_forward_and_to_int_agree_at_every_threshold_and_one_ulp_beside_it(bits, signed):
    """Eq. 1: an oscillating weight lives on its threshold; other formulas round otherwise."""
    q = Quantizer(bits, signed)
    for scale in torch.rand(20) * 0.3 + 0.01:
        q.scale.data.fill_(scale)
        x = (torch.arange(q.int_min - 1, q.int_max + 1) + 0.5) * scale
        x = torch.cat([x, x.nextafter(x + 1), x.nextafter(x - 1)])
        quotients = torch.tensor([w / scale.item() for w in x.tolist()]).tolist()  # rounded once
        expected = [min(max(round(u), q.int_min), q.int_max) for u in quotients]
        assert q.to_int(x).tolist() == expected
        assert (q(x) / scale).round().tolist() == expected


@PER_CHANNEL
@pytest.mark.parametrize("broken", [0.0, -0.02, -9.0, math.nan, math.inf, -math.inf])
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


@PER_CHANNEL
@pytest.mark.parametrize("bits, signed", [(2, True), (3, True), (4, False), (8, True)])
def test_initial_scale_is_the_best_of_a_dense_search(bits, signed, per_channel):
    """Section 4: scales are MSE-initialised."""
    q, w = Quantizer(bits, signed, 3 * per_channel), torch.randn(3, 2000)
    w = (w if signed else w.relu()) * (torch.tensor([[0.01], [1], [30]]) if per_channel else 0.1)
    q.initialize(w)
    for channel, x in enumerate(w if per_channel else w.view(1, -1)):
        s = x.abs().max() / q.int_max * torch.linspace(0.002, 1.5, 1000).view(-1, 1)
        errors = ((x / s).round().clamp(q.int_min, q.int_max) * s - x).square().sum(1)
        ours = fake_quantize(x, q.scale[channel], q.int_min, q.int_max)
        assert (ours - x).square().sum() <= 1.01 * errors.min()
    q.initialize(torch.zeros(3, 5))
    assert (q.scale == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantized_in_float32(dtype):
    """Eq. 1, also under autocast: half precision flips roundings."""
    q, x, model = Quantizer(4), torch.randn(1000).to(dtype), small_net()
    q.scale.data.fill_(0.1)
    assert q(x).dtype == torch.float32
    assert_same([q(x), q.to_int(x).float()], [q(x.float()), q.to_int(x.float())])
    q.to(dtype)
    assert_same(q(x), fake_quantize(x.float(), q.scale.float(), -8, 7))
    before = [layer.weight_hat() for layer in quant_layers(model).values()]
    with torch.autocast("cpu", dtype=dtype):
        assert_same([layer.weight_hat() for layer in quant_layers(model).values()], before)
        model(images()[0]).float().sum().backward()
    assert model[3].weight.grad.isfinite().all()


# --- Section 4, set-up: quantized layers and networks ---------------------------------------------

CLASSIFIERS = {"mobilenet_v2": {"width_mult": 0.35}, "mobilenet_v3_small": {}, "resnet18": {},
               "squeezenet1_0": {}, "efficientnet_b0": {}, "shufflenet_v2_x0_5": {}}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_layer_of_a_classifier_is_quantized_but_the_image_is_not(name):
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
        assert layer.input_quantizer is None if key == first else layer.input_quantizer.bits == 4
    calibrate(model, [torch.randn(4, 3, 32, 32)])
    logits = model.train()(torch.randn(4, 3, 32, 32))
    logits.square().sum().backward()
    assert logits.shape == (4, 10) and all(p.grad.isfinite().all() for p in model.parameters())


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
def test_calibration_decides_the_sign_of_each_input_from_real_batches(name):
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
    assert tracker.oscillating() == 288 / 360 and tracker.frozen_share() == 0


def test_only_layers_of_at_most_max_bits_are_tracked():
    """Algorithm 1 as released: weights of more than 4 bits are not."""
    assert list(OscillationTracker(small_net()).integers()) == ["3", "6"]
    assert list(OscillationTracker(small_net(), max_bits=8).integers()) == ["0", "3", "6", "11"]
    assert OscillationTracker(small_net(bits=5)).oscillating() == 0


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
            if threshold is not None:  # the latent weight waits at its bin centre
                assert torch.equal(layer.weight[mask], centre[mask])
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
    with pytest.raises(ValueError, match="other layers"):
        OscillationTracker(small_net(), max_bits=8).load_state_dict(saved["tracker"])


# --- Section 3: dampening, and the schedules ------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "kernel_mean"])
def test_dampening_loss_is_eq_5_and_its_gradient_the_difference_quotient(reduction):
    """Eq. 5, inside and outside of the grid -4 .. 3; a frozen weight adds nothing."""
    model, expected = small_net().double(), 0.0
    freeze_half(model)
    for layer in (model[3], model[6]):
        s = layer.weight_quantizer.scale.item()
        layer.weight.data.uniform_(-6.3 * s, 5.3 * s)
        for w, frozen in zip(layer.weight.flatten().tolist(), layer.frozen.flatten().tolist()):
            gap = 0 if frozen else s * min(max(round(w / s), -4), 3) - min(max(w, -4 * s), 3 * s)
            expected += gap**2 / (1 if reduction == "sum" else layer.weight[0].numel())
    loss = dampening_loss(model, reduction)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    moved = [key for key, p in model.named_parameters() if p.grad is not None]
    assert moved == ["3.weight", "6.weight"]
    low_bit = (model[3].weight, model[6].weight)  # gradcheck takes the differences, and moves them
    assert torch.autograd.gradcheck(lambda *w: dampening_loss(model, reduction), low_bit)


def test_cosine_anneal_rests_starts_halves_and_ends():
    """cos(start, end) of Tables 4 and 5."""
    for start, end, warmup in ((0.04, 0.01, 0.25), (0.0, 1e-3, 0.0)):
        quarter = start + (end - start) * math.sin(math.pi / 8) ** 2
        points = ((-1, start), (0, start), (0.25, quarter), (0.5, (start + end) / 2), (1, end))
        for t, value in points:
            progress = warmup + t * (1 - warmup)
            assert cosine_anneal(start, end, progress, warmup) == pytest.approx(value)
    assert cosine_anneal(0.04, 0.01, 0.1) == 0.04 > cosine_anneal(0.04, 0.01, 0.3)


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


def test_bn_kl_divergence_is_that_of_torch_distributions():
    """Table 1: population p against running estimates q, in this order, per channel."""
    model, batches = small_net().train(), images()
    for i in (1, 4, 7):
        model[i].running_mean.normal_()
        model[i].running_var.uniform_(0.01, 3)
    before = snapshot(model)
    divergence = bn_kl_divergence(model, batches)
    assert_same(snapshot(model), before)
    assert list(divergence) == ["1", "4", "7"] and model[4].training and model[8].training
    for name, xs in bn_inputs(model, batches).items():
        x, bn = torch.cat(xs, 1), model.get_submodule(name)
        p = Normal(x.mean(1), (x.var(1, unbiased=False) + bn.eps).sqrt())
        q = Normal(bn.running_mean.double(), (bn.running_var.double() + bn.eps).sqrt())
        assert_close(divergence[name], kl_divergence(p, q).float())


# --- Traps, and bad arguments ---------------------------------------------------------------------


@pytest.mark.parametrize("call, words", [
    (lambda: Quantizer(1), "2 to 8"),
    (lambda: Quantizer(9), "2 to 8"),
    (lambda: Quantizer(4, estimator="round"), "choose from ste"),
    (lambda: fake_quantize(torch.ones(1), torch.ones(1), -4, 3, "round"), "choose from ste"),
    (lambda: Quantizer(4).initialize(torch.ones(0)), "missing"),
    (lambda: Quantizer(4).initialize(torch.tensor([1.0, math.nan])), "NaN"),
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


def test_freezing_an_8_bit_network_does_nothing():
    OscillationTracker(small_net(bits=8)).step(freeze_threshold=0.1)


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


def test_integers_of_a_half_precision_network_are_those_of_its_forward():
    q, x = Quantizer(4).half(), torch.randn(10000).half()
    q.scale.data.fill_(0.1)
    assert torch.equal((q(x) / q.scale).round(), q.to_int(x).float())
