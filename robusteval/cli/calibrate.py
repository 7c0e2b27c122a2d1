"""`calibrate`: how far a run's suite is from another suite, on a random part of its samples."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.cli import _console
from robusteval.cli._options import source_of, source_options
from robusteval.errors import RobustevalError, UsageError

if TYPE_CHECKING:
    from robusteval.report import Calibration, Report


@click.command("calibrate")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--samples", "count", type=int, default=200, show_default=True, help="How many random samples.")
@click.option("--against", default="standard", show_default=True, help="The suite to compare with: a name or a file.")
@source_options
@click.option("--seed", type=int, help="Seed that chooses the samples.  [default: one that nobody could foresee]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON record on stdout.")
def command(path: Path, count: int, against: str, seed: int | None, as_json: bool, **where: Any) -> None:
    """Run the suite of the report in folder PATH and suite `standard` on the same random samples.

    Says how often their verdicts differ, with a confidence interval, and what each took, side by side in one process.
    The result becomes part of the report's folder, as calibration.json, and is shown in its report.html.
    """
    from robusteval.comparison.calibrate import calibrate
    from robusteval.evaluation.assemble import CALIBRATION
    from robusteval.evaluation.validate import read_report, reseal, validate
    from robusteval.evaluation.verify import mismatches, subject
    from robusteval.render.documents import write_documents
    from robusteval.runs import RunDir, write_json

    if count < 1:
        raise UsageError(f"--samples {count} compares nothing; give at least 1.")
    folder = path.parent if path.name == "report.json" else path
    problems = validate(folder)
    if problems:
        raise RobustevalError(f"the report in '{folder}' is not valid: {problems[0]}.")
    with _console.err.status("loading"):
        plan = subject(folder, source_of(**where))
        report = read_report(folder)
        problems = mismatches(folder, report, plan)
    if problems:
        raise RobustevalError(f"this is not what the report in '{folder}' is about: {problems[0]}.")
    with _console.progress() as bar:
        task = bar.add_task("calibrating", total=2 * min(count, len(plan.split)), status="")

        def told(done: int, name: str) -> None:
            bar.update(task, advance=done, status=name)

        found = calibrate(plan, folder, against, count, secrets.randbits(31) if seed is None else seed, told)
    with RunDir(folder).locked():
        write_json(folder / CALIBRATION, found.model_dump(mode="json"))
        reseal(folder, CALIBRATION)
        reseal(folder, *write_documents(report, folder, plan.split))  # `render` can do that again, if it stops here
    _show(found, report, folder, as_json)


def _show(found: Calibration, report: Report, folder: Path, as_json: bool) -> None:
    from robusteval.render._text import calibrated

    if as_json:
        click.echo(found.model_dump_json())
        return
    for said in calibrated(found, report):
        click.echo(said)
    click.echo(f"report: {folder}")
