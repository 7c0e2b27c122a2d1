"""Branch and bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robusteval.bounds.branch import Limits, decide
from robusteval.bounds.interval import Bounds
from robusteval.bounds.margins import MemoryBudgetError, Problem
from robusteval.bounds.proof import Proof
from robusteval.bounds.tree import Tree
from robusteval.certifiers._margins import enough, judged, with_evidence
from robusteval.certifiers.alpha_crown import AlphaCrown
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.verdict import Certificate


@dataclass(frozen=True)
class BaB(AlphaCrown):
    """beta-CROWN (Wang et al. 2021, arXiv 2103.06624): what alpha-CROWN leaves open is split along its ReLUs.

    Ends in a proof, or in a counter-example, which the harness confirms like any attack's; or gives a sample up
    after ``domains`` subproblems or ``seconds`` (0: no such limit; the time alone makes an outcome depend on the
    machine, and only whether it is open). ``batch`` subproblems are split at once, at the best of ``tries`` places,
    and bounded in ``split_steps`` of ascent. ``memory`` is what the largest step may take, in MiB.
    """

    refutes: ClassVar[bool] = True
    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = ({"seconds": 0.0, "domains": 100},)

    domains: int = 20000
    seconds: float = 10.0
    batch: int = 64
    tries: int = 3
    split_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.domains, self.batch, self.tries, self.split_steps) < 1 or self.seconds < 0:
            raise ValueError("branch and bound needs domains, batch, tries, split_steps >= 1 and seconds >= 0")

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        """Return a proof, a counter-example within eps, or a reason per input."""
        found = super().__call__(model, x, y, threat, rng)
        return [
            one
            if one.counterexample is None
            else replace(one, counterexample=threat.hold(clean[None], one.counterexample[None])[0])
            for clean, one in zip(x, found, strict=True)
        ]

    def certificates(self, problem: Problem) -> list[Certificate]:
        """Return a proof, a counter-example or a reason per sample of ``problem``."""
        margins, proofs, bounds = self.proofs(problem)
        found = []
        for row, one in enumerate(judged(problem, margins)):
            own, around = problem.take(row), [(low[row : row + 1], high[row : row + 1]) for low, high in bounds]
            if one.proved:
                found.append(with_evidence(own, one, proofs[row]))
            else:
                found.append(self._search(own, margins[row], proofs[row], around))
        return found

    def _search(self, problem: Problem, margin: Tensor, proof: Proof, bounds: list[Bounds]) -> Certificate:
        tree, threshold = Tree.of(problem, bounds, self.split_steps), float(enough(problem))
        rivals = (~(margin > threshold)).nonzero().squeeze(1)
        limits = Limits(self.domains, self.seconds or torch.inf)
        try:
            outcome = decide(tree, tree.roots(rivals, margin[rivals]), threshold, limits, self.batch, self.tries)
        except MemoryBudgetError as error:
            return Certificate(False, str(error))
        if outcome.leaves:
            values = {kinks.source: kinks.values for kinks in tree.kinks}
            whole = replace(proof, values=values, leaves=outcome.leaves)
            return with_evidence(problem, Certificate(True, ""), whole)
        if outcome.point is None:
            return Certificate(False, outcome.reason)
        reason = "branch and bound found an error that float32 does not confirm"
        return Certificate(False, reason, counterexample=outcome.point.float())
