"""The comparison as a table: a row per objective out of a row per run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from robusteval.comparison.config import CompareConfig, Contender
from robusteval.comparison.results import Result
from robusteval.comparison.statistics import Paired, Spread, holm, paired, spread
from robusteval.comparison.work import evaluation_path, suite_of
from robusteval.errors import RobustevalError
from robusteval.evaluation.suite import Suite
from robusteval.provenance import Environment
from robusteval.training.cost import Passes
from robusteval.training.objective import OBJECTIVES

BEFORE = ("clean", "pgd")
AFTER = (
    "margin_mean", "margin_median", "scaled_margin_mean", "scaled_margin_median",
    "last_clean", "last_pgd", "best_epoch", "val_clean", "val_pgd",
)  # fmt: skip
"""Columns before and after those of the attack stages."""


@dataclass(frozen=True)
class Row:
    """An objective's runs. ``spreads`` is by column, over the seeds that have it; ``failures`` by seed.

    ``fully`` is ``spreads`` over only the seeds that were attacked with the full suite.

    ``robust`` and ``clean`` are the differences from the reference, ``p_holm`` is ``robust.p`` adjusted for the
    number of objectives; None where there is nothing to compare.
    """

    label: str
    objective: str
    params: dict[str, Any]
    note: str
    passes: Passes
    results: tuple[Result, ...]
    failures: dict[int, str]
    spreads: dict[str, Spread]
    fully: dict[str, Spread]
    robust: Paired | None
    clean: Paired | None
    p_holm: float | None = None


@dataclass(frozen=True)
class Table:
    """A comparison so far. ``shared`` are the stages of every run, ``full`` those of the seeds attacked with more.

    ``jobs`` are the numbers of runs that were done at once; they are no part of the result.
    """

    config: CompareConfig
    facts: dict[str, Any]
    shared: tuple[str, ...]
    full: tuple[str, ...]
    jobs: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Figures of a run, in order."""
        return (*BEFORE, *self.full, *AFTER)

    @property
    def some_fully(self) -> bool:
        """Whether only some of the seeds were attacked with the full suite, so that they are a table of their own."""
        return self.full != self.shared and self.config.full_seeds < self.config.seeds


Failures = Mapping[tuple[str, int], str]
"""(label, seed) -> what went wrong."""


@dataclass(frozen=True)
class Frame:
    """What is known of a comparison before any cell is done.

    ``identity`` is what all cells of its folder must share; ``suites`` are the shared and the full one.
    """

    config: CompareConfig
    identity: dict[str, Any]
    facts: dict[str, Any]
    suites: tuple[Suite, Suite]
    params: Mapping[str, dict[str, Any]]
    passes: Mapping[str, Passes]
    jobs: tuple[int, ...] = ()

    @property
    def stages(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the stages of every run, and of the seeds attacked with more."""
        shared, full = (tuple(stage.name for stage in suite.specs) for suite in self.suites)
        return shared, full if self.config.full_seeds else shared


def build(frame: Frame, results: Sequence[Result], failures: Failures) -> Table:
    """Put the finished cells together; raise `RobustevalError` if they cannot be compared."""
    _refuse_mixed(frame, results)
    reference = [result for result in results if result.cell.label == frame.config.reference]
    rows = [_row(frame, contender, results, failures, reference) for contender in frame.config.objectives]
    tested = [(index, row.robust.p) for index, row in enumerate(rows) if row.robust]
    for (index, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
        rows[index] = replace(rows[index], p_holm=adjusted)
    facts = {**frame.facts, **_made_with(results)}
    return Table(frame.config, facts, *frame.stages, frame.jobs, tuple(rows))


def _refuse_mixed(frame: Frame, results: Sequence[Result]) -> None:
    """Raise `RobustevalError` unless all cells were evaluated on the same samples, with the suites as they are now."""
    if len({result.report.data.sha256 for result in results}) > 1:
        raise RobustevalError("the runs were not evaluated on the same test samples; start over with another --out.")
    current = {suite.name: suite.sha256 for suite in frame.suites}
    for result in results:
        name = suite_of(frame.config, result.cell)
        if result.report.suite.sha256 != current[name]:
            raise RobustevalError(
                f"{result.cell.name} was evaluated with other stages than suite '{name}' has now; delete "
                f"'{evaluation_path(result.cell, name)}', and the same command evaluates it again."
            )


def _row(
    frame: Frame, contender: Contender, results: Sequence[Result], failures: Failures, reference: Sequence[Result]
) -> Row:
    label = contender.label
    own = tuple(result for result in results if result.cell.label == label)
    fully = [result for result in own if result.cell.seed < frame.config.full_seeds]
    other = {result.cell.seed: result for result in reference if label != frame.config.reference}
    pairs = [(result, other[result.cell.seed]) for result in own if result.cell.seed in other]
    return Row(
        label=label,
        objective=contender.name,
        params=frame.params[label],
        note=OBJECTIVES.unconfirmed(contender.name),
        passes=frame.passes[label],
        results=own,
        failures={seed: text for (name, seed), text in failures.items() if name == label},
        spreads=_spreads(own),
        fully=_spreads(fully),
        robust=_compare(pairs, "held"),
        clean=_compare(pairs, "right"),
    )


def _spreads(results: Sequence[Result]) -> dict[str, Spread]:
    columns = dict.fromkeys(column for result in results for column in result.values)
    return {key: spread([r.values[key] for r in results if key in r.values]) for key in columns}


def _compare(pairs: Sequence[tuple[Result, Result]], what: str) -> Paired | None:
    if not pairs:
        return None
    own, other = (np.stack([getattr(pair[side], what) for pair in pairs]) for side in (0, 1))
    return paired(own, other)


def _made_with(results: Sequence[Result]) -> dict[str, list[str]]:
    """Return the software and devices that trained and evaluated the cells, naming the cells where they differ."""
    trained = [(result, environment) for result in results for environment in result.trained_in]
    evaluated = [(result, result.report.environment) for result in results]
    return {
        "trained_with": _by_cell((result, _versions(found, ("robusteval", "torch"))) for result, found in trained),
        "trained_on": _by_cell((result, _device(found)) for result, found in trained),
        "evaluated_with": _by_cell(
            (result, _versions(found, ("robusteval", "torch", "pyautoattack"))) for result, found in evaluated
        ),
        "evaluated_on": _by_cell((result, _device(found)) for result, found in evaluated),
    }


def _by_cell(said: Iterable[tuple[Result, str]]) -> list[str]:
    """Return the distinct texts, each with the names of its cells if there are several."""
    cells: dict[str, dict[str, None]] = {}
    for result, text in said:
        cells.setdefault(text, {})[result.cell.name] = None
    return list(cells) if len(cells) < 2 else [f"{text} ({', '.join(cells[text])})" for text in sorted(cells)]


def _versions(environment: Environment, packages: Sequence[str]) -> str:
    commit = f", commit {environment.git_commit[:12]}" if environment.git_commit else ""
    dirty = " with local changes" if environment.git_dirty else ""
    named = ", ".join(f"{name} {environment.packages[name]}" for name in packages)
    return f"{named}{commit}{dirty}"


def _device(environment: Environment) -> str:
    return f"{environment.device.split(':')[0]} {environment.device_name}".strip()
