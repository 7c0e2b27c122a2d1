"""What a finished cell's own files say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robusteval.comparison.cells import Cell
from robusteval.comparison.config import CompareConfig
from robusteval.comparison.work import CHECKPOINTS, evaluation_path, margins_path, suite_of
from robusteval.errors import RobustevalError
from robusteval.evaluation.assemble import SAMPLES
from robusteval.evaluation.validate import read_report
from robusteval.provenance import Environment
from robusteval.report import Report, SampleRow
from robusteval.runs import CONFIG, EVENTS, read_json
from robusteval.verdict import Verdict

ENVIRONMENT = "environment.json"


@dataclass(frozen=True)
class Result:
    """One cell. ``values`` are its figures by column, fractions for accuracies.

    ``right`` and ``held`` (N,) say which test samples are right, clean and after the stages that all cells share.
    ``trained_in`` are the environments of all sessions that trained it; ``seconds`` of a training whose log has lost
    an epoch are None.
    """

    cell: Cell
    values: dict[str, float]
    right: NDArray[np.bool_]
    held: NDArray[np.bool_]
    alarms: tuple[str, ...]
    seconds: dict[str, float | None]
    trained_in: tuple[Environment, ...]
    report: Report


def read_result(config: CompareConfig, cell: Cell, shared: tuple[str, ...]) -> Result:
    """Collect the figures of a finished cell; ``shared`` are the stages that all cells' suites begin with.

    Raises `RobustevalError` when they are not of the cell's model.
    """
    folder = evaluation_path(cell, suite_of(config, cell))
    report, card = read_report(folder), read_json(cell.run / "best" / CONFIG)["training"]
    _check_weights(cell, "best", folder, report.model.weights_sha256)
    rows = [SampleRow.model_validate_json(line) for line in (folder / SAMPLES).read_text().splitlines()]
    right = np.array([row.verdict is not Verdict.MISCLASSIFIED for row in rows])
    broken = np.array([row.verdict is Verdict.BROKEN and row.stage in shared for row in rows])
    values = {"best_epoch": card["epoch"], "val_clean": card["validation"]["clean"]}
    values |= {"val_pgd": card["validation"]["pgd"], "clean": report.results.clean.rate}
    for checkpoint in CHECKPOINTS:
        values |= _margin_values(cell, checkpoint)
    values |= _after_stages(report)
    events = read_events(cell.run / EVENTS)
    seconds = {"training": _training_seconds(cell, events), "evaluation": report.seconds}
    environments = [read_json(cell.run / ENVIRONMENT), *(e["environment"] for e in events if "environment" in e)]
    trained_in = tuple(map(Environment.model_validate, environments))
    alarms = tuple(card.get("alarms", ()))
    return Result(cell, values, right, right & ~broken, alarms, seconds, trained_in, report)


def _check_weights(cell: Cell, checkpoint: str, source: Path, found: str) -> None:
    if found != read_json(cell.run / checkpoint / CONFIG)["weights_sha256"]:
        raise RobustevalError(
            f"'{source}' is not about the model in '{cell.run / checkpoint}': their weights_sha256 differ; delete "
            f"'{cell.folder}', and the same command makes it again."
        )


def _margin_values(cell: Cell, checkpoint: str) -> dict[str, float]:
    path = margins_path(cell, checkpoint)
    record = read_json(path)
    _check_weights(cell, checkpoint, path, record["weights_sha256"])
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
        left -= stage.broken
        after[stage.name] = left / report.results.clean.total
    return after


def _training_seconds(cell: Cell, events: Sequence[dict[str, Any]]) -> float | None:
    """Return the seconds of all epochs, None if one is missing; one redone after an interruption counts once."""
    seconds = {event["epoch"]: event["seconds"] for event in events if event.get("event") == "epoch"}
    return sum(seconds.values()) if len(seconds) == cell.epoch else None


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run's log, without lines that a kill cut off; none where there is no log."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [event for event in map(_parsed, lines) if event is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
