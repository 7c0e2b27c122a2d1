"""What the studies in this folder share: rows kept between runs, tables, and the document they go into."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from robusteval.provenance import version_of
from robusteval.runs import write_json

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- What follows is written by the command. -->\n"


def cached(folder: Path, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``folder`` keeps under ``name``, computed first if there is nothing: a study can be interrupted."""
    path = folder / f"{name}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, compute())
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Render Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def versions(*packages: str) -> str:
    """Name the versions of ``packages`` and of Python."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version_of(name)}" for name in packages)])


def publish(name: str, figures: str) -> None:
    """Put ``figures`` below the mark in docs/results/``name``; what stands above it is written by hand and stays."""
    path = ROOT / "docs" / "results" / name
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.write_text(f"{text.partition(MARK)[0]}{MARK}\n{figures}\n", encoding="utf-8")
