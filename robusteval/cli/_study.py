"""What the commands that train many models share: options and progress."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.cli import _console
from robusteval.cli._options import config_options, data_options, stack, threat_options
from robusteval.errors import RobustevalError

if TYPE_CHECKING:
    from robusteval.comparison.cells import Cell

DOTTED = {"model": "train.model.name", "limit": "evaluate.limit"} | {
    key: f"train.{key}"
    for key in ("dataset", "data_dir", "download", "norm", "eps", "epochs", "batch_size", "train_limit", "device")
}
"""Flags whose setting has another name."""

study_options = stack(
    data_options,
    click.option("--recipe", help="Named training settings to start from; see `list recipes`."),
    click.option("--train-limit", type=int, metavar="N", help="Train on N samples, each class in proportion."),
    click.option("--model", help="Architecture.  [default: small_cnn]"),
    click.option("--epochs", type=int, help="Passes through the training data.  [default: 30]"),
    click.option("--batch-size", type=int, help="Samples per training step.  [default: 128]"),
    threat_options,
    click.option("--seeds", type=int, metavar="N", help="Train with the seeds 0 to N - 1."),
    click.option("--jobs", type=click.IntRange(min=1), help="Runs at once.  [default: one per CPU core or GPU]"),
    click.option("--device", help="cpu, cuda, cuda:1 or auto.  [default: auto]"),
    click.option("--out", type=click.Path(path_type=Path), help="Folder of the study.  [default: one under runs/]"),
    click.option("--dry-run", is_flag=True, help="Print the runs and what they cost; train nothing."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON record on stdout."),
    config_options,
)


def dotted(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags under the names of their settings."""
    return {DOTTED.get(key, key): value for key, value in flags.items()}


def base(recipe: str | None) -> dict[str, Any]:
    """Return the settings that a recipe stands for, but for its objective, which the study decides."""
    from robusteval.training.recipes import load_recipe

    settings = load_recipe(recipe).settings if recipe else {}
    return {"train": {key: value for key, value in settings.items() if key not in ("objective", "seed")}}


def folder(out: Path | None, identity: Mapping[str, Any]) -> Path:
    """Return ``out``, or a folder that settings which runs must share always give, so that more can be added."""
    from robusteval.runs import digest

    return out or Path("runs") / f"{identity['command']}-{digest(identity)[:8]}"


def command_line() -> str:
    """Return the command as it was typed."""
    return f"{_console.program()} {shlex.join(sys.argv[1:])}"


@contextmanager
def watching(cells: Sequence[Cell], done: int) -> Iterator[Callable[[Cell | None, str | None], None]]:
    """Show on stderr a bar over ``cells``, the runs under way, and a line per cell that ends."""
    left = list(cells)
    with _console.progress() as bar:
        task = bar.add_task("runs", total=done + len(cells), completed=done, status="starting")

        def told(cell: Cell | None, problem: str | None) -> None:
            if cell is not None:
                left.remove(cell)
                bar.advance(task)
                _console.say(f"{cell.name}: {'done' if problem is None else f'FAILED: {problem}'}")
            under_way = [f"{one.name} {one.epoch}/{one.train.epochs}" for one in left if one.epoch]
            bar.update(task, status=", ".join(under_way))

        yield told


def fail(failed: Sequence[str], total: int, out: Path) -> None:
    """Raise `RobustevalError` if any cell failed."""
    if failed:
        raise RobustevalError(
            f"{len(failed)} of {total} runs failed: {', '.join(failed)}; the tables in '{out}' say why, and the same "
            "command tries them again."
        )
