"""`render`: write what people read in an evaluation's folder again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from robusteval.cli import _console
from robusteval.errors import CheckFailed, RobustevalError

if TYPE_CHECKING:
    from robusteval.datasets.base import Split
    from robusteval.report import Report


@click.command("render")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data-dir", help="Folder with the dataset's files, for pictures of clean images.  [default: as evaluated]"
)
def command(run: Path, data_dir: str | None) -> None:
    """Write report.html, report.md and the curve of the evaluation in folder RUN again, say with a newer version.

    The folder must be valid but for these, whose hashes in manifest.json are then replaced. The data set is read for
    pictures of clean images; where it cannot be, or is not the one that was evaluated, they are left out.
    """
    from robusteval.evaluation.validate import read_report, reseal, validate
    from robusteval.render.documents import DOCUMENTS, write_documents
    from robusteval.render.html import HTML
    from robusteval.runs import RunDir

    problems = validate(run, but=DOCUMENTS)
    if problems:
        raise CheckFailed(f"'{run}' is not a valid report, so there is nothing to render: {problems[0]}")
    report = read_report(run)
    with _console.err.status("rendering"), RunDir(run).locked():
        clean = _samples(report, run, data_dir)
        reseal(run, *write_documents(report, run, clean))
    click.echo(run / HTML)


def _samples(report: Report, run: Path, data_dir: str | None) -> Split | None:
    """Return the samples that were evaluated, or warn that there are none; nothing is fetched."""
    from robusteval.datasets.base import in_order
    from robusteval.datasets.open import open_dataset

    data = report.data
    try:
        split = in_order(open_dataset(data.name, data_dir or _data_dir(run)).load("test")).take(
            slice(0, data.evaluated)
        )
    except RobustevalError as error:
        _console.warn(f"clean images are left out: {error}")
        return None
    if split.content_hash == data.sha256:
        return split
    _console.warn(f"clean images are left out: what is called '{data.name}' here is not the data that was evaluated.")
    return None


def _data_dir(run: Path) -> str | None:
    """Return where the data lay when it was evaluated, if the folder says so."""
    from robusteval.runs import LAUNCH, read_json

    launch = read_json(run / LAUNCH) if (run / LAUNCH).is_file() else {}
    found = launch.get("data_dir") if isinstance(launch, dict) else None
    return found if isinstance(found, str) else None
