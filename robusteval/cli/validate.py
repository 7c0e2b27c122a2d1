"""`validate`: check a report against its schema and against itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from robusteval.cli import _console
from robusteval.errors import CheckFailed

SHOWN = 20


@click.command("validate")
@click.argument("path", type=click.Path(path_type=Path))
def command(path: Path) -> None:
    """Check the report in folder PATH: JSON Schemas, hashes, and that results, stages and rank follow from the rows.

    Neither the model nor the data is needed, so costs, provenance and the witnesses' effect are not checked. Exit
    code 3 if anything is wrong.
    """
    click.echo(f"valid: {valid(path)}")


def valid(path: Path) -> Path:
    """Return the folder of the report at ``path``; name what is wrong with it and raise `CheckFailed` if anything."""
    from robusteval.evaluation.validate import validate

    folder = path.parent if path.name == "report.json" else path
    problems = validate(folder) or [*_check_rendering(folder)]
    for problem in problems[:SHOWN]:
        _console.say(f"wrong: {problem}")
    if problems:
        raise CheckFailed(f"'{folder}' is not a valid report: {len(problems)} problem(s).")
    return folder


def _check_rendering(folder: Path) -> Iterator[str]:
    """Compare what people read, and paste into their own tables, with what `report.json` says."""
    from robusteval.evaluation.validate import read_report
    from robusteval.render.eps_curve import CURVE_TABLE, curve_table
    from robusteval.render.html import HTML, is_current
    from robusteval.render.markdown import render

    report = read_report(folder)
    expected = {"report.md": render(report)} | ({CURVE_TABLE: curve_table(report)} if report.curve else {})
    for name, text in expected.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            yield f"{name} does not say what report.json says"
    if (folder / HTML).is_file() and not is_current(folder):
        yield f"{HTML} is of another report; `render` makes it again"
