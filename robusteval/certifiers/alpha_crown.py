"""Linear bounds with chosen slopes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robusteval.bounds.alpha import Ascent
from robusteval.bounds.interval import Bounds
from robusteval.bounds.margins import Problem, optimised_margins, tightened
from robusteval.certifiers._margins import ByBounds
from robusteval.certifiers.crown import linear_bound


@dataclass(frozen=True)
class AlphaCrown(ByBounds):
    """alpha-CROWN (Xu et al. 2021, arXiv 2011.13824): ``steps`` of gradient ascent on the lower slopes of each margin.

    With ``inner_steps`` the bounds of undecided activations are improved likewise, each by slopes of its own. Never
    less than CROWN gives. ``memory`` is what the largest step may take, in MiB.
    """

    steps: int = 20
    inner_steps: int = 5
    lr: float = 0.25

    def __post_init__(self) -> None:
        if self.steps < 1 or self.inner_steps < 0 or self.lr <= 0:
            raise ValueError("alpha-CROWN needs steps >= 1, inner_steps >= 0 and lr > 0")

    def bound(self, problem: Problem) -> Tensor:
        """Return margins (N, K - 1), none less than CROWN's."""
        return self.bounds(problem)[0]

    def bounds(self, problem: Problem) -> tuple[Tensor, list[Bounds]]:
        """Return margins (N, K - 1), none less than CROWN's, and bounds (N, *shape) of every value."""
        inner = Ascent(self.inner_steps, self.lr) if self.inner_steps else None
        bounds = tightened(problem, inner)
        return optimised_margins(problem, bounds, Ascent(self.steps, self.lr), linear_bound(problem)), bounds
