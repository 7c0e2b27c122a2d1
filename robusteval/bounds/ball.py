"""The inputs a bound is about: a ball, cut to the box of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robusteval.threat import Norm

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
        gain, towards = self._directions(a, owner)
        if self.norm is Norm.L2:
            change = _most_in_l2(gain, towards, self.radius)
        else:
            change = (gain * self._way(gain, towards)).sum(1)
        return (a.flatten(1) * self.x[owner].flatten(1)).sum(1) - change

    def minimiser(self, a: Tensor, owner: Tensor, curvature: float = 0.0) -> Tensor:
        """Return the point (P, ...) of the ball where ``<a_p, x'>`` is least.

        In L2, ``curvature / 2 ||x' - x||^2`` may be added, which makes it unique.
        """
        way = self._way(*self._directions(a, owner), curvature)
        return self.x[owner] - (a.flatten(1).sign() * way).view_as(a)

    def _directions(self, a: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each value (P, V) gains per step that lowers ``<a_p, x'>``, and how far it may go."""
        flat = a.flatten(1)
        low, high = self.low[owner].flatten(1), self.high[owner].flatten(1)
        return flat.abs(), torch.where(flat > 0, -low, high)

    def _way(self, gain: Tensor, towards: Tensor, curvature: float = 0.0) -> Tensor:
        """Return how far each value (P, V) goes to gain the most."""
        if self.norm is Norm.LINF:
            return towards
        if self.norm is Norm.L1:
            return _spent(gain, towards, self.radius)
        return torch.minimum(gain / _multiplier(gain, towards, self.radius).clamp_min(curvature), towards)


def _spent(gain: Tensor, towards: Tensor, radius: float) -> Tensor:
    """Spend the radius on the largest gains first, as far as each may go (the fractional knapsack)."""
    order = gain.argsort(dim=1, descending=True)
    limits = towards.gather(1, order)
    before = limits.cumsum(1) - limits
    return torch.zeros_like(gain).scatter(1, order, torch.relu(torch.minimum(limits, radius - before)))


def _multiplier(gain: Tensor, towards: Tensor, radius: float) -> Tensor:
    """Return ``m`` (P, 1) such that ``min(gain / m, towards)`` is as long as the radius allows, and no longer."""
    low: Tensor = gain.new_zeros(len(gain), 1)
    high: Tensor = torch.linalg.vector_norm(gain, dim=1, keepdim=True) / radius + 1e-30
    with torch.no_grad():
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            step = torch.minimum(gain / middle, towards)
            inside = torch.linalg.vector_norm(step, dim=1, keepdim=True) <= radius
            low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    return high


def _most_in_l2(gain: Tensor, towards: Tensor, radius: float) -> Tensor:
    """Return the least Lagrangian dual found: ``min_m  m r^2 / 2 + sum max_{0 <= t <= towards} g t - m t^2 / 2``.

    Each value of the multiplier ``m`` > 0 gives an upper bound of what can be gained, so no convergence is needed.
    """
    size, m = torch.linalg.vector_norm(gain, dim=1), _multiplier(gain.detach(), towards, radius)
    step = torch.minimum(gain / m, towards)
    dual = (gain * step - m * step.square() / 2).sum(1) + m.squeeze(1) * radius**2 / 2
    return torch.minimum(torch.minimum(dual, radius * size), (gain * towards).sum(1))
