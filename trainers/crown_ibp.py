"""Training on linear bounds that become interval bounds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robusteval.training.objective import StepContext

from ._checks import require_fraction
from ._ramped import Bounded, Ramped, between


@dataclass(frozen=True)
class CrownIBP(Ramped):
    """CROWN-IBP: interval bounds inside, one linear pass back for the margins (Zhang et al. 2020, arXiv 1906.06316).

    ``loss = mean_B [ kappa CE(z(x), y) + (1 - kappa) CE(beta CROWN-IBP + (1 - beta) IBP, y) ]`` on worst logits as in
    `ibp`. kappa and beta go from their start to their end as the ball grows: it begins with the tighter bounds and, by
    default, ends with the ones that are easier to train on.

    kappa from 1 to 1/2 and beta from 1 to 0 are the defaults of the authors' code.
    """

    kappa_start: float = 1.0
    kappa_end: float = 0.5
    beta_start: float = 1.0
    beta_end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kappa_start", "kappa_end", "beta_start", "beta_end"):
            require_fraction(name, getattr(self, name))

    def robust(self, ctx: StepContext, clean: Tensor, radius: float, reached: float) -> Bounded:
        """Return the loss, and the mixed worst logits."""
        kappa = between(self.kappa_start, self.kappa_end, reached)
        beta = between(self.beta_start, self.beta_end, reached)
        region = ctx.bounds(radius)
        worst = region.by_intervals
        if beta:
            worst = beta * region.by_planes + (1 - beta) * worst
        return Bounded(kappa * ctx.fit(clean) + (1 - kappa) * ctx.fit(worst), worst, region)
