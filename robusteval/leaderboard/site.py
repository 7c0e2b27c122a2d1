"""A leaderboard of run folders on this machine, as static files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robusteval.errors import CheckFailed
from robusteval.evaluation.validate import MANIFEST, read_report, validate
from robusteval.leaderboard.entry import Published, entry_of
from robusteval.leaderboard.pages import write_site
from robusteval.runs import file_digest


def build(runs: Sequence[Path], out: Path) -> int:
    """Write the leaderboard of ``runs`` to ``out`` and return how many there are; the same run counts once.

    Raises `CheckFailed` when a report is not valid: a wrong one is not published.
    """
    entries = {one.id: one for one in map(_entry, runs)}
    write_site(list(entries.values()), out)
    return len(entries)


def _entry(run: Path) -> Published:
    problems = validate(run)
    if problems:
        raise CheckFailed(f"'{run}' is not a valid report: {problems[0]}")
    entry = entry_of(read_report(run))
    return Published(
        id=file_digest(run / MANIFEST), status="claimed", reason="", owner="", received=entry.created, report=entry
    )
