"""Training that asks more of misclassified samples."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.training.objective import Loss, StepContext

from ._checks import require_fraction, require_weight
from ._mart import OFFSET, terms


@dataclass(frozen=True)
class Mart:
    """MART: boosted cross-entropy and misclassification-aware divergence (Wang et al., ICLR 2020).

    With ``x'`` ascending cross-entropy::

        loss = mean_B [ BCE(x') + beta * KL( p(x) || p(x') ) * (1 - p_y(x)) ]
        BCE(x') = CE(z(x'), y) - log( 1 - max_{k != y} p_k(x') + offset )

    Nothing is detached: gradients flow into the weight ``1 - p_y(x)`` and into p(x) as well. All of it is computed
    from log-probabilities. Label smoothing, where a run has it, acts on the CE in BCE.

    beta = 5 is the official default for ResNet-18 (6 for WRN-34-10). The paper has offset = 0. The official code has
    1e-4, which caps the second term of BCE at 9.21 and fades its gradient where the model is surely wrong; so it is
    here. It also starts at ``x + N(0, 0.001^2)``: set adversary.start to "gaussian" for that.
    """

    beta: float = 5.0
    offset: float = OFFSET

    def __post_init__(self) -> None:
        require_weight("beta", self.beta)
        require_fraction("offset", self.offset)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch; ``doubted`` is the mean of the term that beta multiplies."""
        found = terms(ctx, self.offset)
        value = (found.boosted + self.beta * found.doubted).mean()
        return Loss(value, found.logits, {"doubted": float(found.doubted.detach().mean())})
