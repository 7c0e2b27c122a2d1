"""Gaussian noise, for networks that are to be smoothed."""

from __future__ import annotations

import torch
from torch import Tensor

from robusteval.training.objective import StepContext


def noises(ctx: StepContext, sigma: float, samples: int) -> list[Tensor]:
    """Return ``samples`` draws (N, C, H, W) from ``N(0, sigma^2)``, in pixel units."""

    def sampler(x: Tensor, rng: torch.Generator) -> Tensor:
        return sigma * torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)

    return [ctx.draw(sampler) for _ in range(samples)]


def noisy_logits(ctx: StepContext, x: Tensor, drawn: list[Tensor]) -> Tensor:
    """Return the logits (samples, N, K) of ``x`` (N, ...) plus each noise, in one pass; nothing is clipped."""
    logits: Tensor = ctx.model(torch.cat([x + noise for noise in drawn]))
    return logits.view(len(drawn), len(x), -1)


def mean_fit(ctx: StepContext, logits: Tensor) -> Tensor:
    """Return the cross-entropy to descend, the mean over logits (samples, N, K)."""
    return torch.stack([ctx.fit(each).mean() for each in logits]).mean()
