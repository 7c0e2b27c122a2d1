"""SOVR in place of the clean term of TRADES."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.training.objective import Loss, StepContext

from ._checks import require_percentage, require_weight
from ._hard import hardest, switched
from ._trades import compared


@dataclass(frozen=True)
class TSOVR:
    """SOVR with TRADES, read as TRADES with a switched clean term (Kanai et al., ICML 2023, arXiv 2207.10283).

    With ``x'`` as in `trades` and ``L`` the ``m`` percent of the batch with the smallest logit margins on ``x'``::

        loss = ( sum_S CE(z(x), y) + lam * sum_L OVR(z(x), y) ) / |B| + beta * mean_B KL( p(x) || p(x') )

    ``L`` is a constant; gradients flow into p(x) and p(x'). m = 0 is `trades`.

    NOT confirmed: the paper combines SOVR with TRADES, but how could not be checked. This reading is the one that
    reduces to TRADES; `tsovr_adv` is the other. m and lam are the unconfirmed defaults of `sovr`, beta that of
    `trades`.
    """

    m: float = 40.0
    lam: float = 0.4
    beta: float = 6.0

    def __post_init__(self) -> None:
        require_percentage(self.m)
        require_weight("lam", self.lam)
        require_weight("beta", self.beta)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch; ``wrong_in_L`` is the share of L that the adversary fools."""
        both = compared(ctx)
        hard = hardest(ctx, both.logits, self.m)
        values = switched(ctx, both.clean, hard, self.lam) + self.beta * both.divergence
        return Loss(values.mean(), both.logits, {**hard.metrics, **both.metrics})
