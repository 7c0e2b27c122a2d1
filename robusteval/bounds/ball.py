"""The inputs a bound is about: a ball, cut to the box of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robusteval.threat import Norm, per_sample

HALVINGS = 60


@dataclass(frozen=True)
class Ball:
    """``{x + d : ||d||_p <= radius, low <= d <= high}`` around each of ``x`` (N, ...); ``low <= 0 <= high``."""

    x: Tensor
    norm: Norm
    radius: float
    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, x: Tensor, norm: Norm, radius: float, clip: bool = True) -> Ball:
        """Return the ball around ``x`` in [0, 1], within that box if ``clip``."""
        reach = torch.full_like(x, radius)
        if not clip:
            return cls(x, norm, radius, -reach, reach)
        return cls(x, norm, radius, -torch.minimum(reach, x), torch.minimum(reach, 1 - x))

    def take(self, rows: Tensor) -> Ball:
        """Return the balls of the samples at ``rows``."""
        return Ball(self.x[rows], self.norm, self.radius, self.low[rows], self.high[rows])

    @property
    def box(self) -> tuple[Tensor, Tensor]:
        """Bounds of every input value."""
        return self.x + self.low, self.x + self.high

    def least(self, a: Tensor, owner: Tensor) -> Tensor:
        """Return lower bounds (P,) of ``<a_p, x'>`` over the ball of sample ``owner_p``; ``a`` is (P, ...).

        Exact for Linf and L1; for L2 a dual value, which never exceeds the minimum.
        """
        flat = a.flatten(1)
        low, high = self.low[owner].flatten(1), self.high[owner].flatten(1)
        towards = torch.where(flat > 0, -low, high)  # how far each value may go to lower the sum
        gain = flat.abs()
        change = {Norm.LINF: _all, Norm.L2: _within_l2, Norm.L1: _within_l1}[self.norm](gain, towards, self.radius)
        return (flat * self.x[owner].flatten(1)).sum(1) - change

    def minimiser(self, a: Tensor, owner: Tensor) -> Tensor:
        """Return a point (P, ...) of the ball where ``<a_p, x'>`` is small; the smallest for Linf."""
        low, high = self.low[owner], self.high[owner]
        step = torch.where(a > 0, low, high)
        if self.norm is not Norm.LINF:
            size = torch.linalg.vector_norm((a * step).flatten(1), dim=1).clamp_min(1e-12)
            step = torch.maximum(torch.minimum(-a * per_sample(self.radius / size, a), high), low)
            order = 2 if self.norm is Norm.L2 else 1
            length = torch.linalg.vector_norm(step.flatten(1), ord=order, dim=1).clamp_min(1e-12)
            step = step * per_sample((self.radius / length).clamp_max(1.0), step)
        return self.x[owner] + step


def _all(gain: Tensor, towards: Tensor, radius: float) -> Tensor:
    return (gain * towards).sum(1)


def _within_l1(gain: Tensor, towards: Tensor, radius: float) -> Tensor:
    """Spend the radius on the largest gains first, as far as each may go (the fractional knapsack)."""
    order = gain.argsort(dim=1, descending=True)
    gain, towards = gain.gather(1, order), towards.gather(1, order)
    spent = towards.cumsum(1)
    usable = torch.relu(torch.minimum(towards, radius - (spent - towards)))
    return (gain * usable).sum(1)


def _within_l2(gain: Tensor, towards: Tensor, radius: float) -> Tensor:
    """Return the least Lagrangian dual found: ``min_m  m r^2 / 2 + sum max_{0 <= t <= towards} g t - m t^2 / 2``.

    Each value of the multiplier ``m`` > 0 gives an upper bound of what can be gained, so no convergence is needed.
    """
    size = torch.linalg.vector_norm(gain, dim=1)
    low, high = torch.zeros_like(size), size / radius + 1e-30
    with torch.no_grad():
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            step = torch.minimum(gain.detach() / middle[:, None], towards)
            inside = torch.linalg.vector_norm(step, dim=1) <= radius
            low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    step = torch.minimum(gain / high[:, None], towards)
    dual = (gain * step - high[:, None] * step.square() / 2).sum(1) + high * radius**2 / 2
    return torch.minimum(torch.minimum(dual, radius * size), (gain * towards).sum(1))
