"""Adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.training.objective import Loss, StepContext


@dataclass(frozen=True)
class AT:
    """Adversarial training: cross-entropy on PGD examples only (Madry et al. 2018, arXiv 1706.06083)."""

    def __call__(self, ctx: StepContext) -> Loss:
        """``mean_B CE(z(x'), y)`` with ``x'`` ascending the same loss; clean inputs are not mixed in."""
        logits = ctx.model(ctx.attack(ctx.cross_entropy))
        return Loss(ctx.fit(logits).mean(), logits)
