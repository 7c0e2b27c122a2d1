"""Linear bounds with chosen slopes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robusteval.bounds.alpha import Ascent, Chosen
from robusteval.bounds.interval import Bounds
from robusteval.bounds.margins import Problem, optimised_margins
from robusteval.bounds.proof import Proof
from robusteval.bounds.tighten import tightened
from robusteval.certifiers._margins import ByBounds, judged, with_evidence
from robusteval.certifiers.crown import linear_bound
from robusteval.verdict import Certificate


@dataclass(frozen=True)
class AlphaCrown(ByBounds):
    """alpha-CROWN (Xu et al. 2021, arXiv 2011.13824): ``steps`` of gradient ascent on the lower slopes of each margin.

    With ``inner_steps`` the bounds of undecided activations are improved likewise, each by slopes of its own. Never
    less than CROWN gives. ``memory`` is what the largest step may take, in MiB.
    """

    searches: ClassVar[bool] = True

    steps: int = 20
    inner_steps: int = 5
    lr: float = 0.25

    def __post_init__(self) -> None:
        if self.steps < 1 or self.inner_steps < 0 or self.lr <= 0:
            raise ValueError("alpha-CROWN needs steps >= 1, inner_steps >= 0 and lr > 0")

    def certificates(self, problem: Problem) -> list[Certificate]:
        """Return a certificate per sample of ``problem``, with the slopes that prove it."""
        margins, proofs = self.proofs(problem)[:2]
        return [
            with_evidence(problem.take(row), one, proofs[row]) if one.proved else one
            for row, one in enumerate(judged(problem, margins))
        ]

    def proofs(self, problem: Problem) -> tuple[Tensor, list[Proof], list[Bounds]]:
        """Return margins (N, K - 1), none less than CROWN's, how to find them again, and bounds of every value."""
        inner = Ascent(self.inner_steps, self.lr) if self.inner_steps else None
        found, least = tightened(problem, inner), linear_bound(problem)
        margins, chosen = optimised_margins(problem, found.bounds, Ascent(self.steps, self.lr), least)
        proofs = []
        for rounds, slopes in zip(found.rounds, chosen, strict=True):
            rivals = problem.y.new_tensor(list(slopes))
            proofs.append(Proof(rounds, rivals, Chosen.joined(list(slopes.values())) if slopes else None))
        return margins, proofs, found.bounds
