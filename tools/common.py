"""What the tools share: their command lines, and their pictures by matplotlib (only for --plot)."""

import argparse
import io
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from train import one_line_parser, save_atomically, user_error


def tool_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser for `python -m tools.NAME` that reports a bad flag in one line."""
    prog = f"python -m tools.{name}"
    return one_line_parser(description, prog=prog, epilog=f"example: {prog} {example}")


@contextmanager
def picture(path: str, width: float, height: float, write: bool = True):
    """Yields an empty matplotlib figure, width by height inches; at the end it is written to path.

    MPLBACKEND and a user's matplotlibrc (text.usetex, fonts) change nothing. Raises UserError if
    matplotlib is missing, if path does not end as a picture does, or if it cannot be written.
    """
    backend = os.environ.pop("MPLBACKEND", None)  # the import fails if it names no backend
    try:
        with user_error("--plot: needs matplotlib; pip install matplotlib", ImportError):
            from matplotlib import style
            from matplotlib.figure import Figure
    finally:
        os.environ |= {"MPLBACKEND": backend} if backend else {}
    content = io.BytesIO()
    with style.context("default"):
        figure = Figure((width, height), layout="constrained")
        yield figure
        with user_error(f"--plot {path}: give FILE.png or another picture's name", ValueError):
            figure.savefig(content, format=Path(path).suffix[1:] or "none", dpi=100)
    if write:
        save_atomically(Path(path), content.getvalue(), "--plot")


def check_picture(path: str) -> None:
    """Raises UserError if no picture can be written to path: before minutes of work, not after."""
    with picture(path, 1, 1, write=False):
        pass
    with user_error(f"--plot {path}: cannot be written", OSError):
        if os.path.isdir(path):
            raise IsADirectoryError("it is a folder")
        tempfile.TemporaryFile(dir=Path(path).parent).close()
