"""Run an evaluation in a run folder: resumable, in one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from functools import cache
from pathlib import Path

from robusteval.errors import RobustevalError
from robusteval.evaluation.assemble import assemble, pending
from robusteval.evaluation.chunks import ChunkResult
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import Plan, identity, judge_chunk, preflight, prepare
from robusteval.processes import worker_pool
from robusteval.report import Finding, Report
from robusteval.runs import RunDir

Told = Callable[[ChunkResult | str], None]
"""Hears of the stage that begins (a string, single process only) and of every finished chunk."""


def evaluate(plan: Plan, run: RunDir, told: Told = lambda news: None) -> Report:
    """Judge the chunks that ``run`` does not have yet and write its report.

    Raises `UsageError` when the folder belongs to other settings, `RobustevalError` when the model cannot be judged.
    """
    findings = preflight(plan)
    run.claim(identity(plan))
    with run.locked():
        return _evaluate(plan, run, findings, told)


def _evaluate(plan: Plan, run: RunDir, findings: list[Finding], told: Told) -> Report:
    todo = pending(plan, run.path)
    run.event("start", pending=len(todo), chunks=len(plan.chunks), workers=plan.workers)
    judged = _in_processes(plan, todo, run.path) if plan.workers > 1 else _in_turn(plan, todo, run.path, told)
    for chunk in judged:
        run.event("chunk", first=chunk.rows[0].id, seconds=round(sum(stage.seconds for stage in chunk.stages), 3))
        told(chunk)
    report = assemble(plan, run, findings)
    run.event("done", robust=report.results.empirical.rate)
    return report


def _in_turn(plan: Plan, todo: list[int], folder: Path, told: Told) -> Iterator[ChunkResult]:
    return (judge_chunk(plan, index, folder, told) for index in todo)


def _in_processes(plan: Plan, todo: list[int], folder: Path) -> Iterator[ChunkResult]:
    """Judge chunks in worker processes that load model and data themselves."""
    job = (plan.config, folder, identity(plan))
    with worker_pool(plan.workers, "--workers", _start_worker, *job) as pool:
        for future in as_completed([pool.submit(_work, index) for index in todo]):
            yield future.result()


_Job = tuple[EvalConfig, Path, dict[str, object]]
_jobs: list[_Job] = []
"""What this worker process evaluates; set once when it starts."""


def _start_worker(config: EvalConfig, folder: Path, expected: dict[str, object]) -> None:
    _jobs.append((config, folder, expected))


def _work(index: int) -> ChunkResult:
    _, folder, _ = _jobs[0]
    return judge_chunk(_loaded(), index, folder)


@cache
def _loaded() -> Plan:
    """Load model and data once, and make sure that they are the ones the parent looked at."""
    config, _, expected = _jobs[0]
    plan = prepare(config)
    if identity(plan) != expected:
        raise RobustevalError("the model or the data changed on disk while the evaluation was starting.")
    return plan
