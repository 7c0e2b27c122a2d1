"""One epoch of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robusteval.errors import RobustevalError
from robusteval.rng import generator
from robusteval.training import average
from robusteval.training.checkpoint import Row, TrainState
from robusteval.training.extra import mixed_batches
from robusteval.training.plan import Plan
from robusteval.training.step import train_step

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
        share = plan.team.share(len(rows))
        value = plan.team.sum([float(loss.value.detach()) * share.weight], plan.device)[0] / plan.team.size
        if not math.isfinite(value):
            raise RobustevalError(f"the loss is {value} in epoch {state.epoch + 1}, step {step + 1}{_advice(plan)}")
        own = share.mine(rows)
        right = loss.logits.detach().argmax(1) == plan.train.labels[own].to(plan.device)
        means.add(len(own), {"loss": value, "accuracy": float(right.float().mean()), **loss.metrics})
        on_event("step", {"epoch": state.epoch + 1, "step": step + 1, "loss": value})
    if not all(bool(value.isfinite().all()) for value in state.model.state_dict().values()):
        raise RobustevalError(f"weights are not finite after epoch {state.epoch + 1}{_advice(plan)}")
    if state.average is not None:
        average.after_epoch(state.average, state.model, plan.config.average, state.epoch, plan.config.epochs)
        if plan.config.average.buffers == "recompute":
            average.recompute(state.average, _clean_images(plan))
    plan.team.agree(state.model, state.average)
    return {"lr": state.optimizer.param_groups[0]["lr"], **means.row("train_", plan)}


def batches(plan: Plan, epoch: int) -> Iterator[Tensor]:
    """Yield the rows of each batch of ``epoch`` in a fresh order; a last batch too small to share is dropped."""
    config, steps = plan.config, plan.steps_per_epoch
    if plan.extra:
        counts = (len(plan.train) - plan.extra, plan.extra)
        yield from mixed_batches(*counts, config.batch_size, config.extra.fraction, steps, config.seed, epoch)
        return
    order = torch.randperm(len(plan.train), generator=generator(config.seed, "order", epoch))
    yield from torch.split(order, config.batch_size)[:steps]


def _clean_images(plan: Plan) -> Iterator[Tensor]:
    """Yield the training images without the extra ones; a last batch of one has no statistics."""
    for rows in torch.split(torch.arange(len(plan.train) - plan.extra), plan.config.batch_size):
        if len(rows) > 1:
            yield plan.train.images(rows).to(plan.device, plan.dtype)


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

    def row(self, prefix: str, plan: Plan) -> Row:
        """Return the means over all processes under prefixed names."""
        count, *sums = plan.team.sum([self.count, *self.sums.values()], plan.device)
        return {f"{prefix}{name}": total / count for name, total in zip(self.sums, sums, strict=True)}


def _advice(plan: Plan) -> str:
    return f"; training diverged. Try a smaller optimizer.lr than {plan.config.optimizer.lr:g}"
