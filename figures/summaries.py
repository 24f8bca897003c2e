"""Tables of finished runs, from their summary.json: train.py --summarize, and its closing table."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from statistics import fmean

# What a table shows of summaries, what compared runs have in common, what is no setting of a run.
TABLE_COLUMNS = {"fp32_top1": "FP32", "pre_bn_top1": "pre-BN", "post_bn_top1": "post-BN",
                 "pre_bn_loss": "pre-BN loss", "post_bn_loss": "post-BN loss", "gap": "gap %",
                 "oscillating": "osc. %", "frozen": "frozen %", "seconds": "seconds"}
COMPARABLE = ("model", "data", "weight_bits", "act_bits", "seed")
NO_SETTING = {"seed", "output", "resume", "workers", "device", "checkpoint_every"}


def print_table(rows: list[dict]) -> None:
    """Rows under their keys, in Markdown: what the terminal shows can go into a README."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
             for row in (rows[0], *(row.values() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in (cells[0], ["-" * width for width in widths], *cells[1:]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def mean_std(values: list[float], digits: int = 2) -> str:
    """The mean, and where there are several values, their standard deviation; also of NaN."""
    mean = fmean(values)
    squares = sum((value - mean) ** 2 for value in values)
    deviation = f" ± {math.sqrt(squares / (len(values) - 1)):.{digits}f}" if values[1:] else ""
    return f"{mean:.{digits}f}{deviation}"


def read_summary(folder: str | Path) -> dict:
    """What a finished run wrote of itself; "setting" is all but the seed and where it ran.

    OSError, in one line, where there is nothing of the kind.
    """
    file = Path(folder, "summary.json")
    try:
        if not file.is_file():  # a pipe would block for ever
            raise OSError("no such file")
        summary = json.loads(file.read_text())
        seed = f"seed{summary['seed']}"  # weights of the same name but for the seed are alike
        setting = {key: str(value).replace(seed, "seed*")
                   for key, value in summary["arguments"].items() if key not in NO_SETTING}
        pre, post = summary["pre_bn_loss"], summary["post_bn_loss"]
        summary |= {"gap": 100 * (pre / post - 1) if post else math.nan, "setting": setting}
        return {**{key: summary[key] for key in ("method", "setting", *COMPARABLE)},
                **{key: float(summary[key]) for key in TABLE_COLUMNS}}
    except Exception as error:  # whatever a file of another shape raises
        raise OSError(f"--summarize {folder}: no summary.json of a run ({error})") from None


def print_summaries(summaries: list[dict]) -> None:
    """A table; those of one setting share a row: mean and standard deviation."""
    groups = {}
    for summary in summaries:
        groups.setdefault(json.dumps(summary["setting"]), []).append(summary)
    varied = [key for key in summaries[0]["setting"]
              if key not in ("method", "model", "bits", "act_bits", "weights")
              and len({s["setting"].get(key) for s in summaries}) > 1]
    print_table([{"network": group[0]["model"], "method": group[0]["method"],
                  "W/A": f"{group[0]['weight_bits']}/{group[0]['act_bits']}",
                  **{key: group[0]["setting"].get(key) for key in varied}, "runs": len(group),
                  **{title: mean_std([s[key] for s in group], 3 if "loss" in title else 2)
                     for key, title in TABLE_COLUMNS.items()}} for group in groups.values()])


def summarize(folders: list[str]) -> None:
    """A table of these finished runs."""
    print_summaries([read_summary(folder) for folder in folders])


def compare(output: str) -> None:
    """A table of this run and those beside it of the same network, data, bits and seed."""
    this, alike = read_summary(output), []
    beside = Path(os.path.realpath(output)).parent.glob("*")  # none, where nobody may list them
    for folder in sorted({os.path.realpath(path) for path in (output, *beside)}):
        with suppress(OSError):  # of another program
            other = read_summary(folder)
            alike += [other] if all(other[key] == this[key] for key in COMPARABLE) else []
    print_summaries(alike)
