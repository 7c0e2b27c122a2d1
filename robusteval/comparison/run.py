"""Run a comparison in a folder: what is done already is kept, and the table is written after every cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from robusteval.comparison.caption import facts
from robusteval.comparison.cells import Cell, check, make_cells, run_cells
from robusteval.comparison.config import CompareConfig
from robusteval.comparison.figure import draw
from robusteval.comparison.markdown import render
from robusteval.comparison.results import Result, read_events, read_result
from robusteval.comparison.table import Frame, Table, build
from robusteval.comparison.work import check_suites, is_done, rehearse, work
from robusteval.comparison.write import write_data
from robusteval.evaluation.suite import Suite
from robusteval.evaluation.validate import MANIFEST
from robusteval.runs import CONFIG, EVENTS, RunDir, write_atomic
from robusteval.training.cost import passes_per_step
from robusteval.training.plan import Plan

MARKDOWN = "table.md"

Told = Callable[[Cell | None, str | None], None]
"""Hears of every cell that ends, with what went wrong, if anything; and of None every few seconds."""


def prepare(config: CompareConfig, out: Path, command: str) -> tuple[Frame, list[Cell]]:
    """Check every setting before any work; raise `UsageError` for a wrong one or one that is not the folder's.

    The test part of the dataset is opened once, so that what is missing there is said now.
    """
    cells = make_cells([(row.label, row) for row in config.contenders], config.seeds, config.train, out)
    plans = check(cells)
    first = next(iter(plans.values()))
    suites = check_suites(config, first.threat)
    rehearse(config, cells[0], first)
    identity = _identity(config, first, suites)
    if (out / CONFIG).is_file():
        RunDir(out).claim(identity)
    params = {label: plan.config.objective.params for label, plan in plans.items()}
    passes = {label: passes_per_step(plan) for label, plan in plans.items()}
    steps = first.steps_per_epoch * first.config.epochs
    known = {**facts(config, first, command), "steps": steps}
    return Frame(config, identity, known, suites, params, passes), cells


def finished_elsewhere(cells: Sequence[Cell], out: Path) -> list[str]:
    """Return the names of runs that are evaluated in ``out`` but are none of ``cells``."""
    finished = {manifest.parent.parent.name for manifest in out.glob(f"*/evaluate-*/{MANIFEST}")}
    return sorted(finished - {cell.name for cell in cells})


def _identity(config: CompareConfig, plan: Plan, suites: tuple[Suite, Suite]) -> dict[str, Any]:
    """Return what all cells of a folder must share: settings, and hashes of the data and of what suite files say."""
    hashes = {"data_sha256": plan.data_sha256, "suite_sha256": suites[0].sha256, "full_suite_sha256": suites[1].sha256}
    return {**config.identity(), **hashes}


def compare(frame: Frame, cells: Sequence[Cell], out: Path, jobs: int, told: Told) -> Table:
    """Do the cells that are not done yet and return the table, written to ``out`` after every one of them."""
    config, run, shared = frame.config, RunDir(out), frame.stages[0]
    run.claim(frame.identity)
    with run.locked():
        results = [read_result(config, cell, shared) for cell in cells if is_done(config, cell)]
        failures: dict[tuple[str, int], str] = {}
        left = [cell for cell in cells if not is_done(config, cell)]
        if left:
            run.event("started", jobs=min(jobs, len(left)))
        frame = replace(frame, jobs=_jobs(out))
        for news in run_cells(left, partial(work, config), jobs):
            if news is None:
                told(None, None)
                continue
            cell, problem = news
            if problem is None:
                results.append(read_result(config, cell, shared))
            else:
                failures[cell.label, cell.seed] = problem
            run.event("cell", name=cell.name, problem=problem)
            _write(frame, cells, results, failures, out)
            told(cell, problem)
        table = _write(frame, cells, results, failures, out)
        draw(table, out)
    return table


def _jobs(out: Path) -> tuple[int, ...]:
    """Return how many runs were done at once, in every call that had any to do."""
    return tuple(sorted({event["jobs"] for event in read_events(out / EVENTS) if event.get("event") == "started"}))


def _write(
    frame: Frame, cells: Sequence[Cell], results: Sequence[Result], failures: dict[tuple[str, int], str], out: Path
) -> Table:
    order = {cell.name: index for index, cell in enumerate(cells)}  # not the order in which workers finish
    table = build(
        frame,
        sorted(results, key=lambda result: order[result.cell.name]),
        dict(sorted(failures.items(), key=lambda item: item[0][1])),
    )
    write_data(table, out)
    write_atomic(out / MARKDOWN, render(table).encode())
    return table
