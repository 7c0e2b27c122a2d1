"""Linear bounds throughout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusteval.bounds.first import mixed_margins
from robusteval.bounds.interval import Bounds
from robusteval.bounds.margins import Problem, linear_margins
from robusteval.bounds.proof import Proof, packed
from robusteval.bounds.tighten import tightened, worthwhile
from robusteval.certifiers._margins import ByBounds, judged
from robusteval.verdict import Certificate

FIRST = 0.2
"""Share of undecided activations that are bounded first: most that can be proved is, at a fraction of the cost."""


@dataclass(frozen=True)
class Crown(ByBounds):
    """CROWN (Zhang et al. 2018, arXiv 1811.00866): passes backwards for every undecided activation and for the margins.

    First only for those that cost the margins most, then, if that is not enough, for all. Never less than CROWN-IBP
    gives. ``memory`` is what the largest step may take, in MiB.
    """

    def certificates(self, problem: Problem) -> list[Certificate]:
        """Return a certificate per sample of ``problem``, with what it takes to bound inner values again."""
        answers = _answers(problem, worthwhile(problem, FIRST))
        left = [row for row, one in enumerate(answers) if not one.proved]
        if left:
            rest = _answers(problem.take(problem.y.new_tensor(left)))
            answers = [one if one.proved else rest.pop(0) for one in answers]
        return answers


def _answers(problem: Problem, worth: Mapping[int, Tensor] | None = None) -> list[Certificate]:
    found = tightened(problem, worth=worth)
    certificates, none = judged(problem, _margins(problem, found.bounds)), problem.y.new_zeros(0)
    return [
        replace(one, evidence=packed(Proof(rounds, none))) if one.proved else one
        for one, rounds in zip(certificates, found.rounds, strict=True)
    ]


def linear_bound(problem: Problem) -> Tensor:
    """Return the larger of the margins (N, K - 1) of CROWN and of CROWN-IBP."""
    return _margins(problem, tightened(problem).bounds)


def _margins(problem: Problem, bounds: list[Bounds]) -> Tensor:
    return torch.maximum(linear_margins(problem, bounds), mixed_margins(problem))
