"""Adversarial training on cross-entropy with more weight on small margins."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robusteval.training.objective import Loss, StepContext

from ._checks import require_percentage, require_weight
from ._hard import hardest


@dataclass(frozen=True)
class WCE:
    """Weighted cross-entropy on SOVR's choice of samples: its control (after Kanai et al. 2023, arXiv 2207.10283).

    With the sets of `sovr`, the ``m`` percent of the batch with the smallest logit margins on ``x'`` being ``L``::

        loss = ( sum_S CE(z(x'), y) + lam * sum_L CE(z(x'), y) ) / |B|

    Set and weight are constants, and weights are not normalised. lam = 1 is `at`.

    NOT confirmed: the paper compares OVR with weighted cross-entropy; that it is compared on this selection, and the
    defaults (m as in `sovr`, lam = 2), are our choice.
    """

    m: float = 40.0
    lam: float = 2.0

    def __post_init__(self) -> None:
        require_percentage(self.m)
        require_weight("lam", self.lam)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the weighted loss of one batch; ``wrong_in_L`` is the share of L that the adversary fools."""
        logits = ctx.model(ctx.attack(ctx.cross_entropy))
        hard = hardest(ctx, logits, self.m)
        values = ctx.fit(logits)
        return Loss(torch.where(hard.mask, self.lam * values, values).mean(), logits, hard.metrics)
