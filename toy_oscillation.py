"""Watch a quantized weight oscillate: section 2.2 (Eq. 3), Figures 1, 5 and 6, appendix A.

    python toy_oscillation.py                    draws one weight; measured against predicted
    python toy_oscillation.py --compare          all estimators, random x and both cures
    python toy_oscillation.py --plot FILE        .png: Figures 1, 5, 6; .gif: both cures, moving

Why does w swing? Training wants w*, which lies between two grid points. The network computes with
q(w), the grid point nearest to an exact, "latent" weight w. While w rounds down, q(w) is too small,
and the gradient pushes w up. It does not get weaker on the way, since q(w) does not change. Past
the threshold halfway, q(w) is too large. The gradient changes its sign, pushes w back, and so on.

How often? w* lies d from its near grid point and s - d from the far one; s is the grid's step. With
learning rate lr, an iteration on the near side moves w by lr d, towards the threshold. A single one
on the far side moves w back by lr (s - d), which is more. To make up for it, w needs (s - d) / d
iterations on average. So a cycle lasts 1 + (s - d) / d = s / d iterations: the frequency is d / s
for every lr. The height of a swing is lr (s - d). q(w) is the far point in a share d / s of the
iterations, so that its mean is w*.

What stops it? Dampening (Eq. 5) pulls w back to the grid point in use, hardest at the threshold: by
lr lambda s. A point holds w if this pull is stronger than training's, lr d or lr (s - d):
    lambda below d / s         neither point holds w; it swings, but less often
    from d / s to 1 - d / s    the near point holds w: q(w) rests on it
    above 1 - d / s            both do: q(w) rests on the one in use when dampening sets in
Freezing (Algorithm 1) pins w to the point that was in use most of the time: the near one.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from osc_qat import ESTIMATORS, OscillationTracker, dampening_loss, quantize_model

BITS, INT_MIN, INT_MAX = 4, -8, 7  # more bits are not tracked or dampened; grid -8 s .. 7 s
MOMENTUM = 0.01  # m of f_t and EMA(w_int): they settle in 500 iterations; 0.001 takes 5000
CURES = {"dampening": {"dampening": 1.0}, "freezing": {"freeze_threshold": 0.02}}
WIDTH, ROWS = 51, 40  # columns from grid point to grid point, odd; lines drawn of a phase


# ---- Section 2.2, Eq. 3: the regression ----------------------------------------------------------
@dataclass
class Toy:
    """One setting of the regression. ValueError, beginning with the flag's name, if it is bad."""
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
        # The grid point below w*, and the position of w* from there (0) to the next point (1).
        self.lower = self.scale * (self.w_star / self.scale).floor().clamp(INT_MIN, INT_MAX - 1)
        self.bin_position = ((self.w_star - self.lower) / self.scale).round(decimals=9)
        self.threshold = self.lower + self.scale / 2
        cures = self.dampening or self.freeze_threshold is not None
        self.onset = self.cure_after if cures else math.inf
        for name, good, rule in (
                ("scale", 1e-6 <= self.scale <= 1e6, "from 1e-6 to 1e6"),
                ("target", ((self.bin_position - 0.5).abs() <= 0.5).all(), "from -8 s to 7 s"),
                ("lr", 0 < self.lr <= 1000, "above 0, and 1000 or less"),
                ("steps", self.steps >= 1, "1 or more"),
                ("estimator", self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
                ("lambda", 0 <= self.dampening <= 1000, "from 0 (off) to 1000"),
                ("threshold", 0 <= (self.freeze_threshold or 0) < 1, "from 0 to below 1"),
                ("cure-after", self.cure_after >= 0, "0 or more")):
            if not good:
                raise ValueError(f"{name} must be {rule}")


def oscillate(toy: Toy):
    """Trains K independent weights; yields w and q(w) before each step: (K,)."""
    network = nn.Sequential(nn.Linear(1, toy.w_star.numel(), bias=False))
    model = quantize_model(network, BITS, first_last_bits=BITS, estimator=toy.estimator)
    layer = model.double()[0]  # since the predictions hold to many digits
    layer.weight_quantizer.scale.requires_grad_(False).fill_(toy.scale)
    start = toy.lower + toy.scale * toy.bin_position.round() if toy.start is None else toy.start
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
    """Returns frequency, mean and height of traces, (T,) or (T, K), once all swing or are cured."""
    skip = ((toy.onset + len(w)) // 2 if len(w) > toy.onset else
            (w_hat != w_hat[0]).int().argmax(0).max())
    w, w_hat = w[skip:], w_hat[skip:]
    flips = (w_hat.diff(dim=0) != 0).sum(0)
    # Height: the length of w's path divided by its number of reversals (its range settles slowly).
    return {"frequency": flips / 2 / max(len(w) - 1, 1), "mean q(w)": w_hat.mean(0),
            "height": w.diff(dim=0).abs().sum(0) * (flips > 0) / flips.clamp(min=1)}


def predict(toy: Toy, at_onset: float | None = None) -> dict[str, float]:
    """Predicts one weight: exact for STE, x = 1, lr <= 1/2, no cure; else for a small lr.

    at_onset is q(w) in iteration cure_after, when f_t and EMA(w_int) have settled; None = no cure.
    DSQ and PSG are slower at d = s/2 for every lr: a step back often ends before the threshold.
    """
    up, cured = toy.bin_position.item(), at_onset is not None
    d, near = min(up, 1 - up), round(up)  # d and points count in s, points from the lower one
    used = round((at_onset - toy.lower.item()) / toy.scale) if cured else near
    # All estimators multiply the gradient; what counts is the factor at the threshold.
    factor = -ESTIMATORS[toy.estimator](-torch.ones(1), torch.ones(1) / 2).item()
    pull = toy.dampening / max(factor, 1e-9) if cured else 0.0
    f = height = 0.0
    # A cycle has two reversals. f_t fluctuates around 2 d/s, so it passes an f_th of just that.
    if cured and toy.freeze_threshold is not None and 2 * d >= toy.freeze_threshold:
        point = math.nan if d == 0.5 else near  # halfway, no point is nearer: it can be either
    elif d <= pull:  # q(w) moves towards w* and stops at the first point within lambda s of it
        point = min(max(used, math.ceil(up - pull)), math.floor(up + pull))
    else:  # dampening shortens each step by lr lambda s
        f = (d - pull) / (1 - 2 * pull)
        point = abs(near - f)  # on average
        height = toy.lr * toy.scale * factor * (1 - d - pull)
    return {"frequency": f, "mean q(w)": toy.lower.item() + toy.scale * point, "height": height}


# ---- In the terminal -----------------------------------------------------------------------------
def watch(toy: Toy) -> tuple[Tensor, Tensor]:
    """Draws the run while it goes; returns the traces w, q(w): (T,)."""
    trace, zoom, last, line = [], 1, math.inf, ""  # last: the iteration after the last one drawn
    print(f"w* = {toy.target:.5g}, grid points {toy.lower:.4g} and {toy.lower + toy.scale:.4g}\n"
          "o latent weight w   # grid point in use, q(w)   : threshold   left: iteration\n"
          "--- travel: the gradient pushes w one way only")
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
            print(f"{t:6d}  {line}")
            time.sleep(0.08 * sys.stdout.isatty())
    print(f"--- {toy.steps} iterations done")
    return torch.stack(trace).unbind(1)


def tabulate(rows: list[dict], name: str, toy: Toy, w: Tensor, w_hat: Tensor) -> None:
    """Prints the row of a setting, the first one under a heading, and appends it to rows."""
    law = predict(toy, w_hat[toy.onset].item() if len(w) > toy.onset else None)
    row = {key: (cell.item(), law[key]) for key, cell in measure(toy, w, w_hat).items()}
    if not rows:
        print("\nMeasured (predicted; exact for STE, x = 1, no cure, lr <= 1/2). Frequency: cycles "
              "per iteration.\nHeight: of a swing of w. Last q(w): _ lower, # upper point.\n\n"
              + " " * 14, *(f"{key:20}" for key in row), "last q(w)")
    pairs = (f"{got:.4g} ({predicted:.4g})".replace("nan", "either")
             for got, predicted in row.values())
    strip = "".join("_#"[up] for up in (w_hat[-20:] > toy.threshold).int())
    print(f"{name:14}", *(f"{pair:20}" for pair in pairs), strip)
    if law["frequency"] and not row["frequency"][0]:
        print("w is still on its way: raise --steps or --lr")
    rows.append({"setting": name, **row, "q(w)": strip})


# ---- Figures 1, 5 and 6, and a picture that moves ------------------------------------------------
def draw_weights(figure, toys: dict[str, Toy]) -> list[tuple]:
    """Draws w, from up to 15 STE steps before the threshold on, and q(w); returns lines, traces."""
    lines = []
    for panel, (name, toy) in zip(figure.subplots(1, len(toys), sharey=True), toys.items()):
        way = (15 * toy.lr * (toy.bin_position.round() - toy.bin_position)).clamp(-0.4, 0.4)
        w, w_hat = simulate(**asdict(replace(toy, start=toy.threshold + toy.scale * way)))
        low, _, high = levels = [toy.lower.item() + toy.scale * i / 2 for i in range(3)]
        panel.hlines(levels, 0, toy.steps, "gray", ["-", ":", "-"], lw=1)
        panel.hlines(toy.target, 0, toy.steps, "tab:green", "--", label="w*, what training wants")
        line, = panel.step(range(toy.steps), w_hat, "o-", c="tab:orange", where="post", lw=0.8,
                           ms=10, markevery=[-1], label="q(w), what the network uses")
        latent, = panel.plot(w, "o-", c="tab:blue", markevery=[-1], label="w, the latent weight")
        lines += (line, w_hat), (latent, w)
        panel.set_yticks(levels, [f"grid point {low:.4g}", "threshold", f"grid point {high:.4g}"])
        panel.set(label=name, title=name, xlabel="iteration")
        if toy.onset < toy.steps:
            panel.axvspan(toy.onset, toy.steps, color="#ffffcc", lw=0)
            panel.text(toy.onset + 1, toy.lower + 0.9 * toy.scale, f"{name} on", size=9)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return lines


def draw_figures(figure, toy: Toy) -> None:
    """Draws Figure 1, with PSG added, above and Figures 5 and 6 below."""
    above, below = figure.subfigures(2)
    draw_weights(above, {
        "PSG (not in Fig. 1)" if name == "psg" else f"Fig. 1: {name.upper()}, lr = {toy.lr:g}":
        Toy(toy.target, toy.scale, toy.lr, 90, name) for name in ("ste", "ewgs", "dsq", "psg")})
    often, high = below.subplots(1, 2)
    share = torch.linspace(0.02, 0.5, 25, dtype=torch.float64)
    often.plot(share, share, "gray", lw=1, label="d / s, predicted")
    many = Toy(toy.lower + toy.scale * share, toy.scale, toy.lr, 1500, start=toy.threshold)
    for name, marker in zip(ESTIMATORS, "o+xs^Dv*" * len(ESTIMATORS)):
        frequency = measure(many, *simulate(**asdict(replace(many, estimator=name))))["frequency"]
        often.plot(share, frequency, marker, fillstyle="none", label=name.upper())
    often.set(title=f"Fig. 5, lr = {toy.lr:g}", xlabel="d / s", ylabel="cycles an iteration")
    below.supxlabel("Fig. 5: DSQ's and PSG's steps are longest at the threshold. Shorter ones lead "
                    "back: longer cycles. A small lr removes this, but not at d / s = 0.5.", size=9)
    for lr in (toy.lr, toy.lr / 3, toy.lr / 10):
        w, _ = simulate(toy.target, toy.scale, lr, steps=60, start=toy.threshold)
        high.plot((w - toy.threshold) / toy.scale, lw=1, label=f"lr = {lr:.2g}")
    high.set(title="Fig. 6: STE", xlabel="iteration", ylabel="(w - threshold) / s", ymargin=0.3)
    often.legend()
    high.legend(ncols=3)


def plot(toy: Toy, path: Path, steps: int = 72) -> None:
    """Writes draw_figures or, if path ends in .gif, draw_cures. Ignores the user's matplotlibrc."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        if path.suffix.lower() == ".gif":
            path.open("ab").close()  # raises for a bad path before the drawing
            toy = Toy(toy.target, toy.scale, toy.lr, steps, cure_after=steps // 2)
            frames = draw_cures(Figure((8, 3.6), layout="constrained"), toy)
            frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                           duration=[100] * (steps - 1) + [3000])  # ms
        else:
            Figure().savefig(path, format=path.suffix[1:])  # raises for a bad path, too
            draw_figures(figure := Figure((10, 6.5), layout="constrained"), toy)
            figure.savefig(path, dpi=100)


def draw_cures(figure, toy: Toy) -> list:
    """Draws one weight with and without cures; returns a PIL image per iteration."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image
    cured = {name: replace(toy, **cure) for name, cure in CURES.items()}
    canvas = FigureCanvasAgg(figure)
    lines, frames = draw_weights(figure, {"no cure": toy} | cured), []
    canvas.draw()
    figure.set_layout_engine("none")  # else each frame has a slightly different layout
    for t in range(1, toy.steps + 1):
        for line, trace in lines:
            line.set_data(range(t), trace[:t])
        canvas.draw()
        frame = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
        frames.append(frame.convert("RGB").convert("P", dither=0))  # all with the same colors
    return frames


# ---- Command line --------------------------------------------------------------------------------
def parse(argv: list[str] | None) -> tuple[Toy, argparse.Namespace]:
    """Returns the setting and all flags; if a flag is bad, exits with status 2 and one line."""
    parser = argparse.ArgumentParser(
        description="Watch a quantized weight oscillate, then compare it with the predictions.",
        epilog="examples: --target 0.1; --lambda 1; --threshold 0.02; --plot figures.png")
    parser.error = lambda message: parser.exit(2, message.removeprefix("argument ") + "\n")
    for flag, kind, default, text in (
            ("target", float, 0.127, "optimum w*, from -0.8 to 0.7; the grid has step s = 0.1"),
            ("lr", float, 0.1, "learning rate; 0.01 and less make the swing hard to see"),
            ("steps", int, 2000, "number of iterations"),
            ("estimator", str, "ste", f"gradient estimator: {', '.join(ESTIMATORS)}"),
            ("lambda", float, 0.0, "strength of dampening (Eq. 5); d/s or more stops the swing"),
            ("threshold", float, None, "f_th of freezing (Algorithm 1); 2 d/s or less freezes w"),
            ("cure-after", int, 500, "iteration from which dampening or freezing acts"),
            ("plot", Path, None, "picture to write: .png of Figures 1, 5, 6 or .gif of both cures"),
            ("json", Path, None, "file to write the table into")):
        text += "" if default is None else f" (default {default})"
        parser.add_argument(f"--{flag}", type=kind, default=default, help=text)
    parser.add_argument("--compare", action="store_true",
                        help="instead of one weight, a table of all estimators, random x and cures")
    args = parser.parse_args(argv)
    try:
        toy = Toy(args.target, 0.1, args.lr, args.steps, args.estimator, vars(args)["lambda"],
                  args.threshold, args.cure_after)
    except ValueError as error:
        parser.error(f"--{error}")
    return toy, args


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status. Ctrl-C ends it with the rows so far."""
    rows = []
    try:
        toy, args = parse(argv)
        if args.json:
            args.json.open("a").close()  # raises for a bad path before the work
        if args.plot:
            os.environ.pop("MPLBACKEND", None)  # an unknown one would stop the import
            plot(toy, args.plot)
        if args.compare:
            plain = replace(toy, estimator="ste", dampening=0.0, freeze_threshold=None)
            variants = {name: replace(plain, estimator=name) for name in ESTIMATORS}
            for name, more in {"random x": {"noise": True}, **CURES}.items():
                variants[f"ste, {name}"] = replace(plain, **more)
        else:
            tabulate(rows, f"lr = {toy.lr:g}", toy, *watch(toy))
            variants = {f"lr = {lr:g}": replace(toy, lr=lr, start=toy.threshold)
                        for lr in (toy.lr / 10, toy.lr / 100)}  # Figure 6
        for name, variant in variants.items():
            tabulate(rows, name, variant, *simulate(**asdict(variant)))
        if args.json:
            args.json.write_text(json.dumps({"settings": vars(args), "table": rows}, default=str))
    except KeyboardInterrupt:
        print("--- interrupted")
    except BrokenPipeError:  # `| head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ImportError, OSError, ValueError) as error:
        print(f"cannot write the results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with open(os.devnull, "w") as nowhere:  # replaces a stream that the shell has closed (None)
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
        sys.stdout.reconfigure(line_buffering=True)  # prints lines at once into files and pipes too
        sys.exit(main())
