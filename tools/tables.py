"""Every table of README.md and figures/README.md, and the picture of the claims, from runs.csv.

    python -m tools.tables                              prints the tables, as Markdown
    python -m tools.tables --write                      puts them into the two files
    python -m tools.tables --collect runs/*             first adds finished runs to figures/runs.csv
    python -m tools.tables --plot figures/claims.png    draws the claims

A table stands between <!-- tools.tables: NAME --> and <!-- /tools.tables -->. The name of a run is
its group and "-seedK"; groups are compared seed by seed.
"""

import argparse
import csv
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import correlation, mean, stdev, variance

import torch
from torch import Tensor

import train
from tools import controls
from tools.common import check_picture, picture, tool_parser
from train import UserError, save_atomically

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = "README.md", "figures/README.md"

# --- runs.csv: a row per run ----------------------------------------------------------------------

SCORES = ("fp32_top1", "pre_bn_top1", "post_bn_top1", "pre_bn_loss", "post_bn_loss")
# In percent; empty if the network has no such weights.
SHARES = ("oscillating", "recently_reversed", "frozen", "near_threshold")
RECIPE_KEYS = ("method", "model", "data", "bits", "act_bits")  # they choose a recipe


def flags_that_differ(args: dict) -> str:
    """The flags of a run that its method, network, data and bits do not give by themselves.

    args are the "arguments" of its summary.json. Weights are left out: each seed has its own.
    """
    known = [f"--{key.replace('_', '-')}={args[key]}" for key in RECIPE_KEYS
             if args[key] is not None and not (args["method"] == "fp32" and "bits" in key)]
    usual, words = vars(controls.parse(known)), []
    no_setting = {*RECIPE_KEYS, *train.WHERE_AND_HOW, "seed", "weights", "processes"}
    for key, value in sorted(args.items()):
        if key not in no_setting and value != usual.get(key, value):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{key.strip('_').replace('_', '-')}",
                      *(v if isinstance(v, str) else f"{v:g}" for v in values)]
    return " ".join(words)


def shares_of_weights(model: dict[str, Tensor], tracker: dict[str, Tensor]) -> dict[str, float]:
    """Two shares that a summary lacks, in percent, from the states of network and tracker.

    recently_reversed: of the tracked weights, those not frozen whose f is at least what one
    reversal leaves after 255 steps. These are all that reversed in the last 256 steps, and those
    that reversed several times shortly before. It sees reversals that are too rare for f > 5 m.
    near_threshold: of the low-bit depthwise weights, those whose w_int - w / s is in the two
    outermost of 20 bins over -0.5..0.5 (Figure 3). Even is 10; a weight beyond the grid is in no
    bin. A network without such weights has no such share.
    """
    masks = {"recently_reversed": [], "near_threshold": []}
    for name in [key.removesuffix(".f") for key in tracker if key.endswith(".f")]:
        m, weight = tracker["momentum"].item(), model[f"{name}.weight"]
        recent = tracker[f"{name}.f"] > m * (1 - m) ** 255.5  # between 255 and 256: f is rounded
        masks["recently_reversed"].append((recent & (model[f"{name}.frozen"] == 0)).flatten())
        if weight.dim() == 4 and weight.shape[1] == 1:
            scale = model[f"{name}.weight_quantizer.scale"].view(-1, 1, 1, 1)
            distance = (tracker[f"{name}.w_int"] - weight / scale).abs().flatten()
            masks["near_threshold"].append((distance >= 0.45) & (distance <= 0.5))
    return {key: 100 * torch.cat(parts).double().mean().item() for key, parts in masks.items()
            if parts}


def read_run(folder: Path) -> dict:
    """The row of a finished run, from its summary.json and last.pt; a damaged one raises any error.

    The method is "control" for a float run that started from weights.
    """
    summary = json.loads((folder / "summary.json").read_text())
    last = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    args, method = summary["arguments"], summary["method"]
    shares = shares_of_weights(last["model"], last["tracker"])
    numbers = summary | shares if shares else {key: summary[key] for key in SCORES}
    return {"run": folder.resolve().name,
            "data": Path(args["data"]).resolve().name if args["data"] else "patterns",
            "network": summary["model"],
            "method": "control" if method == "fp32" and args["weights"] else method,
            "weight_bits": summary["weight_bits"], "act_bits": summary["act_bits"],
            "seed": summary["seed"], "flags": flags_that_differ(args), "steps": summary["step"],
            **{key: f"{numbers[key]:.6g}" if key in numbers else "" for key in SCORES + SHARES},
            "torch": summary["torch"], "threads": summary["threads"]}


def collect(folders: list[Path], path: Path) -> None:
    """Adds the rows of finished runs to runs.csv; a row of the same name is replaced."""
    rows, named = {}, {}
    if path.exists():
        with path.open(newline="") as file:
            rows = {row["run"]: row for row in csv.DictReader(file)}
    for folder in folders:
        try:
            row = read_run(folder)
        except Exception as error:  # a damaged file can raise any
            raise UserError(f"--collect {folder}: is not a finished run of train.py "
                            f"({error!r:.100}); leave it out") from None
        if named.setdefault(row["run"], folder) is not folder:
            raise UserError(f"--collect {folder}: is the second run of this name; give one of them")
        rows[row["run"]] = row
    table = csv.DictWriter(text := io.StringIO(), list(row), lineterminator="\n")
    table.writeheader()
    table.writerows(rows[name] for name in sorted(rows))
    save_atomically(path, text.getvalue().encode(), "--collect")


def read_csv(path: Path) -> dict[str, dict[int, dict]]:
    """Rows by group and seed; scores and shares are numbers, None if a cell is empty."""
    groups = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            row |= {key: float(row[key]) if row[key] else None for key in SCORES + SHARES}
            group = row["run"].removesuffix(f"-seed{row['seed']}")
            groups.setdefault(group, {})[int(row["seed"])] = row
    return groups


# --- Claims: both plans of figures/README.md as data ----------------------------------------------

def gap(run: dict) -> float:
    """By how many percent the loss before BN re-estimation is above the loss after it."""
    return 100 * (run["pre_bn_loss"] / run["post_bn_loss"] - 1)


# What is compared: how to read it from a row, and the digits to show.
MEASURES = {"gap": (gap, 1), "top-1 after": (lambda run: run["post_bn_top1"], 2),
            "loss after": (lambda run: run["post_bn_loss"], 3),
            "near threshold": (lambda run: run["near_threshold"] - 10, 1),
            "variance of top-1 after": (lambda run: run["post_bn_top1"], 2)}
PREFIXES = {"patterns": "", "photographs": "cifar-"}  # of a group's name
FIRST, PATTERNS = {"patterns": range(1, 10), "photographs": range(1, 7)}, {"patterns": range(1, 7)}
SECOND = {"patterns": range(51, 75), "photographs": range(51, 63)}
SECOND_CONTROL = {"patterns": range(51, 57), "photographs": range(51, 57)}
F_TH = "w3-fth0.004 w3-fth0.008 w3-fth0.016 w3-fth0.03"
LAMBDA = "w3-lambda0.1 w3-lambda0.3 w3-lambda1"
# {(claim, measure, sign of the difference as stated):
#     [(setting and difference, group, its rivals, seeds by data)]}
# Of several rivals the best by its mean counts; if there is none, the group is compared with 0.
CLAIMS = {
    ("BN goes stale under oscillation", "gap", +1): [
        ("W3: LSQ - control", "w3-lsq", "control", FIRST),
        ("W4A4: LSQ - control", "w4a4-lsq", "control", FIRST),
        ("BN 0.1: W3, BN momentum 0.1, learning rate to 0, LSQ - control",
         "zero-lsq", "zero-control", PATTERNS),
        ("W2 (plan 2): LSQ - control", "second-w2-lsq", "second-control", SECOND_CONTROL)],
    ("Freezing closes the gap", "gap", -1): [
        ("W3: freezing - LSQ", "w3-freeze", "w3-lsq", FIRST),
        ("W4A4: freezing - LSQ", "w4a4-freeze", "w4a4-lsq", FIRST),
        ("W2 (plan 2): freezing - LSQ", "second-w2-freeze", "second-w2-lsq", SECOND)],
    ("Dampening closes the gap", "gap", -1): [
        ("W3: dampening - LSQ", "w3-dampen", "w3-lsq", FIRST),
        ("W4A4: dampening - LSQ", "w4a4-dampen", "w4a4-lsq", FIRST),
        ("W2 (plan 2): dampening - LSQ", "second-w2-dampen", "second-w2-lsq", SECOND)],
    ("Fewer bits, larger gap", "gap", +1): [
        ("4 bits: LSQ, W4 - W8", "w4-lsq", "w8-lsq", PATTERNS),
        ("3 bits: LSQ, W3 - W4", "w3-lsq", "w4-lsq", PATTERNS)],
    ("Freezing stops the weights that oscillate", "gap", -1): [
        ("W3: freezing - random freezing", "w3-freeze", "w3-random", PATTERNS),
        ("W3 (plan 2): freezing - random freezing", "second-w3-freeze", "second-w3-random",
         {"patterns": range(51, 57)})],
    ("Weights rest on the thresholds (Figure 3)", "near threshold", +1): [
        ("W3: LSQ - 10 %", "w3-lsq", "", FIRST)],
    ("Freezing ends above LSQ after re-estimation", "top-1 after", +1): [
        ("W3: freezing - LSQ", "w3-freeze", "w3-lsq", FIRST),
        ("W4A4: freezing - LSQ", "w4a4-freeze", "w4a4-lsq", FIRST),
        ("W2: freezing - LSQ", "w2-freeze", "w2-lsq", PATTERNS),
        ("W2 (plan 2): freezing - LSQ", "second-w2-freeze", "second-w2-lsq", SECOND)],
    ("Freezing ends below LSQ in loss after re-estimation", "loss after", -1): [
        ("W2 (plan 2): freezing - LSQ", "second-w2-freeze", "second-w2-lsq", SECOND)],
    ("Dampening ends above LSQ after re-estimation", "top-1 after", +1): [
        ("W3: dampening - LSQ", "w3-dampen", "w3-lsq", FIRST),
        ("W4A4: dampening - LSQ", "w4a4-dampen", "w4a4-lsq", FIRST),
        ("W2: dampening - LSQ", "w2-dampen", "w2-lsq", PATTERNS),
        ("W2 (plan 2): dampening - LSQ", "second-w2-dampen", "second-w2-lsq", SECOND)],
    ("Dampening ends below LSQ in loss after re-estimation", "loss after", -1): [
        ("W2 (plan 2): dampening - LSQ", "second-w2-dampen", "second-w2-lsq", SECOND)],
    ("Top-1 scatters less under freezing than under LSQ", "variance of top-1 after", -1): [
        ("W2 (plan 2): freezing / LSQ", "second-w2-freeze", "second-w2-lsq", SECOND)],
    ("Annealed beats constant", "top-1 after", +1): [
        ("f_th: W3, annealed - best constant", "w3-freeze", F_TH, PATTERNS),
        ("lambda: W3, annealed - best constant", "w3-dampen", LAMBDA, PATTERNS)],
    ("No estimator stops oscillation", "gap", +1): [
        ("EWGS: W3, EWGS - control", "w3-ewgs", "control", PATTERNS),
        ("DSQ: W3, DSQ - control", "w3-dsq", "control", PATTERNS),
        ("PSG: W3, PSG - control", "w3-psg", "control", PATTERNS)],
    ("Depthwise layers suffer, dense ones hardly", "gap", +1): [
        ("W3: LSQ, depthwise - dense", "w3-lsq", "dense-w3-lsq", PATTERNS)]}


# --- Statistics -----------------------------------------------------------------------------------

def beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b): the share of Beta(a, b) below x.

    For 0 < x < 1, by its continued fraction (Abramowitz and Stegun, 26.5.8), from 200 terms back.
    """
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - beta_share(1 - x, b, a)
    fraction = 1.0
    for k in range(200, 0, -1):
        m = k // 2
        term = -(a + m) * (a + b + m) if k % 2 else m * (b - m)
        fraction = 1 + term * x / ((a + k - 1) * (a + k)) / fraction
    log_power = a * math.log(x) + b * math.log1p(-x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(log_power - log_beta) / a / fraction


def f_quantile(share: float, above: int, below: int) -> float:
    """Quantile of the F distribution with so many degrees of freedom above and below the line.

    With 1 above, it is the square of Student's t quantile for (1 + share) / 2.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if beta_share(middle, above / 2, below / 2) < share:
            low = middle
        else:
            high = middle
    return below * low / (above * (1 - low))


def interval(values: list[float]) -> tuple[float, float]:
    """The ends of the 95 % t interval of the mean of two or more values."""
    quantile = math.sqrt(f_quantile(0.95, 1, len(values) - 1))
    half = quantile * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def side(sign: int, ends: tuple[float, float]) -> int:
    """1 if an interval excludes 0 in the direction of sign, -1 if in the other one, else 0."""
    return sign * ((ends[0] > 0) - (ends[1] < 0))


def verdict(sides: dict[str, int | None]) -> str:
    """The plan's rule, from the sides of the intervals by data; None means that runs are missing.

    An interval on the other side is never outweighed. One on photographs only is "not seen".
    """
    if None in sides.values():
        return "open"
    if -1 in sides.values():
        return "opposite"
    if sides["patterns"] == 0:
        return "not seen"
    return "seen" if sides.get("photographs") else "seen on patterns"


def compare(groups: dict, measure: str, sign: int, names: list[str], seeds: Iterable[int]) -> dict:
    """A group against the best of its rivals: what the tables show of it, and its side.

    names are the group and its rivals. If runs are missing, the side is None, and text and values
    (the differences by seed) are those of the seeds that are there.
    """
    read, digits = MEASURES[measure]
    done = [seed for seed in seeds if all(seed in groups.get(name, ()) for name in names)]
    if len(done) < 2:
        return {"text": "open", "side": None, "values": []}
    left, *rivals = [[read(groups[name][seed]) for seed in done] for name in names]
    best = max(rivals, key=mean, default=[0.0] * len(done))
    values = [a - b for a, b in zip(left, best)]
    if measure.startswith("variance"):
        ratio, freedom = variance(left) / variance(best), len(done) - 1
        limit = 1 / f_quantile(0.95, freedom, freedom)
        text, decided = f"{ratio:.2f} (5 %: {limit:.2f})", int(ratio < limit)
    else:
        text, decided = mean_interval(values, digits), side(sign, interval(values))
    if len(done) < len(seeds):
        return {"text": f"{text}, {len(done)} of {len(seeds)} runs", "side": None, "values": values}
    return {"text": text, "side": decided, "values": values}


def compared(groups: dict) -> list[dict]:
    """All comparisons of both plans: a row per setting."""
    rows = []
    for (claim, measure, sign), settings in CLAIMS.items():
        for setting, group, rivals, seeds in settings:
            found = {data: compare(groups, measure, sign, [PREFIXES[data] + name for name in
                                                           [group, *rivals.split()]], numbers)
                     for data, numbers in seeds.items()}
            rows.append({"claim": claim, "measure": measure, "sign": sign, "setting": setting,
                         "name": setting.partition(":")[0], "found": found,
                         "runs": ", ".join(str(len(numbers)) for numbers in seeds.values()),
                         "verdict": verdict({data: each["side"] for data, each in found.items()})})
    return rows


# --- Tables, as Markdown --------------------------------------------------------------------------

def markdown(rows: list[dict]) -> str:
    """A table of these rows, which have the same keys."""
    if not rows:
        return "no runs"
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def mean_interval(values: list[float], digits: int) -> str:
    """The mean, and its 95 % interval in brackets."""
    ends = ", ".join(f"{end:+.{digits}f}" for end in interval(values))
    return f"{mean(values):+.{digits}f} [{ends}]"


def mean_std(values: list[float | None], digits: int) -> str:
    """The mean and, of several values, their standard deviation; a dash for none."""
    if None in values:
        return "–"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if values[1:] else "")


def group_row(runs: dict[int, dict]) -> dict[str, str]:
    """What the runs of a group share, and their scores."""
    first = next(iter(runs.values()))
    w, a = first["weight_bits"], first["act_bits"]

    def score(key: str, digits: int) -> str:
        return mean_std([run[key] for run in runs.values()], digits)

    return {"data": first["data"].replace("CIFAR", "CIFAR-10"),
            "W/A": "float" if w == "32" else f"W{w}" if a == "32" else f"W{w}A{a}",
            "method": first["method"], "runs": len(runs),
            "top-1, pre → post": f"{score('pre_bn_top1', 1)} → {score('post_bn_top1', 1)}",
            "loss, pre → post": f"{score('pre_bn_loss', 3)} → {score('post_bn_loss', 3)}",
            "gap %": mean_std([*map(gap, runs.values())], 1),
            "osc. %": score("oscillating", 2), "frozen %": score("frozen", 1),
            "recently reversed %": score("recently_reversed", 1),
            "near threshold %": score("near_threshold", 1),
            "flags": f"`{first['flags']}`" if first["flags"] else ""}


def results(groups: dict) -> str:
    """The methods and the control on photographs: at W2 (plan 2), and at W3 (plan 1)."""
    rows = []
    for stem in ("cifar-second-{}", "cifar-{}"):
        bits = "w2" if "second" in stem else "w3"
        for name in (f"{bits}-lsq", f"{bits}-dampen", f"{bits}-freeze", "control"):
            if runs := groups.get(stem.format(name)):
                row, first = group_row(runs), next(iter(runs.values()))
                before = mean(run["pre_bn_top1"] for run in runs.values())
                after = mean_std([run["post_bn_top1"] for run in runs.values()], 1)
                rows.append({"data": f"{row['data']}, {int(first['steps']):,} steps"} | {
                    key: row[key] for key in ("W/A", "method", "runs")} | {
                    "top-1, pre → post": f"{before:.1f} → {after}",
                    "gap %": row["gap %"], "osc. %": row["osc. %"]})
    return markdown(rows)


# {setting: (its groups, for METHOD, and its control)}: all that have control, LSQ and freezing.
COSTS = {"patterns, W2": ("w2-METHOD", "control"),
         "patterns, W3": ("w3-METHOD", "control"),
         "patterns, W4 (plan 2)": ("second-w4-METHOD", "second-control"),
         "patterns, W4A4": ("w4a4-METHOD", "control"),
         "patterns, W2 (plan 2)": ("second-w2-METHOD", "second-control"),
         "CIFAR-10, W3": ("cifar-w3-METHOD", "cifar-control"),
         "CIFAR-10, W4A4": ("cifar-w4a4-METHOD", "cifar-control"),
         "CIFAR-10, W2 (plan 2)": ("cifar-second-w2-METHOD", "cifar-second-control")}


def costs(groups: dict) -> str:
    """Claim C: what quantization costs and a cure wins back, in points of top-1 after, and r.

    A difference is the mean over the seeds that both groups have.
    """
    def difference(left: str, right: str) -> tuple[float | None, int]:
        seeds = groups.get(left, {}).keys() & groups.get(right, {}).keys()
        values = [groups[left][seed]["post_bn_top1"] - groups[right][seed]["post_bn_top1"]
                  for seed in seeds]
        return (mean(values) if values else None), len(values)

    rows, points = [], []
    for setting, (stem, control) in COSTS.items():
        lsq, freeze, dampen = (stem.replace("METHOD", each) for each in ("lsq", "freeze", "dampen"))
        pairs = {"control - LSQ": difference(control, lsq),
                 "freezing - LSQ": difference(freeze, lsq),
                 "dampening - LSQ": difference(dampen, lsq)}
        rows.append({"top-1 after re-estimation": setting} | {
            key: "–" if value is None else f"{value:+.2f} ({number})"
            for key, (value, number) in pairs.items()})
        cost, won = (pairs[key][0] for key in ("control - LSQ", "freezing - LSQ"))
        points += [(cost, won)] if None not in (cost, won) else []
    r = f"{correlation(*zip(*points)):+.2f}" if len(points) > 2 else "open"
    return (f"{markdown(rows)}\n\nCorrelation of the first two columns over {len(points)} of "
            f"{len(COSTS)} settings: {r}. In brackets: the runs.")


def claims(groups: dict) -> str:
    """The verdict on each setting, and the intervals behind it."""
    rows = compared(groups)
    sides = [each["side"] for row in rows for each in row["found"].values()]
    table = markdown([{
        "claim": row["claim"], "difference": f"{row['measure']}, {row['setting']} "
        f"{'<>'[row['sign'] > 0]} {1 if row['measure'].startswith('variance') else 0}",
        "runs": row["runs"], "patterns": row["found"]["patterns"]["text"],
        "CIFAR-10": row["found"].get("photographs", {"text": "–"})["text"],
        "verdict": row["verdict"]} for row in rows])
    return (f"{table}\n\nOf {len(sides)} comparisons, {sides.count(1)} exclude 0 in the direction "
            f"stated, {sides.count(-1)} in the opposite one, {sides.count(0)} in\nneither; "
            f"{sides.count(None)} are open.")


def verdicts(groups: dict) -> str:
    """A row per claim: its settings by verdict."""
    by_claim = {}
    for row in compared(groups):
        by_verdict = by_claim.setdefault(row["claim"], {})
        by_verdict.setdefault(row["verdict"], []).append(row["name"])
    return markdown([{"claim": claim, "verdict": "; ".join(
        f"{each}: {', '.join(names)}" for each, names in by_verdict.items())}
        for claim, by_verdict in by_claim.items()])


TABLES = {
    "results": results, "costs": costs, "verdicts": verdicts, "claims": claims,
    "groups": lambda groups: markdown([{"group": g} | group_row(groups[g]) for g in groups])}


def blocks(groups: dict) -> dict[str, str]:
    """All tables by name, each between its markers."""
    return {name: f"<!-- tools.tables: {name} -->\n{table(groups)}\n\n<!-- /tools.tables -->"
            for name, table in TABLES.items()}


def marked(text: str) -> dict[str, str]:
    """The tables of a document by name, with their markers."""
    found = re.finditer(r"<!-- tools\.tables: (\w+) -->.*?<!-- /tools\.tables -->", text, re.S)
    return {match[1]: match[0] for match in found}


# --- The picture ----------------------------------------------------------------------------------

SIDE_COLOURS = {1: "tab:blue", 0: "0.6", -1: "tab:red", None: "0.85"}  # None: runs are missing


def plot_claims(path: str, rows: list[dict]) -> None:
    """Draws a line per setting: the mean of its differences and its 95 % interval.

    The unit is the standard error of the mean, so that all claims share one axis. To the right is
    the direction that the claim states. Rows are those of `compared`.
    """
    rows = [row for row in rows if not row["measure"].startswith("variance")]
    left, right = -6, 9
    with picture(path, 9.6, 0.9 + 0.235 * len(rows)) as figure:
        axes = figure.subplots()
        for y, row in enumerate(rows):
            if row["claim"] != rows[y - 1]["claim"]:
                axes.axhline(y - 0.5, color="0.85", linewidth=0.8)
            for data, found in row["found"].items():
                if found["values"]:
                    low = y + (0.2 if data == "photographs" else -0.2)
                    draw_interval(axes, low, [row["sign"] * value for value in found["values"]],
                                  "s" if data == "photographs" else "o",
                                  SIDE_COLOURS[found["side"]], right)
            axes.text(right + 0.3, y, row["verdict"], va="center", color={
                "seen": SIDE_COLOURS[1], "opposite": SIDE_COLOURS[-1]}.get(
                    row["verdict"].removesuffix(" on patterns"), "0.4"))
        axes.axvline(0, color="black", linewidth=0.8)
        names = [row["name"] if row["claim"] == rows[y - 1]["claim"] else
                 f"{row['claim']}   {row['name']}" for y, row in enumerate(rows)]
        axes.set_yticks(range(len(rows)), names)
        axes.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5), xlabel="mean difference "
                 "in standard errors, 95 % intervals; to the right: as the claim states")
        for marker, colour, label in (("o", "0.4", "patterns"), ("s", "0.4", "photographs"),
                                      ("-", SIDE_COLOURS[1], "excludes 0, as stated"),
                                      ("-", SIDE_COLOURS[-1], "opposite"),
                                      ("-", SIDE_COLOURS[0], "contains 0"),
                                      ("-", SIDE_COLOURS[None], "open")):
            axes.plot([], [], marker, color=colour, label=label)
        figure.legend(loc="outside upper right", ncols=6, frameon=False)


def draw_interval(axes, y: float, values: list[float], marker: str, colour: str,
                  right: float) -> None:
    """The mean of values and its interval, in standard errors; a mean beyond the edge as text."""
    error = stdev(values) / math.sqrt(len(values)) or 1.0  # 0 if all seeds agree
    middle, ends = mean(values) / error, [end / error for end in interval(values)]
    axes.plot(ends, [y, y], color=colour, linewidth=2)
    axes.plot([middle], [y], marker, color=colour, markersize=5)
    if middle > right:
        axes.text(right - 0.1, y, f"{middle:.0f} →", color=colour, fontsize="small", va="center",
                  ha="right")


# --- Command line ---------------------------------------------------------------------------------

def work(args: argparse.Namespace) -> None:
    """Collects, writes, draws and prints, as the flags say."""
    path = ROOT / "figures/runs.csv"
    if args.plot:
        check_picture(args.plot)
    if args.collect:
        collect(args.collect, path)
    with train.user_error(f"{path}: cannot be read; --collect makes it",
                          OSError, ValueError, LookupError, TypeError):
        groups = read_csv(path)
        made = blocks(groups)
    for document in map(ROOT.joinpath, DOCUMENTS if args.write else ()):
        text = document.read_text()
        for name, block in marked(text).items():
            text = text.replace(block, made.get(name, block))
        save_atomically(document, text.encode(), "--write")
    if args.plot:
        plot_claims(args.plot, compared(groups))
    if not (args.write or args.plot):
        print("\n\n".join(made.values()))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    p = tool_parser("tables", "Prints every table of README.md and figures/README.md.",
                    "--collect runs/* --write --plot figures/claims.png")
    p.add_argument("--collect", metavar="DIR", nargs="+", type=Path,
                   help="first add these folders of finished runs to figures/runs.csv; a row of "
                   "the same name is replaced, all other rows stay")
    p.add_argument("--write", action="store_true",
                   help="put the tables into the two files instead of printing them")
    p.add_argument("--plot", metavar="FILE", type=train.a_path,
                   help="draw the intervals of all claims (needs matplotlib)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on standard error."""
    return train.exit_status("python -m tools.tables", parse, work, argv)


if __name__ == "__main__":
    train.run_script(main)
