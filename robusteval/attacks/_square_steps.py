"""Square Attack's proposals: stripes and squares in Linf, windows of opposite bumps in L2 and L1.

Every function treats a batch (N, C, H, W) whose random numbers, uniform in [0, 1), come one row per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from robusteval.attacks._l1 import project_l1_box
from robusteval.threat import Norm, ThreatModel

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10000, after which the share of the image that a square covers is halved, as the authors' code has it."""

TILES = 5
"""Whole tiles along each side of the image in the first L2 and L1 perturbation."""

Start = Callable[[Tensor, torch.Generator], Tensor]


def share(p_init: float, query: int, queries: int) -> float:
    """Return the share of the image that a square covers at ``query``, on a schedule for ``queries``."""
    return p_init / 2.0 ** sum(query * 10000 > after * queries for after in HALVINGS)


def sides(norm: Norm, part: float, image: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a square that covers ``part`` of the image, cut to the image."""
    side = max(round(math.sqrt(part * image[0] * image[1])), 1)
    if norm is not Norm.LINF:
        side = max(side, 3) // 2 * 2 + 1  # odd: the bumps have a centre
    return min(side, image[0]), min(side, image[1])


def width_of(channels: int) -> int:
    """Return how many random numbers `propose` needs per sample: two corners, an orientation, a sign per channel."""
    return 5 + channels


def starts(threat: ThreatModel) -> Start:
    """Return the sampler of the first point: vertical stripes at full strength, or tiles of opposite bumps."""
    if threat.norm is Norm.LINF:
        return lambda x, stream: _stripes(x, threat.radius, stream)
    return lambda x, stream: _tiles(x, threat, stream)


def propose(threat: ThreatModel, x: Tensor, best: Tensor, numbers: Tensor, size: tuple[int, int]) -> Tensor:
    """Return, per sample, ``best`` changed in a random window of ``size``; ``numbers`` is (N, `width_of`)."""
    numbers = numbers.to(x.device)
    signs = torch.where(numbers[:, 5:] < 0.5, -1.0, 1.0)[:, :, None, None]
    window = _Window(x, numbers[:, 0:2], size)
    if threat.norm is Norm.LINF:
        return _square(x, best, threat.radius, window.mask, signs)
    bumps = _bump_pair(size, _order(threat), (numbers[:, 4] < 0.5), x)
    other = _Window(x, numbers[:, 2:4], size)
    return _exchange(x, best, threat, window.mask, other.mask, signs * window.place(bumps))


class _Window:
    """A window of ``size`` per sample, anywhere in the image; ``mask`` is (N, 1, H, W)."""

    def __init__(self, x: Tensor, corner: Tensor, size: tuple[int, int]) -> None:
        spans = [self._span(x.shape[axis + 2], size[axis], corner[:, axis]) for axis in (0, 1)]
        (self._row, rows), (self._column, columns) = spans
        self.mask = (rows[:, :, None] & columns[:, None, :])[:, None]

    @staticmethod
    def _span(length: int, side: int, number: Tensor) -> tuple[Tensor, Tensor]:
        """Return each line's place in the window, cut to the window, and whether it lies within. (N, length)."""
        free = length - side
        first = (number * (free + 1)).long().clamp_max(free)  # rounding could give free + 1
        place = torch.arange(length, device=number.device) - first[:, None]
        return place.clamp(0, side - 1), (place >= 0) & (place < side)

    def place(self, patterns: Tensor) -> Tensor:
        """Put each sample's pattern (N, height, width) into its window; zero elsewhere. (N, 1, H, W)."""
        samples = torch.arange(len(patterns), device=patterns.device)[:, None, None]
        return patterns[samples, self._row[:, :, None], self._column[:, None, :]][:, None] * self.mask


def _stripes(x: Tensor, radius: float, stream: torch.Generator) -> Tensor:
    signs = torch.rand(len(x), x.shape[1], 1, x.shape[3], generator=stream).to(x.device)
    return (x + torch.where(signs < 0.5, -radius, radius)).clamp(0.0, 1.0)


def _square(x: Tensor, best: Tensor, radius: float, mask: Tensor, signs: Tensor) -> Tensor:
    """Set the window to ``x + eps * sign`` in each channel; to the opposite where that would change nothing."""
    low, high = (x - radius).clamp(0.0, 1.0), (x + radius).clamp(0.0, 1.0)
    up = signs > 0
    same = (~mask | (best == torch.where(up, high, low))).flatten(1).all(1)
    up = up ^ same[:, None, None, None]
    return torch.where(mask, torch.where(up, high, low), best)


def _order(threat: ThreatModel) -> int:
    return 2 if threat.norm is Norm.L2 else 1


def _mass(delta: Tensor, order: int, dims: tuple[int, ...] = (2, 3)) -> Tensor:
    """Return ``sum |delta|^order`` over ``dims``, which are kept."""
    return delta.abs().pow(order).sum(dims, keepdim=True)


def _at_full_strength(x: Tensor, delta: Tensor, threat: ThreatModel) -> Tensor:
    """Scale ``delta`` to the length eps, or keep its peaks alone where it is longer in L1; cut to the box."""
    order = _order(threat)
    scale = threat.radius / _mass(delta, order, (1, 2, 3)).pow(1 / order).clamp_min(1e-12)
    if threat.norm is Norm.L2:
        return threat.hold(x, (x + delta * scale).clamp(0.0, 1.0))
    return threat.hold(x, project_l1_box(x, x + delta * scale.clamp_min(1.0), threat.radius))


def _exchange(x: Tensor, best: Tensor, threat: ThreatModel, gain: Tensor, lose: Tensor, bump: Tensor) -> Tensor:
    """Move the perturbation in the window ``lose``, and what is unused of eps, to the window ``gain``, plus ``bump``.

    Per channel the window gets ``bump + nu / ||nu||``, nu what it held, scaled to the length of both windows' content
    and a share of the unused budget (Algorithm 3 of Andriushchenko et al. 2020, with L1 lengths in L1).
    """
    order, delta = _order(threat), best - x
    unused = (threat.radius**order - _mass(delta, order, (1, 2, 3))).clamp_min(0) / x.shape[1]
    budget = (_mass(delta * (gain | lose), order) + unused).pow(1 / order)
    held = delta * gain
    fresh = bump + held / _mass(held, order).pow(1 / order).clamp_min(1e-12)
    length = _mass(fresh, order).pow(1 / order)
    cancelled = length < 1e-3  # in a window of one pixel the bump may be all there is, and its opposite
    fresh = torch.where(cancelled, bump, fresh / length.clamp_min(1e-3))
    return _at_full_strength(x, delta * ~(gain | lose) + fresh * budget, threat)


def _bump(height: int, width: int, order: int) -> Tensor:
    """Return ``sum_{j >= d} (j + 1)^-2`` (L2; ^-4 in L1), d the Chebyshev distance from the centre. (height, width)."""
    away = torch.maximum(
        (torch.arange(height) - height // 2).abs()[:, None], (torch.arange(width) - width // 2).abs()[None]
    )
    powers = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float32) ** (-2.0 if order == 2 else -4.0)
    return powers.flip(0).cumsum(0).flip(0)[away]


@cache
def _halves(height: int, width: int, order: int) -> Tensor:
    """Return two bumps of opposite sign, one above the other, of length 1. (height, width)."""
    above = height // 2
    both = torch.cat([_bump(above, width, order), -_bump(height - above, width, order)])
    return both / both.abs().pow(order).sum().pow(1 / order)


def _bump_pair(size: tuple[int, int], order: int, upright: Tensor, like: Tensor) -> Tensor:
    """Return, per sample, its two bumps one above the other where ``upright``, else side by side. (N, *size)."""
    patterns = torch.stack([_halves(size[1], size[0], order).T, _halves(*size, order)]).to(like.device)
    return patterns[upright.long()]


def _tiles(x: Tensor, threat: ThreatModel, stream: torch.Generator) -> Tensor:
    """Cover the image with tiles of two opposite bumps, each of random orientation, and of random sign per channel."""
    height, width = x.shape[2:]
    tile = (max(height // TILES, 1), max(width // TILES, 1))
    rows, columns = -(-height // tile[0]), -(-width // tile[1])
    numbers = torch.rand(x.shape[1] + 1, rows, columns, generator=stream).to(x.device)
    patterns = _bump_pair(tile, _order(threat), (numbers[0] < 0.5).flatten(), x).view(rows, columns, *tile)
    signs = torch.where(numbers[1:] < 0.5, -1.0, 1.0)[..., None, None]
    image = (signs * patterns).permute(0, 1, 3, 2, 4).reshape(x.shape[1], rows * tile[0], columns * tile[1])
    return _at_full_strength(x, image[None, :, :height, :width], threat)
