"""A table of finished runs: means over seeds, from their summary.json.

    python -m tools.summarize runs/*-lsq-* runs/*-freeze-*
"""

import argparse
import json
import math
from statistics import fmean

import train
from tools.common import tool_parser
from train import TABLE_COLUMNS, WHERE_AND_HOW


def mean_std(values: list[float], digits: int = 2) -> str:
    """The mean; of several values also their standard deviation. Values may be NaN."""
    mean = fmean(values)
    squares = sum((value - mean) ** 2 for value in values)  # statistics.stdev fails at NaN
    deviation = f" ± {math.sqrt(squares / (len(values) - 1)):.{digits}f}" if values[1:] else ""
    return f"{mean:.{digits}f}{deviation}"


def setting(summary: dict) -> dict[str, str]:
    """The arguments that make a setting: all but the seed, and where and how the run was made."""
    seed = f"seed{summary['seed']}"  # two paths of weights may differ in the seed
    return {key: str(value).replace(seed, "seed*") for key, value in summary["arguments"].items()
            if key not in WHERE_AND_HOW | {"seed"}}


def summarize(args: argparse.Namespace) -> None:
    """Prints a row per setting, with mean and standard deviation over its runs."""
    summaries, groups = [train.read_summary(folder) for folder in args.folders], {}
    for summary in summaries:
        groups.setdefault(json.dumps(setting(summary)), []).append(summary)
    settings = [json.loads(group) for group in groups]
    varied = [key for key in settings[0] if len({each.get(key) for each in settings}) > 1
              and key not in ("method", "model", "bits", "act_bits", "weights")]
    train.print_table([{
        "network": group[0]["model"], "method": group[0]["method"], "W/A": group[0]["W/A"],
        **{key: setting(group[0]).get(key) for key in varied}, "runs": len(group),
        **{title: mean_std([each[key] for each in group], digits)
           for key, (title, digits) in TABLE_COLUMNS.items()}} for group in groups.values()])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    p = tool_parser("summarize", "Prints a table of finished runs: a row per setting, with mean "
                    "and\nstandard deviation over its seeds.", "runs/*-lsq-* runs/*-freeze-*")
    p.add_argument("folders", type=train.a_path, metavar="DIR", nargs="+",
                   help="folder of a finished run, that is, the --output of train.py")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on standard error."""
    return train.exit_status("python -m tools.summarize", parse, summarize, argv)


if __name__ == "__main__":
    train.run_script(main)
