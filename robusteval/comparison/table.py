"""The comparison as a table: a row per objective out of a row per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from robusteval.comparison.config import NOTES, CompareConfig, Contender
from robusteval.comparison.results import Result
from robusteval.comparison.statistics import Paired, Spread, holm, paired, spread
from robusteval.errors import RobustevalError
from robusteval.training.cost import Passes

BEFORE = ("clean", "pgd")
AFTER = (
    "margin_mean", "margin_median", "scaled_margin_mean", "scaled_margin_median",
    "last_clean", "last_pgd", "best_epoch", "val_clean", "val_pgd",
)  # fmt: skip
"""Columns before and after those of the attack stages."""


@dataclass(frozen=True)
class Row:
    """An objective's runs. ``spreads`` is by column, over the seeds that have it; ``failures`` by seed.

    ``robust`` and ``clean`` are the differences from the reference, ``p_holm`` is ``robust.p`` adjusted for the
    number of objectives; None where there is nothing to compare.
    """

    label: str
    objective: str
    params: dict[str, Any]
    note: str | None
    passes: Passes
    results: tuple[Result, ...]
    failures: dict[int, str]
    spreads: dict[str, Spread]
    robust: Paired | None
    clean: Paired | None
    p_holm: float | None = None


@dataclass(frozen=True)
class Table:
    """A comparison so far. ``shared`` are the stages of every run, ``full`` those of the seeds attacked with more."""

    config: CompareConfig
    facts: dict[str, Any]
    shared: tuple[str, ...]
    full: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Figures of a run, in order."""
        return (*BEFORE, *self.full, *AFTER)


Failures = Mapping[tuple[str, int], str]
"""(label, seed) -> what went wrong."""


@dataclass(frozen=True)
class Frame:
    """What is known of a comparison before any cell is done."""

    config: CompareConfig
    facts: dict[str, Any]
    shared: tuple[str, ...]
    full: tuple[str, ...]
    params: Mapping[str, dict[str, Any]]
    passes: Mapping[str, Passes]


def build(frame: Frame, results: Sequence[Result], failures: Failures) -> Table:
    """Put the finished cells together; raise `RobustevalError` if they are not about the same samples."""
    if len({result.report.data.sha256 for result in results}) > 1:
        raise RobustevalError("the runs were not evaluated on the same test samples; start over with another --out.")
    reference = [result for result in results if result.cell.label == frame.config.reference]
    rows = [_row(frame, contender, results, failures, reference) for contender in frame.config.objectives]
    tested = [(index, row.robust.p) for index, row in enumerate(rows) if row.robust]
    for (index, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
        rows[index] = replace(rows[index], p_holm=adjusted)
    versions = sorted({_versions(result) for result in results})
    facts = {**frame.facts, "versions": versions, "devices": sorted({_device(result) for result in results})}
    return Table(frame.config, facts, frame.shared, frame.full, tuple(rows))


def _row(
    frame: Frame, contender: Contender, results: Sequence[Result], failures: Failures, reference: Sequence[Result]
) -> Row:
    label = contender.label
    own = tuple(result for result in results if result.cell.label == label)
    columns = dict.fromkeys(column for result in own for column in result.values)
    spreads = {key: spread([r.values[key] for r in own if key in r.values]) for key in columns}
    other = {result.cell.seed: result for result in reference if label != frame.config.reference}
    pairs = [(result, other[result.cell.seed]) for result in own if result.cell.seed in other]
    return Row(
        label=label,
        objective=contender.name,
        params=frame.params[label],
        note=NOTES.get(contender.name),
        passes=frame.passes[label],
        results=own,
        failures={seed: text for (name, seed), text in failures.items() if name == label},
        spreads=spreads,
        robust=_compare(pairs, "held"),
        clean=_compare(pairs, "right"),
    )


def _compare(pairs: Sequence[tuple[Result, Result]], what: str) -> Paired | None:
    if not pairs:
        return None
    own, other = (np.stack([getattr(pair[side], what) for pair in pairs]) for side in (0, 1))
    return paired(own, other)


def _versions(result: Result) -> str:
    environment = result.report.environment
    commit = f", commit {environment.git_commit[:12]}" if environment.git_commit else ""
    dirty = " with local changes" if environment.git_dirty else ""
    named = ", ".join(f"{name} {environment.packages[name]}" for name in ("robusteval", "torch", "pyautoattack"))
    return f"{named}{commit}{dirty}"


def _device(result: Result) -> str:
    environment = result.report.environment
    return f"{environment.device.split(':')[0]} {environment.device_name}".strip()
