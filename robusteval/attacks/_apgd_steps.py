"""Auto-PGD's ascent: the state of each sample, the steps, and the checkpoints at which step sizes change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor, nn

from robusteval.attacks._l1 import project_l1_box, sparse_sign
from robusteval.threat import Norm, ThreatModel, per_sample

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits (N, K), labels (N,) and targets (N,) -> the value to ascend, (N,)."""


def into(threat: ThreatModel, x: Tensor, point: Tensor) -> Tensor:
    """Project on ball and box so that float32 rounding cannot exceed the budget: what is tried is what is judged."""
    if threat.norm is Norm.LINF:
        return threat.project(x, point)
    return threat.hold(
        x, project_l1_box(x, point, threat.radius) if threat.norm is Norm.L1 else threat.project(x, point)
    )


def _largest_is_one(rows: Tensor) -> Tensor:
    """Scale each row of (N, ...) so that no later square or product under- or overflows; zero rows stay zero."""
    rows = rows.nan_to_num()
    largest = rows.abs().flatten(1).amax(1).clamp_min(torch.finfo(rows.dtype).tiny)
    return rows / per_sample(largest, rows)


@dataclass
class Climb:
    """Samples on their way up: row i of every tensor belongs to the same sample.

    ``rows`` are the samples' places in the attack's batch; values are float64.
    """

    rows: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    point: Tensor
    grad: Tensor
    value: Tensor
    best: Tensor
    best_grad: Tensor
    best_value: Tensor
    size: Tensor

    def keep(self, rows: Tensor) -> Self:
        """Return the climb of the samples that ``rows``, a mask or places, selects."""
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def parts(self, each: int, size: int) -> list[Self]:
        """Return it in parts of at most ``size`` samples; runs of ``each`` stay together, of which it consists."""
        runs = torch.arange(len(self.rows), device=self.rows.device).view(-1, each)
        return [self.keep(part.flatten()) for part in runs.tensor_split(parts_of(len(runs), size // each))]

    def look(self, model: nn.Module, loss: Loss, slope: bool) -> Tensor:
        """Update value, gradient (if ``slope``) and best point at ``point``; return which samples are misclassified.

        Per sample only the gradient's direction matters, so the loss's slope at the logits is scaled to 1 before it
        is sent back through the model. Losses are in float64: they compare logits whose scale may be anything.
        """
        point = self.point.detach().requires_grad_(slope)
        with torch.set_grad_enabled(slope):
            logits = model(point)
        with torch.enable_grad():
            leaf = logits.detach().double().requires_grad_()
            value = loss(leaf, self.y, self.target)
            total = value.sum()
        if slope:
            (at_logits,) = torch.autograd.grad(total, leaf)
            (grad,) = torch.autograd.grad(logits, point, _largest_is_one(at_logits).to(logits.dtype))
            self.grad = _largest_is_one(grad)
        self._note(value.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
        wrong: Tensor = logits.detach().argmax(1) != self.y
        return wrong

    def _note(self, value: Tensor) -> None:
        better = value > self.best_value
        self.value, self.best_value = value, torch.where(better, value, self.best_value)
        self.best = torch.where(per_sample(better, self.best), self.point, self.best)
        self.best_grad = torch.where(per_sample(better, self.best), self.grad, self.best_grad)

    def back_to_best(self, rows: Tensor) -> None:
        """Let the samples where the mask ``rows`` is true go on from their best point."""
        wide = per_sample(rows, self.point)
        self.point = torch.where(wide, self.best, self.point)
        self.grad = torch.where(wide, self.best_grad, self.grad)
        self.value = torch.where(rows, self.best_value, self.value)


@dataclass
class MomentumClimb(Climb):
    """The steps in Linf and L2 (Croce & Hein 2020, section 3): with momentum, halved where progress stalls."""

    before: Tensor
    rises: Tensor
    mark: Tensor
    halved: Tensor

    def _note(self, value: Tensor) -> None:
        self.rises = self.rises + (value > self.value)
        super()._note(value)

    def move(self, threat: ThreatModel, momentum: float) -> None:
        """Step to ``P(x_k + a (z - x_k) + (1 - a) (x_k - x_{k-1}))``, where ``z = P(x_k + size * direction)``."""
        direction = self.grad.sign()
        if threat.norm is Norm.L2:
            length = torch.linalg.vector_norm(self.grad.flatten(1), dim=1).clamp_min(1.0)
            direction = self.grad / per_sample(length, self.grad)
        z = into(threat, self.x, self.point + per_sample(self.size, self.point) * direction)
        drift = momentum * (z - self.point) + (1 - momentum) * (self.point - self.before)
        self.before, self.point = self.point, into(threat, self.x, self.point + drift)

    def check(self, threat: ThreatModel, rho: float, period: int) -> None:
        """Halve the step where fewer than ``rho`` of ``period`` steps rose, or where nothing came of the last size."""
        halve = (self.rises < rho * period) | (~self.halved & (self.best_value <= self.mark))
        self.size = torch.where(halve, self.size / 2, self.size)
        self.back_to_best(halve)
        self.halved, self.mark, self.rises = halve, self.best_value, torch.zeros_like(self.rises)


@dataclass
class SparseClimb(Climb):
    """The steps in L1 (Croce & Hein 2021, section 3): on as many pixels as the best point so far suggests."""

    count: Tensor
    sparsity: Tensor

    def move(self, threat: ThreatModel, momentum: float) -> None:
        """Step along the signs of the largest gradients; L1 has no momentum."""
        step = per_sample(self.size, self.point) * sparse_sign(self.grad, self.point, self.count)
        self.point = into(threat, self.x, self.point + step)

    def check(self, threat: ThreatModel, rho: float, period: int) -> None:
        """Start again from the best point where it became sparser by 5 %, else shorten the step by 1.5."""
        sparsity = (self.best != self.x).flatten(1).sum(1)
        sparser = sparsity < 0.95 * self.sparsity
        shorter = (self.size / 1.5).clamp_min(threat.radius / 10)
        self.size = torch.where(sparser, threat.radius, shorter)
        self.count, self.sparsity = (sparsity / 1.5).long().clamp_min(1), sparsity
        self.back_to_best(sparser)


AnyClimb = MomentumClimb | SparseClimb


def parts_of(count: int, size: int) -> int:
    """Return into how many parts of at most ``size``, at least 1 each, ``count`` things go."""
    return max(1, -(-count // max(1, size)))


def join(parts: Sequence[AnyClimb]) -> AnyClimb:
    """Return the climb of the samples of all ``parts``, which are of one kind."""
    columns = ([getattr(part, field.name) for part in parts] for field in fields(parts[0]))
    return type(parts[0])(*map(torch.cat, columns))


def begin(
    threat: ThreatModel, rows: Tensor, x: Tensor, y: Tensor, target: Tensor, start: Tensor, fresh: bool
) -> AnyClimb:
    """Return a climb about to start from ``start`` brought into ``threat``; ``fresh`` says that it is random.

    How sparse an L1 perturbation is to be follows from how sparse the start is, unless that is random.
    """
    start = into(threat, x, start)
    zeros, low = torch.zeros_like(x), torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    length = torch.full_like(low, threat.radius, dtype=x.dtype)
    common = (rows, x, y, target, start, zeros, low, start, zeros, low)
    if threat.norm is not Norm.L1:
        return MomentumClimb(*common, 2 * length, start, torch.zeros_like(y), low, torch.ones_like(y, dtype=torch.bool))
    total = x[0].numel()
    sparsity = torch.full_like(y, total) if fresh else (start != x).flatten(1).sum(1)
    count = torch.full_like(y, max(1, total // 5)) if fresh else (sparsity / 1.5).long().clamp_min(1)
    return SparseClimb(*common, length, count, sparsity)


def checkpoints(norm: Norm, steps: int) -> list[int]:
    """Return the numbers of steps after which step sizes are looked at, ascending.

    Linf and L2: ``ceil(p_j steps)`` with p_1 = .22 and ``p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06)``, in hundredths
    here; L1: every 4 % of the steps.
    """
    if norm is Norm.L1:
        period = max(1, steps // 25)
        return list(range(period, steps, period))
    places, place, gap = [], 22, 22
    while place < 100:
        places.append(-(-place * steps // 100))
        gap = max(gap - 3, 6)
        place += gap
    return sorted(set(places) - {steps})
