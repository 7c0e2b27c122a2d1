"""Adversarial training on the one-versus-the-rest loss."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.training.objective import Loss, StepContext

from ._losses import one_vs_rest


@dataclass(frozen=True)
class OVR:
    """One-vs-the-rest loss on all samples, the limit of SOVR without a switch (Kanai et al. 2023, arXiv 2207.10283).

    ``mean_B OVR(z(x'), y)`` with ``OVR(z, y) = softplus(-z_y) + sum_{k != y} softplus(z_k)``, summed over the classes.
    ``x'`` ascends cross-entropy, as in `sovr`, of which this is m = 100 with lam = 1. OVR is not invariant to a shift
    of the logits, and it has no label smoothing.
    """

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the OVR loss of one batch."""
        logits = ctx.model(ctx.attack(ctx.cross_entropy))
        return Loss(one_vs_rest(logits, ctx.y).mean(), logits)
