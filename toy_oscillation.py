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
WIDTH = 51  # columns from grid point to grid point; odd, so that the threshold has its own
TRAVEL_ROWS, SWING_ROWS, PAUSE = 25, 40, 0.08  # lines a phase; seconds a line, in a terminal


# ---- Section 2.2, Eq. 3: the regression ----------------------------------------------------------
@dataclass
class Toy:
    """One setting of the regression; raises ValueError, beginning with the bad field's name."""

    target: float | Tensor  # w*, from -8 s to 7 s; or a tensor of K, for K independent weights
    scale: float = 0.1  # step size s of the grid, > 0; it is not trained
    lr: float = 0.01  # learning rate of plain SGD, > 0; up to 1 our predictions hold exactly
    steps: int = 2000  # iterations, >= 1
    estimator: str = "ste"  # name in ESTIMATORS
    dampening: float = 0.0  # lambda of Eq. 5, >= 0
    freeze_threshold: float | None = None  # f_th of Algorithm 1, in 0..1; None = no freezing
    cure_after: int = 0  # iteration from which dampening and freezing act
    noise: bool = False  # whether x is drawn from N(0, 1), the same for all K, and not 1
    seed: int = 0  # of that x
    start: float | Tensor | None = None  # first w, one or K; None = the grid point nearest to w*

    def __post_init__(self):
        self.w_star = torch.as_tensor(self.target, dtype=torch.float64)
        # The grid point below w*, and how far up to the next one w* lies: 0..1, without the dust.
        self.lower = self.scale * (self.w_star / self.scale).floor().clamp(INT_MIN, INT_MAX - 1)
        self.up = ((self.w_star - self.lower) / self.scale).round(decimals=9)
        self.threshold = self.lower + self.scale / 2
        cures = self.dampening or self.freeze_threshold is not None
        self.onset = self.cure_after if cures else math.inf
        for name, good, rule in (
                ("scale", 1e-6 <= self.scale <= 1e6, "from 1e-6 to 1e6"),
                ("target", ((self.up >= 0) & (self.up <= 1)).all(),
                 f"on the grid, {INT_MIN * self.scale:.4g} to {INT_MAX * self.scale:.4g}"),
                ("lr", 0 < self.lr <= 1000, "above 0, and 1000 or less"),
                ("steps", self.steps >= 1, "1 or more"),
                ("estimator", self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
                ("dampening", 0 <= self.dampening <= 1000, "from 0 (off) to 1000"),
                ("freeze_threshold", 0 <= (self.freeze_threshold or 0) < 1, "from 0 to below 1"),
                ("cure_after", self.cure_after >= 0, "0 or more"),
                ("seed", 0 <= self.seed < 2**63, "from 0 to below 2^63")):
            if not good:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")


def oscillate(toy: Toy) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Trains K independent weights; yields w, q(w), the tracker's f_t in each iteration: (K,)."""
    network = nn.Sequential(nn.Linear(1, toy.w_star.numel(), bias=False))
    model = quantize_model(network, BITS, first_last_bits=BITS, estimator=toy.estimator)
    layer = model.double()[0]  # so that the predictions can be held to their last digits
    layer.weight_quantizer.scale.requires_grad_(False).fill_(toy.scale)
    nearest = torch.where(toy.up > 0.5, toy.lower + toy.scale, toy.lower)
    start = torch.as_tensor(nearest if toy.start is None else toy.start, dtype=torch.float64)
    layer.weight.data.copy_(start.reshape(-1, 1))
    tracker, generator = OscillationTracker(model), torch.Generator().manual_seed(toy.seed)
    inputs = torch.randn(toy.steps, generator=generator) if toy.noise else torch.ones(toy.steps)
    for t, x in enumerate(inputs.double().reshape(-1, 1, 1)):
        w, w_hat = layer.weight.detach().clone(), layer.weight_hat().detach()
        # min_w E_x[ 1/2 (x w* - x q(w))^2 ]                                                   Eq. 3
        loss = (x * toy.w_star.reshape(1, -1) - model(x)).square().sum() / 2
        if toy.dampening and t >= toy.onset:
            loss = loss + toy.dampening * dampening_loss(model)
        # Plain SGD by hand: torch.optim would nearly double the time until the first line appears.
        layer.weight.data -= toy.lr * torch.autograd.grad(loss, layer.weight)[0]
        tracker.step(toy.freeze_threshold if t >= toy.onset else None)
        yield w.flatten(), w_hat.flatten(), tracker.frequency()["0"].flatten()


def simulate(target: float | Tensor, scale: float = 0.1, lr: float = 0.01, steps: int = 2000,
             estimator: str = "ste", dampening: float = 0.0, freeze_threshold: float | None = None,
             cure_after: int = 0, noise: bool = False, seed: int = 0,
             start: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Traces (w, w_hat) of the latent and the quantized weight; the arguments are Toy's fields.

    Both are float64, (steps,) or (steps, K); w[t] is the weight before step t.
    """
    toy = Toy(**locals())
    w, w_hat, _ = (torch.stack(trace) for trace in zip(*oscillate(toy)))
    return w.reshape(steps, *toy.w_star.shape), w_hat.reshape(steps, *toy.w_star.shape)


# ---- Appendix A.2 and A.3: measured and predicted ------------------------------------------------
def measure(toy: Toy, w: Tensor, w_hat: Tensor) -> dict[str, Tensor]:
    """What the traces, (T,) or (T, K), do once all weights swing, or long after a cure's onset."""
    skip = int((w_hat != w_hat[0]).int().argmax(0).max())
    if len(w) > toy.onset:
        skip = (toy.onset + len(w)) // 2
    w, w_hat = w[skip:], w_hat[skip:]
    flips = (w_hat.diff(dim=0) != 0).sum(0)
    # The mean way of w from turn to turn, and w turns at a flip only. Its max - min would depend on
    # luck: near a simple fraction d/s it takes thousands of cycles to visit the whole range.
    height = w.diff(dim=0).abs().sum(0) * (flips > 0) / flips.clamp(min=1)
    return {"frequency": flips / 2 / max(len(w) - 1, 1), "mean": w_hat.mean(0), "height": height,
            "upper": (w_hat > toy.threshold).double().mean(0)}


def predict(toy: Toy, cured: bool = False) -> dict[str, float]:
    """What one weight does: exact for STE, x = 1, lr <= 1, no cure; else to first order in lr."""
    up, pull = toy.up.item(), toy.dampening if cured else 0.0
    f = min(up, 1 - up)  # d / s
    # All estimators multiply the gradient; what counts is the factor at the threshold.
    factor = -ESTIMATORS[toy.estimator](-torch.ones(1), torch.ones(1) / 2).item()
    frozen = cured and toy.freeze_threshold is not None and 2 * f > toy.freeze_threshold
    # Dampening shortens each step by lr lambda s. Where nothing is left of the short ones, w rests.
    f = 0.0 if frozen or factor * f <= pull else (factor * f - pull) / (factor - 2 * pull)
    upper = f if up <= 0.5 else 1 - f
    return {"frequency": f, "mean": (toy.lower + toy.scale * upper).item(), "upper": upper,
            "height": toy.lr * toy.scale * (factor - 2 * pull) * (1 - f) if f else 0.0}


# ---- In the terminal -----------------------------------------------------------------------------
def draw(toy: Toy, t: int, w: float, w_hat: float, zoom: int, live: bool) -> str:
    """One iteration as a line of 75 columns; in colour where live."""
    column = round(WIDTH // 2 + zoom * (WIDTH - 1) * (w - toy.threshold.item()) / toy.scale)
    cells = [" "] * WIDTH
    cells[WIDTH // 2] = ":"
    cells[min(max(column, 0), WIDTH - 1)] = "<" if column < 0 else ">" if column >= WIDTH else "o"
    upper = w_hat > toy.threshold
    line = f"{t:6d}  {'#|'[upper]}{''.join(cells)}{'|#'[upper]}  q(w) = {w_hat:.4g}"
    return f"\033[{33 if upper else 36}m{line}\033[0m" if live else line


def watch(toy: Toy) -> list[Tensor]:
    """Draws the run while it goes, up to Ctrl-C; returns the traces w, q(w), f_t so far: (T,)."""
    live, trace = sys.stdout.isatty(), []
    print(f"w* = {toy.target:.5g} lies between the grid points {toy.lower:.4g} and "
          f"{toy.lower + toy.scale:.4g}, {toy.up:.4g} of the way up\n"
          "# grid point in use   : threshold   o latent weight", flush=True)
    try:
        first = next(oscillate(toy))[1]
        way = sum(1 for _ in takewhile(lambda step: step[1] == first, oscillate(toy)))
        every, zoom = math.ceil(way / TRAVEL_ROWS), max(1, round(0.1 / toy.lr))
        print(f"--- travel: the gradient pushes one way only (iterations a line: {every})")
        for t, step in enumerate(oscillate(toy)):
            trace.append(torch.cat(step))
            if t == way:
                print("--- swing: beyond the threshold it turns round (iterations a line: 1)"
                      + f", magnified {zoom} times" * (zoom > 1))
            if t == toy.onset:
                print("--- cure: dampening or freezing sets in (iterations a line: 1)")
            shown = t % every == 0 if t < way else t < way + SWING_ROWS
            if shown or 0 <= t - toy.onset < SWING_ROWS:
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
            first, *others = (cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells)
            print(first.ljust(width), *(cell.rjust(9) for cell in others), flush=True)
        yield row


def report(toy: Toy, w: Tensor, w_hat: Tensor, f: Tensor) -> Iterator[dict]:
    """The rows of measured against predicted, of one weight."""
    got, law = measure(toy, w, w_hat), predict(toy, len(w) > toy.onset)
    for name, measured, predicted in (
            ("frequency, cycles an iteration (d/s)", got["frequency"], law["frequency"]),
            (f"share of time on {toy.lower:.4g}", 1 - got["upper"], 1 - law["upper"]),
            (f"share of time on {toy.lower + toy.scale:.4g}", got["upper"], law["upper"]),
            (f"mean of q(w) (w* = {toy.target:.5g})", got["mean"], law["mean"]),
            ("height of a swing of w (lr (s - d))", got["height"], law["height"]),
            # Eq. 4 counts each change of direction, and a cycle has two.
            ("f_t of Eq. 4 at the end (2 d/s)", f[-1], 2 * law["frequency"])):
        yield {"after the travel": name, "measured": float(measured), "predicted": predicted}
    if law["frequency"] and not got["frequency"]:
        print("w has not crossed the threshold twice: raise --steps or --lr")
    elif law["frequency"] and (toy.noise or toy.estimator != "ste" or toy.lr > 1):
        often, high = (got[name] / law[name] for name in ("frequency", "height"))
        print("The predictions are exact for STE, x = 1 and lr up to 1. Here w swings "
              f"{often:.3f} times\nas often and {high:.3f} times as high.")


def compare(variants: dict[str, Toy]) -> Iterator[dict]:
    """The rows of several settings beside what theory says of STE with x = 1 and no cure."""
    print("\nBias: mean of q(w) - w*, in % of s. Height: of a swing of w. Last w: 0 is the lower "
          "point, _ below,\n1 the upper, #. A frequency of 0 without a cure: still on its way.\n")
    for name, toy in variants.items():
        w, w_hat = simulate(**asdict(toy))
        got, law = measure(toy, w, w_hat), predict(replace(toy, estimator="ste"))
        row = {"frequency": got["frequency"], "d/s": law["frequency"],
               "bias": 100 * (got["mean"] - toy.target) / toy.scale, "height": got["height"],
               "lr (s-d)": law["height"], "last w": (w[-1] - toy.lower) / toy.scale}
        strip = "".join("_#"[up] for up in (w_hat[-22:] > toy.threshold).int())
        yield {"setting": name, **{key: float(cell) for key, cell in row.items()}, "q(w)": strip}


# ---- Figures 1, 5 and 6 --------------------------------------------------------------------------
def draw_figures(toy: Toy, path: Path) -> None:
    """Figure 1 above (STE, EWGS, DSQ), Figures 5 and 6 below, in one picture."""
    from matplotlib.figure import Figure

    toy = Toy(toy.target, toy.scale, toy.lr, steps=120)
    figure = Figure((10, 6), layout="constrained")
    panels = figure.subplot_mosaic([["ste"] * 2 + ["ewgs"] * 2 + ["dsq"] * 2, [5] * 3 + [6] * 3])
    for name in ("ste", "ewgs", "dsq"):
        w, w_hat = simulate(**asdict(replace(toy, estimator=name)))
        panels[name].step(range(toy.steps), w_hat, color="tab:orange", lw=0.7, label="q(w)")
        panels[name].plot(w, color="tab:blue", label="w")
        panels[name].axhline(toy.target, color="tab:green", ls="--", lw=1, label="w*")
        panels[name].axhline(toy.threshold, color="gray", ls=":", lw=1, label="threshold")
        panels[name].set(title=f"Fig. 1: {name.upper()}, lr = {toy.lr:g}", xlabel="iteration")
    share = torch.linspace(0.02, 0.5, 25, dtype=torch.float64)
    panels[5].plot(share, share, color="gray", lw=1, label="f = d / s")
    for name, marker in zip(ESTIMATORS, "o+x."):
        many = Toy(toy.lower + toy.scale * share, toy.scale, toy.lr, 1500, name,
                   start=toy.threshold.expand(len(share)))
        got = measure(many, *simulate(**asdict(many)))
        panels[5].plot(share, got["frequency"], marker, ms=4, label=name.upper())
    panels[5].set(title=f"Fig. 5, lr = {toy.lr:g}", xlabel="d / s", ylabel="cycles an iteration")
    for lr in (toy.lr, toy.lr / 3, toy.lr / 10):
        w, _ = simulate(**asdict(replace(toy, lr=lr, steps=60, start=toy.threshold)))
        panels[6].plot((w - toy.threshold) / toy.scale, lw=1, label=f"lr = {lr:.2g}")
    panels[6].set(title="Fig. 6: STE", xlabel="iteration", ylabel="(w - threshold) / s")
    panels[6].margins(y=0.2)
    for name in ("dsq", 5, 6):
        panels[name].legend(fontsize=8, ncols=3 if name == 6 else 1)
    figure.savefig(path, dpi=100)


# ---- Command line --------------------------------------------------------------------------------
def parse(argv: list[str] | None) -> tuple[Toy, argparse.Namespace]:
    """The setting and all flags; exits with status 2 and one line where one of them is bad."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, message.removeprefix("argument ") + "\n")
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
    parser.add_argument("--noise", action="store_true", help="draw x from N(0, 1), not x = 1")
    parser.add_argument("--compare", action="store_true", help="estimators, random x and cures")
    args = parser.parse_args(argv)
    try:
        toy = Toy(args.target, args.scale, args.lr, args.steps, args.estimator, args.dampening,
                  args.freeze_threshold, args.cure_after, args.noise, args.seed)
    except ValueError as error:  # begins with the field's name
        parser.error(f"--{str(error).replace('_', '-', 1)}")
    try:
        if args.json:
            args.json.open("a").close()
        if args.plot:
            draw_figures(toy, args.plot)
    except ImportError:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return toy, args


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status. Ctrl-C ends it with the table so far."""
    results = {"settings": {}, "table": [], "compare": []}
    try:
        toy, args = parse(argv)
        results["settings"] = vars(args)
        if args.compare:
            plain = replace(toy, estimator="ste", noise=False, dampening=0.0, freeze_threshold=None)
            variants = {name: replace(plain, estimator=name) for name in ESTIMATORS}
            # With lambda = 1/2 the gradient is w - w*.
            variants |= {"ste, random x": replace(plain, noise=True),
                         "ste, dampening": replace(plain, dampening=0.5),
                         "ste, freezing": replace(plain, freeze_threshold=0.02)}
        else:
            w, w_hat, f = watch(toy)
            results["table"].extend(tell(report(toy, w, w_hat, f), 38))
            # Figure 6, A.3. From the threshold, since the way to it takes 1/lr iterations.
            variants = {f"lr = {lr:g}": replace(toy, lr=lr, steps=500, start=toy.threshold)
                        for lr in (toy.lr, toy.lr / 10, toy.lr / 100)}
        if args.compare or toy.up % 1 and len(w) == toy.steps <= toy.onset:
            results["compare"].extend(tell(compare(variants), 16))
    except KeyboardInterrupt:
        print("--- interrupted")
    if path := results["settings"].get("json"):
        path.write_text(json.dumps(results, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
