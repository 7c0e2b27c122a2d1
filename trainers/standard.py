"""Training without an adversary."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.training.objective import Loss, StepContext


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on clean inputs: no adversary, the baseline every robust model is compared with."""

    def __call__(self, ctx: StepContext) -> Loss:
        """``mean_B CE(z(x), y)``."""
        logits = ctx.model(ctx.x)
        return Loss(ctx.fit(logits).mean(), logits)
