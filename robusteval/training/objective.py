"""What a training objective is: one step's data and inner adversary in, a loss to descend out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.bounds.ball import Ball
from robusteval.catalog import Catalog
from robusteval.threat import ThreatModel
from robusteval.training.bounds import Region, Traces
from robusteval.training.share import ALONE, Share

OBJECTIVES = Catalog("objective", "trainers")

LogitLoss = Callable[[Tensor], Tensor]
"""Logits (N, K) of the perturbed inputs -> the value to ascend, (N,)."""

Start = Literal["uniform", "gaussian", "none"]

Found = TypeVar("Found")


class InnerAttack(Protocol):
    """The inner maximisation, bound to one step's model, inputs, threat model and randomness."""

    def __call__(
        self,
        loss: LogitLoss,
        *,
        start: Start | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        radius: float | None = None,
    ) -> Tensor:
        """Return perturbed inputs (N, C, H, W) that ascend ``loss``, detached.

        ``loss`` is called once per step, in order, before the step is taken. An argument that is given belongs
        to the objective's definition and wins over the user's adversary settings; ``step_size`` and ``radius``, the
        size of the ball, are in pixel units. The user's step size is for eps, and shrinks or grows with ``radius``.
        """
        ...

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (N, K) of ``x`` without a graph, in the mode in which the attack runs the model."""
        ...

    def run(self, search: Callable[[nn.Module], Found]) -> Found:
        """Return ``search(model)``, called with the parameters frozen and the model in the attack's mode.

        For inner maximisations other than projected gradient ascent. Gradients are enabled; what ``search``
        returns must be detached.
        """
        ...


@dataclass(frozen=True)
class StepContext:
    """Everything an objective may use in one optimizer step.

    ``model`` is in training mode; ``x`` is (N, C, H, W) float32 in [0,1], ``y`` (N,) int64, ``ids`` (N,) int64 the
    samples' stable ids, all below ``population``. ``rng`` (a CPU generator) is this step's alone. ``progress`` is
    the fraction of training done, in (0, 1). ``state`` belongs to the objective: tensors it puts there come back in
    the next step and are checkpointed; it is the only thing an objective may change. ``traces`` is what `bounds`
    keeps from step to step. An objective that wraps another passes it a `dataclasses.replace`d context.

    Where several processes share a batch, ``x``, ``y`` and ``ids`` are this process's rows. The loop averages the
    processes' losses, so a mean over rows needs no care; what compares samples (a ranking, a normalisation) goes
    through `gather`, and what is drawn through `draw`, so that the number of processes does not matter.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    ids: Tensor
    threat: ThreatModel
    attack: InnerAttack
    rng: torch.Generator
    progress: float
    population: int
    state: dict[str, Tensor] = field(default_factory=dict)
    smoothing: float = 0.0
    share: Share = ALONE
    traces: Traces = field(default_factory=Traces)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Return ``-log softmax(z)_y`` per sample: the loss that most inner attacks ascend. (N, K) -> (N,)."""
        return F.cross_entropy(logits, self.y, reduction="none")

    def fit(self, logits: Tensor) -> Tensor:
        """Return the cross-entropy to descend, per sample: `cross_entropy` with the run's label smoothing."""
        return F.cross_entropy(logits, self.y, reduction="none", label_smoothing=self.smoothing)

    def bounds(self, radius: float, centre: Tensor | None = None) -> Region:
        """Return what the network can output over balls of ``radius``, in pixel units, cut to [0,1].

        They are around ``x`` unless there is a ``centre`` (N, C, H, W), in the norm of the threat model. BatchNorm in
        training mode normalises by the statistics of ``x``, to which gradients flow, and its running ones do not move.
        Raises `UsageError` for a network that no bound is known for.
        """
        ball = Ball.around(self.x if centre is None else centre, self.threat.norm, radius)
        return self.traces.region(self.model, ball, self.y, self.x)

    def gather(self, values: Tensor) -> Tensor:
        """Return ``values`` (N, ...) of the whole batch, without a graph: one process's rows after another's."""
        return self.share.gather(values.detach())

    def draw(self, sampler: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
        """Return ``sampler(x, rng)``, drawn for the whole batch so that each sample gets its own numbers."""
        return self.share.draw(sampler, self.x, self.rng)

    def per_sample(self, name: str, default: float) -> Tensor:
        """Return the state ``name``, (population,) float32, created as ``default``; index it with ``ids``."""
        if name not in self.state:
            self.state[name] = torch.full((self.population,), default, device=self.x.device)
        return self.state[name]


@dataclass(frozen=True)
class Loss:
    """What an objective returns.

    ``value`` () is to be descended; ``logits`` (N, K) of the inputs trained on give the training accuracy, nothing
    else; ``metrics`` are figures worth logging, means over the batch. One called "reached" is how far the objective's
    adversary has grown, 1 at the end: the best epoch is one of the largest.
    """

    value: Tensor
    logits: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """An objective plug-in: a frozen dataclass of hyper-parameters.

    One that trains for another question than attacks ask names the suite that asks it by an attribute ``suite``.

    The global generators, the parameters' gradients and flags and the model's mode are left as found. BatchNorm
    statistics move, as in any training forward pass.
    """

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch, attached to the graph of ``ctx.model``'s parameters."""
        ...
