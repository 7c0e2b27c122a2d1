"""Linear bounds on interval bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusteval.bounds.interval import intervals
from robusteval.bounds.margins import Problem, interval_margins, linear_margins
from robusteval.certifiers._margins import certify
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.verdict import Certificate


@dataclass(frozen=True)
class CrownIBP:
    """CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316): intervals inside, one pass backwards for the margins.

    Never less than intervals give. ``memory`` is what the largest step may take, in MiB.
    """

    memory: int = 2048

    def supports(self, threat: ThreatModel) -> bool:
        """Linf, L2 and L1."""
        return threat.convex

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        """Return a proof, or the worst bound, per input."""
        return certify(mixed_bound, model, x, y, threat, self.memory)


def mixed_bound(problem: Problem) -> Tensor:
    """Return the larger of the margins (N, K - 1) from intervals and from a pass backwards on them."""
    bounds = intervals(problem.graph, problem.ball)
    return torch.maximum(interval_margins(problem, bounds), linear_margins(problem, bounds))
