"""Linear bounds on interval bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robusteval.bounds.first import enclosed
from robusteval.bounds.margins import Problem, interval_margins, linear_margins
from robusteval.certifiers._margins import ByBounds


@dataclass(frozen=True)
class CrownIBP(ByBounds):
    """CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316): intervals inside, one pass backwards for the margins.

    Never less than intervals give. ``memory`` is what the largest step may take, in MiB.
    """

    def bound(self, problem: Problem) -> Tensor:
        """Return the margins (N, K - 1) of `mixed_bound`."""
        return mixed_bound(problem)


def mixed_bound(problem: Problem) -> Tensor:
    """Return the larger of the margins (N, K - 1) from intervals and from a pass backwards on them."""
    bounds = enclosed(problem)
    return torch.maximum(interval_margins(problem, bounds), linear_margins(problem, bounds))
