"""Suites: ordered stages as data, one TOML file each; the file name is the suite's name."""

from __future__ import annotations

import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent


def suite_files() -> dict[str, Path]:
    """Return suite name -> file."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def describe_suites() -> dict[str, str]:
    """Return suite name -> what it is for."""
    return {name: tomllib.loads(path.read_text(encoding="utf-8"))["about"] for name, path in suite_files().items()}
