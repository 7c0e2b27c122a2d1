"""Where output goes: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def progress() -> Progress:
    """Return a progress display on stderr: description, bar, count, elapsed time, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=err,
    )


def program() -> str:
    """Return how this program was called: from a checkout or installed."""
    return "python cli.py" if Path(sys.argv[0]).name == "cli.py" else "robusteval"


def printable(text: str) -> str:
    """Return ``text`` without control characters, which could rewrite what is on the screen."""
    return "".join(c for c in text if c.isprintable())


def say(message: str) -> None:
    """Print a line on stderr as it is: no markup, no wrapping, no control characters."""
    err.print(printable(message), soft_wrap=True, markup=False)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    say(f"warning: {message}")
