"""Switching one-versus-the-rest adversarial training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robusteval.attacks._losses import margin_loss
from robusteval.training.objective import Loss, StepContext

from ._losses import one_vs_rest


@dataclass(frozen=True)
class SOVR:
    """Switching one-vs-the-rest loss on small logit margins (Kanai et al., ICML 2023, arXiv 2207.10283).

    With ``x'`` ascending cross-entropy and ``LM = max_{k != y} z_k(x') - z_y(x')``, the ``m`` percent of the batch
    with the largest LM form ``L``, the rest ``S``::

        loss = ( sum_S CE(z(x'), y) + lam * sum_L OVR(z(x'), y) ) / |B|
        OVR(z, y) = softplus(-z_y) + sum_{k != y} softplus(z_k)

    The division is by the batch size, not by the sizes of the sets. ``|L| = floor(m / 100 * |B|)``, for a smaller
    last batch as well. LM is taken from the training-mode logits of the loss itself and is a constant. Of equal LM,
    the sample with the smaller id goes to ``L``, so the order within a batch does not matter. m = 0 is `at`; m = 100
    with lam = 1 is adversarial training on OVR.

    Confirmed from the paper's abstracts: the switch to OVR for the samples with small logit margins, and CE for the
    rest. NOT confirmed, as no full text or official code could be read: ranking within the mini-batch on PGD-10
    examples, the form of the sum above, the rounding, use from the first epoch on, and the defaults m = 40 and
    lam = 0.4. Tune both on a validation split before comparing with published figures.
    """

    m: float = 40.0
    lam: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.m <= 100:
            raise ValueError(f"m = {self.m} is not a percentage of the batch; choose one from 0 to 100")
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ValueError(f"lam = {self.lam} cannot weight a loss; choose a finite number of at least 0")

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the switched loss of one batch; ``wrong_in_L`` is the share of L that the adversary fools."""
        logits = ctx.model(ctx.attack(ctx.cross_entropy))
        margins = margin_loss(logits.detach(), ctx.y)
        hard = self.hardest(margins, ctx.ids)
        values = torch.where(hard, self.lam * one_vs_rest(logits, ctx.y), ctx.cross_entropy(logits))
        wrong = float((margins[hard] > 0).float().mean()) if hard.any() else 0.0
        return Loss(values.mean(), logits, {"margin": -float(margins.mean()), "wrong_in_L": wrong})

    def hardest(self, margins: Tensor, ids: Tensor) -> Tensor:
        """Return the mask (N,) of the set L, for margin losses (N,) and distinct sample ids (N,)."""
        count = math.floor(self.m / 100 * len(margins) + 1e-9)
        by_id = ids.argsort()
        order = by_id[margins[by_id].argsort(descending=True, stable=True)]
        mask = torch.zeros_like(margins, dtype=torch.bool)
        mask[order[:count]] = True
        return mask
