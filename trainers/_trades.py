"""The two predictions that TRADES compares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from robusteval.training.objective import StepContext


@dataclass(frozen=True)
class Comparison:
    """Logits (N, K) of the clean and of the perturbed inputs, and ``KL( p(x) || p(x') )`` (N,)."""

    clean: Tensor
    logits: Tensor
    divergence: Tensor

    @property
    def metrics(self) -> dict[str, float]:
        """Figures worth logging."""
        return {"divergence": float(self.divergence.detach().mean())}


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """``KL( softmax(logits) || softmax(other) )``, summed over the classes: (N, K), (N, K) -> (N,).

    Gradients flow into both. Probabilities stay logarithms, so that one that underflows makes nothing NaN.
    """
    return F.kl_div(other.log_softmax(1), logits.log_softmax(1), reduction="none", log_target=True).sum(1)


def compared(ctx: StepContext) -> Comparison:
    """Find ``x'`` that ascends the divergence, and return both predictions in training mode.

    The search starts at ``x`` plus Gaussian noise whatever the user's start, as the gradient is zero at ``x``.
    """
    fixed = ctx.attack.logits(ctx.x)
    x_adv = ctx.attack(lambda logits: divergence(fixed, logits), start="gaussian")
    clean, logits = ctx.model(ctx.x), ctx.model(x_adv)
    return Comparison(clean, logits, divergence(clean, logits))
