"""Linear bounds on interval bounds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robusteval.bounds.first import mixed_margins
from robusteval.bounds.margins import Problem
from robusteval.certifiers._margins import ByBounds


@dataclass(frozen=True)
class CrownIBP(ByBounds):
    """CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316): intervals inside, one pass backwards for the margins.

    Never less than intervals give. ``memory`` is what the largest step may take, in MiB.
    """

    def bound(self, problem: Problem) -> Tensor:
        """Return the margins (N, K - 1) of `mixed_margins`."""
        return mixed_margins(problem)
