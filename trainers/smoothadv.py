"""Adversarial training of smoothed classifiers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robusteval.attacks._steps import ascend
from robusteval.training.objective import Loss, StepContext

from ._checks import require_fraction, require_noise, require_steps
from ._noise import mean_fit, noises, noisy_logits


@dataclass(frozen=True)
class SmoothAdv:
    """SmoothAdv: cross-entropy on noisy adversarial inputs of the smoothed net (Salman et al. 2019, arXiv 1906.04584).

    ``mean_B mean_i CE(z(x' + n_i), y)`` with ``samples`` draws ``n_i`` from ``N(0, sigma^2)`` and ``x'`` ascending
    ``-log mean_i p_y(x' + n_i)`` for the same draws: ``steps`` projected steps of 2 / ``steps`` radii from ``x``,
    with the attack's mode of BatchNorm. The radius grows linearly to eps up to the fraction ``warmup`` of the training.
    Noise is in pixel units, before normalisation, and is not clipped; ``x'`` is. The adversary's start, steps and step
    size do not apply. Meant for L2.

    Published: 10 steps, warm-up 10 of 150 epochs, sigma 0.25 with eps 1 and 8 draws, 0.5 with eps 2 and 2 draws
    among others. The authors split a batch so that a step sees as many inputs as without draws; here it sees
    ``samples`` times as many.
    """

    suite: ClassVar[str] = "smoothing"

    sigma: float = 0.25
    samples: int = 2
    steps: int = 10
    warmup: float = 1 / 15

    def __post_init__(self) -> None:
        require_noise("sigma", self.sigma)
        require_steps("samples", self.samples)
        require_steps("steps", self.steps)
        require_fraction("warmup", self.warmup)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch; its training accuracy is that on the first draw."""
        drawn, reached = noises(ctx, self.sigma, self.samples), self._reached(ctx.progress)
        x_adv = ctx.attack.run(lambda model: self._search(ctx, model, drawn, reached * ctx.threat.radius))
        logits = noisy_logits(ctx, x_adv, drawn)
        return Loss(mean_fit(ctx, logits), logits[0], {"reached": reached})

    def _reached(self, progress: float) -> float:
        return progress / self.warmup if progress < self.warmup else 1.0

    def _search(self, ctx: StepContext, model: nn.Module, drawn: list[Tensor], radius: float) -> Tensor:
        def smoothed(point: Tensor) -> Tensor:
            log_p = [-ctx.cross_entropy(model(point + noise)) for noise in drawn]
            return math.log(len(drawn)) - torch.stack(log_p).logsumexp(0)

        return ascend(smoothed, ctx.x, ctx.x, ctx.threat.resized(radius), self.steps, 2 * radius / self.steps).detach()
