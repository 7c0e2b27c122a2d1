"""What certifiers by bounds share: trace the model, bound its margins in float64, decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robusteval.bounds.ball import Ball
from robusteval.bounds.graph import trace
from robusteval.bounds.margins import MemoryBudgetError, Problem
from robusteval.bounds.nodes import Graph, UnsupportedError
from robusteval.bounds.proof import Proof, holds, packed, unpacked
from robusteval.errors import RobustevalError
from robusteval.rng import SampleRng
from robusteval.threat import BUDGET_TOLERANCE, ThreatModel
from robusteval.verdict import Certificate, Evidence

TOLERANCE = 1e-5
"""What a margin must exceed, relative to the logits: more than the rounding of float32, in which attacks are judged."""

ROUNDING = 1e-6
"""By which share of that a margin may fall short when it is bounded again in another batch."""

SAMPLES = 32
"""Samples bounded at once."""


@dataclass(frozen=True)
class ByBounds:
    """A certifier by lower bounds of the margins; ``memory`` is what the largest step may take, in MiB."""

    memory: int = 2048

    def supports(self, threat: ThreatModel) -> bool:
        """Linf, L2 and L1."""
        return threat.convex

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        """Return a proof, or the worst bound, per input.

        The bounds are those of real arithmetic, computed in float64, for the weights as they are and for all inputs
        that the harness would accept: within eps and its tolerance, in [0, 1].
        """
        exact = x.double()
        try:
            graph = trace(model, exact)
        except UnsupportedError as error:
            return [Certificate(False, str(error))] * len(x)
        pieces = (slice(first, first + SAMPLES) for first in range(0, len(x), SAMPLES))
        return [one for rows in pieces for one in self._piece(graph, exact[rows], y[rows], threat)]

    def _piece(self, graph: Graph, x: Tensor, y: Tensor, threat: ThreatModel) -> list[Certificate]:
        try:
            with torch.no_grad():
                return self.certificates(self._problem(graph, x, y, threat))
        except MemoryBudgetError as error:
            return [Certificate(False, str(error))] * len(x)

    def _problem(self, graph: Graph, x: Tensor, y: Tensor, threat: ThreatModel) -> Problem:
        ball = Ball.around(x, threat.norm, threat.radius + BUDGET_TOLERANCE)
        return Problem(graph, ball, y, self.memory * 2**20)

    def recheck(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, evidence: Sequence[Evidence]
    ) -> list[bool]:
        """Say for each input whether its ``evidence`` proves it, by one pass and without any search.

        What is true of it does not depend on where the evidence came from; any other is refused.
        """
        exact = x.double()
        problem = self._problem(trace(model, exact), exact, y, threat)
        with torch.no_grad():
            return [_holds(problem.take(row), one) for row, one in enumerate(evidence)]

    def certificates(self, problem: Problem) -> list[Certificate]:
        """Return a certificate per sample of ``problem``."""
        return judged(problem, self.bound(problem))

    def bound(self, problem: Problem) -> Tensor:
        """Return lower bounds (N, K - 1) of the margins."""
        raise NotImplementedError


def _holds(problem: Problem, evidence: Evidence) -> bool:
    try:
        return holds(problem, unpacked(evidence), (1 - ROUNDING) * float(enough(problem)))
    except (LookupError, ValueError, TypeError, RuntimeError, RobustevalError):
        return False  # it is not about this network


def with_evidence(problem: Problem, certificate: Certificate, proof: Proof) -> Certificate:
    """Return a certificate of a problem of one sample with its proof; none if that is not enough by itself."""
    evidence = packed(proof)
    if _holds(problem, evidence):
        return replace(certificate, evidence=evidence)
    return Certificate(False, "a proof was found, but not in the precision in which it would be kept")


def enough(problem: Problem) -> Tensor:
    """Return what each margin of a sample (N,) must exceed."""
    return TOLERANCE * (1 + problem.graph(problem.ball.x).abs().amax(1))


def judged(problem: Problem, margins: Tensor) -> list[Certificate]:
    """Return a certificate per sample: proved only if each of ``margins`` (N, K - 1) is `enough`; NaN is not."""
    proved = (margins > enough(problem)[:, None]).all(1)
    worst, rival = margins.min(1)
    return [
        Certificate(ok, "" if ok else f"bound {low:.3g} on the margin over class {k + (k >= label)}")
        for ok, low, k, label in zip(proved.tolist(), worst.tolist(), rival.tolist(), problem.y.tolist(), strict=True)
    ]
