"""Randomised smoothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robusteval.rng import SampleRng
from robusteval.smoothing import LookPlan, votes
from robusteval.threat import BUDGET_TOLERANCE, Norm, ThreatModel
from robusteval.verdict import Certificate, Sampling


@dataclass(frozen=True)
class Smoothing:
    """Certificates of the smoothed classifier, by sampling (Cohen et al. 2019, arXiv 1902.02918).

    Of each input ``n0`` noisy copies choose a class. Fresh ones then bound its probability from below at the ``looks``,
    which share ``alpha`` equally, until the radius is proved or cannot be. ``sigma`` is in pixel units. With confidence
    ``1 - alpha`` all that is proved of a sample is true, at every eps together.
    """

    smoothed: ClassVar[bool] = True
    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = ({"looks": (100, 1000)},)

    sigma: float = 0.25
    n0: int = 100
    looks: tuple[int, ...] = (100, 1000, 10_000, 100_000)
    alpha: float = 0.001

    def __post_init__(self) -> None:
        if self.n0 < 1:
            raise ValueError("smoothing needs n0 >= 1")
        _ = self.plan

    @property
    def plan(self) -> LookPlan:
        """When and at which level it looks."""
        return LookPlan(self.sigma, tuple(self.looks), self.alpha)

    def supports(self, threat: ThreatModel) -> bool:
        """L2 only."""
        return threat.norm is Norm.L2

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        rng: SampleRng,
        known: Sequence[Sampling | None] = (),
    ) -> list[Certificate]:
        """Return a proof for every input that the harness would accept, within eps and its tolerance, or a reason.

        What is ``known`` of an input from a smaller eps is not drawn again: its votes would be the same.
        """
        before = list(known) or [None] * len(x)
        chosen = self._chosen(model, x, rng, before)
        counts = [list(one.counts) if one else [] for one in before]
        reach, plan, labels = threat.radius + BUDGET_TOLERANCE, self.plan, y.tolist()
        for look, drawn in enumerate(self.looks):
            at = [row for row in range(len(x)) if chosen[row] == labels[row] and len(counts[row]) == look]
            rows = torch.tensor([row for row in at if not plan.stops(counts[row], reach)], dtype=torch.long)
            if len(rows):
                fresh = drawn - (self.looks[look - 1] if look else 0)
                said = votes(model, x[rows], self.sigma, fresh, rng.take(rows), "smoothing", "look", look)
                for row, more in zip(rows.tolist(), said.gather(1, y[rows][:, None]).squeeze(1).tolist(), strict=True):
                    counts[row].append(more + (counts[row][-1] if look else 0))
        return [self._certificate(*one, reach) for one in zip(chosen, labels, counts, strict=True)]

    def _chosen(self, model: nn.Module, x: Tensor, rng: SampleRng, known: Sequence[Sampling | None]) -> list[int]:
        rows = torch.tensor([row for row, one in enumerate(known) if one is None], dtype=torch.long)
        said = votes(model, x[rows], self.sigma, self.n0, rng.take(rows), "smoothing", "choose") if len(rows) else None
        fresh = iter(said.argmax(1).tolist() if said is not None else [])
        return [next(fresh) if one is None else one.chosen for one in known]

    def _certificate(self, chosen: int, label: int, counts: list[int], reach: float) -> Certificate:
        sampling, plan = Sampling(chosen, tuple(counts)), self.plan
        if chosen != label:
            return Certificate(False, f"the first {self.n0} draws choose class {chosen}", sampling)
        if plan.radius(counts) > reach:
            return Certificate(True, "", sampling)
        return Certificate(False, plan.reason(counts, reach), sampling)
