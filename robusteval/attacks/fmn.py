"""The Fast Minimum-Norm attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robusteval.attacks._minimal import (
    Nearest,
    Slope,
    cosine,
    inward,
    nearest_rival,
    noise,
    project,
    prune,
    reach,
    runner_up,
    unit,
)
from robusteval.attacks.base import AttackResult
from robusteval.rng import SampleRng
from robusteval.threat import Norm, ThreatModel, per_sample

LEAP = 100.0
"""The size of the first step: so large that the projection returns the point of the ball of least linearised margin."""

LEAST = 1e-6
"""The least radius while nothing is found: a point on the decision boundary must be able to leave it."""


@dataclass(frozen=True)
class FMN:
    """Fast Minimum-Norm attack: the nearest adversarial point (Pintor et al. 2021, arXiv 2102.12827).

    Descends ``z_y - max_{k != y} z_k`` along the gradient of L2 length 1 and projects on a ball of a radius of each
    sample's own: while nothing is found, a share ``gamma`` beyond where the linearised margin is 0; from then on
    smaller by gamma after an adversarial point, else larger. Gamma and the step size decay along a cosine.

    Unlike in the paper, steps are ``step_size`` times the radius and a factor (`_strides`), not of a fixed length; the
    first one goes to the nearest linearised boundary of the ``classes`` strongest other classes; the projection is the
    exact one on ball and box; and in L0, changes that turn out not to matter are undone at the end.
    """

    minimal: ClassVar[bool] = True

    steps: int = 100
    step_size: float = 1.0
    step_size_end: float = 0.01
    gamma: float = 0.05
    gamma_end: float = 0.001
    classes: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or self.classes < 1:
            raise ValueError("FMN needs steps >= 1 and classes >= 1")
        if not 0 < self.step_size_end <= self.step_size or not 0 < self.gamma_end <= self.gamma < 1:
            raise ValueError("FMN needs 0 < step_size_end <= step_size and 0 < gamma_end <= gamma < 1")

    def supports(self, threat: ThreatModel) -> bool:
        """Linf, L2, L1 and L0."""
        return threat.norm in (Norm.LINF, Norm.L2, Norm.L1, Norm.L0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return, per input, the nearest adversarial point found if it lies within eps, else the input."""
        return self.search(model, x, y, threat.norm, rng).within(threat)

    def search(self, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, rng: SampleRng) -> Nearest:
        """Return the nearest adversarial points found, whatever their distance."""
        spare, nearest = rng.draw(noise, x, "fmn"), Nearest.unknown(x, norm)
        point, eps = x, torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for step in range(self.steps):
            slope = nearest_rival(model, point, y, norm, self.classes) if step == 0 else runner_up(model, point, y)
            nearest = nearest.note(point, slope.adversarial)
            eps = _resize(eps, slope, point, nearest, cosine(self.gamma, self.gamma_end, step, self.steps))
            size = LEAP if step == 0 else cosine(self.step_size, self.step_size_end, step, self.steps)
            ahead = point - x - per_sample(size * _strides(eps, x, norm), x) * unit(inward(slope.grad, point), spare)
            point = (x + project(ahead, eps, x, norm)).clamp(0.0, 1.0)
        nearest = nearest.try_out(model, point, y)
        return prune(model, nearest, y) if norm is Norm.L0 else nearest


def _resize(eps: Tensor, slope: Slope, point: Tensor, nearest: Nearest, gamma: float) -> Tensor:
    """Return each sample's next radius (N,), no larger than the nearest distance found and than the box."""
    missing = reach(slope.margin, inward(slope.grad, point), point, nearest.norm)
    searching = ((nearest.measure(point) + missing) * (1 + gamma)).clamp_min(LEAST)
    smaller, larger = eps * (1 - gamma), eps * (1 + gamma)
    if nearest.norm is Norm.L0:
        smaller, larger = torch.minimum(smaller.floor(), eps - 1), torch.maximum(larger.floor(), eps + 1)
    found = nearest.distances.isfinite()
    eps = torch.where(found, torch.where(slope.adversarial, smaller, larger), searching)
    corner = (nearest.x < 0.5).to(point.dtype)
    return eps.minimum(nearest.distances).minimum(nearest.measure(corner))


def _strides(eps: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """Return the L2 length (N,) of a step of size 1: what served best on two small trained nets.

    A fixed length, as in the paper, has to be found anew for each data set. In L0, where eps is a count, it is fixed.
    """
    if norm is Norm.L0:
        return torch.full_like(eps, 5.0, dtype=x.dtype)
    factor: float = {Norm.LINF: 8.0 * math.sqrt(x[0].numel()), Norm.L2: 2.0, Norm.L1: 0.25}[norm]
    return (factor * eps).to(x.dtype)
