"""The training loop: train an epoch, validate, write down, repeat; resumable at any moment."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robusteval.errors import RobustevalError, UsageError
from robusteval.models.io import save_model
from robusteval.provenance import deterministic, environment
from robusteval.runs import CONFIG, RunDir, read_json, write_json
from robusteval.training.alarms import alarms
from robusteval.training.checkpoint import CHECKPOINT, Row, TrainState, restore, save
from robusteval.training.config import Optimizer
from robusteval.training.epoch import OnEvent, train_epoch
from robusteval.training.network import Network
from robusteval.training.parallel import connected
from robusteval.training.plan import Plan
from robusteval.training.step import rehearse
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
    check_smoothing(plan)
    with connected(plan.team, plan.device), _owned(plan, run), _controlled(plan):
        state = begin(plan)
        resumed = restore(state, run.path, plan.device)
        if state.epoch < plan.config.epochs:
            _announce(plan, run, state, on_event)
        if resumed and plan.team.leads:
            _publish(plan, run, state)  # the kill may have come between the checkpoint and these files
        done_before, start = state.epoch, time.monotonic()
        goal = min(plan.config.epochs, state.epoch + (stop_after or plan.config.epochs))
        while state.epoch < goal:
            row = _one_epoch(plan, run, state, validate, on_event)
            _record(plan, run, on_event, "epoch", {**row, "seconds": round(time.monotonic() - start, 2)})
            state.history.append(row)
            if plan.team.leads:
                save(state, run.path)
                _publish(plan, run, state)
            _check_collapse(plan, run, state, on_event)  # only now, so that the cards hold its alarm
            start = time.monotonic()
        plan.team.wait()
    finished = state.epoch == plan.config.epochs
    status: Status = "already complete" if done_before == plan.config.epochs else "complete" if finished else "stopped"
    _record(plan, run, on_event, "ended", {"status": status, "epoch": state.epoch})
    return TrainResult(run.path, status, state.epoch, state.best, tuple(state.history))


@contextmanager
def _owned(plan: Plan, run: RunDir) -> Iterator[None]:
    """Claim and lock the folder for the whole team; only the leader writes in it."""
    if plan.team.leads:
        run.claim(plan.identity)
    plan.team.wait()
    with run.locked() if plan.team.leads else nullcontext():
        yield


@contextmanager
def _controlled(plan: Plan) -> Iterator[None]:
    """Run deterministic float32 kernels; leave the flags and the global generators as found."""
    devices = [plan.device] if plan.device.type == "cuda" else []
    with deterministic(plan.threads), torch.random.fork_rng(devices=devices):
        yield


def begin(plan: Plan) -> TrainState:
    """Return the state before the first step."""
    config, model = plan.config, plan.build_model()
    if plan.team.size > 1 and plan.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # not for CPUs
    optimizer = _optimizer(model, config.optimizer)
    network = partial(Network, config=config, compiled=config.compile)
    return TrainState(
        model=model,
        network=network(model),
        average=copy.deepcopy(model) if config.average.name != "none" else None,
        proxy=network(copy.deepcopy(model)).train() if config.awp.gamma else None,
        optimizer=optimizer,
    )


def _optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    values = settings.model_dump(exclude={"name"})
    if settings.name == "sgd":
        return torch.optim.SGD(model.parameters(), **values)
    return torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)


def check_smoothing(plan: Plan) -> None:
    """Raise `UsageError` when label smoothing is asked of an objective whose loss it does not change."""
    if plan.config.label_smoothing and rehearse(plan, begin(plan), 0.0) == rehearse(plan, begin(plan), 0.5):
        raise UsageError(
            f"label_smoothing = {plan.config.label_smoothing:g} has no effect on objective "
            f"'{plan.config.objective.name}', which descends no cross-entropy; set it to 0."
        )


def _one_epoch(plan: Plan, run: RunDir, state: TrainState, validate: Validate, on_event: OnEvent) -> Row:
    try:
        row = train_epoch(plan, state, on_event)
        scores = validate(plan, state.evaluated)
        row = {"epoch": state.epoch + 1, **row, **{f"val_{name}": score for name, score in asdict(scores).items()}}
        for sentence in alarms([*state.history, row])[len(alarms(state.history)) :]:
            _record(plan, run, on_event, "alarm", {"epoch": row["epoch"], "alarm": sentence})
    except RobustevalError as error:
        _record(plan, run, on_event, "failed", {"epoch": state.epoch + 1, "error": str(error)})
        saved = f"epoch {state.epoch} in '{run.path / CHECKPOINT}'" if state.epoch else "none"
        raise RobustevalError(f"{error}. Last good checkpoint: {saved}.") from error
    return row


def _check_collapse(plan: Plan, run: RunDir, state: TrainState, on_event: OnEvent) -> None:
    """Raise when, a third of the way in or later, neither accuracy beats always answering the same class."""
    row = state.history[-1]
    constant_train, constant_val = (_majority(split.labels) for split in (plan.train, plan.validation))
    late = row["epoch"] >= max(PATIENCE * plan.config.epochs, PATIENCE_EPOCHS)
    if late and row["train_accuracy"] <= constant_train and row["val_clean"] <= constant_val:
        problem = (
            f"training collapsed: after epoch {row['epoch']:.0f} of {plan.config.epochs} the clean validation accuracy "
            f"{row['val_clean']:.1%} is that of a constant answer; {plan.threat} may be too strong for this model, "
            f"or optimizer.lr {plan.config.optimizer.lr:g} too high"
        )
        _record(plan, run, on_event, "failed", {"epoch": row["epoch"], "error": problem})
        raise RobustevalError(f"{problem}. Best model: epoch {state.best['epoch']:.0f} in '{run.path / 'best'}'.")


def _majority(labels: Tensor) -> float:
    """Return the share of the commonest class: the accuracy of a constant answer."""
    return float(labels.bincount().max()) / len(labels)


def _announce(plan: Plan, run: RunDir, state: TrainState, on_event: OnEvent) -> None:
    facts = environment(plan.device).model_dump(mode="json")
    if plan.team.leads:
        write_json(run.path / "environment.json", facts)
    fields = {"epoch": state.epoch, "processes": plan.team.size, "environment": facts}
    _record(plan, run, on_event, "resumed" if state.epoch else "started", fields)


def _record(plan: Plan, run: RunDir, on_event: OnEvent, kind: str, fields: Mapping[str, Any]) -> None:
    if plan.team.leads:
        run.event(kind, **fields)
    on_event(kind, fields)


def _publish(plan: Plan, run: RunDir, state: TrainState) -> None:
    """Write `last/`, `best/` if the last epoch is the best one, and the history; doing it twice changes nothing.

    An alarm is written on the best epoch's card as well, even if that epoch came before it.
    """
    write_json(run.path / HISTORY, state.history)
    warned, row = alarms(state.history), state.history[-1]
    model = copy.deepcopy(state.evaluated).float() if plan.dtype == torch.float64 else state.evaluated
    save_model(run.path / "last", model, _card(plan, row, warned))
    if state.best is row:
        save_model(run.path / "best", model, _card(plan, row, warned))
    elif warned:
        best = run.path / "best" / CONFIG
        write_json(best, {**read_json(best), "training": _training_facts(plan, state.best, warned)})


def _card(plan: Plan, row: Row, warned: Sequence[str]) -> dict[str, Any]:
    info, config = plan.info, plan.config
    return {
        "architecture": config.model.model_dump(),
        "shape": list(info.shape),
        "num_classes": info.num_classes,
        "classes": list(info.classes),
        "mean": list(info.mean),
        "std": list(info.std),
        "training": _training_facts(plan, row, warned),
    }


def _training_facts(plan: Plan, row: Row, warned: Sequence[str]) -> dict[str, Any]:
    config = plan.config
    return {
        "objective": config.objective.model_dump(),
        "dataset": config.dataset,
        "cut": plan.cut.model_dump(),
        "extra_data": plan.extra > 0,
        "norm": config.norm,
        "eps": config.eps,
        "seed": config.seed,
        "epoch": row["epoch"],
        "epochs": config.epochs,
        "average": config.average.name,
        "precision": config.precision,
        "validation": {"clean": row["val_clean"], "pgd": row["val_pgd"], "samples": len(plan.validation)},
        "alarms": list(warned),
        "data_sha256": plan.data_sha256,
    }
