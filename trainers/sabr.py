"""Training on interval bounds of small boxes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robusteval.training.objective import StepContext

from ._checks import require_fraction, require_positive, require_steps
from ._ramped import Bounded, Ramped


@dataclass(frozen=True)
class SABR(Ramped):
    """SABR: interval bounds of a small ball around an adversarial input (Mueller et al. 2023, arXiv 2210.04871).

    ``mean_B CE(worst, y)``, worst over the ball of radius ``lam * eps`` around ``x'``, which ascends cross-entropy
    within ``(1 - lam) * eps`` of ``x``: the ball lies within eps. Unless lam is 1, which is `ibp` without a clean term,
    the loss is no upper bound of the adversarial one. The authors' shrinking of ReLU boxes is not done.

    Published lam: 0.4 and 0.6 on MNIST at 0.1 and 0.3, 0.1 (0.05 without shrinking) and 0.7 on CIFAR-10 at 2/255 and
    8/255. ``steps`` of half a radius each are the authors'.
    """

    lam: float = 0.4
    steps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("lam", self.lam)
        require_fraction("lam", self.lam)
        require_steps("steps", self.steps)

    def robust(self, ctx: StepContext, clean: Tensor, radius: float, reached: float) -> Bounded:
        """Return the loss, and the worst logits over the small balls."""
        away, centre = (1 - self.lam) * radius, ctx.x
        if away:
            centre = ctx.attack(ctx.cross_entropy, steps=self.steps, step_size=away / 2, radius=away)
        region = ctx.bounds(self.lam * radius, centre)
        return Bounded(ctx.fit(region.by_intervals), region.by_intervals, region)
