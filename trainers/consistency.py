"""Training for predictions that agree under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robusteval.training.objective import Loss, StepContext

from ._checks import require_noise, require_steps, require_weight
from ._noise import mean_fit, noises, noisy_logits


@dataclass(frozen=True)
class Consistency:
    """Consistency: noisy predictions drawn to their mean (Jeong & Shin 2020, arXiv 2006.04062).

    With ``samples`` draws ``n_i`` from ``N(0, sigma^2)``, ``p_i = p(x + n_i)`` and their mean ``q``::

        loss = mean_B [ mean_i CE(z(x + n_i), y) + lam * mean_i KL( q || p_i ) + eta * H(q) ]

    Gradients flow everywhere. Noise is in pixel units, before normalisation, and is not clipped. lam = 0 and eta = 0 is
    `gaussian`. Published for CIFAR-10: two draws, eta 0.5, lam 20 at sigma 0.25 and 10 at 0.5 and 1.
    """

    suite: ClassVar[str] = "smoothing"

    sigma: float = 0.25
    samples: int = 2
    lam: float = 20.0
    eta: float = 0.5

    def __post_init__(self) -> None:
        require_noise("sigma", self.sigma)
        require_steps("samples", self.samples)
        require_weight("lam", self.lam)
        require_weight("eta", self.eta)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch, the mean divergence and the mean entropy of the means, in nats."""
        logits = noisy_logits(ctx, ctx.x, noises(ctx, self.sigma, self.samples))
        log_p = logits.log_softmax(2)
        log_q = log_p.logsumexp(0) - log_p.new_tensor(len(log_p)).log()
        divergence = (log_q.exp() * (log_q - log_p)).sum(2).mean()
        entropy = -(log_q.exp() * log_q).sum(1).mean()
        value = mean_fit(ctx, logits) + self.lam * divergence + self.eta * entropy
        return Loss(value, logits[0], {"divergence": float(divergence.detach()), "entropy": float(entropy.detach())})
