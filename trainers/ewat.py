"""Importance by how uncertain the prediction is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robusteval.training.objective import Loss, StepContext

from ._importance import spread


@dataclass(frozen=True)
class Ewat:
    """EWAT: samples weighted by the entropy of their adversarial predictions (Kim et al., ICML 2021 AML workshop).

    With ``H = -sum_k p_k(x') log p_k(x')``, ``loss = mean_B w CE(z(x'), y)`` with the constant
    ``w = omega / mean_B omega`` of mean 1, and ``form``

    - additive: ``omega = 1 + H / mean_B H``
    - absolute: ``omega = 1 + H / log K``
    - proportional: ``omega = H``

    If no prediction in the batch is uncertain at all, every w is 1.

    Confirmed from the abstracts: the loss of an adversarial example is weighted by the entropy of its prediction.
    NOT confirmed: the form, as no full text or official code could be read. The default is the one whose effect fits
    the method's published robustness, near that of `at`; dividing by the mean keeps the loss on the scale of `at`.
    """

    form: Literal["additive", "absolute", "proportional"] = "additive"

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch, the mean entropy in nats and the spread of the weights."""
        logits = ctx.model(ctx.attack(ctx.cross_entropy))
        log_p = logits.detach().log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1)
        mean = ctx.gather(entropy).mean()
        weights = self._weights(entropy, mean, logits.shape[1])
        metrics = {"entropy": float(mean), **spread(ctx, weights)}
        return Loss((weights * ctx.fit(logits)).mean(), logits, metrics)

    def _weights(self, entropy: Tensor, mean: Tensor, classes: int) -> Tensor:
        """Return w (N,) from the entropies (N,) and their ``mean`` () over the whole batch."""
        if self.form == "absolute":
            return (1 + entropy / math.log(classes)) / (1 + mean / math.log(classes))
        relative = torch.where(mean > 0, entropy / mean, 1.0)
        return (1 + relative) / 2 if self.form == "additive" else relative
