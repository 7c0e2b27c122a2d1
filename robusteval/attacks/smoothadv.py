"""Projected gradient descent on a smoothed classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.attacks._steps import ascend
from robusteval.attacks.base import AttackResult
from robusteval.rng import SampleRng
from robusteval.threat import Norm, ThreatModel


@dataclass(frozen=True)
class SmoothAdv:
    """PGD on the mean softmax of noisy copies (Salman et al. 2019, arXiv 1906.04584), against the smoothed classifier.

    Each step draws ``samples`` copies with noise ``sigma`` (pixel units) afresh and moves ``step_size`` times eps.
    It ascends the log-odds of the mean softmax, whose gradient has the direction of that of its cross-entropy, but does
    not underflow. The candidate is the last point: which points the smoothed classifier has wrong is not asked.
    """

    smoothed: ClassVar[bool] = True

    sigma: float = 0.25
    steps: int = 20
    samples: int = 16
    step_size: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 1 or not self.sigma > 0 or not self.step_size > 0:
            raise ValueError("SmoothAdv needs steps >= 1, samples >= 1, sigma > 0 and step_size > 0")

    def supports(self, threat: ThreatModel) -> bool:
        """L2 only."""
        return threat.norm is Norm.L2

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return, per input, the point the ascent from there ended at."""
        step = 0

        def objective(point: Tensor) -> Tensor:
            nonlocal step
            noise = rng.draw(self._noise, x, "smoothadv", step)
            step += 1
            logits = model((point[:, None] + self.sigma * noise).flatten(0, 1))
            return mean_log_odds(logits.view(len(x), self.samples, -1), y)

        end = ascend(objective, x, x, threat, self.steps, self.step_size * threat.radius)
        return AttackResult(threat.hold(x, end))

    def _noise(self, x: Tensor, stream: torch.Generator) -> Tensor:
        return torch.randn(1, self.samples, *x.shape[1:], generator=stream).to(x)


def mean_log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Return ``log((1 - p_y) / p_y)`` (N,), p the mean softmax over copies of ``logits`` (N, M, K)."""
    shares = F.log_softmax(logits, 2)
    own = shares.gather(2, y.view(-1, 1, 1).expand(-1, shares.shape[1], 1))
    others = shares.scatter(2, y.view(-1, 1, 1).expand(-1, shares.shape[1], 1), -torch.inf)
    return others.logsumexp((1, 2)) - own.logsumexp((1, 2))
