"""Linear bounds throughout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from robusteval.bounds.first import enclosed, mixed_margins
from robusteval.bounds.margins import Problem, interval_margins, linear_margins
from robusteval.bounds.proof import Proof, packed
from robusteval.bounds.tighten import tightened, worthwhile
from robusteval.certifiers._margins import ByBounds, judged
from robusteval.verdict import Certificate

WIDER = 10
"""How much wider than CROWN-IBP's, roughly, intervals are where CROWN proves something."""


@dataclass(frozen=True)
class Crown(ByBounds):
    """CROWN (Zhang et al. 2018, arXiv 1811.00866): passes backwards for undecided activations and for the margins.

    First only for a part of the activations, those that cost the margins most, then, if that is not enough, for the
    larger ones of ``shares``: most that can be proved is so at a fraction of the cost. Never less than CROWN-IBP gives.
    With ``reach`` it gives up where CROWN-IBP bounds the margins by less than -``reach`` times the clean margin, and
    before that where intervals do so by less than `WIDER` times as much: further passes would cost as much as elsewhere
    and hardly ever prove anything. ``memory`` is what the largest step may take, in MiB.
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"shares": [0.2], "reach": 10.0})

    shares: tuple[float, ...] = (0.2, 1.0)
    reach: float | None = None

    def __post_init__(self) -> None:
        ascending = list(self.shares) == sorted(set(self.shares))
        if not self.shares or not ascending or not 0 < min(self.shares) <= max(self.shares) <= 1:
            raise ValueError("crown needs ascending shares, above 0 and at most 1")
        if self.reach is not None and self.reach < 0:
            raise ValueError("crown needs reach >= 0")

    def certificates(self, problem: Problem) -> list[Certificate]:
        """Return a certificate per sample of ``problem``, with what it takes to bound inner values again."""
        _ = problem.fits  # too little memory is so for all samples, also those that intervals prove
        margins, clean = interval_margins(problem, enclosed(problem)), _clean_margins(problem)
        answers = judged(problem, margins)
        reach = math.inf if self.reach is None else self.reach
        for share, least in ((0.0, -WIDER * reach), *((share, -reach) for share in self.shares)):
            within = (margins.amin(1) >= least * clean).tolist()
            left = [row for row, one in enumerate(answers) if within[row] and not one.proved]
            if left:
                rows = problem.y.new_tensor(left)
                part = problem.take(rows)
                if share == 0:
                    margins[rows] = torch.maximum(mixed_margins(part), margins[rows])
                    found = judged(part, margins[rows])
                else:  # the margins stay CROWN-IBP's: evidence is about one share, and a larger one may bound some less
                    found = _answers(part, margins[rows], share)
                for row, one in zip(left, found, strict=True):
                    answers[row] = one
        return answers


def _clean_margins(problem: Problem) -> Tensor:
    """Return the margins (N,) of the clean inputs."""
    logits, label = problem.graph(problem.ball.x), problem.y[:, None]
    return logits.gather(1, label).squeeze(1) - logits.scatter(1, label, -torch.inf).amax(1)


def _answers(problem: Problem, least: Tensor, share: float) -> list[Certificate]:
    """Return a certificate per sample from margins none of which is less than ``least`` (N, K - 1)."""
    found = tightened(problem, worth=worthwhile(problem, share) if share < 1 else None)
    margins = torch.maximum(linear_margins(problem, found.bounds), least)
    certificates, none = judged(problem, margins), problem.y.new_zeros(0)
    for row, rounds in enumerate(found.rounds):
        if certificates[row].proved:
            certificates[row] = replace(certificates[row], evidence=packed(Proof(rounds, none)))
    return certificates


def linear_bound(problem: Problem) -> Tensor:
    """Return the larger of the margins (N, K - 1) of CROWN and of CROWN-IBP."""
    return torch.maximum(linear_margins(problem, tightened(problem).bounds), mixed_margins(problem))
