"""Training on clean accuracy and on how far the adversary moves the prediction."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.training.objective import Loss, StepContext

from ._checks import require_weight
from ._trades import compared


@dataclass(frozen=True)
class Trades:
    """TRADES: clean cross-entropy plus the divergence of predictions (Zhang et al., ICML 2019, arXiv 1901.08573).

    ``loss = mean_B [ CE(z(x), y) + beta * KL( p(x) || p(x') ) ]``, the KL summed over the classes. ``x'`` ascends
    the same KL, always from ``x + N(0, 0.001^2)``: the gradient is zero at ``x``. Nothing is detached in the loss:
    gradients flow into p(x) and p(x'). Training accuracy is that on ``x'``.

    beta = 6 is the official default. The official recipe has steps of 0.007 in a ball of 0.031 and passes ``x``
    twice in training mode (BatchNorm statistics two thirds clean); here it passes once.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        require_weight("beta", self.beta)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch; ``divergence`` is the mean KL."""
        both = compared(ctx)
        values = ctx.fit(both.clean) + self.beta * both.divergence
        return Loss(values.mean(), both.logits, both.metrics)
