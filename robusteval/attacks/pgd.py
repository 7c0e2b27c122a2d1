"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robusteval.attacks._losses import LOSSES
from robusteval.attacks._steps import ascend
from robusteval.attacks.base import AttackResult
from robusteval.rng import SampleRng
from robusteval.threat import Norm, ThreatModel


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent with random restarts (Madry et al. 2018, arXiv 1706.06083).

    ``step_size`` is a fraction of eps. The candidate is the last point of the first restart that ends
    misclassified, so a sample's outcome does not depend on how many restarts others need. Not for L1, where steps of a
    fixed size on many values are far from the best; APGD adapts both.
    """

    steps: int = 20
    restarts: int = 1
    step_size: float = 0.25
    loss: Literal["ce", "margin"] = "margin"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or not self.step_size > 0:
            raise ValueError("PGD needs steps >= 1, restarts >= 1 and step_size > 0")

    def supports(self, threat: ThreatModel) -> bool:
        """Linf and L2."""
        return threat.norm in (Norm.LINF, Norm.L2)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return, per input, the point the loss ascent ended at."""
        loss = LOSSES[self.loss]
        found = x.clone()
        left = torch.arange(len(x), device=x.device)
        for restart in range(self.restarts):
            x_left, y_left = x[left], y[left]
            start = rng.take(left).draw(threat.sample, x_left, "pgd", restart)
            end = ascend(
                lambda point, label=y_left: loss(model(point), label),  # type: ignore[misc]
                x_left,
                start,
                threat,
                self.steps,
                self.step_size * threat.radius,
            )
            found[left] = end = threat.hold(x_left, end)
            with torch.no_grad():
                left = left[model(end).argmax(1) == y_left]
            if len(left) == 0:
                break
        return AttackResult(found)
