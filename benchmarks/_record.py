"""What the benchmarks share: how a record is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click


def output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options `--json` and `--markdown`, files to write."""
    for name in ("markdown", "json"):
        command = click.option(f"--{name}", f"{name}_file", type=click.Path(path_type=Path))(command)
    return command


def write(record: Mapping[str, Any], text: str, json_file: Path | None, markdown_file: Path | None) -> None:
    """Print ``text``, and write it and ``record`` to the files asked for."""
    if json_file:
        json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if markdown_file:
        markdown_file.write_text(text, encoding="utf-8")
    print(text)
