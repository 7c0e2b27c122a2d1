"""One epoch of training, and one step of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robusteval.errors import RobustevalError
from robusteval.rng import derive_seed, generator
from robusteval.training import ema
from robusteval.training.augment import augment
from robusteval.training.checkpoint import Row, TrainState
from robusteval.training.objective import Loss, StepContext
from robusteval.training.plan import Plan
from robusteval.training.schedule import midpoint

OnEvent = Callable[[str, Mapping[str, Any]], None]
"""Told what happens: ``("step" | "epoch" | "started" | "resumed" | ..., fields)``."""


def train_epoch(plan: Plan, state: TrainState, on_event: OnEvent) -> Row:
    """Train through the data once; return the epoch's mean loss, accuracy on what was trained on, and metrics.

    Raises `RobustevalError` when the loss or the weights stop being finite.
    """
    state.model.train()
    means = Means()
    for step, rows in enumerate(batches(plan, state.epoch)):
        loss = train_step(plan, state, step, rows)
        value = float(loss.value.detach())
        if not math.isfinite(value):
            raise RobustevalError(f"the loss is {value} in epoch {state.epoch + 1}, step {step + 1}{_advice(plan)}")
        right = loss.logits.detach().argmax(1) == plan.train.labels[rows].to(plan.device)
        means.add(len(rows), {"loss": value, "accuracy": float(right.float().mean()), **loss.metrics})
        on_event("step", {"epoch": state.epoch + 1, "step": step + 1, "loss": value})
    if not all(bool(value.isfinite().all()) for value in state.model.state_dict().values()):
        raise RobustevalError(f"weights are not finite after epoch {state.epoch + 1}{_advice(plan)}")
    return {"lr": state.optimizer.param_groups[0]["lr"], **means.row("train_")}


def train_step(plan: Plan, state: TrainState, step: int, rows: Tensor) -> Loss:
    """Take one optimizer step on the training samples ``rows``; every random draw is derived from the step."""
    config, moment = plan.config, (state.epoch, step)
    taken = state.epoch * plan.steps_per_epoch + step
    progress = midpoint(taken, config.epochs * plan.steps_per_epoch)
    _seed_global(derive_seed(config.seed, "layers", *moment), plan.device)  # for modules such as dropout
    x = plan.train.images(rows)
    if config.augment:
        x = augment(x, plan.info.pad, plan.info.flip, generator(config.seed, "augment", *moment))
    x = x.to(plan.device)
    attack = config.adversary.bind(state.model, x, plan.threat, generator(config.seed, "attack", *moment))
    loss = plan.objective(
        StepContext(
            model=state.model,
            x=x,
            y=plan.train.labels[rows].to(plan.device),
            ids=plan.train.ids[rows].to(plan.device),
            threat=plan.threat,
            attack=attack,
            rng=generator(config.seed, "objective", *moment),
            progress=progress,
            population=plan.population,
            state=state.objective,
        )
    )
    for group in state.optimizer.param_groups:
        group["lr"] = config.optimizer.lr * config.schedule.scale(progress)
    state.optimizer.zero_grad()
    loss.value.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    if state.average is not None:
        ema.update(state.average, state.model, config.ema, taken)
    return loss


def batches(plan: Plan, epoch: int) -> Iterator[Tensor]:
    """Yield the rows of each batch of ``epoch`` in a fresh order; a last batch of one sample is dropped."""
    order = torch.randperm(len(plan.train), generator=generator(plan.config.seed, "order", epoch))
    yield from torch.split(order, plan.config.batch_size)[: plan.steps_per_epoch]


@dataclass
class Means:
    """Means over the samples seen so far."""

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, count: int, values: Mapping[str, float]) -> None:
        """Count a batch of ``count`` samples whose means are ``values``."""
        self.count += count
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + count * value

    def row(self, prefix: str) -> Row:
        """Return the means under prefixed names."""
        return {f"{prefix}{name}": total / self.count for name, total in self.sums.items()}


def _seed_global(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _advice(plan: Plan) -> str:
    return f"; training diverged. Try a smaller optimizer.lr than {plan.config.optimizer.lr:g}"
