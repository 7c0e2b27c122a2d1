"""Adversarial training with one projected step."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.training.objective import Loss, StepContext

from ._checks import require_positive


@dataclass(frozen=True)
class FGSMRS:
    """FGSM-RS, or fast AT: one step from a random start (Wong, Rice & Kolter, ICLR 2020, arXiv 2001.03994).

    ``mean_B CE(z(x'), y)`` with ``x'`` one steepest-ascent step of length ``alpha * eps`` on cross-entropy from a
    uniform start in the ball, projected back. Start and step are the method's, whatever the adversary's settings.
    alpha = 1.25 is the official 10/255 for 8/255. The official code attacks with BatchNorm in train mode
    (adversary.bn_mode). Watch for catastrophic overfitting: PGD accuracy falls to 0 within an epoch.
    """

    alpha: float = 1.25

    def __post_init__(self) -> None:
        require_positive("alpha", self.alpha)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch."""
        size = self.alpha * ctx.threat.radius
        logits = ctx.model(ctx.attack(ctx.cross_entropy, start="uniform", steps=1, step_size=size))
        return Loss(ctx.fit(logits).mean(), logits)
