"""Two models on the same samples: the exact test of McNemar and the score interval of Tango."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats
from scipy.optimize import brentq

from robusteval.report import CONFIDENCE

METHOD = (
    "p: exact McNemar test, two-sided binomial on the samples that only one has right, not adjusted for the number of "
    "tests; interval: score interval of the paired difference, Tango 1998, Statistics in Medicine 17(8). Both are over "
    "draws of samples, the models taken as given."
)
NEAR = 1e-9
"""Where a root is looked for ends this far from the estimate, at which the variance may vanish."""


@dataclass(frozen=True)
class McNemar:
    """How much more often B is right than A, as a fraction of samples, its 95 % interval, and p of "equally often"."""

    difference: float
    low: float
    high: float
    p: float


def mcnemar(only_a: int, only_b: int, total: int) -> McNemar:
    """Compare two models on ``total`` samples, of which ``only_a`` and ``only_b`` are right in one alone.

    McNemar 1947, Psychometrika 12(2), in its exact form; without discordant samples p is 1.
    """
    discordant = only_a + only_b
    p = float(stats.binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0
    low, high = _lower(only_b, only_a, total), -_lower(only_a, only_b, total)
    return McNemar((only_b - only_a) / total, low, high, p)


def _lower(more: int, less: int, total: int) -> float:
    """Return the lower end for ``(more - less) / total``: the smallest difference that a score test does not reject."""
    estimate = (more - less) / total
    if estimate == -1:
        return -1.0
    z = float(stats.norm.isf((1 - CONFIDENCE) / 2))

    def rejected_by(difference: float) -> float:
        return more - less - total * difference - z * math.sqrt(_variance(more, less, total, difference))

    return float(brentq(rejected_by, -1.0, estimate - NEAR, xtol=1e-12))


def _variance(more: int, less: int, total: int, difference: float) -> float:
    """Return the variance of ``more - less`` at the most likely probabilities that have this ``difference``.

    Tango 1998, equation (7): the probability of "less" solves a quadratic equation.
    """
    b = (2 * total - more + less) * difference - more - less
    c = -less * difference * (1 - difference)
    probability = (math.sqrt(max(0.0, b * b - 8 * total * c)) - b) / (4 * total)
    return max(0.0, total * (2 * probability + difference * (1 - difference)))
