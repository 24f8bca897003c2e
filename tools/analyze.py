"""Tables 1 and 3 and Figures 2 to 4 of the paper, from checkpoints of train.py.

    python -m tools.analyze runs/LSQ/last.pt runs/DAMPEN/last.pt runs/FREEZE/last.pt --plot a.png

The tables describe the first checkpoint. Table 3 ends with a row for each of the others.
"""

import argparse
import math
import os
from collections.abc import Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

import train
from osc_qat import bn_kl_divergence, optimize_oscillating_weights, sample_oscillating_weights
from tools.common import check_picture, picture, tool_parser
from tools.summarize import mean_std
from train import Run, UserError, print_table

BINS = 20  # in Figures 3 and 4, from -0.5 to 0.5; evenly spread weights would put 5 % into each


def analyze(args: argparse.Namespace) -> None:
    """Prints Figures 3 and 4 of all checkpoints as a table, and Tables 1 and 3; draws --plot."""
    if args.plot:
        check_picture(args.plot)
    load, runs = partial(train.stored_run, flag="CHECKPOINT", args=args), {}
    for number, path in enumerate(args.checkpoints, 1):
        run = load(path)
        method = run.args.method
        runs[method if method not in runs else f"{method}, number {number}"] = run
    first = next(iter(runs.values()))
    layers, description = layers_shown(runs, args.layer)
    print(f"\nFigures 3 and 4: w_int - w / s of {description}, in percent of the weights")
    shares = {title: distance_shares(run, layers).tolist() for title, run in runs.items()}
    print_table([{"from": f"{k / BINS - 0.5:.2f}",
                  **{title: f"{share[k]:.1f}" for title, share in shares.items()}}
                 for k in range(BINS)])
    print("\nTable 1: KL divergence of BN statistics")
    print_table(table1(first))
    print("\nTable 3: BN re-estimated each time")
    print_table(table3(load(args.checkpoints[0]), runs, args.steps))
    if args.plot:
        plot_figures(args.plot, runs, layers, description)


# --- Tables ---------------------------------------------------------------------------------------

def table1(run: Run) -> list[dict]:
    """Table 1: the KL divergence of BN's statistics from those of the training batches.

    A row per BN layer, with the kind of the convolution before it, then a row per kind, over all
    channels of that kind.
    """
    kinds, kind = {}, ""
    for name, module in run.model.named_modules():
        if isinstance(module, nn.Conv2d):
            kind = "8 bit" if module.weight_quantizer.bits > 4 else "depthwise" \
                if module.groups > 1 else "pointwise" if module.kernel_size == (1, 1) else "full"
        kinds[name] = kind  # BN follows its convolution
    batches = run.sample_train_batches("bn", run.args.bn_batches)
    with run.autocast():
        divergence = bn_kl_divergence(run.model, batches)
    for kind in sorted({kinds[name] for name in divergence}):
        divergence[f"all {kind}"] = torch.cat([d for name, d in divergence.items()
                                               if kinds.get(name) == kind])
    return [{"layer": name, "convolution": kinds.get(name, ""), "max D": d.max().item(),
             "mean D": d.mean().item()} for name, d in divergence.items()]


def loss_and_top1(run: Run) -> tuple[float, float]:
    """Train loss and top-1 after BN re-estimation, whose statistics the network keeps."""
    train.reestimate(run)
    _, loss = train.validate(run, run.sample_train_batches("loss", run.args.bn_batches))
    return loss, train.validate(run)[0]


def table3(run: Run, runs: dict[str, Run], steps: int) -> list[dict]:
    """Table 3: train loss and top-1, a row per variant of the first run, then one per other run.

    `run` is a second copy of the first of `runs`, since the variants change it: as trained,
    sampled, rounded to the EMA, optimised, and with its last steps repeated.
    """
    trained = {key: tensor.clone() for key, tensor in run.model.state_dict().items()}
    sampler = train.generator("samples", run.args.seed)
    measured = {next(iter(runs)): [loss_and_top1(run)]}
    sampled = measured["sampled, mean of 10"] = []
    for _ in range(10):
        run.model.load_state_dict(trained)
        sample_oscillating_weights(run.model, run.tracker, sampler)
        sampled.append(loss_and_top1(run))
    measured["sampled, best"] = [min(sampled)]
    run.model.load_state_dict(trained)
    ema = run.tracker.mean_integers()
    for layer, mask in run.tracker.oscillating_masks().items():
        run.tracker.layers[layer].move_to_centers(mask, ema[layer].round())
    measured["round(EMA)"] = [loss_and_top1(run)]
    run.model.load_state_dict(trained)
    with run.autocast():
        chosen = optimize_oscillating_weights(
            run.model, run.tracker, run.sample_train_batches("choice", steps), steps)
    measured[f"AdaRound, {chosen} weights, {steps} steps"] = [loss_and_top1(run)]
    run.model.load_state_dict(trained)
    repeated = len(list(repeat_last_steps(run, steps)))
    measured[f"last {repeated} steps, repeated"] = [loss_and_top1(run)]
    measured |= {title: [loss_and_top1(other)] for title, other in list(runs.items())[1:]}
    return [{"network": name, "train loss": mean_std([loss for loss, _ in each], 4),
             "top-1": mean_std([top1 for _, top1 in each])} for name, each in measured.items()]


def repeat_last_steps(run: Run, most: int) -> Iterator[float]:
    """Repeats the last fifth of the schedule, at most so many steps; yields the loss of each."""
    steps = min(most, run.total // 5)
    run.step = run.total - steps
    run.wrapped_model.train()
    for images, labels in run.sample_train_batches("repeated", steps):
        yield train.train_step(run, images, labels)


# --- Figures --------------------------------------------------------------------------------------

def layers_shown(runs: dict[str, Run], layer: str | None) -> tuple[list[str], str]:
    """The names of the low-bit layers to show, and a description of them.

    They are `layer`; or, if it is None, all depthwise layers; or, if there are none, all layers.
    """
    tracked = next(iter(runs.values())).tracker.layers
    depthwise = [name for name, each in tracked.items() if getattr(each, "groups", 1) > 1]
    names = [layer] if layer else depthwise or list(tracked)
    if not names or any(name not in run.tracker.layers for run in runs.values() for name in names):
        raise UserError(f"--layer {layer}: is not in every checkpoint; low-bit layers of the first "
                        f"are {', '.join(tracked) or 'none'}")
    kind = "depthwise" if depthwise else "low-bit"
    return names, layer or f"all {len(names)} {kind} layers"


def distance_shares(run: Run, layers: list[str]) -> Tensor:
    """Figures 3 and 4: the percentage of all weights of these layers in each bin of w_int - w / s.

    Weights beyond the grid are in no bin, so the sum can be below 100.
    """
    distance = torch.cat([(layer.weight_int() - layer.weight_in_steps().detach()).flatten().cpu()
                          for layer in map(run.tracker.layers.get, layers)])
    return 100 * torch.histc(distance, BINS, -0.5, 0.5) / distance.numel()


def record(run: Run, layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Integers and latent weights w / s of each layer over the last fifth: (1 + steps, C_out, K).

    The first entry is the state before these steps. Deviation: the iterations of Figure 2 are
    repeated after training, so that a run need not keep a trace.
    """
    states = {name: [] for name in layers}
    for _ in chain([None], repeat_last_steps(run, 1000)):
        for name in layers:
            layer = run.tracker.layers[name]
            states[name].append((layer.weight_int().flatten(1).char().cpu(),
                                 layer.weight_in_steps().detach().flatten(1).cpu()))
    return {name: tuple(map(torch.stack, zip(*each))) for name, each in states.items()}


def changes_most(recorded: dict[str, tuple[Tensor, Tensor]]) -> tuple[str, int, int, float]:
    """The layer and channel whose integers change most often; in it, the weight that does so.

    Also the threshold that this weight crosses, in steps.
    """
    changes = {name: (w_int[1:] != w_int[:-1]).sum(0) for name, (w_int, _) in recorded.items()}
    layer = max(changes, key=lambda name: changes[name].sum(1).max())
    channel = changes[layer].sum(1).argmax().item()
    weight = changes[layer][channel].argmax().item()
    mean_integer = recorded[layer][0][:, channel, weight].float().mean().item()
    return layer, channel, weight, math.floor(mean_integer) + 0.5


def plot_figures(path: str, runs: dict[str, Run], layers: list[str], description: str) -> None:
    """Draws Figures 3, 4 and 2, a row per run. The last steps of each run are repeated for it.

    Every row shows the channel that changes most in the first run.
    """
    highest = 1.05 * max(distance_shares(run, layers).max().item() for run in runs.values())
    chosen = None
    with picture(path, 11, 0.5 + 2.3 * len(runs)) as figure:
        rows = figure.subfigures(len(runs), 1, squeeze=False)[:, 0]
        axes = [row.subplots(1, 3) for row in rows]
        for row, (left, middle, right), (title, run) in zip(rows, axes, runs.items()):
            row.suptitle(title, fontweight="bold")
            draw_distances(left, distance_shares(run, layers).tolist(), highest)
            recorded = record(run, chosen[:1] if chosen else layers)
            chosen = chosen or changes_most(recorded)
            draw_channel(middle, right, run, recorded, *chosen)
        titles = (description, f"channel {chosen[1]} of {chosen[0]}",
                  "its latent weights, thresholds dashed")
        steps = "iteration of the last fifth, repeated"
        below = "distance from the bin centre, w_int - w / s", steps, steps
        for k in range(3):
            axes[0][k].set_title(titles[k], fontsize="medium")
            axes[-1][k].set_xlabel(below[k])


def draw_distances(axes, shares: list[float], highest: float) -> None:
    """Figures 3 and 4: a bar per bin; dashed, the height of all bars if weights were even."""
    axes.bar([(k + 0.5) / BINS - 0.5 for k in range(BINS)], shares, 0.9 / BINS)
    axes.axhline(100 / BINS, color="black", linestyle="--", linewidth=0.8)
    axes.text(0.57, 100 / BINS, "even", va="center")
    axes.set(xlim=(-0.55, 0.55), ylim=(0, highest), ylabel="% of the weights")


def draw_channel(integers, latent, run: Run, recorded: dict, layer: str, channel: int, weight: int,
                 threshold: float) -> None:
    """Figure 2: the integers of a channel, and its latent weights near one threshold."""
    for axes, values in zip((integers, latent), recorded[layer]):
        axes.plot(values[:, channel].numpy(), color="silver", linewidth=0.8)
        axes.plot(values[:, channel, weight].numpy(), linewidth=0.8)
    quantizer = run.tracker.layers[layer].weight_quantizer
    for k in range(quantizer.int_min, quantizer.int_max):
        latent.axhline(k + 0.5, color="black", linestyle="--", linewidth=0.8)
    integers.set(ylim=(quantizer.int_min - 0.5, quantizer.int_max + 0.5), ylabel="w_int")
    latent.set(ylim=(threshold - 0.7, threshold + 0.7), ylabel="w / s",
               yticks=(threshold - 0.5, threshold, threshold + 0.5))


# --- Command line ---------------------------------------------------------------------------------

def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    p = tool_parser("analyze", "Prints Figures 3 and 4 of all checkpoints as a table, and Tables 1 "
                    "and 3\nof the first one. --plot draws Figures 2 to 4.",
                    "runs/LSQ/last.pt runs/FREEZE/last.pt --plot figures.png")
    add = p.add_argument
    add("checkpoints", type=train.a_path, metavar="CHECKPOINT", nargs="+",
        help="last.pt or best.pt of a run")
    add("--layer", metavar="NAME",
        help="show this layer in Figures 2 to 4 [all depthwise layers together]")
    add("--plot", type=train.a_path, metavar="FILE",
        help="draw Figures 2 to 4 into this file, such as a.png (needs matplotlib)")
    add("--steps", type=train.within(1, 10**9), default=1000, metavar="N",
        help="steps of AdaRound in Table 3 (paper: 10000), and at most so many repeated steps")
    add("--data", type=train.a_path, metavar="DIR",
        help="folder of the images [where they were in training]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to compute on")
    add("--workers", type=train.within(0, 256), default=min(8, os.cpu_count() or 1), metavar="N",
        help="processes that load images")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on standard error."""
    return train.exit_status("python -m tools.analyze", parse, analyze, argv)


if __name__ == "__main__":
    train.run_script(main)
