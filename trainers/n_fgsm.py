"""Adversarial training with one unprojected step from strong noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from robusteval.attacks._steps import steepest
from robusteval.training.objective import Loss, StepContext

from ._checks import require_positive


@dataclass(frozen=True)
class NFGSM:
    """N-FGSM: one step from noise beyond the ball, not projected (de Jorge et al., NeurIPS 2022, arXiv 2202.01181).

    ``mean_B CE(z(x'), y)`` with ``x'`` one steepest-ascent step of length ``alpha * eps`` on cross-entropy from a
    start that is uniform in the ball of radius ``noise * eps``. Both points are clipped to [0,1] but ``x'`` is not
    projected to the ball, so it is up to ``(noise + alpha) * eps`` from ``x``. The adversary's start, steps and
    step size do not apply. noise = 2 and alpha = 1 are the official values, given for Linf. The official code
    attacks with BatchNorm in train mode (adversary.bn_mode).
    """

    noise: float = 2.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        require_positive("noise", self.noise)
        require_positive("alpha", self.alpha)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch; ``distance`` is the mean distance of ``x'`` from ``x`` in units of eps."""
        x_adv = ctx.attack.run(lambda model: self._step(ctx, model))
        logits = ctx.model(x_adv)
        distance = float(ctx.threat.distance(ctx.x, x_adv).mean()) / ctx.threat.radius
        return Loss(ctx.fit(logits).mean(), logits, {"distance": distance})

    def _step(self, ctx: StepContext, model: nn.Module) -> Tensor:
        wide = replace(ctx.threat, eps=Fraction(self.noise) * ctx.threat.eps)
        start = ctx.draw(wide.sample).requires_grad_()
        (grad,) = torch.autograd.grad(ctx.cross_entropy(model(start)).sum(), start)
        start = start.detach()
        step = self.alpha * ctx.threat.radius * steepest(grad, start, ctx.threat)
        return (start + step).clamp(0.0, 1.0)
