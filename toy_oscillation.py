"""Watch a quantized weight oscillate: section 2.2 (Eq. 3), Figures 1, 5 and 6, appendix A.

    python toy_oscillation.py                         watch one weight; measured against predicted
    python toy_oscillation.py --compare               all estimators, random x and both cures
    python toy_oscillation.py --plot figure.png       Figures 1, 5 and 6 (needs matplotlib)

Why does the weight swing? Training wants w*, but the network may only use grid points 0, s, 2s, ...
It keeps an exact, "latent" weight w and computes with q(w), the grid point nearest to w. Let w* lie
between two grid points, 0.27 of the way up. While w rounds down, the network's weight is too small,
so the gradient pushes w up. It pushes as hard however far up w has come: q(w) has not moved. Once w
is past the threshold halfway, q(w) is the upper point and too large: the gradient turns round and
pushes w back below the threshold, where it turns again, and so for ever. No position of w makes the
gradient zero, and a smaller learning rate only makes smaller swings.

How often? With learning rate lr and d = |w* - q(w*)|, the distance of w* from its nearer point, a
step from that side is lr d long, a step back lr (s - d). The steps cancel if w spends d/s of its
time on the far side, where each visit is one step: d/s full cycles an iteration, whatever lr is. In
those shares the mean of q(w) is w*. Each swing is as high as that one step back: lr (s - d).

Nothing of the method is copied here: the weight is a one-weight network from `quantize_model`, with
the real `dampening_loss` and `OscillationTracker`. Only the predictions are our own.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn

from osc_qat import ESTIMATORS, OscillationTracker, Quantizer, dampening_loss, quantize_model

BITS = 4  # grid -8 s .. 7 s; the tracker and the dampening look at weights of 4 bits and fewer
INT_MIN, INT_MAX = Quantizer(BITS).int_min, Quantizer(BITS).int_max
DAMPENING, FREEZE_THRESHOLD = 0.5, 0.02  # of --compare; with lambda = 1/2 the gradient is w - w*
WIDTH = 51  # columns from grid point to grid point; odd, so that the threshold has its own
TRAVEL_ROWS, SWING_ROWS, PAUSE = 25, 40, 0.08  # lines a phase; seconds a line, in a terminal

# --------------------------------------------------------------------------------------------------
# Section 2.2, Eq. 3: the regression
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """One setting of the regression; `simulate` explains the fields and their ranges."""

    target: float | Tensor
    scale: float = 0.1
    lr: float = 0.01
    steps: int = 2000
    estimator: str = "ste"
    dampening: float = 0.0
    freeze_threshold: float | None = None
    cure_after: int = 0
    noise: bool = False
    seed: int = 0
    start: float | Tensor | None = None

    def __post_init__(self):
        for name, good, rule in (
                ("scale", 1e-6 <= self.scale < math.inf, "1e-6 or more, and finite"),
                ("target", ((self.w_star - self.lower) / self.scale - 0.5).abs().max() < 0.5 + 1e-9,
                 f"on the grid, {INT_MIN * self.scale:.4g} to {INT_MAX * self.scale:.4g}"),
                ("lr", 0 < self.lr < math.inf, "above 0 and finite"),
                ("steps", self.steps >= 1, "1 or more"),
                ("estimator", self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
                ("dampening", 0 <= self.dampening < math.inf, "0 (off) or more, and finite"),
                ("freeze_threshold", 0 <= (self.freeze_threshold or 0) < 1, "from 0 to below 1"),
                ("cure_after", self.cure_after >= 0, "0 or more"),
                ("seed", 0 <= self.seed < 2**63, "from 0 to below 2^63")):
            if not good:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")

    @property
    def w_star(self) -> Tensor:
        return torch.as_tensor(self.target, dtype=torch.float64)

    @property
    def lower(self) -> Tensor:
        """The lower of the two grid points around w*."""
        return self.scale * (self.w_star / self.scale).floor().clamp(INT_MIN, INT_MAX - 1)

    @property
    def up(self) -> Tensor:
        """How far up w* lies between the two, 0..1; less than 1e-9 is but a rounding error."""
        return ((self.w_star - self.lower) / self.scale).round(decimals=9)

    @property
    def threshold(self) -> Tensor:
        return self.lower + self.scale / 2

    def cured(self, iterations: int) -> bool:
        """Whether dampening or freezing has acted after so many iterations."""
        cures = self.dampening > 0 or self.freeze_threshold is not None
        return cures and iterations > self.cure_after


def oscillate(toy: Toy) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Trains K independent weights; yields w, q(w) and the tracker's f_t in each iteration: (K,).

    In float64, so that the predictions can be held to their last digits.
    """
    w_star, generator = toy.w_star.reshape(1, -1), torch.Generator().manual_seed(toy.seed)
    network = nn.Sequential(nn.Linear(1, w_star.numel(), bias=False))
    model = quantize_model(network, BITS, first_last_bits=BITS, estimator=toy.estimator).double()
    layer = model[0]
    layer.weight_quantizer.scale.requires_grad_(False).fill_(toy.scale)
    start = toy.lower + toy.scale * (toy.up > 0.5) if toy.start is None else toy.start
    layer.weight.data.copy_(torch.as_tensor(start).reshape(-1, 1))
    tracker = OscillationTracker(model)
    x = torch.ones(1, 1, dtype=torch.float64)
    for t in range(toy.steps):
        if toy.noise:
            x = torch.randn(1, 1, generator=generator, dtype=torch.float64)
        w, w_hat = layer.weight.detach().clone(), layer.weight_hat().detach()
        # min_w E_x[ 1/2 (x w* - x q(w))^2 ]                                                   Eq. 3
        loss = (x * w_star - model(x)).square().sum() / 2
        if toy.dampening and t >= toy.cure_after:
            loss = loss + toy.dampening * dampening_loss(model)
        # Plain SGD, written out: torch.optim alone would double the time this file takes to start.
        layer.weight.data -= toy.lr * torch.autograd.grad(loss, layer.weight)[0]
        tracker.step(toy.freeze_threshold if t >= toy.cure_after else None)
        yield w.flatten(), w_hat.flatten(), tracker.frequency()["0"].flatten()


def run(toy: Toy) -> tuple[Tensor, Tensor]:
    """Traces (w, w_hat) of the whole run: (steps,), or (steps, K) for K targets."""
    w, w_hat, _ = (torch.stack(trace) for trace in zip(*oscillate(toy)))
    shape = (toy.steps, *toy.w_star.shape)
    return w.reshape(shape), w_hat.reshape(shape)


def simulate(target: float | Tensor, scale: float = 0.1, lr: float = 0.01, steps: int = 2000,
             estimator: str = "ste", dampening: float = 0.0, freeze_threshold: float | None = None,
             cure_after: int = 0, noise: bool = False, seed: int = 0,
             start: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Traces of the latent and of the quantized weight: (w, w_hat); w[t] is w before step t.

    Args:
        target: w*, from -8 s to 7 s; or a tensor of K, for K independent weights.
        scale: step size s of the grid, > 0; it is not trained.
        lr: learning rate of plain SGD, > 0. Up to 1 the predictions of this file hold exactly.
        steps: iterations, >= 1.
        estimator: name in ESTIMATORS.
        dampening: lambda of Eq. 5, >= 0.
        freeze_threshold: f_th of Algorithm 1, in 0..1; None = no freezing.
        cure_after: iteration from which dampening and freezing act.
        noise: x is drawn from N(0, 1), the same for all K, and not 1; `seed` is its seed.
        start: first latent weight, one or K; None = the grid point nearest to w*.
    Returns:
        Two float64 tensors of shape (steps,), or (steps, K) for a tensor of K targets.
    Raises:
        ValueError: for a value outside these ranges; the message begins with the argument's name.
    """
    return run(Toy(target, scale, lr, steps, estimator, dampening, freeze_threshold, cure_after,
                   noise, seed, start))


# --------------------------------------------------------------------------------------------------
# Appendix A.2 and A.3: measured and predicted
# --------------------------------------------------------------------------------------------------


def measure(toy: Toy, w: Tensor, w_hat: Tensor) -> dict[str, Tensor]:
    """What the traces, (T,) or (T, K), do from the last weight's first crossing on.

    Where a cure acts: in the second half of what follows its onset.
    """
    skip = int((w_hat != w_hat[0]).int().argmax(0).max())
    if toy.cured(len(w)):
        skip = (toy.cure_after + len(w)) // 2
    w, w_hat = w[skip:], w_hat[skip:]
    flips = (w_hat.diff(dim=0) != 0).sum(0)
    # w turns round at each flip only. Unlike max - min, its mean way from turn to turn needs no
    # luck: near a simple fraction d/s, w takes thousands of cycles to visit the whole range.
    return {"frequency": flips / 2 / max(len(w) - 1, 1), "mean": w_hat.mean(0),
            "upper": (w_hat > toy.threshold).double().mean(0),
            "height": w.diff(dim=0).abs().sum(0) / flips.clamp(min=1)}


def predict(toy: Toy, cured: bool = False) -> dict[str, float]:
    """What one weight does: exact for STE, x = 1 and lr <= 1 without cure, else to first order."""
    up, pull = toy.up.item(), toy.dampening if cured else 0.0
    f = min(up, 1 - up)  # d / s
    # All estimators multiply the gradient; what counts is the factor at the threshold.
    factor = -ESTIMATORS[toy.estimator](-torch.ones(1), torch.ones(1) / 2).item()
    frozen = cured and toy.freeze_threshold is not None and 2 * f > toy.freeze_threshold
    # Dampening shortens each step by lr lambda s. Where the shorter kind is gone, w is at rest.
    f = 0.0 if frozen or factor * f <= pull else (factor * f - pull) / (factor - 2 * pull)
    upper = f if up <= 0.5 else 1 - f
    return {"frequency": f, "mean": (toy.lower + toy.scale * upper).item(), "upper": upper,
            "height": toy.lr * toy.scale * (factor - 2 * pull) * (1 - f) if f else 0.0}


# --------------------------------------------------------------------------------------------------
# In the terminal
# --------------------------------------------------------------------------------------------------


def draw(toy: Toy, t: int, w: float, w_hat: float, zoom: int, live: bool) -> str:
    """One iteration as a line of 75 columns; in colour where live."""
    column = (WIDTH - 1) / 2 + zoom * (WIDTH - 1) * (w - toy.threshold.item()) / toy.scale
    cells = [" "] * WIDTH
    cells[WIDTH // 2] = ":"
    mark = "<" if column < -0.5 else ">" if column > WIDTH - 0.5 else "o"
    cells[round(min(max(column, 0), WIDTH - 1))] = mark
    upper = w_hat > toy.threshold
    line = f"{t:6d}  {'#|'[upper]}{''.join(cells)}{'|#'[upper]}  q(w) = {w_hat:.4g}"
    return f"\033[{33 if upper else 36}m{line}\033[0m" if live else line


def watch(toy: Toy) -> list[Tensor]:
    """Draws the run while it goes, up to Ctrl-C; returns the traces w, q(w), f_t so far: (T,)."""
    live, trace, lower = sys.stdout.isatty(), [], toy.lower.item()
    print(f"w* = {toy.target:.5g} lies between the grid points {lower:.4g} and "
          f"{lower + toy.scale:.4g}, {toy.up:.4g} of the way up\n"
          "# grid point in use   : threshold   o latent weight", flush=True)
    try:
        _, first, _ = next(oscillate(toy))
        way = sum(1 for _ in takewhile(lambda step: step[1] == first, oscillate(toy)))
        every, zoom = math.ceil(way / TRAVEL_ROWS), max(1, round(0.1 / toy.lr))
        print(f"--- travel: the gradient pushes one way only (iterations a line: {every})")
        for t, step in enumerate(oscillate(toy)):
            trace.append(torch.cat(step))
            if t == way:
                print("--- swing: beyond the threshold it turns round (iterations a line: 1)"
                      + f", magnified {zoom} times" * (zoom > 1))
            since_cure = t - toy.cure_after if toy.cured(t + 1) else SWING_ROWS
            if since_cure == 0:
                print("--- cure: dampening or freezing sets in (iterations a line: 1)")
            if since_cure < SWING_ROWS or (t % every == 0 if t < way else t < way + SWING_ROWS):
                w, w_hat, _ = trace[-1].tolist()
                print(draw(toy, t, w, w_hat, 1 if t < way else zoom, live), flush=True)
                time.sleep(PAUSE * live)
    except KeyboardInterrupt:
        if not trace:
            raise
        print("--- interrupted", end=" ")
    print(f"--- {len(trace)} of {toy.steps} iterations done\n")
    return list(torch.stack(trace).unbind(1))


def tell(rows: Iterable[dict], width: int) -> Iterator[dict]:
    """Prints rows under their keys while they come, the first column so wide; passes them on."""
    for i, row in enumerate(rows):
        for cells in (row.keys(), row.values())[i > 0:]:
            first, *others = (cell if isinstance(cell, str) else f"{cell:.5g}" for cell in cells)
            print(first.ljust(width), *(cell.rjust(11) for cell in others), flush=True)
        yield row


def report(toy: Toy, w: Tensor, w_hat: Tensor, f: Tensor) -> Iterator[dict]:
    """Measured against predicted."""
    got, law, lower = measure(toy, w, w_hat), predict(toy, toy.cured(len(w))), toy.lower.item()
    for name, measured, predicted in (
            ("frequency, cycles an iteration (d/s)", got["frequency"], law["frequency"]),
            (f"share of time on {lower:.4g}", 1 - got["upper"], 1 - law["upper"]),
            (f"share of time on {lower + toy.scale:.4g}", got["upper"], law["upper"]),
            (f"mean of q(w) (w* = {toy.target:.5g})", got["mean"], law["mean"]),
            ("height of a swing of w (lr (s - d))", got["height"], law["height"]),
            # Eq. 4 counts each change of direction, and a cycle has two.
            ("f_t of Eq. 4 at the end (2 d/s)", f[-1], 2 * law["frequency"])):
        yield {"after the travel": name, "measured": float(measured), "predicted": predicted}
    if law["frequency"] and not got["frequency"]:
        print("w has not crossed the threshold twice: raise --steps or --lr")
    elif law["frequency"] and (toy.noise or toy.estimator != "ste" or toy.lr > 1):
        often, high = (got[name] / law[name] for name in ("frequency", "height"))
        print(f"The predictions are exact for STE, x = 1 and lr up to 1. Here w swings {often:.3f} "
              f"times as often\nand {high:.3f} times as high, and the mean of q(w) is off by "
              f"{100 * (got['mean'] - law['mean']) / toy.scale:.2f} % of s.")


def learning_rates(toy: Toy) -> Iterator[dict]:
    """Figure 6, A.3: frequency and height at lr, lr/10 and lr/100."""
    for lr in (toy.lr, toy.lr / 10, toy.lr / 100):
        # From the threshold, since the way to it takes 1/lr iterations.
        part = replace(toy, lr=lr, steps=1000, start=toy.threshold)
        got, law = measure(part, *run(part)), predict(part)
        yield {"learning rate": lr, "frequency": got["frequency"].item(),
               "predicted f": law["frequency"], "height": got["height"].item(),
               "predicted h": law["height"]}


def compare(toy: Toy) -> Iterator[dict]:
    """All estimators, random x and both cures on the same weight."""
    plain = replace(toy, estimator="ste", noise=False, dampening=0.0, freeze_threshold=None)
    f_th = FREEZE_THRESHOLD if toy.freeze_threshold is None else toy.freeze_threshold
    variants = {name: replace(plain, estimator=name) for name in ESTIMATORS}
    variants |= {"ste, random x": replace(plain, noise=True),
                 "ste, dampening": replace(plain, dampening=toy.dampening or DAMPENING),
                 "ste, freezing": replace(plain, freeze_threshold=f_th)}
    print(f"w* lies {toy.up:.4g} of the way up. Bias: mean of q(w) - w*, in % of s. Height: in "
          f"lr (s - d).\nLast w: 0 lower, 1 upper point; below _ and #. Cures act from iteration "
          f"{toy.cure_after} on. A frequency\nof 0 without a cure: still on its way.\n")
    ste_height = predict(plain)["height"] or 1
    for name, variant in variants.items():
        w, w_hat = run(variant)
        got = measure(variant, w, w_hat)
        row = {"frequency": got["frequency"], "share up": got["upper"],
               "bias": 100 * (got["mean"] - toy.target) / toy.scale,
               "height": got["height"] / ste_height, "last w": (w[-1] - toy.lower) / toy.scale}
        strip = "".join("_#"[up] for up in (w_hat[-22:] > toy.threshold).int())
        yield {"variant": name, **{key: float(cell) for key, cell in row.items()}, "last q(w)": strip}


# --------------------------------------------------------------------------------------------------
# Figures 1, 5 and 6
# --------------------------------------------------------------------------------------------------


def draw_figures(toy: Toy, path: Path) -> None:
    """Figure 1 above (STE, EWGS, DSQ), Figures 5 and 6 below, in one picture."""
    from matplotlib.figure import Figure

    toy = Toy(toy.target, toy.scale, toy.lr, steps=120)
    figure = Figure((10, 6), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    for i, name in enumerate(("ste", "ewgs", "dsq")):
        axes = figure.add_subplot(grid[0, 2 * i:2 * i + 2])
        w, w_hat = run(replace(toy, estimator=name))
        axes.step(range(toy.steps), w_hat, color="tab:orange", lw=0.7, label="q(w)")
        axes.plot(w, color="tab:blue", label="w")
        axes.axhline(toy.target, color="tab:green", ls="--", lw=1, label="w*")
        axes.axhline(toy.threshold, color="gray", ls=":", lw=1, label="threshold")
        axes.set(title=f"Fig. 1: {name.upper()}, lr = {toy.lr:g}", xlabel="iteration")
    left, right = figure.add_subplot(grid[1, :3]), figure.add_subplot(grid[1, 3:])
    share = torch.linspace(0.02, 0.5, 25, dtype=torch.float64)
    left.plot(share, share, color="gray", lw=1, label="f = d / s")
    for name, marker in zip(ESTIMATORS, "o+x."):
        many = Toy(toy.lower + toy.scale * share, toy.scale, toy.lr, 1500, name,
                   start=toy.threshold.expand(len(share)))
        left.plot(share, measure(many, *run(many))["frequency"], marker, ms=4, label=name.upper())
    left.set(title=f"Fig. 5, lr = {toy.lr:g}", xlabel="d / s", ylabel="cycles an iteration")
    for lr in (toy.lr, toy.lr / 3, toy.lr / 10):
        w, _ = run(replace(toy, lr=lr, steps=60, start=toy.threshold))
        right.plot((w - toy.threshold) / toy.scale, lw=1, label=f"lr = {lr:.2g}")
    right.set(title="Fig. 6: STE", xlabel="iteration", ylabel="(w - threshold) / s")
    right.margins(y=0.2)
    for panel, columns in ((axes, 1), (left, 1), (right, 3)):
        panel.legend(fontsize=8, ncols=columns)
    figure.savefig(path, dpi=100)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{message.removeprefix('argument ')}; see --help for what it takes\n")


def parse(argv: list[str] | None) -> tuple[Toy, argparse.Namespace]:
    """The setting and the other flags; exits with status 2 and one line where one is bad."""
    parser = Parser(description=__doc__.split("\n")[0])
    for name, kind, default, text in (
            ("target", float, 0.127, "w*"),
            ("scale", float, 0.1, "step size s of the 4-bit grid"),
            ("lr", float, 0.1, "learning rate; about 0.1 shows the swing to the eye"),
            ("steps", int, 2000, "iterations"),
            ("estimator", str, "ste", f"gradient estimator: {', '.join(ESTIMATORS)}"),
            ("dampening", float, 0.0, "lambda of Eq. 5: d/s .. 1 - d/s holds w at the near point"),
            ("freeze-threshold", float, None, "f_th of Algorithm 1: below 2 d/s it freezes w"),
            ("cure-after", int, 500, "iteration from which dampening and freezing act"),
            ("seed", int, 0, "seed of --noise"),
            ("plot", Path, None, "first draw Figures 1, 5 and 6 into this file"),
            ("json", Path, None, "write what the tables print into this file")):
        parser.add_argument(f"--{name}", type=kind, default=default,
                            help=f"{text} (default: {default})")
    parser.add_argument("--noise", action="store_true", help="draw x from N(0, 1) (default: x = 1)")
    parser.add_argument("--compare", action="store_true", help="estimators, random x and cures, "
                        f"lambda {DAMPENING}, f_th {FREEZE_THRESHOLD} (default: watch one weight)")
    args = parser.parse_args(argv)
    try:
        toy = Toy(args.target, args.scale, args.lr, args.steps, args.estimator, args.dampening,
                  args.freeze_threshold, args.cure_after, args.noise, args.seed)
        if args.json:
            args.json.open("a").close()
        if args.plot:
            draw_figures(toy, args.plot)
    except ImportError:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    except OSError as error:
        parser.error(f"cannot write {error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    return toy, args


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status. Ctrl-C ends it with the table so far."""
    results = {"table": [], "learning_rates": [], "compare": []}
    torch.set_num_threads(1)  # for one weight
    try:
        toy, args = parse(argv)
        if args.compare:
            results["compare"].extend(tell(compare(toy), 16))
        else:
            trace = watch(toy)
            results["table"].extend(tell(report(toy, *trace), 38))
            if toy.up % 1 and len(trace[0]) == toy.steps and not toy.cured(toy.steps):
                print()
                results["learning_rates"].extend(tell(learning_rates(toy), 15))
    except KeyboardInterrupt:
        print("--- interrupted")
    if args.json:
        args.json.write_text(json.dumps({"settings": asdict(toy), **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
