"""What objectives that weight samples by their importance share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robusteval.training.objective import StepContext


def normalised(ctx: StepContext, log_weights: Tensor) -> Tensor:
    """Return ``exp(log_weights)`` (N,) divided by their mean over the whole batch; never 0 / 0."""
    every = ctx.gather(log_weights)
    log_mean = every.logsumexp(0) - math.log(len(every))
    return (log_weights.detach() - log_mean).exp()


def spread(ctx: StepContext, weights: Tensor) -> dict[str, float]:
    """Return figures on ``weights`` (N,) over the whole batch: their mean, and the effective share of the batch.

    The effective share is ``(sum w)^2 / (|B| sum w^2)``: 1 for equal weights, 1 / |B| if one sample has them all.
    """
    every = ctx.gather(weights).double()
    share = every.mean().square() / every.square().mean().clamp_min(torch.finfo(every.dtype).tiny)
    return {"weight": float(every.mean()), "effective_share": float(share)}
