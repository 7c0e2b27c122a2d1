"""The two terms of MART."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robusteval.training.objective import StepContext

from ._losses import log_complement
from ._trades import divergence

OFFSET = 1e-4


@dataclass(frozen=True)
class Terms:
    """Logits (N, K) of the perturbed inputs, ``BCE(x')`` (N,), ``KL( p(x) || p(x') ) (1 - p_y(x))`` (N,)."""

    logits: Tensor
    boosted: Tensor
    doubted: Tensor


def terms(ctx: StepContext, offset: float = OFFSET) -> Terms:
    """Find ``x'`` that ascends cross-entropy and return the terms of `mart`; gradients flow everywhere."""
    x_adv = ctx.attack(ctx.cross_entropy)
    clean, logits = ctx.model(ctx.x), ctx.model(x_adv)
    doubt = log_complement(clean, ctx.y).exp()
    return Terms(logits, _boosted(ctx, logits, offset), divergence(clean, logits) * doubt)


def _boosted(ctx: StepContext, logits: Tensor, offset: float) -> Tensor:
    """``CE - log( 1 - max_{k != y} p_k + offset )``, (N,)."""
    rival = logits.detach().scatter(1, ctx.y[:, None], -torch.inf).argmax(1)
    rest = log_complement(logits, rival)
    floor = torch.full_like(rest, math.log(offset) if offset > 0 else -math.inf)
    return ctx.fit(logits) - torch.logaddexp(rest, floor)
