"""The choice of important samples that the switching objectives share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robusteval.attacks._losses import margin_loss
from robusteval.training.objective import StepContext

from ._losses import one_vs_rest


@dataclass(frozen=True)
class Hard:
    """The set L of a batch: ``mask`` (N,) bool of this process's rows, and figures worth logging."""

    mask: Tensor
    metrics: dict[str, float]


def hardest(ctx: StepContext, logits: Tensor, m: float) -> Hard:
    """Return the ``m`` percent of the batch with the largest ``LM = max_{k != y} z_k - z_y`` of ``logits`` (N, K).

    ``|L| = floor(m / 100 * |B|)`` over the whole batch, for a smaller last one as well. Of equal LM the sample with
    the smaller id goes to L, so neither the order within a batch nor the number of processes matters. LM is a
    constant. ``wrong_in_L`` is the share of L that is misclassified.
    """
    margins = margin_loss(logits.detach(), ctx.y)
    every, ids = ctx.gather(margins), ctx.gather(ctx.ids)
    count = math.floor(m / 100 * len(every) + 1e-9)
    by_id = ids.argsort(stable=True)
    order = by_id[every[by_id].argsort(descending=True, stable=True)]
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[order[:count]] = True
    wrong = float((every[order[:count]] > 0).float().mean()) if count else 0.0
    return Hard(ctx.share.mine(chosen), {"margin": -float(every.mean()), "wrong_in_L": wrong})


def switched(ctx: StepContext, logits: Tensor, hard: Hard, lam: float) -> Tensor:
    """Return ``lam * OVR`` of ``logits`` for the samples in L and cross-entropy for the rest, (N,)."""
    return torch.where(hard.mask, lam * one_vs_rest(logits, ctx.y), ctx.fit(logits))
