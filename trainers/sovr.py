"""Switching one-versus-the-rest adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.training.objective import Loss, StepContext

from ._checks import require_percentage, require_weight
from ._hard import hardest, switched


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
    with lam = 1 is `ovr`.

    Confirmed from the paper's abstracts: the switch to OVR for the samples with small logit margins, and CE for the
    rest. NOT confirmed, as no full text or official code could be read: ranking within the mini-batch on PGD-10
    examples, the form of the sum above, the rounding, use from the first epoch on, and the defaults m = 40 and
    lam = 0.4. Tune both on a validation split before comparing with published figures.
    """

    m: float = 40.0
    lam: float = 0.4

    def __post_init__(self) -> None:
        require_percentage(self.m)
        require_weight("lam", self.lam)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the switched loss of one batch; ``wrong_in_L`` is the share of L that the adversary fools."""
        logits = ctx.model(ctx.attack(ctx.cross_entropy))
        hard = hardest(ctx, logits, self.m)
        return Loss(switched(ctx, logits, hard, self.lam).mean(), logits, hard.metrics)
