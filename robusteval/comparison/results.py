"""What a finished cell's own files say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robusteval.comparison.cells import Cell
from robusteval.comparison.config import CompareConfig
from robusteval.comparison.work import CHECKPOINTS, evaluation_path, margins_path, suite_of
from robusteval.evaluation.assemble import SAMPLES
from robusteval.evaluation.validate import read_report
from robusteval.report import Report, SampleRow
from robusteval.runs import CONFIG, EVENTS, read_json
from robusteval.verdict import Verdict


@dataclass(frozen=True)
class Result:
    """One cell. ``values`` are its figures by column, fractions for accuracies.

    ``right`` and ``held`` (N,) say which test samples are right, clean and after the stages that all cells share.
    """

    cell: Cell
    values: dict[str, float]
    right: NDArray[np.bool_]
    held: NDArray[np.bool_]
    alarms: tuple[str, ...]
    seconds: dict[str, float]
    report: Report


def read_result(config: CompareConfig, cell: Cell, shared: tuple[str, ...]) -> Result:
    """Collect the figures of a finished cell; ``shared`` are the stages that all cells' suites begin with."""
    folder = evaluation_path(cell, suite_of(config, cell))
    report, card = read_report(folder), read_json(cell.run / "best" / CONFIG)["training"]
    rows = [SampleRow.model_validate_json(line) for line in (folder / SAMPLES).read_text().splitlines()]
    right = np.array([row.verdict is not Verdict.MISCLASSIFIED for row in rows])
    broken = np.array([row.verdict is Verdict.BROKEN and row.stage in shared for row in rows])
    values = {"best_epoch": card["epoch"], "val_clean": card["validation"]["clean"]}
    values |= {"val_pgd": card["validation"]["pgd"], "clean": report.results.clean.rate}
    for checkpoint in CHECKPOINTS:
        values |= _margin_values(cell, checkpoint)
    values |= _after_stages(report)
    seconds = {"training": _training_seconds(cell), "evaluation": report.seconds}
    return Result(cell, values, right, right & ~broken, tuple(card.get("alarms", ())), seconds, report)


def _margin_values(cell: Cell, checkpoint: str) -> dict[str, float]:
    record = read_json(margins_path(cell, checkpoint))
    accuracy = {"pgd": record["robust_accuracy"]}
    if checkpoint == "last":
        return {"last_clean": record["clean_accuracy"], "last_pgd": accuracy["pgd"]}
    for prefix, key in (("margin", "adversarial"), ("scaled_margin", "scaled")):
        accuracy |= {f"{prefix}_mean": fmean(record[key]), f"{prefix}_median": median(record[key])}
    return accuracy


def _after_stages(report: Report) -> dict[str, float]:
    """Return stage -> accuracy after it."""
    left, after = report.results.clean.count, {}
    for stage in report.stages:
        left -= stage.closed
        after[stage.name] = left / report.results.clean.total
    return after


def _training_seconds(cell: Cell) -> float:
    """Return the seconds of all epochs; one that was redone after an interruption counts once."""
    seconds: dict[int, float] = {}
    for line in (cell.run / EVENTS).read_text().splitlines():
        event: dict[str, Any] = _parsed(line)
        if event.get("event") == "epoch":
            seconds[event["epoch"]] = event["seconds"]
    return sum(seconds.values())


def _parsed(line: str) -> dict[str, Any]:
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}  # cut off by a kill
    return event
