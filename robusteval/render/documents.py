"""What people read, and paste into their own tables: written, and whether it says what `report.json` says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from robusteval.datasets.base import Split
from robusteval.render.eps_curve import CURVE_PICTURE, CURVE_TABLE, curve_table, write_curve
from robusteval.render.html import HTML, is_current, write_html
from robusteval.render.markdown import render
from robusteval.report import Report
from robusteval.runs import write_atomic

MARKDOWN = "report.md"
DOCUMENTS = (MARKDOWN, HTML, CURVE_TABLE, CURVE_PICTURE)


def write_documents(report: Report, folder: Path, clean: Split | None) -> list[str]:
    """Write the documents of ``report`` into its ``folder``, and return the names of those that are there now.

    ``clean`` holds the evaluated samples; without it `report.html` has no pictures of them.
    """
    write_atomic(folder / MARKDOWN, render(report).encode())
    if report.curve:
        write_curve(report, folder)
    write_html(report, folder, clean)
    return [name for name in DOCUMENTS if (folder / name).is_file()]


def unfaithful(report: Report, folder: Path) -> Iterator[str]:
    """Yield what is wrong with the documents beside ``report``; of `report.html` only whether it is this report's."""
    expected = {MARKDOWN: render(report)} | ({CURVE_TABLE: curve_table(report)} if report.curve else {})
    for name, text in expected.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            yield f"{name} does not say what report.json says; `render` makes it again"
    if (folder / HTML).is_file() and not is_current(folder):
        yield f"{HTML} is not made from the files beside it; `render` makes it again"
