"""Training on an adversarial loss and on interval bounds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robusteval.training.objective import StepContext

from ._checks import require_fraction, require_positive
from ._ramped import Bounded, Ramped


@dataclass(frozen=True)
class MTLIBP(Ramped):
    """MTL-IBP: a mean of the adversarial and the interval-bound loss (De Palma et al. 2024, arXiv 2305.13991).

    ``loss = mean_B [ (1 - alpha) CE(z(x'), y) + alpha CE(worst, y) ]``: ``x'`` ascends cross-entropy within
    ``attack_scale`` times the radius, worst logits are those of `ibp`. alpha 1 is `ibp` without a clean term, alpha 0
    adversarial training. BatchNorm normalises ``x'`` by its own batch and bounds by the clean one, where the
    authors' bounds take the statistics of ``x'``; both passes move the running ones.

    Published alpha: 0.01 and 0.08 on MNIST at 0.1 and 0.3, 0.004 (with attack_scale 2.1) and 0.5 on CIFAR-10 at 2/255
    and 8/255.
    """

    alpha: float = 0.5
    attack_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("alpha", self.alpha)
        require_positive("attack_scale", self.attack_scale)

    def robust(self, ctx: StepContext, clean: Tensor, radius: float, reached: float) -> Bounded:
        """Return the loss, and the logits of the adversarial inputs."""
        logits = ctx.model(ctx.attack(ctx.cross_entropy, radius=self.attack_scale * radius))
        region = ctx.bounds(radius)
        values = (1 - self.alpha) * ctx.fit(logits) + self.alpha * ctx.fit(region.by_intervals)
        return Bounded(values, logits, region)
