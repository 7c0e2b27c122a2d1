"""Linear bounds throughout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robusteval.bounds.margins import Problem, linear_margins, tightened
from robusteval.certifiers._margins import ByBounds
from robusteval.certifiers.crown_ibp import mixed_bound


@dataclass(frozen=True)
class Crown(ByBounds):
    """CROWN (Zhang et al. 2018, arXiv 1811.00866): passes backwards for every undecided activation and for the margins.

    Never less than CROWN-IBP gives. ``memory`` is what the largest step may take, in MiB.
    """

    def bound(self, problem: Problem) -> Tensor:
        """Return the margins (N, K - 1) of `linear_bound`."""
        return linear_bound(problem)


def linear_bound(problem: Problem) -> Tensor:
    """Return the larger of the margins (N, K - 1) of CROWN and of CROWN-IBP."""
    return torch.maximum(linear_margins(problem, tightened(problem)), mixed_bound(problem))
