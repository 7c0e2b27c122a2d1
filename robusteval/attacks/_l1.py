"""What L1 attacks need: the exact projection on ball and box, and sparse steps."""

from __future__ import annotations

import torch
from torch import Tensor


def project_l1_box(x: Tensor, x_adv: Tensor, radius: float) -> Tensor:
    """Return the point nearest to ``x_adv`` (L2) within ``||. - x||_1 <= radius`` and [0,1], for x in [0,1].

    Projecting on the ball first and clipping then would leave budget unused.
    """
    return (x + shrink_l1(x_adv - x, x, radius)).clamp(0.0, 1.0)


def shrink_l1(delta: Tensor, x: Tensor, radius: float | Tensor) -> Tensor:
    """Return the perturbation of ``x`` nearest to ``delta`` (L2) within ``||.||_1 <= radius``, a number or (N, 1).

    Croce & Hein 2021 (arXiv 2103.01208): coordinate i of ``delta`` becomes ``sign(d_i) min(max(|d_i| - level, 0),
    room_i)``, where room is the way to the wall of the box [0,1] and level >= 0 is the least that keeps the budget.
    """
    flat = delta.flatten(1)
    room = torch.where(flat > 0, 1 - x.flatten(1), x.flatten(1))
    size = flat.abs()
    kept = torch.minimum((size - _level(size, room, radius)).clamp_min(0), room)
    return (flat.sign() * kept).view_as(x)


def _level(size: Tensor, room: Tensor, radius: float | Tensor) -> Tensor:
    """Return, per row, the least level >= 0 with ``sum_i min(max(size_i - level, 0), room_i) <= radius``. (N, 1).

    As the level rises, a coordinate starts to shrink at ``size - room`` and is gone at ``size``; between these knots
    the sum falls linearly, with the number of shrinking coordinates as its slope.
    """
    knots, order = torch.cat([(size - room).clamp_min(0), size], 1).sort(1)
    slope = torch.where(order < size.shape[1], 1.0, -1.0).cumsum(1)
    fallen = (slope[:, :-1] * knots.diff(dim=1)).cumsum(1, dtype=torch.float64)
    fallen = torch.nn.functional.pad(fallen, (1, 0))
    excess = torch.minimum(size, room).sum(1, keepdim=True, dtype=torch.float64) - radius
    last = ((fallen < excess).sum(1, keepdim=True) - 1).clamp_min(0)
    level = knots.gather(1, last) + (excess - fallen.gather(1, last)) / slope.gather(1, last).clamp_min(1)
    return torch.where(excess > 0, level, 0.0).to(size.dtype)


def sparse_sign(grad: Tensor, point: Tensor, count: Tensor) -> Tensor:
    """Return, per sample, the signs of its ``count`` (N,) largest gradients, scaled to L1 length 1.

    Coordinates that the box keeps from moving are passed over. Fewer are taken where fewer gradients are not zero,
    none where all are.
    """
    stuck = ((point <= 0) & (grad < 0)) | ((point >= 1) & (grad > 0))
    flat = grad.masked_fill(stuck, 0.0).flatten(1)
    size = flat.abs()
    least = size.sort(1, descending=True).values.gather(1, count[:, None] - 1)
    signs = flat.sign() * (size >= least)
    return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).view_as(grad)
