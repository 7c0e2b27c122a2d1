"""Whether what people read, and paste into their own tables, says what `report.json` says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from robusteval.render.eps_curve import CURVE_TABLE, curve_table
from robusteval.render.html import HTML, is_current
from robusteval.render.markdown import render
from robusteval.report import Report


def unfaithful(report: Report, folder: Path) -> Iterator[str]:
    """Yield what is wrong with the documents beside ``report``; of `report.html` only whether it is this report's."""
    expected = {"report.md": render(report)} | ({CURVE_TABLE: curve_table(report)} if report.curve else {})
    for name, text in expected.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            yield f"{name} does not say what report.json says"
    if (folder / HTML).is_file() and not is_current(folder):
        yield f"{HTML} is of another report; `render` makes it again"
