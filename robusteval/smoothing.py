"""The smoothed classifier ``g(x) = argmax_c P(f(x + sigma * N(0, I)) = c)``: votes of noisy copies, what they prove.

Cohen et al. 2019, arXiv 1902.02918. Noise is in pixel units of [0, 1], added before the model normalises, not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import scipy
import torch
from scipy.special import betaincinv, ndtri
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.errors import RobustevalError
from robusteval.rng import SampleRng, generator

ABSTAINS = "abstains"
GRID = 1e6
"""Radii are rounded down to multiples of 1/GRID, far above the rounding of the special functions they come from."""

FUTILE = 0.01
"""Stopping proves nothing, so its level is free: a radius that is true is given up at a look this often at most."""

MOST_COPIES, MOST_VALUES = 4096, 2**22
"""Noisy copies drawn at once, and values in them; a constant of the image's size, as each call draws a block."""


def lower(count: int, total: int, alpha: float) -> float:
    """Return the one-sided lower bound of Clopper & Pearson (1934, Biometrika 26(4)) with confidence ``1 - alpha``."""
    return float(betaincinv(count, total - count + 1, alpha)) if count else 0.0


def upper(count: int, total: int, alpha: float) -> float:
    """Return the one-sided upper bound of Clopper & Pearson with confidence ``1 - alpha``."""
    return float(betaincinv(count + 1, total - count, 1 - alpha)) if count < total else 1.0


def beats(votes: int, others: int, alpha: float) -> bool:
    """Say whether a class with ``votes`` is more probable than one with ``others``, wrongly with at most ``alpha``."""
    return float(scipy.stats.binom.sf(votes - 1, votes + others, 0.5)) <= alpha


@dataclass(frozen=True)
class LookPlan:
    """When a certificate may look at its votes: after ``looks`` draws, ascending, each at its share of ``alpha``.

    All bounds of a plan hold together with confidence ``1 - alpha``, so it may stop at any look, and the same draws
    serve every radius. Stopping for futility proves nothing and costs nothing.
    """

    sigma: float
    looks: tuple[int, ...]
    alpha: float

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and 0 < self.alpha < 0.5):
            raise ValueError("smoothing needs sigma > 0 and 0 < alpha < 0.5")
        if not self.looks or self.looks[0] < 1 or list(self.looks) != sorted(set(self.looks)):
            raise ValueError("looks are counts of draws, ascending, such as [100, 1000, 10000]")
        if self.ceiling(()) <= 0:
            raise ValueError(f"{self.looks[-1]} draws can prove nothing at alpha {self.alpha:g}; they always abstain")

    @property
    def share(self) -> float:
        """The part of alpha that each look spends."""
        return self.alpha / len(self.looks)

    def p_lower(self, counts: Sequence[int]) -> float:
        """Return the best lower bound of the class's probability, from its votes at the looks so far."""
        return max((lower(k, n, self.share) for k, n in zip(counts, self.looks, strict=False)), default=0.0)

    def radius(self, counts: Sequence[int]) -> float:
        """Return the L2 radius, rounded down, that the votes at the looks so far prove; 0 where they abstain."""
        return self._radius(self.p_lower(counts))

    def ceiling(self, counts: Sequence[int]) -> float:
        """Return the radius that would be proved if every draw to come were a vote for the class."""
        drawn, votes = (self.looks[len(counts) - 1], counts[-1]) if counts else (0, 0)
        ahead = self.looks[len(counts) :]
        return self._radius(max((lower(votes + n - drawn, n, self.share) for n in ahead), default=0.0))

    def stops(self, counts: Sequence[int], reach: float) -> bool:
        """Say whether there is no point in another look: ``reach`` is proved, or will not be, or none is left."""
        if self.radius(counts) > reach or self.ceiling(counts) <= reach:
            return True
        return bool(counts) and self._radius(upper(counts[-1], self.looks[len(counts) - 1], FUTILE)) <= reach

    def reason(self, counts: Sequence[int], reach: float) -> str:
        """Say why ``reach`` was not proved."""
        if not counts:
            return f"{self.looks[-1]} draws prove at most radius {self.ceiling(()):.6g}"
        told = f"{counts[-1]} of {self.looks[len(counts) - 1]} draws"
        return f"{told} prove radius {proved:.6g}" if (proved := self.radius(counts)) else f"{ABSTAINS}: {told}"

    def _radius(self, p: float) -> float:
        if p <= 0.5 or p >= 1:
            return 0.0 if p <= 0.5 else math.inf
        return math.floor(self.sigma * float(ndtri(p)) * GRID) / GRID


def votes(model: nn.Module, x: Tensor, sigma: float, draws: int, rng: SampleRng, *purpose: str | int) -> Tensor:
    """Count how ``model`` classifies ``draws`` noisy copies of each input ``x`` (N, C, H, W); (N, K) int64.

    The noise of a sample comes from its own stream for ``purpose``, so its votes do not depend on its company.
    Raises `RobustevalError` on non-finite logits.
    """
    most = max(16, min(MOST_COPIES, MOST_VALUES // x[0].numel()))
    together = max(1, most // draws)
    rows = [torch.arange(len(x))[first : first + together] for first in range(0, len(x), together)]
    with torch.no_grad():
        return torch.cat([_votes(model, x[some], sigma, draws, most, rng.take(some), purpose) for some in rows])


def _votes(
    model: nn.Module, x: Tensor, sigma: float, draws: int, most: int, rng: SampleRng, purpose: tuple[str | int, ...]
) -> Tensor:
    streams = [generator(rng.seed, *purpose, sample) for sample in rng.ids]
    parts = []
    for size in _blocks(draws, most):
        noise = torch.stack([torch.randn(size, *x.shape[1:], generator=stream) for stream in streams]).to(x.device)
        logits = model((x[:, None] + sigma * noise).flatten(0, 1))
        _check_finite(logits, size, rng)
        parts.append(F.one_hot(logits.argmax(1), logits.shape[1]).view(len(x), size, -1).sum(1))
    return torch.stack(parts).sum(0)


def _blocks(draws: int, most: int) -> Iterator[int]:
    for first in range(0, draws, most):
        yield min(most, draws - first)


def _check_finite(logits: Tensor, copies: int, rng: SampleRng) -> None:
    bad = (~logits.isfinite().all(1)).nonzero()
    if len(bad):
        sample = rng.ids[int(bad[0, 0]) // copies]
        raise RobustevalError(f"the model returns NaN or infinite logits on a noisy copy of sample {sample}.")
