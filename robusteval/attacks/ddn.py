"""Decoupled direction and norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.attacks._minimal import (
    Nearest,
    Slope,
    cosine,
    inward,
    nearest_rival,
    noise,
    reach,
    runner_up,
    unit,
)
from robusteval.attacks.base import AttackResult
from robusteval.rng import SampleRng
from robusteval.threat import Norm, ThreatModel, per_sample


@dataclass(frozen=True)
class DDN:
    """Decoupled direction and norm: the nearest adversarial point in L2 (Rony et al. 2019, arXiv 1811.09600).

    The perturbation follows the loss by steps of length ``step_size``, which decay along a cosine, and is then rescaled
    to length eps: a share ``gamma`` shorter after an adversarial point, longer after one that is not.

    Unlike in the paper, eps starts where the linearised boundary is, if that is nearer than ``eps``; the first step
    goes towards that of the ``classes`` strongest other classes whose linearised boundary is nearest; and the loss is
    the logit margin unless ``loss`` is "ce", whose direction depends on the scale of the logits.
    """

    minimal: ClassVar[bool] = True

    steps: int = 100
    step_size: float = 1.0
    step_size_end: float = 0.01
    eps: float = 1.0
    gamma: float = 0.05
    loss: Literal["ce", "margin"] = "margin"
    classes: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or self.classes < 1 or not self.eps > 0 or not 0 < self.gamma < 1:
            raise ValueError("DDN needs steps >= 1, classes >= 1, eps > 0 and 0 < gamma < 1")
        if not 0 < self.step_size_end <= self.step_size:
            raise ValueError("DDN needs 0 < step_size_end <= step_size")

    def supports(self, threat: ThreatModel) -> bool:
        """L2 only."""
        return threat.norm is Norm.L2

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return, per input, the nearest adversarial point found if it lies within eps, else the input."""
        return self.search(model, x, y, threat.norm, rng).within(threat)

    def search(self, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, rng: SampleRng) -> Nearest:
        """Return the nearest adversarial points found, whatever their distance."""
        if norm is not Norm.L2:
            raise ValueError(f"DDN is defined for L2, not for {norm.value}")
        spare, nearest = rng.draw(noise, x, "ddn"), Nearest.unknown(x, norm)
        slope = nearest_rival(model, x, y, norm, self.classes)
        point, eps = x, reach(slope.margin, inward(slope.grad, x), x, norm).clamp(1e-6, self.eps)
        follow = runner_up if self.loss == "margin" else _cross_entropy
        for step in range(self.steps):
            if step > 0:
                slope = follow(model, point, y)
            nearest = nearest.note(point, slope.adversarial)
            eps = eps * torch.where(slope.adversarial, 1 - self.gamma, 1 + self.gamma)
            size = cosine(self.step_size, self.step_size_end, step, self.steps)
            ahead = point - x - size * unit(inward(slope.grad, point), spare)
            length = torch.linalg.vector_norm(ahead.flatten(1), dim=1).clamp_min(1e-12)
            point = (x + per_sample(eps / length, x) * ahead).clamp(0.0, 1.0)
        return nearest.try_out(model, point, y)


def _cross_entropy(model: nn.Module, point: Tensor, y: Tensor) -> Slope:
    """Return ``log softmax(z)_y`` in place of the margin, and its slope."""
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        value = -F.cross_entropy(logits, y, reduction="none")
        (grad,) = torch.autograd.grad(value.sum(), point)
    return Slope(value.detach(), grad, logits.detach().argmax(1) != y)
