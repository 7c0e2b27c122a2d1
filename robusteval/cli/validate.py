"""`validate`: check a report against its schema and against itself."""

from __future__ import annotations

from pathlib import Path

import click

from robusteval.cli import _console
from robusteval.errors import CheckFailed

SHOWN = 20


@click.command("validate")
@click.argument("path", type=click.Path(path_type=Path))
def command(path: Path) -> None:
    """Check the report in folder PATH: JSON Schemas, hashes, and that results, stages and rank follow from the rows.

    Neither the model nor the data is needed, so costs, provenance and the witnesses' effect are not checked, nor what
    report.html shows; `render` makes that again. Exit code 3 if anything is wrong.
    """
    click.echo(f"valid: {valid(path)}")


def valid(path: Path) -> Path:
    """Return the folder of the report at ``path``; name what is wrong with it and raise `CheckFailed` if anything."""
    from robusteval.evaluation.validate import read_report, validate
    from robusteval.render.documents import unfaithful

    folder = path.parent if path.name == "report.json" else path
    problems = validate(folder) or [*unfaithful(read_report(folder), folder)]
    for problem in problems[:SHOWN]:
        _console.say(f"wrong: {problem}")
    if problems:
        raise CheckFailed(f"'{folder}' is not a valid report: {len(problems)} problem(s).")
    return folder
