"""Every table of README.md and figures/README.md, from figures/runs.csv alone.

    python -m tools.tables                       prints them, as Markdown
    python -m tools.tables --write               puts them into the two files
    python -m tools.tables --collect runs/*      first makes runs.csv anew, of finished runs

A table stands between <!-- tools.tables: NAME --> and <!-- /tools.tables -->. A run's name is
its group's and "-seedK"; groups are compared seed by seed.
"""

import argparse
import csv
import io
import json
import math
import os
import re
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from train import parse

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = "README.md", "figures/README.md"

# --- runs.csv: a row a run ------------------------------------------------------------------------

SCORES = ("fp32_top1", "pre_bn_top1", "post_bn_top1", "pre_bn_loss", "post_bn_loss")
SHARES = ("oscillating", "reversed", "frozen", "edge")  # percent; empty where nothing is tracked
CHOOSES = ("method", "model", "data", "bits", "act_bits")  # a recipe; these have columns
PLACES = {"weights", "output", "workers", "device", "resume", "checkpoint_every", "processes"}


def flags_that_differ(args: dict) -> str:
    """The flags of a run that its method, network, data and bits do not give by themselves."""
    known = [f"--{key.replace('_', '-')}={args[key]}" for key in CHOOSES
             if args[key] is not None and not (args["method"] == "fp32" and "bits" in key)]
    usual, words = vars(parse(known)), []
    for key, value in args.items():
        if key not in {*CHOOSES, *PLACES, "seed"} and value != usual.get(key, value):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{key.strip('_').replace('_', '-')}",
                      *(v if isinstance(v, str) else f"{v:g}" for v in values)]
    return " ".join(words)


def shares_of_weights(model: dict[str, Tensor], tracker: dict[str, Tensor]) -> dict[str, float]:
    """Two shares that a summary lacks, in percent, of the states of network and tracker.

    reversed: of the tracked weights, those not frozen whose f is at least what one reversal leaves
    after 255 steps. These are all that reversed in the last 256 steps, and no other that reversed
    only once. It sees swings that are too slow for f > 5 m.
    edge: of the low-bit depthwise weights, those whose w_int - w / s is in the two outermost of 20
    bins over -0.5..0.5 (Figure 3). Even is 10; a weight beyond the grid can be in no bin.
    """
    masks = {"reversed": [], "edge": []}
    for name in [key.removesuffix(".f") for key in tracker if key.endswith(".f")]:
        m, weight = tracker["momentum"].item(), model[f"{name}.weight"]
        recent = tracker[f"{name}.f"] > m * (1 - m) ** 255.5  # between 255 and 256: f is rounded
        masks["reversed"].append((recent & (model[f"{name}.frozen"] == 0)).flatten())
        if weight.dim() == 4 and weight.shape[1] == 1:
            scale = model[f"{name}.weight_quantizer.scale"].view(-1, 1, 1, 1)
            distance = (tracker[f"{name}.w_int"] - weight / scale).abs().flatten()
            masks["edge"].append((distance >= 0.45) & (distance <= 0.5))
    return {key: 100 * torch.cat(parts).double().mean().item() for key, parts in masks.items()
            if parts}


def read_run(folder: Path) -> dict:
    """The row of a finished run, from its summary.json and last.pt.

    Two methods have no flag. "control" is a float run that starts from weights. "random" is known
    by the folder's name alone: tools/controls.py made it. Older runs keep neither torch's
    version nor the number of threads; theirs are of this process: collect where they were made,
    and with their OMP_NUM_THREADS.
    """
    summary = json.loads((folder / "summary.json").read_text())
    last = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    args, name, method = summary["arguments"], folder.resolve().name, summary["method"]
    shares = shares_of_weights(last["model"], last["tracker"])
    here = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    numbers = summary | shares if shares else {key: summary[key] for key in SCORES}
    return {"run": name, "data": Path(args["data"]).resolve().name if args["data"] else "patterns",
            "network": summary["model"], "method": "random" if "-random-" in name else
            "control" if method == "fp32" and args["weights"] else method,
            "weight_bits": summary["weight_bits"], "act_bits": summary["act_bits"],
            "seed": summary["seed"], "flags": flags_that_differ(args), "steps": summary["step"],
            **{key: f"{numbers[key]:.6g}" if key in numbers else "" for key in SCORES + SHARES},
            **{key: summary.get(key, own) for key, own in here.items()}}


def read_csv(path: Path) -> dict[str, dict[int, dict]]:
    """Rows by group and seed; scores and shares are numbers, what is empty is None."""
    groups = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            row |= {key: float(row[key]) if row[key] else None for key in SCORES + SHARES}
            group = row["run"].removesuffix(f"-seed{row['seed']}")
            groups.setdefault(group, {})[int(row["seed"])] = row
    return groups


# --- Claims: the plan of figures/README.md as data ------------------------------------------------

def gap(run: dict) -> float:
    """What the loss is higher by before BN re-estimation than after, in percent of the latter."""
    return 100 * (run["pre_bn_loss"] / run["post_bn_loss"] - 1)


# What is compared, and the digits that are shown.
MEASURES = {"gap": (gap, 1), "top-1 after": (lambda run: run["post_bn_top1"], 2),
            "edge": (lambda run: run["edge"] - 10, 1)}
F_TH = "w3-fth0.004 w3-fth0.008 w3-fth0.016 w3-fth0.03"
LAMBDA = "w3-lambda0.1 w3-lambda0.3 w3-lambda1"
# Claim, measure, and the sign of the difference as stated: its settings. A setting is its name and
# text, a group, its rivals (of several, the best by its mean counts; none is 0), and the last seed
# on patterns and on photographs (0 = not planned; there, groups are named "cifar-" and so).
CLAIMS = {
    ("BN goes stale under oscillation", "gap", +1): [
        ("W3: LSQ - control", "w3-lsq", "control", 9, 6),
        ("W4A4: LSQ - control", "w4a4-lsq", "control", 9, 6),
        ("BN 0.1: W3, BN momentum 0.1, learning rate to 0, LSQ - control",
         "zero-lsq", "zero-control", 6, 0)],
    ("Freezing closes the gap", "gap", -1): [
        ("W3: freezing - LSQ", "w3-freeze", "w3-lsq", 9, 6),
        ("W4A4: freezing - LSQ", "w4a4-freeze", "w4a4-lsq", 9, 6)],
    ("Dampening closes the gap", "gap", -1): [
        ("W3: dampening - LSQ", "w3-dampen", "w3-lsq", 9, 6),
        ("W4A4: dampening - LSQ", "w4a4-dampen", "w4a4-lsq", 9, 6)],
    ("Fewer bits, larger gap", "gap", +1): [
        ("4 bits: LSQ, W4 - W8", "w4-lsq", "w8-lsq", 6, 0),
        ("3 bits: LSQ, W3 - W4", "w3-lsq", "w4-lsq", 6, 0)],
    ("Freezing stops the weights that swing", "gap", -1): [
        ("W3: freezing - random freezing", "w3-freeze", "w3-random", 6, 0)],
    ("Weights rest on the thresholds (Figure 3)", "edge", +1): [
        ("W3: LSQ - 10 %", "w3-lsq", "", 9, 6)],
    ("Freezing ends above LSQ after re-estimation", "top-1 after", +1): [
        ("W3: freezing - LSQ", "w3-freeze", "w3-lsq", 9, 6),
        ("W4A4: freezing - LSQ", "w4a4-freeze", "w4a4-lsq", 9, 6),
        ("W2: freezing - LSQ", "w2-freeze", "w2-lsq", 6, 0)],
    ("Dampening ends above LSQ after re-estimation", "top-1 after", +1): [
        ("W3: dampening - LSQ", "w3-dampen", "w3-lsq", 9, 6),
        ("W4A4: dampening - LSQ", "w4a4-dampen", "w4a4-lsq", 9, 6),
        ("W2: dampening - LSQ", "w2-dampen", "w2-lsq", 6, 0)],
    ("Annealed beats constant", "top-1 after", +1): [
        ("f_th: W3, annealed - best constant", "w3-freeze", F_TH, 6, 0),
        ("lambda: W3, annealed - best constant", "w3-dampen", LAMBDA, 6, 0)],
    ("No estimator stops oscillation", "gap", +1): [
        ("EWGS: W3, EWGS - control", "w3-ewgs", "control", 6, 0),
        ("DSQ: W3, DSQ - control", "w3-dsq", "control", 6, 0),
        ("PSG: W3, PSG - control", "w3-psg", "control", 6, 0)],
    ("Depthwise layers suffer, dense ones hardly", "gap", +1): [
        ("W3: LSQ, depthwise - dense", "w3-lsq", "dense-w3-lsq", 6, 0)]}
# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom, from the usual table.
T_975 = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600)


def interval(values: list[float]) -> tuple[float, float]:
    """Ends of the mean's 95 % t interval."""
    half = T_975[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def side(sign: int, ends: tuple[float, float]) -> int:
    """1 where an interval excludes 0 in the direction of sign, -1 in the other one, else 0."""
    return sign * ((ends[0] > 0) - (ends[1] < 0))


def verdict(sides: dict[str, int | None]) -> str:
    """The plan's rule, for the sides of intervals by data; None where runs are missing.

    One on the other side is never outweighed, and photographs alone are "not seen".
    """
    if None in sides.values():
        return "open"
    if -1 in sides.values():
        return "opposite"
    if sides["patterns"] == 0:
        return "not seen"
    return "seen" if sides.get("photographs") else "seen on patterns"


def differences(groups: dict, measure: str, left: str, rivals: str, last: int,
                prefix: str) -> list[float] | None:
    """A group less the best of its rivals, by seed from 1 to last; None where a run is missing."""
    def measured(group: str) -> list[float]:
        return [MEASURES[measure][0](groups[prefix + group][seed]) for seed in range(1, last + 1)]

    try:
        best = max(map(measured, rivals.split()), key=mean, default=[0.0] * last)
        return [a - b for a, b in zip(measured(left), best)]
    except KeyError:
        return None


# --- Tables, as Markdown --------------------------------------------------------------------------

def markdown(rows: list[dict]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def mean_std(values: list[float | None], digits: int) -> str:
    """The mean, and where there are several values, their standard deviation; a dash for none."""
    if None in values:
        return "–"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if values[1:] else "")


def group_row(runs: dict[int, dict]) -> dict[str, str]:
    """What the runs of a group share, and their scores."""
    first = next(iter(runs.values()))
    w, a = first["weight_bits"], first["act_bits"]

    def told(key: str, digits: int) -> str:
        return mean_std([run[key] for run in runs.values()], digits)

    return {"data": first["data"].replace("CIFAR", "CIFAR-10"),
            "W/A": "float" if w == "32" else f"W{w}" if a == "32" else f"W{w}A{a}",
            "method": first["method"], "runs": len(runs),
            "top-1, pre → post": f"{told('pre_bn_top1', 1)} → {told('post_bn_top1', 1)}",
            "loss, pre → post": f"{told('pre_bn_loss', 3)} → {told('post_bn_loss', 3)}",
            "gap %": mean_std([*map(gap, runs.values())], 1),
            "osc. %": told("oscillating", 2), "frozen %": told("frozen", 1),
            "reversed %": told("reversed", 1), "edge %": told("edge", 1),
            "flags": f"`{first['flags']}`" if first["flags"] else ""}


def results(groups: dict) -> str:
    """The methods at W3, and the control: means, and the gap's standard deviation."""
    names = [f"{data}{setting}" for data in ("cifar-", "")
             for setting in ("w3-lsq", "w3-dampen", "w3-freeze", "control")]
    rows = []
    for runs in (groups[name] for name in names if name in groups):
        row = group_row(runs)
        before, after = (mean(run[f"{when}_bn_top1"] for run in runs.values())
                         for when in ("pre", "post"))
        rows.append({"data": row["data"], "method": row["method"],
                     "top-1, pre → post": f"{before:.1f} → {after:.1f}",
                     "gap %": row["gap %"], "osc. %": row["osc. %"]})
    return markdown(rows)


def mean_interval(values: list[float] | None, digits: int) -> str:
    if values is None:
        return "open"
    ends = ", ".join(f"{end:+.{digits}f}" for end in interval(values))
    return f"{mean(values):+.{digits}f} [{ends}]"


def compared(groups: dict) -> list[dict]:
    """A row a setting, with the sides of its intervals."""
    rows = []
    for (claim, measure, sign), settings in CLAIMS.items():
        for setting, left, rivals, *last in settings:
            found = {data: differences(groups, measure, left, rivals, seeds, prefix)
                     for data, seeds, prefix in zip(("patterns", "photographs"), last,
                                                    ("", "cifar-")) if seeds}
            sides = {data: values and side(sign, interval(values))
                     for data, values in found.items()}
            told = {data: mean_interval(values, MEASURES[measure][1])
                    for data, values in found.items()}
            rows.append({"claim": claim, "difference": f"{measure}, {setting} {'<>'[sign > 0]} 0",
                         "runs": ", ".join(map(str, filter(None, last))),
                         "patterns": told["patterns"], "CIFAR-10": told.get("photographs", "–"),
                         "verdict": verdict(sides), "sides": [*sides.values()]})
    return rows


def claims(groups: dict) -> str:
    """The verdict on each setting, and what it rests on."""
    rows = compared(groups)
    all_sides = [each for row in rows for each in row.pop("sides")]
    return (f"{markdown(rows)}\n\nOf {len(all_sides)} comparisons, {all_sides.count(1)} intervals "
            f"exclude 0 in the direction stated, {all_sides.count(-1)} in the opposite one, "
            f"{all_sides.count(0)} in\nneither; {all_sides.count(None)} are open.")


def verdicts(groups: dict) -> str:
    """A row a claim: the numbers of its first setting, and the verdicts on all, by name."""
    rows = {}
    for row in compared(groups):
        name = row["difference"].partition(", ")[2].partition(":")[0]
        first = rows.setdefault(row["claim"], {"claim": row["claim"], "verdicts": []} | {
            data: row[data] for data in ("patterns", "CIFAR-10")})
        first["verdicts"].append(f"{name} {row['verdict']}")
    return markdown([row | {"verdicts": ", ".join(row["verdicts"])} for row in rows.values()])


TABLES = {
    "results": results, "verdicts": verdicts, "claims": claims,
    "groups": lambda groups: markdown([{"group": g} | group_row(groups[g]) for g in groups])}


def blocks(groups: dict) -> dict[str, str]:
    """All tables by name, each with its markers."""
    return {name: f"<!-- tools.tables: {name} -->\n{table(groups)}\n\n<!-- /tools.tables -->"
            for name, table in TABLES.items()}


def marked(text: str) -> dict[str, str]:
    """The blocks of a document by name, with their markers."""
    found = re.finditer(r"<!-- tools\.tables: (\w+) -->.*?<!-- /tools\.tables -->", text, re.S)
    return {match[1]: match[0] for match in found}


# --- Command line ---------------------------------------------------------------------------------

def write_atomically(path: Path, text: str) -> None:
    part = Path(f"{path}.part")
    part.write_text(text)
    os.replace(part, path)


def main(argv: list[str] | None = None) -> None:
    """Exit status: 0, or 2 after one line on standard error."""
    p = argparse.ArgumentParser(prog="tools.tables", description=__doc__.split("\n\n")[0])
    p.error = lambda said: p.exit(2, f"{p.prog}: {said}\n")
    p.add_argument("--collect", metavar="DIR", nargs="+", type=Path, default=[],
                   help="make runs.csv of these folders of finished runs")
    p.add_argument("--write", action="store_true", help="put the tables into the two READMEs")
    args, path, rows = p.parse_args(argv), ROOT / "figures/runs.csv", {}
    for folder in args.collect:
        try:
            row = read_run(folder)
        except Exception as error:  # whatever a damaged file raises
            p.error(f"--collect {folder}: is no finished run of train.py ({error!r:.100})")
        if rows.setdefault(row["run"], row) is not row:
            p.error(f"--collect {folder}: is the second run of this name; give one of them")
    try:
        if rows:
            table = csv.DictWriter(text := io.StringIO(), list(row), lineterminator="\n")
            table.writeheader()
            table.writerows(rows[name] for name in sorted(rows))
            write_atomically(path, text.getvalue())
        made = blocks(read_csv(path))
        for document in map(ROOT.joinpath, DOCUMENTS if args.write else ()):
            text = document.read_text()
            for name, block in marked(text).items():
                text = text.replace(block, made.get(name, block))
            write_atomically(document, text)
    except (OSError, ValueError, LookupError, TypeError) as error:
        p.error(f"{path}: cannot be read, or not be written ({error!r:.100}); --collect makes it")
    if not args.write:
        print("\n\n".join(made.values()))


if __name__ == "__main__":
    main()
