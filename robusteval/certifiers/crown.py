"""Linear bounds throughout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusteval.bounds.margins import Problem, linear_margins, tightened
from robusteval.certifiers._margins import certify
from robusteval.certifiers.crown_ibp import mixed_bound
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.verdict import Certificate


@dataclass(frozen=True)
class Crown:
    """CROWN (Zhang et al. 2018, arXiv 1811.00866): passes backwards for every undecided activation and for the margins.

    Never less than CROWN-IBP gives. ``memory`` is what the largest step may take, in MiB.
    """

    memory: int = 2048

    def supports(self, threat: ThreatModel) -> bool:
        """Linf, L2 and L1."""
        return threat.convex

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        """Return a proof, or the worst bound, per input."""
        return certify(linear_bound, model, x, y, threat, self.memory)


def linear_bound(problem: Problem) -> Tensor:
    """Return the larger of the margins (N, K - 1) of CROWN and of CROWN-IBP."""
    return torch.maximum(linear_margins(problem, tightened(problem)), mixed_bound(problem))
