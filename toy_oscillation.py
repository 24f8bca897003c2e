"""Watch a quantized weight oscillate: section 2.2 (Eq. 3), Figures 1, 5 and 6, appendix A.

    python toy_oscillation.py                    watch one weight; measured against predicted
    python toy_oscillation.py --compare          all estimators, random x and both cures
    python toy_oscillation.py --plot FILE        .png: Figures 1, 5, 6; .gif: both cures, moving

Why does w swing? Training wants w*, which lies between two grid points. The network computes with
q(w), the grid point nearest to an exact, "latent" weight w. While w rounds down, q(w) is too small,
and the gradient pushes w up: as hard however far it has come, for q(w) has not moved. Past the
threshold halfway, q(w) is too large. The gradient turns, pushes w back, and so for ever.

How often? With learning rate lr and d = |w* - q(w*)|, the distance of w* from its nearer point, a
step from that side is lr d long, a step back lr (s - d). The steps cancel if w spends d/s of its
time on the far side, where each visit is one step: d/s full cycles an iteration, whatever lr is. In
those shares the mean of q(w) is w*. Each swing is as high as that one step back: lr (s - d).

What stops it? Dampening pulls w back to q(w), at the threshold by lr lambda s a step. So it holds w
at every grid point within lambda s of w*: w rests at the first of them on its way. If lambda < d/s,
there is none; w swings less often. From d/s to 1 - d/s it is the near point. Above, it is the point
in use when dampening sets in, near or far. Freezing pins w where it mostly was: near.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from osc_qat import ESTIMATORS, OscillationTracker, dampening_loss, quantize_model

BITS, INT_MIN, INT_MAX = 4, -8, 7  # more bits are not tracked or dampened; grid -8 s .. 7 s
MOMENTUM = 0.01  # m of f_t and EMA(w_int): they settle in 500 iterations; the paper's takes 5000
CURES = {"dampening": {"dampening": 0.5}, "freezing": {"freeze_threshold": 0.02}}
WIDTH, ROWS = 51, 40  # columns from grid point to grid point, odd; lines drawn of a phase


# ---- Section 2.2, Eq. 3: the regression ----------------------------------------------------------
@dataclass
class Toy:
    """One setting of the regression; raises ValueError, beginning with the bad field's name."""
    target: float | Tensor  # w*, from -8 s to 7 s; or a tensor of K, for K independent weights
    scale: float = 0.1  # step size s of the grid, > 0; it is not trained
    lr: float = 0.01  # learning rate of plain SGD, > 0; up to 1/2 our predictions are exact
    steps: int = 2000  # iterations, >= 1
    estimator: str = "ste"  # name in ESTIMATORS
    dampening: float = 0.0  # lambda of Eq. 5, >= 0
    freeze_threshold: float | None = None  # f_th of Algorithm 1, in 0..1; None = no freezing
    cure_after: int = 0  # iteration from which dampening and freezing act
    noise: bool = False  # whether x is drawn from N(0, 1), the same for all K, and not 1
    seed: int = 0  # of that x, >= 0
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
                ("target", ((self.up >= 0) & (self.up <= 1)).all(), f"{INT_MIN} s to {INT_MAX} s"),
                ("lr", 0 < self.lr <= 1000, "above 0, and 1000 or less"),
                ("steps", self.steps >= 1, "1 or more"),
                ("estimator", self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
                ("dampening", 0 <= self.dampening <= 1000, "from 0 (off) to 1000"),
                ("freeze_threshold", 0 <= (self.freeze_threshold or 0) < 1, "from 0 to below 1"),
                ("cure_after", self.cure_after >= 0, "0 or more")):
            if not good:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")


def oscillate(toy: Toy) -> Iterator[tuple[Tensor, Tensor]]:
    """Trains K independent weights; yields w and q(w) before each step: (K,)."""
    network = nn.Sequential(nn.Linear(1, toy.w_star.numel(), bias=False))
    model = quantize_model(network, BITS, first_last_bits=BITS, estimator=toy.estimator)
    layer = model.double()[0]  # so that the predictions can be held to their last digits
    layer.weight_quantizer.scale.requires_grad_(False).fill_(toy.scale)
    start = toy.lower + toy.scale * toy.up.round() if toy.start is None else toy.start
    layer.weight.data.copy_(torch.as_tensor(start, dtype=torch.float64).reshape(-1, 1))
    tracker, random = OscillationTracker(model, MOMENTUM), torch.Generator().manual_seed(toy.seed)
    inputs = torch.randn(toy.steps, generator=random) if toy.noise else torch.ones(toy.steps)
    for t, x in enumerate(inputs.double().reshape(-1, 1, 1)):
        yield layer.weight.detach().flatten().clone(), layer.weight_hat().detach().flatten()
        # min_w E_x[ 1/2 (x w* - x q(w))^2 ]                                                   Eq. 3
        loss = (x * toy.w_star.reshape(1, -1) - model(x)).square().sum() / 2
        if toy.dampening and t >= toy.onset:
            loss = loss + toy.dampening * dampening_loss(model)
        # Plain SGD by hand: importing torch.optim would nearly double the time to the first line.
        layer.weight.data -= toy.lr * torch.autograd.grad(loss, layer.weight)[0]
        tracker.step(toy.freeze_threshold if t >= toy.onset else None)


def simulate(target, scale=0.1, lr=0.01, steps=2000, estimator="ste", dampening=0.0,
             freeze_threshold=None, **more) -> tuple[Tensor, Tensor]:
    """Traces (w, w_hat) before each step, (steps,) or (steps, K); arguments: the fields of Toy."""
    toy = Toy(target, scale, lr, steps, estimator, dampening, freeze_threshold, **more)
    return tuple(torch.stack(t).reshape(steps, *toy.w_star.shape) for t in zip(*oscillate(toy)))


# ---- Appendix A.2 and A.3: measured and predicted ------------------------------------------------
def measure(toy: Toy, w: Tensor, w_hat: Tensor) -> dict[str, Tensor]:
    """What the traces, (T,) or (T, K), do once all weights swing, or long after a cure's onset."""
    skip = int((w_hat != w_hat[0]).int().argmax(0).max())
    if len(w) > toy.onset:
        skip = (toy.onset + len(w)) // 2
    w, w_hat = w[skip:], w_hat[skip:]
    flips = (w_hat.diff(dim=0) != 0).sum(0)
    # The mean way from turn to turn: w turns at flips. Its whole range would take long to visit.
    height = w.diff(dim=0).abs().sum(0) * (flips > 0) / flips.clamp(min=1)
    return {"frequency": flips / 2 / max(len(w) - 1, 1), "mean q(w)": w_hat.mean(0),
            "height": height}


def predict(toy: Toy, at_onset: float | None = None) -> dict[str, float]:
    """What one weight does: exact for STE, x = 1, lr <= 1/2, no cure; else to first order in lr.

    at_onset is q(w) in iteration cure_after, when f_t and EMA(w_int) have settled; None = no cure.
    """
    up, cured = toy.up.item(), at_onset is not None
    f, nearest = min(up, 1 - up), round(up)  # f = d / s; points count in s from the lower one
    # All estimators multiply the gradient; what counts is the factor at the threshold.
    factor = -ESTIMATORS[toy.estimator](-torch.ones(1), torch.ones(1) / 2).item()
    pull = toy.dampening / factor if cured else 0.0
    if cured and toy.freeze_threshold is not None and 2 * f > toy.freeze_threshold:
        f, point = 0.0, nearest
    elif f <= pull:  # the first point within lambda s of w* on the way from the one in use
        used = round((at_onset - toy.lower.item()) / toy.scale) if cured else nearest
        f, point = 0.0, min(max(used, math.ceil(up - pull)), math.floor(up + pull))
    else:  # dampening shortens each step by lr lambda s
        f = (f - pull) / (1 - 2 * pull)
        point = abs(nearest - f)  # on average
    height = toy.lr * toy.scale * factor * (1 - 2 * pull) * (1 - f) if f else 0.0
    return {"frequency": f, "mean q(w)": toy.lower.item() + toy.scale * point, "height": height}


# ---- In the terminal -----------------------------------------------------------------------------
def watch(toy: Toy) -> tuple[Tensor, Tensor]:
    """Draws the run while it goes, up to Ctrl-C; returns the traces w, q(w) so far: (T,)."""
    trace, zoom, last, line = [], 1, math.inf, ""  # last: the iteration after the last one drawn
    print(f"w* = {toy.target:.5g}, grid points {toy.lower:.4g} and {toy.lower + toy.scale:.4g}\n"
          "o latent weight w   # grid point in use, q(w)   : threshold   left: iteration\n"
          "--- travel: the gradient pushes w one way only")
    try:
        for t, step in enumerate(oscillate(toy)):
            trace.append(torch.cat(step))
            w, w_hat = trace[-1].tolist()
            if last == math.inf and w_hat != trace[0][1]:
                last, zoom = t + ROWS, max(1, round(0.3 / toy.lr))
                print(f"--- swing: the gradient turns at the threshold (magnified {zoom} times)")
            if t == toy.onset:
                last, zoom = t + ROWS, 1
                print("--- cure: dampening or freezing sets in (not magnified)")
            column = WIDTH // 2 + zoom * (WIDTH - 1) * (w - toy.threshold.item()) / toy.scale
            cells = [":" if i == WIDTH // 2 else " " for i in range(WIDTH)]
            cells[round(min(max(column, 0), WIDTH - 1))] = "o"
            left, right = "|#" if w_hat > toy.threshold else "#|"
            before, line = line, f"{left}{''.join(cells)}{right}  q(w) = {w_hat:.4g}"
            if t < last < math.inf or t < last and line != before:
                print(f"{t:6d}  {line}", flush=True)
                time.sleep(0.08 * sys.stdout.isatty())
    except KeyboardInterrupt:
        if not trace:
            raise
        print("--- interrupted", end=" ")
    print(f"--- {len(trace)} of {toy.steps} iterations done")
    return torch.stack(trace).unbind(1)


def tabulate(rows: list[dict], name: str, toy: Toy, w: Tensor, w_hat: Tensor) -> None:
    """Prints the row of a setting, the first one under a heading, and appends it to rows."""
    law = predict(toy, w_hat[toy.onset].item() if len(w) > toy.onset else None)
    row = {key: (cell.item(), law[key]) for key, cell in measure(toy, w, w_hat).items()}
    if not rows:
        print("\nMeasured (predicted; exact for STE, x = 1, no cure, lr <= 1/2). Frequency: cycles "
              "an iteration.\nHeight: of a swing of w. Last q(w): _ lower point, # upper point.\n\n"
              + " " * 14, *(f"{key:20}" for key in row), "last q(w)")
    pairs = (f"{got:.4g} ({predicted:.4g})" for got, predicted in row.values())
    strip = "".join("_#"[up] for up in (w_hat[-20:] > toy.threshold).int())
    print(f"{name:14}", *(f"{pair:20}" for pair in pairs), strip, flush=True)
    if law["frequency"] and not row["frequency"][0]:
        print("w is still on its way: raise --steps or --lr")
    rows.append({"setting": name, **row, "q(w)": strip})


# ---- Figures 1, 5 and 6, and a picture that moves ------------------------------------------------
def draw_weight(panel, toy: Toy, title: str) -> list[tuple]:
    """Draws the course of w and q(w); returns both lines, each with its trace."""
    w, w_hat = simulate(**asdict(toy))
    low, _, high = levels = [toy.lower.item() + toy.scale * i / 2 for i in range(3)]
    panel.hlines(levels, 0, toy.steps, "gray", ["-", ":", "-"], lw=1)
    panel.hlines(toy.target, 0, toy.steps, "tab:green", "--", label="w*, where training wants w")
    lines = panel.step(range(toy.steps), w_hat, "tab:orange", where="post", lw=0.8,
                       label="q(w), what the network uses")
    lines += panel.plot(w, "tab:blue", label="w, the latent weight")
    panel.set_yticks(levels, [f"grid point {low:.4g}", "threshold", f"grid point {high:.4g}"])
    panel.set(title=title, xlabel="iteration")
    return list(zip(lines, (w_hat, w)))


def draw_figures(figure, toy: Toy) -> None:
    """Figure 1 above (STE, EWGS, DSQ), Figures 5 and 6 below."""
    panels = figure.subplot_mosaic([["ste"] * 2 + ["ewgs"] * 2 + ["dsq"] * 2, [5] * 3 + [6] * 3])
    for name in ("ste", "ewgs", "dsq"):
        draw_weight(panels[name], Toy(toy.target, toy.scale, toy.lr, 120, name),
                    f"Fig. 1: {name.upper()}, lr = {toy.lr:g}")
        panels[name].tick_params(labelleft=name == "ste")
    figure.legend(*panels["ste"].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    share = torch.linspace(0.02, 0.5, 25, dtype=torch.float64)
    panels[5].plot(share, share, "gray", lw=1, label="d / s")
    for name, marker in zip(ESTIMATORS, "o+x.^sDv" * len(ESTIMATORS)):
        many = Toy(toy.lower + toy.scale * share, toy.scale, toy.lr, 1500, name,
                   start=toy.threshold.expand(len(share)))
        frequency = measure(many, *simulate(**asdict(many)))["frequency"]
        panels[5].plot(share, frequency, marker, fillstyle="none", label=name.upper())
    panels[5].set(title=f"Fig. 5, lr = {toy.lr:g}", xlabel="d / s", ylabel="cycles an iteration")
    for lr in (toy.lr, toy.lr / 3, toy.lr / 10):
        w, _ = simulate(toy.target, toy.scale, lr, steps=60, start=toy.threshold)
        panels[6].plot((w - toy.threshold) / toy.scale, lw=1, label=f"lr = {lr:.2g}")
    panels[6].set(title="Fig. 6: STE", xlabel="iteration", ylabel="(w - threshold)/s", ymargin=0.3)
    panels[5].legend()
    panels[6].legend(ncols=3)


def draw_cures(figure, toy: Toy, steps: int) -> list[tuple]:
    """One weight under STE, with dampening, with freezing; returns the lines with their traces."""
    offset = toy.w_star - toy.threshold  # w starts at w*, but at most 15 steps from the threshold
    way = 15 * toy.lr * (toy.scale / 2 - offset.abs())
    toy = Toy(toy.target, toy.scale, toy.lr, steps, cure_after=steps // 2,
              start=toy.threshold + offset.clamp(-way, way))
    panels, lines = figure.subplots(1, 3, sharey=True), []
    for panel, (name, cure) in zip(panels, {"STE": {}, **CURES}.items()):
        lines += draw_weight(panel, replace(toy, **cure), f"{name}: swings for ever")
        for (line, _), size in zip(lines[-2:], (10, 6)):
            line.set(marker="o", markersize=size, markevery=[-1])
        law = predict(replace(toy, **cure), lines[-2][1][steps // 2].item() if cure else None)
        if not law["frequency"]:
            rests = "pinned to" if name == "freezing" else "rests on"
            panel.set_title(f"{name}: {rests} {law['mean q(w)']:.4g}")
        if cure:
            panel.axvspan(toy.cure_after, steps, color="#ffffcc", lw=0)
            panel.text(steps / 2 + 1, toy.lower + 0.9 * toy.scale, f"{name} on", size=9)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return lines


def plot(toy: Toy, path: Path, steps: int = 60) -> None:
    """Writes draw_figures or, into a .gif, draw_cures: it moves, an iteration a frame."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    from PIL import Image, ImageSequence
    if path.suffix.lower() != ".gif":
        Figure().savefig(path)  # tells a bad path before the drawing, which takes seconds
        draw_figures(figure := Figure((10, 6.5), layout="constrained"), toy)
        return figure.savefig(path, dpi=100)
    path.open("ab").close()
    lines = draw_cures(figure := Figure((8, 3.6), layout="constrained"), toy, steps)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # else each frame has a slightly different one
    with (writer := PillowWriter()).saving(figure, path, dpi=100):
        for t in range(1, steps + 1):
            for line, trace in lines:
                line.set_data(range(t), trace[:t])
            writer.grab_frame()
    # The writer gives each frame colours of its own. Shared, they store once what does not move.
    with Image.open(path) as gif:
        frames = [f.convert("RGB").convert("P", dither=0) for f in ImageSequence.Iterator(gif)]
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                   duration=[100] * (steps - 1) + [3000])  # ms


# ---- Command line --------------------------------------------------------------------------------
def parse(argv: list[str] | None) -> tuple[Toy, argparse.Namespace]:
    """The setting and all flags; exits with status 2 and one line where one of them is bad."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, message.removeprefix("argument ") + "\n")
    for name, kind, default, text in (
            ("target", float, 0.127, "w*, from -0.8 to 0.7; s is 0.1"),
            ("lr", float, 0.1, "learning rate; about 0.1 shows the swing to the eye"),
            ("steps", int, 2000, "iterations"),
            ("estimator", str, "ste", f"gradient estimator: {', '.join(ESTIMATORS)}"),
            ("dampening", float, 0.0, "lambda of Eq. 5; d/s or more brings w to rest"),
            ("freeze-threshold", float, None, "f_th of Algorithm 1: below 2 d/s it freezes w"),
            ("cure-after", int, 500, "iteration from which dampening and freezing act"),
            ("plot", Path, None, "first draw Figures 1, 5 and 6 or, into a .gif, both cures"),
            ("json", Path, None, "write what the table prints into this file")):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default})")
    parser.add_argument("--compare", action="store_true", help="estimators, random x and cures")
    args = parser.parse_args(argv)
    try:
        toy = Toy(args.target, 0.1, args.lr, args.steps, args.estimator, args.dampening,
                  args.freeze_threshold, args.cure_after)
        if args.json:
            args.json.open("a").close()
        if args.plot:
            plot(toy, args.plot)
    except ImportError:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return toy, args


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status. Ctrl-C ends it with the table so far."""
    rows = []
    try:
        toy, args = parse(argv)
        if args.compare:
            plain = replace(toy, estimator="ste", dampening=0.0, freeze_threshold=None)
            variants = {name: replace(plain, estimator=name) for name in ESTIMATORS}
            variants["ste, random x"] = replace(plain, noise=True)
            variants |= {f"ste, {name}": replace(plain, **cure) for name, cure in CURES.items()}
        else:
            w, w_hat = watch(toy)
            tabulate(rows, f"lr = {toy.lr:g}", toy, w, w_hat)
            variants = {f"lr = {lr:g}": replace(toy, lr=lr, start=toy.threshold)
                        for lr in (toy.lr / 10, toy.lr / 100) if len(w) == toy.steps}  # Figure 6
        for name, variant in variants.items():
            tabulate(rows, name, variant, *simulate(**asdict(variant)))
    except KeyboardInterrupt:
        print("--- interrupted")
    if rows and args.json:
        args.json.write_text(json.dumps({"settings": vars(args), "table": rows}, default=str))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
