"""Spread over seeds, and paired tests on shared samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95

Outcomes = NDArray[np.bool_]
"""(seeds, samples): whether a sample counts as right."""


@dataclass(frozen=True)
class Spread:
    """Values of several runs: their number, mean, standard deviation (n - 1; None for one run) and range."""

    n: int
    mean: float
    std: float | None
    min: float
    max: float


def spread(values: Sequence[float]) -> Spread:
    """Summarise at least one value."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    low, high = float(min(values)), float(max(values))
    mean = min(max(float(np.mean(values)), low), high)  # rounding may leave the range: the mean of three times 0.1
    return Spread(len(values), mean, std, low, high)


@dataclass(frozen=True)
class Paired:
    """How much more often a method is right than the reference, as a fraction of the samples.

    ``low`` and ``high`` are the 95 % interval and ``p`` the exact sign-flip permutation test over samples, the models
    taken as given; ``by_seed`` are the differences of single seeds and ``seed_p`` their paired t test (None for
    fewer than two seeds, or no spread), which has little power for few seeds.
    """

    difference: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]
    seed_p: float | None


def paired(method: Outcomes, reference: Outcomes) -> Paired:
    """Compare a method with the reference, both (seeds, samples), row by row of the same seed.

    A sample's difference ``d_i`` is its mean over the seeds; the interval is ``mean(d) +- t sd(d) / sqrt(N)``.
    """
    differences = method.astype(np.int64) - reference.astype(np.int64)
    d, by_seed = differences.mean(0), differences.mean(1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    varied = len(by_seed) > 1 and bool(np.ptp(by_seed) > 0)
    seed_p = float(stats.ttest_1samp(by_seed, 0).pvalue) if varied else None
    mean = float(d.mean())
    low, high = max(-1.0, float(mean - half)), min(1.0, float(mean + half))
    return Paired(mean, low, high, sign_flip(differences.sum(0)), tuple(by_seed.tolist()), seed_p)


def sign_flip(d: NDArray[np.int64]) -> float:
    """Return the exact two-sided p of "the signs of ``d`` (N,) are random": the chance of a sum as far from 0.

    Of the n differences of one size s, a binomial number B keeps a positive sign and adds s (2 B - n); the chances
    of all sums are the convolution over the sizes, of which integers over few seeds have few.
    """
    sizes, counts = np.unique(np.abs(d[d != 0]), return_counts=True)
    chances = np.ones(1)  # of the sums -reach, -reach + 2, ..., reach
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        wider = np.zeros(len(chances) + size * count)
        for positive, chance in enumerate(stats.binom.pmf(np.arange(count + 1), count, 0.5)):
            wider[positive * size :][: len(chances)] += chance * chances
        chances = wider
    reach = len(chances) - 1
    sums = 2 * np.arange(len(chances)) - reach
    return min(1.0, float(chances[np.abs(sums) >= abs(int(d.sum()))].sum()))


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p values for their number (Holm 1979, Scandinavian Journal of Statistics 6(2)), in the given order."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted
