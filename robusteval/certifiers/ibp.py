"""Interval bounds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robusteval.bounds.first import enclosed
from robusteval.bounds.margins import Problem, interval_margins
from robusteval.certifiers._margins import ByBounds


@dataclass(frozen=True)
class IBP(ByBounds):
    """Interval bound propagation (Gowal et al. 2018, arXiv 1810.12715), the last affine maps folded into the margins.

    ``memory`` is what the largest step may take, in MiB.
    """

    def bound(self, problem: Problem) -> Tensor:
        """Return the margins (N, K - 1) of `interval_bound`."""
        return interval_bound(problem)


def interval_bound(problem: Problem) -> Tensor:
    """Return margins (N, K - 1) from intervals alone."""
    return interval_margins(problem, enclosed(problem))
