"""sigma-zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robusteval.attacks._minimal import Nearest, cosine, prune, runner_up
from robusteval.attacks.base import AttackResult
from robusteval.rng import SampleRng
from robusteval.threat import Norm, ThreatModel, per_sample

MEMORY = (0.9, 0.999)
"""Adam's usual decay of the averages of the gradient and of its square."""


@dataclass(frozen=True)
class SigmaZero:
    """sigma-zero: the adversarial point with the fewest changed values (Cina et al. 2025, arXiv 2402.01879).

    Minimises ``max(z_y - max_{k != y} z_k, 0) + sum_i d_i^2 / (d_i^2 + sigma) / dim`` by Adam, on gradients divided by
    their largest entry, with a step size that anneals from ``step_size`` to 0. After each step, changes smaller than
    tau are undone; a sample's tau grows while its point is adversarial and falls while it is not.

    Unlike in the paper, the margin is in units of its value at ``x``, so that the scale of the logits does not matter,
    and changes that turn out not to matter are undone at the end. The paper takes 1000 steps.
    """

    minimal: ClassVar[bool] = True

    steps: int = 300
    step_size: float = 1.0
    sigma: float = 1e-3
    tau: float = 0.3
    tau_step: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.step_size > 0 or not self.sigma > 0:
            raise ValueError("sigma-zero needs steps >= 1, step_size > 0 and sigma > 0")
        if not 0 <= self.tau < 1 or not 0 < self.tau_step < 1:
            raise ValueError("sigma-zero needs 0 <= tau < 1 and 0 < tau_step < 1")

    def supports(self, threat: ThreatModel) -> bool:
        """L0 only."""
        return threat.norm is Norm.L0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return, per input, the nearest adversarial point found if it lies within eps, else the input."""
        return self.search(model, x, y, threat.norm, rng).within(threat)

    def search(self, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, rng: SampleRng) -> Nearest:
        """Return the nearest adversarial points found, whatever their distance; it draws nothing from ``rng``."""
        if norm is not Norm.L0:
            raise ValueError(f"sigma-zero is defined for L0, not for {norm.value}")
        nearest, adam = Nearest.unknown(x, norm), _Adam(x)
        point, tau = x, torch.full((len(x),), self.tau, dtype=x.dtype, device=x.device)
        slope = runner_up(model, x, y)
        unit = per_sample(slope.margin.abs().clamp_min(torch.finfo(x.dtype).tiny), x)
        for step in range(self.steps):
            if step > 0:
                slope = runner_up(model, point, y)
            nearest = nearest.note(point, slope.adversarial)
            size = cosine(self.step_size, 0.0, step, self.steps)
            tau = (tau + self.tau_step * size * torch.where(slope.adversarial, 1.0, -1.0)).clamp(0.0, 1.0)
            grad = (slope.grad / unit).masked_fill(per_sample(slope.adversarial, x), 0.0).nan_to_num(0.0, 0.0, 0.0)
            moved = (point - size * adam.direction(grad + _count_slope(point - x, self.sigma))).clamp(0.0, 1.0)
            point = torch.where((moved - x).abs() < per_sample(tau, x), x, moved)
        return prune(model, nearest.try_out(model, point, y), y)


class _Adam:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980) on gradients whose largest entry, per sample, is 1."""

    def __init__(self, x: Tensor) -> None:
        self.mean, self.square, self.step = torch.zeros_like(x), torch.zeros_like(x), 0

    def direction(self, grad: Tensor) -> Tensor:
        """Take in a gradient (N, ...) and return the step to descend, before its size."""
        grad = grad / per_sample(grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny), grad)
        self.step += 1
        self.mean = MEMORY[0] * self.mean + (1 - MEMORY[0]) * grad
        self.square = MEMORY[1] * self.square + (1 - MEMORY[1]) * grad.square()
        mean, square = self.mean / (1 - MEMORY[0] ** self.step), self.square / (1 - MEMORY[1] ** self.step)
        return mean / (square.sqrt() + 1e-8)


def _count_slope(delta: Tensor, sigma: float) -> Tensor:
    """Return the gradient of ``sum_i d_i^2 / (d_i^2 + sigma) / dim``."""
    slope: Tensor = 2 * sigma * delta / (delta.square() + sigma).square() / delta[0].numel()
    return slope
