"""Interval bounds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robusteval.bounds.interval import intervals
from robusteval.bounds.margins import Problem, interval_margins
from robusteval.certifiers._margins import certify
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.verdict import Certificate


@dataclass(frozen=True)
class IBP:
    """Interval bound propagation (Gowal et al. 2018, arXiv 1810.12715), the last affine maps folded into the margins.

    ``memory`` is what the largest step may take, in MiB.
    """

    memory: int = 2048

    def supports(self, threat: ThreatModel) -> bool:
        """Linf, L2 and L1."""
        return threat.convex

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        """Return a proof, or the worst bound, per input."""
        return certify(interval_bound, model, x, y, threat, self.memory)


def interval_bound(problem: Problem) -> Tensor:
    """Return margins (N, K - 1) from intervals alone."""
    return interval_margins(problem, intervals(problem.graph, problem.ball))
