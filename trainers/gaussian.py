"""Training on Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robusteval.training.objective import Loss, StepContext

from ._checks import require_noise, require_steps
from ._noise import mean_fit, noises, noisy_logits


@dataclass(frozen=True)
class Gaussian:
    """Gaussian augmentation, for randomised smoothing (Cohen, Rosenfeld & Kolter 2019, arXiv 1902.02918).

    ``mean_B CE(z(x + N(0, sigma^2)), y)``, over ``samples`` draws for each input. Noise is in pixel units of [0, 1],
    before the network's own normalisation, and is not clipped, as a certificate by smoothing needs. The threat model is
    used by validation alone. sigma is one of 0.12, 0.25, 0.5 and 1 in the paper, with one draw.
    """

    suite: ClassVar[str] = "smoothing"

    sigma: float = 0.25
    samples: int = 1

    def __post_init__(self) -> None:
        require_noise("sigma", self.sigma)
        require_steps("samples", self.samples)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch; its training accuracy is that on the first draw."""
        logits = noisy_logits(ctx, ctx.x, noises(ctx, self.sigma, self.samples))
        return Loss(mean_fit(ctx, logits), logits[0])
