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
those shares the mean of q(w) is w*. The swing is one step up plus one step down: lr s.

Nothing of the method is copied here: the weight is a one-weight network from `quantize_model`, with
the real `dampening_loss` and `OscillationTracker`. Only the predictions are our own.
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

from osc_qat import (ESTIMATORS, MIN_SCALE, OscillationTracker, Quantizer, dampening_loss,
                     quantize_model)

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
        lowest, highest, slack = INT_MIN * self.scale, INT_MAX * self.scale, 1e-9 * self.scale
        inside = (self.w_star >= lowest - slack) & (self.w_star <= highest + slack)
        f_th = self.freeze_threshold
        for name, good, what in (
                ("scale", MIN_SCALE <= self.scale < math.inf,
                 f"be {MIN_SCALE:.2g} or more, and finite"),
                ("target", inside.all(),
                 f"lie on the grid, {lowest:.4g} to {highest:.4g} at scale {self.scale:g}"),
                ("lr", 0 < self.lr < math.inf, "be above 0 and finite"),
                ("steps", self.steps >= 1, "be 1 or more"),
                ("estimator", self.estimator in ESTIMATORS, f"be one of {', '.join(ESTIMATORS)}"),
                ("dampening", 0 <= self.dampening < math.inf, "be 0 (off) or more, and finite"),
                ("freeze_threshold", f_th is None or 0 <= f_th < 1, "be 0 or more and below 1"),
                ("cure_after", self.cure_after >= 0, "be 0 or more"),
                ("seed", 0 <= self.seed < 2**63, "be 0 or more and below 2^63")):
            if not good:
                raise ValueError(f"{name} must {what}, not {getattr(self, name)}")

    @property
    def w_star(self) -> Tensor:
        return torch.as_tensor(self.target, dtype=torch.float64)

    @property
    def lower(self) -> Tensor:
        """The lower of the two grid points around w*."""
        return self.scale * (self.w_star / self.scale).floor().clamp(max=INT_MAX - 1)

    @property
    def threshold(self) -> Tensor:
        return self.lower + self.scale / 2

    @property
    def d(self) -> Tensor:
        """Distance of w* from its nearer grid point; below 1e-9 s it is but a rounding error."""
        d = torch.minimum(self.w_star - self.lower, self.lower + self.scale - self.w_star)
        return torch.where(d > 1e-9 * self.scale, d, 0)

    def cured(self, iterations: int) -> bool:
        """Whether dampening or freezing has acted after so many iterations."""
        cures = self.dampening > 0 or self.freeze_threshold is not None
        return cures and iterations > self.cure_after


def oscillate(toy: Toy) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Trains K independent weights; yields w, q(w) and the tracker's f_t in each iteration: (K,).

    In float64, so that the predictions can be held to their last digits.
    """
    w_star, generator = toy.w_star.reshape(-1, 1), torch.Generator().manual_seed(toy.seed)
    network = nn.Sequential(nn.Linear(1, len(w_star), bias=False))
    model = quantize_model(network, BITS, first_last_bits=BITS, estimator=toy.estimator).double()
    layer = model[0]
    layer.weight_quantizer.scale.requires_grad_(False).fill_(toy.scale)
    start = layer.weight_quantizer(w_star) if toy.start is None else torch.as_tensor(toy.start)
    layer.weight.data.copy_(start.reshape(-1, 1))
    optimizer, tracker = torch.optim.SGD([layer.weight], toy.lr), OscillationTracker(model)
    x = torch.ones(1, 1, dtype=torch.float64)
    for t in range(toy.steps):
        if toy.noise:
            x = torch.randn(1, 1, generator=generator, dtype=torch.float64)
        w, w_hat = layer.weight.detach().clone(), layer.weight_hat().detach()
        # min_w E_x[ 1/2 (x w* - x q(w))^2 ]                                                   Eq. 3
        loss = (x * w_star.T - model(x)).square().sum() / 2
        if toy.dampening and t >= toy.cure_after:
            loss = loss + toy.dampening * dampening_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tracker.step(toy.freeze_threshold if t >= toy.cure_after else None)
        yield w.flatten(), w_hat.flatten(), tracker.frequency()["0"].flatten()


def simulate(target: float | Tensor, scale: float = 0.1, lr: float = 0.01, steps: int = 2000,
             estimator: str = "ste", dampening: float = 0.0,
             freeze_threshold: float | None = None, **more) -> tuple[Tensor, Tensor]:
    """Traces of the latent and of the quantized weight: (w, w_hat); w[t] is w before step t.

    Args:
        target: w*, from -8 s to 7 s; or a tensor of K, for K independent weights.
        scale: step size s of the grid, > 0; it is not trained.
        lr: learning rate of plain SGD, > 0. Up to 1 the predictions of this file hold exactly.
        steps: iterations, >= 1.
        estimator: name in ESTIMATORS.
        dampening: lambda of Eq. 5, >= 0.
        freeze_threshold: f_th of Algorithm 1, in 0..1; None = no freezing.
        more: `cure_after` (0): iteration from which dampening and freezing act; `noise` (False):
            x is drawn from N(0, 1), the same for all K, and not 1; `seed` (0) of that x; `start`
            (None): first latent weight, one or K; None = the grid point nearest to w*.
    Returns:
        Two float64 tensors of shape (steps,), or (steps, K) for a tensor of K targets.
    Raises:
        ValueError: for a value outside these ranges; the message begins with the argument's name.
    """
    toy = Toy(target, scale, lr, steps, estimator, dampening, freeze_threshold, **more)
    w, w_hat, _ = (torch.stack(column) for column in zip(*oscillate(toy)))
    shape = (steps, *toy.w_star.shape)
    return w.reshape(shape), w_hat.reshape(shape)


# --------------------------------------------------------------------------------------------------
# Appendix A.2 and A.3: measured and predicted
# --------------------------------------------------------------------------------------------------


def measure(toy: Toy, w: Tensor, w_hat: Tensor) -> dict[str, Tensor] | None:
    """What the traces (T,) or (T, K) do without their transient; None where nothing is left.

    The transient ends where the last of the weights crosses a threshold, or where a cure acts,
    halfway from there to the end.
    """
    before = ((w_hat != w_hat[:1]).cumsum(0) == 0).sum(0)  # iterations until each first crosses
    skip = int(torch.where(toy.d > 0, before, 0).max())
    if toy.cured(len(w)):
        skip = (toy.cure_after + len(w)) // 2
    w, w_hat = w[skip:], w_hat[skip:]
    return None if len(w) < 2 else {
        "frequency": (w_hat[1:] != w_hat[:-1]).sum(0) / 2 / (len(w) - 1),
        "upper": (w_hat > toy.threshold).double().mean(0), "mean": w_hat.mean(0),
        "swing": w.amax(0) - w.amin(0), "w": w.mean(0)}


def predict(toy: Toy, cured: bool = False) -> dict[str, float]:
    """What a weight does: exact for STE, x = 1, lr <= 1; to first order in lr otherwise.

    Dampening adds a pull to the grid point in use, lambda s at the threshold. Below d/s that leaves
    (d/s - lambda) / (1 - 2 lambda) cycles an iteration. From d/s on it lets w rest where the pulls
    cancel, and from 1 - d/s on beside the farther point too, if w happens to be there.
    """
    lower, w_star, f = toy.lower.item(), toy.w_star.item(), toy.d.item() / toy.scale
    nearer = lower if w_star < lower + toy.scale / 2 else lower + toy.scale
    pull = toy.dampening if cured else 0.0
    frozen = cured and toy.freeze_threshold is not None and 2 * f > toy.freeze_threshold
    factor, rest = 0.0, {}
    if frozen or pull and pull >= f:
        rest = {"w": nearer if frozen else nearer + (w_star - nearer) / (2 * pull)}
        f = 0.0
    elif f:
        # The estimator's factor at the threshold; below it g < 0, and a half rounds down to 0.
        factor = -ESTIMATORS[toy.estimator](-torch.ones(1), torch.ones(1) / 2).item() - 2 * pull
        f = (f - pull) / (1 - 2 * pull)
    mean = nearer + math.copysign(f * toy.scale, w_star - nearer)
    return {"frequency": f, "upper": f if nearer == lower else 1 - f, "mean": mean,
            "swing": toy.lr * toy.scale * factor, **rest}


# --------------------------------------------------------------------------------------------------
# In the terminal
# --------------------------------------------------------------------------------------------------


def draw(toy: Toy, t: int, w: float, w_hat: float, zoom: int, live: bool) -> str:
    """One iteration as a line of 75 columns; in colour where live."""
    column = (WIDTH - 1) / 2 + zoom * (WIDTH - 1) * (w - toy.threshold.item()) / toy.scale
    cells = [" "] * WIDTH
    cells[WIDTH // 2] = ":"
    mark = "<" if column < -0.5 else ">" if column > WIDTH - 0.5 else "o"
    cells[min(max(round(column), 0), WIDTH - 1)] = mark
    upper = w_hat > toy.threshold
    line = f"{t:6d}  {'#|'[upper]}{''.join(cells)}{'|#'[upper]}  q(w) = {w_hat:.4g}"
    return f"\033[{33 if upper else 36}m{line}\033[0m" if live else line


def watch(toy: Toy) -> list[Tensor]:
    """Draws the run while it goes, up to Ctrl-C; returns the traces w, q(w), f_t so far: (T,)."""
    live, trace, arrived, zoom = sys.stdout.isatty(), [], toy.steps, 1
    # The way from the grid point to the threshold is s/2 long, in steps of lr d times the factor.
    u = torch.linspace(0, 0.5, 200)
    slowness = (1 / ESTIMATORS[toy.estimator](-torch.ones_like(u), u).abs()).mean().item()
    travel = slowness * 0.5 * toy.scale / max(toy.lr * toy.d.item(), sys.float_info.min)
    every = math.ceil(min(travel, toy.steps) / TRAVEL_ROWS)
    lower, upper = toy.lower.item(), toy.lower.item() + toy.scale
    print(f"w* = {toy.target:.5g} lies between the grid points {lower:.4g} and {upper:.4g}, d/s = "
          f"{toy.d.item() / toy.scale:.4g}\n# grid point in use   : threshold   o latent weight\n"
          f"--- travel: the gradient pushes one way only (iterations a line: {every})")
    try:
        for t, (w, w_hat, f) in enumerate(oscillate(toy)):
            trace.append(torch.cat([w, w_hat, f]))
            if arrived == toy.steps and w_hat != trace[0][1]:
                arrived, zoom = t, 10 ** max(0, round(math.log10(0.1 / toy.lr)))
                print("--- swing: beyond the threshold it turns round (iterations a line: 1)"
                      + f", magnified {zoom} times" * (zoom > 1))
            cure_rows = range(toy.cure_after, toy.cure_after + SWING_ROWS * toy.cured(t + 1))
            if cure_rows and t == toy.cure_after:
                print("--- cure: dampening or freezing sets in (iterations a line: 1)")
            if t in cure_rows or (t % every == 0 if t < arrived else t < arrived + SWING_ROWS):
                print(draw(toy, t, w.item(), w_hat.item(), zoom, live), flush=True)
                time.sleep(PAUSE * live)
    except KeyboardInterrupt:
        print("--- interrupted", end=" ")
    print(f"--- {len(trace)} of {toy.steps} iterations done\n")
    return list(torch.stack(trace).unbind(1)) if trace else [torch.zeros(0)] * 3


def report(toy: Toy, w: Tensor, w_hat: Tensor, f: Tensor) -> Iterator[dict]:
    """Prints the table of measured against predicted, and yields its rows."""
    got, law = measure(toy, w, w_hat), predict(toy, toy.cured(len(w)))
    if got is None:
        print(f"w crossed no threshold in {len(w)} iterations: raise --steps or --lr")
        return
    lower = toy.lower.item()
    rows = [("frequency, cycles an iteration (d/s)", got["frequency"], law["frequency"]),
            (f"share of time on {lower:.4g}", 1 - got["upper"], 1 - law["upper"]),
            (f"share of time on {lower + toy.scale:.4g}", got["upper"], law["upper"]),
            (f"mean of q(w) (w* = {toy.target:.5g})", got["mean"], law["mean"]),
            ("swing of w, max - min (up to lr s)", got["swing"], law["swing"]),
            # Eq. 4 counts each change of direction, and a cycle has two.
            ("w at rest", got["w"], law["w"]) if "w" in law else
            ("f_t of Eq. 4 at the end (2 d/s)", f[-1], 2 * law["frequency"])]
    print(f"{'without the transient':38s}{'measured':>12s}{'predicted':>12s}")
    for name, measured, predicted in rows:
        print(f"{name:38s}{measured:12.5g}{predicted:12.5g}")
        yield {"quantity": name, "measured": float(measured), "predicted": predicted}
    if law["frequency"] and (toy.noise or toy.estimator != "ste" or toy.lr > 1):
        frequency, swing = (got[name] / law[name] for name in ("frequency", "swing"))
        print(f"Predictions are exact for STE, x = 1, lr up to 1 only. Here: {frequency:.3f} times "
              f"the frequency,\n{swing:.3f} times the swing, and a mean of q(w) that is off by "
              f"{100 * (got['mean'] - law['mean']) / toy.scale:.3f} % of s.")


def learning_rates(toy: Toy) -> Iterator[dict]:
    """Figure 6, A.3: prints frequency and swing at lr, lr/10 and lr/100, and yields the rows."""
    print("\nlearning rate    frequency    predicted        swing    predicted")
    for lr in (toy.lr, toy.lr / 10, toy.lr / 100):
        # From the threshold, since the way to it takes 1/lr iterations.
        part = replace(toy, lr=lr, steps=1000, start=toy.threshold)
        got, law = measure(part, *simulate(**vars(part))), predict(part)
        row = {"lr": lr,
               "frequency": got["frequency"].item(), "predicted_frequency": law["frequency"],
               "swing": got["swing"].item(), "predicted_swing": law["swing"]}
        print("".join(f"{value:13.4g}" for value in row.values()), flush=True)
        yield row


def compare(toy: Toy) -> Iterator[dict]:
    """Prints all estimators, random x and both cures on the same weight, and yields the rows."""
    plain = replace(toy, estimator="ste", noise=False, dampening=0.0, freeze_threshold=None)
    f_th = FREEZE_THRESHOLD if toy.freeze_threshold is None else toy.freeze_threshold
    variants = {name: replace(plain, estimator=name) for name in ESTIMATORS}
    variants |= {"ste, random x": replace(plain, noise=True),
                 "ste, dampening": replace(plain, dampening=toy.dampening or DAMPENING),
                 "ste, freezing": replace(plain, freeze_threshold=f_th)}
    print(f"w* = {toy.target:.5g}, d/s = {toy.d.item() / toy.scale:.4g}, lr = {toy.lr:g}, without "
          f"the transient; cures act from iteration {toy.cure_after} on\n\n"
          f"{'':16s}cycles an  share of  mean of q(w)   swing of   last w as  last 32 iterations\n"
          f"{'':16s}iteration   time up  - w*, % of s  w, in lr s  0..1 of s  _ lower # upper")
    for name, variant in variants.items():
        w, w_hat = simulate(**vars(variant))
        got = measure(variant, w, w_hat)
        if got is None:
            print(f"{name:16s}crossed no threshold: raise --steps or --lr", flush=True)
            continue
        row = {"frequency": got["frequency"], "upper": got["upper"],
               "mean_error_percent": 100 * (got["mean"] - toy.target) / toy.scale,
               "swing_in_lr_s": got["swing"] / (toy.lr * toy.scale),
               "last_w": (w[-1] - toy.lower) / toy.scale}
        strip = "".join("_#"[up] for up in (w_hat[-32:] > toy.threshold).int())
        numbers = "{:9.4f}{:10.4f}{:14.3f}{:12.3f}{:11.3f}".format(*row.values())
        print(f"{name:16s}{numbers}  {strip}", flush=True)
        yield {"variant": name, **{key: float(value) for key, value in row.items()}}


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
        w, w_hat = simulate(**vars(replace(toy, estimator=name)))
        axes.step(range(toy.steps), w_hat, color="tab:orange", lw=0.7, label="q(w)")
        axes.plot(w, color="tab:blue", label="w")
        axes.axhline(toy.target, color="tab:green", ls="--", lw=1, label="w*")
        axes.axhline(toy.threshold, color="gray", ls=":", lw=1, label="threshold")
        axes.set(title=f"Fig. 1: {name.upper()}, lr = {toy.lr:g}", xlabel="iteration")
    left, right = figure.add_subplot(grid[1, :3]), figure.add_subplot(grid[1, 3:])
    share = torch.linspace(0.02, 0.5, 25, dtype=torch.float64)
    left.plot(share, share, color="gray", lw=1, label="f = d / s")
    for name, marker in zip(ESTIMATORS, "o+x."):
        many = replace(toy, target=toy.lower + toy.scale * share, steps=1500, estimator=name,
                       start=toy.threshold.expand(len(share)))
        frequency = measure(many, *simulate(**vars(many)))["frequency"]
        left.plot(share, frequency, marker, ms=4, label=name.upper())
    left.set(title=f"Fig. 5, lr = {toy.lr:g}", xlabel="d / s", ylabel="cycles an iteration")
    for lr in (toy.lr, toy.lr / 3, toy.lr / 10):
        w, _ = simulate(**vars(replace(toy, lr=lr, steps=60, start=toy.threshold)))
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
    """Its errors are one line that begins with the flag's name."""

    def error(self, message: str) -> None:
        self.exit(2, f"{message.removeprefix('argument ')}; see --help for what it takes\n")


def parse(argv: list[str] | None) -> tuple[Toy, argparse.Namespace]:
    """The setting and the other flags, checked; exits with status 2 and a line where one is bad."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
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
            ("plot", Path, None, "draw Figures 1, 5 and 6 into this file"),
            ("json", Path, None, "write what the tables print into this file")):
        parser.add_argument(f"--{name}", type=kind, default=default,
                            help=f"{text} (default: {default})")
    parser.add_argument("--noise", action="store_true", help="draw x from N(0, 1) (default: x = 1)")
    parser.add_argument("--compare", action="store_true", help="estimators, random x and cures, "
                        f"lambda {DAMPENING}, f_th {FREEZE_THRESHOLD} (default: watch one weight)")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"{unknown[0]}: unknown")
    try:
        toy = Toy(args.target, args.scale, args.lr, args.steps, args.estimator, args.dampening,
                  args.freeze_threshold, args.cure_after, args.noise, args.seed)
        check_file("plot", args.plot)
        check_file("json", args.json)
    except ValueError as error:
        flag, _, what = str(error).partition(" ")
        parser.exit(2, f"--{flag.replace('_', '-')} {what}\n")
    return toy, args


def check_file(name: str, path: Path | None) -> None:
    """Raises ValueError where `path` could not be written in the end; leaves nothing behind."""
    if path and name == "plot":
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ValueError("plot needs matplotlib: pip install matplotlib") from None
        if path.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
            raise ValueError(f"plot cannot draw {path}: let it end in .png, .pdf or .svg")
    try:
        if path and not path.exists():
            path.touch()
            path.unlink()
        elif path:
            path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{name} cannot write {path} ({error.strerror}); name another") from None


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status. Ctrl-C ends it with the table so far."""
    toy, args = parse(argv)
    torch.set_num_threads(1)  # for one weight
    results = {"settings": asdict(toy), "compare": [], "table": [], "learning_rates": []}
    try:
        if args.compare:
            results["compare"].extend(compare(toy))
        else:
            trace = watch(toy)
            results["table"].extend(report(toy, *trace))
            complete = results["table"] and len(trace[0]) == toy.steps
            if complete and toy.d and not toy.cured(toy.steps):
                results["learning_rates"].extend(learning_rates(toy))
        if args.plot:
            draw_figures(toy, args.plot)
    except KeyboardInterrupt:
        print("--- interrupted")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
