"""The training loop: train an epoch, validate, write down, repeat; resumable at any moment."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robusteval.errors import RobustevalError
from robusteval.models.io import save_model
from robusteval.provenance import deterministic, environment
from robusteval.runs import RunDir, write_json
from robusteval.training.checkpoint import CHECKPOINT, Row, TrainState, restore, save
from robusteval.training.epoch import OnEvent, train_epoch
from robusteval.training.plan import Plan
from robusteval.training.validate import Validate, validate

HISTORY = "history.json"
PATIENCE, PATIENCE_EPOCHS = 1 / 3, 5
"""From this fraction of the training and this many epochs on, a model no better than a constant one has collapsed."""


Status = Literal["complete", "already complete", "stopped"]


@dataclass(frozen=True)
class TrainResult:
    """How a run stands. ``best`` and the rows of ``history`` count epochs from 1."""

    path: Path
    status: Status
    epochs: int
    best: Row
    history: tuple[Row, ...]


def ignore(kind: str, fields: Mapping[str, Any]) -> None:
    """Do nothing about an event."""


def train(
    plan: Plan,
    run: RunDir,
    *,
    validate: Validate = validate,
    on_event: OnEvent = ignore,
    stop_after: int | None = None,
) -> TrainResult:
    """Train ``plan`` in the folder ``run``, or go on where an earlier call was interrupted.

    An interruption, even a kill, cannot change the final weights on the same machine and thread count. The folder
    gets `best/` (highest validation PGD accuracy, then clean accuracy, then the earlier epoch) and `last/`, both of
    the moving average where there is one, `history.json`, `events.jsonl` (an epoch that was redone appears twice)
    and `checkpoint.pt`. ``stop_after`` stops cleanly after so many more epochs. Raises `RobustevalError` when the
    loss is not finite or the model collapses.
    """
    run.claim(plan.identity)
    with run.locked(), _controlled(plan):
        state = _begin(plan)
        resumed = restore(state, run.path, plan.device)
        _announce(plan, run, state, on_event)
        if resumed:
            _publish(plan, run, state)  # the kill may have come between the checkpoint and these files
        done_before, start = state.epoch, time.monotonic()
        goal = min(plan.config.epochs, state.epoch + (stop_after or plan.config.epochs))
        while state.epoch < goal:
            row = _one_epoch(plan, run, state, validate, on_event)
            _record(run, on_event, "epoch", {**row, "seconds": round(time.monotonic() - start, 2)})
            state.history.append(row)
            save(state, run.path)
            _publish(plan, run, state)
            start = time.monotonic()
    finished = state.epoch == plan.config.epochs
    status: Status = "already complete" if done_before == plan.config.epochs else "complete" if finished else "stopped"
    _record(run, on_event, "ended", {"status": status, "epoch": state.epoch})
    return TrainResult(run.path, status, state.epoch, state.best, tuple(state.history))


@contextmanager
def _controlled(plan: Plan) -> Iterator[None]:
    """Run deterministic float32 kernels; leave the flags and the global generators as found."""
    devices = [plan.device] if plan.device.type == "cuda" else []
    with deterministic(plan.threads), torch.random.fork_rng(devices=devices):
        yield


def _begin(plan: Plan) -> TrainState:
    model, settings = plan.build_model(), plan.config.optimizer
    average = copy.deepcopy(model) if plan.config.ema else None
    return TrainState(model, average, torch.optim.SGD(model.parameters(), **settings.model_dump()))


def _one_epoch(plan: Plan, run: RunDir, state: TrainState, validate: Validate, on_event: OnEvent) -> Row:
    try:
        row = train_epoch(plan, state, on_event)
        scores = validate(plan, state.evaluated)
        row = {"epoch": state.epoch + 1, **row, "val_clean": scores.clean, "val_pgd": scores.pgd}
        _check_collapse(plan, row)
    except RobustevalError as error:
        saved = f"epoch {state.epoch} in '{run.path / CHECKPOINT}'" if state.epoch else "none"
        raise RobustevalError(f"{error}. Last good checkpoint: {saved}.") from error
    return row


def _check_collapse(plan: Plan, row: Row) -> None:
    """Raise when, a third of the way in or later, neither accuracy beats always answering the same class."""
    constant_train, constant_val = (_majority(split.labels) for split in (plan.train, plan.validation))
    late = row["epoch"] >= max(PATIENCE * plan.config.epochs, PATIENCE_EPOCHS)
    if late and row["train_accuracy"] <= constant_train and row["val_clean"] <= constant_val:
        raise RobustevalError(
            f"training collapsed: after epoch {row['epoch']:.0f} of {plan.config.epochs} the clean validation accuracy "
            f"{row['val_clean']:.1%} is that of a constant answer; {plan.threat} may be too strong for this model, "
            f"or optimizer.lr {plan.config.optimizer.lr:g} too high"
        )


def _majority(labels: Tensor) -> float:
    """Return the share of the commonest class: the accuracy of a constant answer."""
    return float(labels.bincount().max()) / len(labels)


def _announce(plan: Plan, run: RunDir, state: TrainState, on_event: OnEvent) -> None:
    facts = environment(plan.device).model_dump(mode="json")
    write_json(run.path / "environment.json", facts)
    _record(run, on_event, "resumed" if state.epoch else "started", {"epoch": state.epoch, "environment": facts})


def _record(run: RunDir, on_event: OnEvent, kind: str, fields: Mapping[str, Any]) -> None:
    run.event(kind, **fields)
    on_event(kind, fields)


def _publish(plan: Plan, run: RunDir, state: TrainState) -> None:
    """Write `last/`, `best/` if the last epoch is the best one, and the history; doing it twice changes nothing."""
    write_json(run.path / HISTORY, state.history)
    card = _card(plan, state.history[-1])
    save_model(run.path / "last", state.evaluated, card)
    if state.best is state.history[-1]:
        save_model(run.path / "best", state.evaluated, card)


def _card(plan: Plan, row: Row) -> dict[str, Any]:
    info, config = plan.info, plan.config
    return {
        "architecture": config.model.model_dump(),
        "shape": list(info.shape),
        "num_classes": info.num_classes,
        "classes": list(info.classes),
        "mean": list(info.mean),
        "std": list(info.std),
        "training": {
            "objective": config.objective.model_dump(),
            "dataset": config.dataset,
            "extra_data": False,
            "norm": config.norm,
            "eps": config.eps,
            "seed": config.seed,
            "epoch": row["epoch"],
            "epochs": config.epochs,
            "ema": config.ema,
            "validation": {"clean": row["val_clean"], "pgd": row["val_pgd"], "samples": len(plan.validation)},
            "data_sha256": plan.data_sha256,
        },
    }
