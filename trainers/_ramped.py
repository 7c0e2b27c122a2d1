"""What objectives that descend bounds share: a ball that grows, and penalties that keep its bounds tight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.bounds.activations import Activation
from robusteval.bounds.interval import Bounds
from robusteval.bounds.nodes import Affine
from robusteval.errors import UsageError
from robusteval.training.bounds import Region
from robusteval.training.objective import Loss, StepContext

from ._checks import require_fraction, require_positive, require_weight

KNEE, POWER = 0.25, 4
"""The ramp grows as a power up to this fraction of it, then linearly, with no jump in its slope."""

SMALLEST = 1e-5
"""The radius, in pixel units, below which a ball is taken for a point: float32 would round the width of its bounds."""

TOLERANCE = 0.5
"""The ratio that regularised bounds are asked for: tau of Shi et al."""


@dataclass(frozen=True)
class Bounded:
    """Losses (N,), logits (N, K) for the training accuracy, and the region whose bounds were used, if any."""

    values: Tensor
    logits: Tensor
    region: Region | None = None


@dataclass(frozen=True)
class Ramped:
    """A training objective on balls that grow: fields and steps that all of them share.

    Up to the fraction ``warmup`` of the training the loss is clean cross-entropy; then the radius rises smoothly to
    ``scale`` times eps, which it has from the fraction ``ramp`` on. ``l1`` weights the sum of the absolute weights of
    all layers, ``regularisation`` what Shi et al. add while the radius grows.
    """

    suite: ClassVar[str] = "certified"

    warmup: float = 0.01
    ramp: float = 0.5
    scale: float = 1.0
    l1: float = 0.0
    regularisation: float = 0.0

    def __post_init__(self) -> None:
        require_fraction("warmup", self.warmup)
        require_fraction("ramp", self.ramp)
        if self.warmup > self.ramp:
            raise ValueError(f"warmup = {self.warmup} is after the end of the ramp, {self.ramp}")
        require_positive("scale", self.scale)
        require_weight("l1", self.l1)
        require_weight("regularisation", self.regularisation)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch; its training accuracy is that on clean inputs until the ball has a size."""
        clean, reached = ctx.model(ctx.x), smooth(ctx.progress, self.warmup, self.ramp)
        radius = self.scale * reached * ctx.threat.radius
        begun = radius >= SMALLEST
        found = self.robust(ctx, clean, radius, reached) if begun else Bounded(ctx.fit(clean), clean)
        value = found.values.mean()
        if self.regularisation and reached < 1:
            value = value + self.regularisation * (1 - reached) * _looseness(ctx, found.region or ctx.bounds(SMALLEST))
        if self.l1:
            value = value + self.l1 * _size(ctx.model)
        return Loss(value, found.logits, {"reached": reached})

    def robust(self, ctx: StepContext, clean: Tensor, radius: float, reached: float) -> Bounded:
        """Return the losses on balls of ``radius``.

        ``clean`` are the logits (N, K) of ``x``, and ``reached`` is the fraction of the full radius.
        """
        raise NotImplementedError


def smooth(t: float, start: float, end: float) -> float:
    """Return 0 up to ``start``, 1 from ``end`` on, and in between a rise whose beginning is flat.

    With s the fraction of the ramp, ``a s^4`` up to s = 1/4, then the tangent there, on to 1 (the schedule that Shi et
    al. 2021 took from auto_LiRPA).
    """
    if t >= end:
        return 1.0
    s = max(t - start, 0.0) / (end - start)
    a = 1 / (KNEE ** (POWER - 1) * (KNEE + POWER * (1 - KNEE)))
    return a * min(s, KNEE) ** POWER + a * POWER * KNEE ** (POWER - 1) * max(s - KNEE, 0.0)


def between(first: float, last: float, reached: float) -> float:
    """Return the value that goes from ``first`` to ``last`` as the ball grows."""
    return first + (last - first) * reached


def _size(model: nn.Module) -> Tensor:
    """Return the sum of absolute weights, without biases and BatchNorm."""
    return torch.stack([weight.abs().sum() for weight in model.parameters() if weight.dim() > 1]).sum()


def _looseness(ctx: StepContext, region: Region) -> Tensor:
    """Return what Shi et al. 2021 (arXiv 2103.17268) penalise, the mean over activations of their two terms.

    relu(1 - r / tau) for r the mean width of bounds before the first layer over that at the activation, and for each
    of two ratios of active to inactive values, of sums and of squared deviations, the smaller way round.
    """
    if ctx.share.size > 1:
        raise UsageError("regularisation compares values over the whole batch; train in one process, or set it to 0.")
    nodes, bounds = region.problem.graph.nodes, region.bounds
    before = [bounds[node.inputs[0]] for node in nodes if isinstance(node.op, Activation)]
    if not before:
        return region.by_intervals.new_zeros(())
    first = next((node.inputs[0] for node in nodes if isinstance(node.op, Affine) and node.op.mixing), 0)
    ratios = [ratio for each in before for ratio in _ratios(_width(bounds[first]), each)]
    return torch.stack([F.relu(1 - ratio / TOLERANCE) for ratio in ratios]).sum() / len(before)


def _width(bounds: Bounds) -> Tensor:
    low, high = bounds
    return ((high - low) / 2).mean()


def _ratios(first: Tensor, bounds: Bounds) -> list[Tensor]:
    """Return the ratios at an activation of bounds (N, *shape) that there are, at most 1.

    Without active or without inactive values there is no balance, and bounds without width are tight.
    """
    low, high = bounds
    centre, active, inactive = (low + high) / 2, low > 0, high < 0
    spread = (centre - centre.mean()).square()
    width = torch.maximum(_width(bounds), first)
    pairs = [(first, width), ((centre * active).sum(), -(centre * inactive).sum())]
    pairs.append(((spread * active).sum(), (spread * inactive).sum()))
    return [torch.minimum(*pair) / torch.maximum(*pair) for pair in pairs if min(pair) > torch.finfo(low.dtype).tiny]
