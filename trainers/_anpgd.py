"""The search of MMA training for each sample's distance to the decision boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robusteval.attacks._steps import steepest
from robusteval.threat import Norm, ThreatModel

Margin = Callable[[Tensor], Tensor]
"""Inputs (N, ...) -> the value (N,) that is negative iff a sample is on the right side of the boundary."""


@dataclass(frozen=True)
class Crossing:
    """Where rays meet the boundary: points (N, ...) in [0,1] and how far along they are, (N,), in pixel units."""

    points: Tensor
    distance: Tensor


def climb(margin: Margin, x: Tensor, start: Tensor, threat: ThreatModel, radius: Tensor, steps: int) -> Tensor:
    """Ascend ``margin`` from ``start`` within each sample's own ``radius`` (N,) of ``x``.

    Projected gradient ascent with steps of 2.5 / ``steps`` radii, in the norm of ``threat`` (Linf or L2).
    """
    reach, point = _column(radius, x), start.detach()
    for _ in range(steps):
        point = point.requires_grad_()
        (grad,) = torch.autograd.grad(margin(point).sum(), point)
        point = point.detach()
        point = _project(x, point + 2.5 / steps * reach * steepest(grad, point, threat), threat.norm, reach)
    return point


def bisect(margin: Margin, x: Tensor, towards: Tensor, threat: ThreatModel, limit: float, halvings: int) -> Crossing:
    """Find where the ray from ``x`` through ``towards``, clipped to [0,1], crosses ``margin = 0`` up to ``limit``.

    The crossing is bracketed and the bracket's far end returned, which is past the boundary and less than
    ``limit / 2**halvings`` too far; it is ``limit`` itself where no point tried is past the boundary.
    """
    length = threat.distance(x, towards).to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)
    unit = (towards - x) / _column(length, x)
    near, far = torch.zeros_like(length), torch.full_like(length, limit)
    with torch.no_grad():
        for _ in range(halvings):
            middle = (near + far) / 2
            crossed = margin(_along(x, unit, middle)) >= 0
            near, far = torch.where(crossed, near, middle), torch.where(crossed, middle, far)
    return Crossing(_along(x, unit, far), far)


def _along(x: Tensor, unit: Tensor, distance: Tensor) -> Tensor:
    return (x + _column(distance, x) * unit).clamp(0.0, 1.0)


def _project(x: Tensor, point: Tensor, norm: Norm, reach: Tensor) -> Tensor:
    """Move ``point`` into the ball of radius ``reach`` (N, 1, ...) around ``x`` and into [0,1]."""
    delta = point - x
    if norm is Norm.LINF:
        delta = torch.maximum(torch.minimum(delta, reach), -reach)
    else:
        size = _column(torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12), x)
        delta = delta * (reach / size).clamp_max(1.0)
    return (x + delta).clamp(0.0, 1.0)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
