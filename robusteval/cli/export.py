"""`export`: a report in the form that someone else's leaderboard takes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.cli import _console
from robusteval.cli._options import config_options
from robusteval.cli.validate import valid
from robusteval.errors import CheckFailed

if TYPE_CHECKING:
    from robusteval.exports.base import Evaluation, Export


@click.command("export")
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, help="robustbench, huggingface or csv; see `list exports`.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the files.  [default: RUN-TARGET beside RUN]")
@config_options
def command(path: Path, target: str, out: Path | None, config: Path | None, assignments: tuple[str, ...]) -> None:
    """Write the report in folder RUN in the form of another place; nothing is sent.

    What no report can know (authors, licence, consent) comes from --set KEY=VALUE or from the keys of a TOML file, and
    is asked for by name. Exit code 3 if the report is not valid, or the place's rules bar it, with every reason.
    """
    from robusteval.exports.base import write_files

    exporter = build(target, config, assignments)
    run = checked(path)
    made = allowed(exporter(run), target)
    folder = out or beside(run.folder, target)
    for written in write_files(made.files, folder).values():
        click.echo(f"wrote {shlex.quote(str(written))}")
    for note in made.notes:
        _console.say(f"note: {note}")


def build(target: str, config: Path | None, assignments: tuple[str, ...]) -> Any:
    """Build the exporter called ``target`` from a TOML file and ``key=value`` strings, the latter the stronger."""
    from robusteval.exports.base import EXPORTERS
    from robusteval.settings import read_assignments, read_toml

    return EXPORTERS.build(target, {**(read_toml(config) if config else {}), **read_assignments(assignments)})


def checked(path: Path) -> Evaluation:
    """Read the evaluation at ``path``; raise `CheckFailed` if it is not valid."""
    from robusteval.exports.base import Evaluation

    return Evaluation.read(valid(path))


def allowed(made: Export, target: str) -> Export:
    """Return what was made; name every reason why it is barred and raise `CheckFailed` if there is one."""
    for reason in made.barred:
        _console.say(f"barred: {reason}")
    if made.barred:
        raise CheckFailed(f"the rules of {target} bar this report: {len(made.barred)} reason(s).")
    return made


def beside(run: Path, target: str) -> Path:
    """Return the default folder for what is made of the folder ``run``."""
    whole = run.resolve()
    return whole.parent / f"{whole.name}-{target}"
