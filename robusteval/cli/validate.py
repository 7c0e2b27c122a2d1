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
    """Check the report in folder PATH: JSON Schemas, hashes, and that every number follows from the rows.

    Neither the model nor the data is needed. Exit code 3 if anything is wrong.
    """
    from robusteval.evaluation.validate import validate

    folder = path.parent if path.name == "report.json" else path
    problems = validate(folder)
    for problem in problems[:SHOWN]:
        _console.err.print(f"[red]wrong:[/red] {problem}", soft_wrap=True)
    if problems:
        raise CheckFailed(f"'{folder}' is not a valid report: {len(problems)} problem(s).")
    _console.out.print(f"valid: {folder}", soft_wrap=True)
