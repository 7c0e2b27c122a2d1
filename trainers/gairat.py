"""Importance by how long a sample withstands the attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from robusteval.training.objective import Loss, StepContext

from ._checks import require_finite, require_fraction
from ._importance import normalised, spread


@dataclass(frozen=True)
class Gairat:
    """GAIRAT: samples weighted by how soon the attack fools them (Zhang et al., ICLR 2021, arXiv 2010.01736).

    With ``kappa`` the number of the attack's k iterates that are still classified correctly, start included and end
    not, ``loss = mean_B w CE(z(x'), y)`` with ``w = omega / mean_B omega``, a constant of mean 1, and ``form``

    - tanh: ``omega = (1 + tanh(Lambda + 5 (1 - 2 kappa / k))) / 2``
    - sigmoid: ``omega = sigmoid(Lambda + 5 (1 - 2 kappa / k))``
    - linear: ``omega = 1 - kappa / (k + 1)``

    Lambda is ``shift``. Before the fraction ``begin`` of the training all w are 1, which is `at`. All as in the
    official code, with its shift = -1 from epoch 60 of 120 on. ``kappa`` is not the first step that fools the model
    where the path is not monotone. Its robustness against PGD does not hold against stronger attacks, as the first
    author acknowledges.
    """

    form: Literal["tanh", "sigmoid", "linear"] = "tanh"
    shift: float = -1.0
    begin: float = 0.5

    def __post_init__(self) -> None:
        require_finite("shift", self.shift)
        require_fraction("begin", self.begin)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch; ``kappa`` is the mean share of iterates that are still correct."""
        right: list[Tensor] = []

        def watched(logits: Tensor) -> Tensor:
            right.append(logits.detach().argmax(1) == ctx.y)
            return ctx.cross_entropy(logits)

        logits = ctx.model(ctx.attack(watched))
        kappa = torch.stack(right).sum(0).to(logits.dtype)
        log_omega = self._log_omega(kappa, len(right))
        weights = torch.ones_like(kappa) if ctx.progress < self.begin else normalised(ctx, log_omega)
        metrics = {"kappa": float(ctx.gather(kappa).mean()) / len(right), **spread(ctx, weights)}
        return Loss((weights * ctx.fit(logits)).mean(), logits, metrics)

    def _log_omega(self, kappa: Tensor, steps: int) -> Tensor:
        """Return log omega; with (1 + tanh(a)) / 2 = sigmoid(2 a) it underflows nowhere."""
        if self.form == "linear":
            return torch.log1p(-kappa / (steps + 1))
        level = self.shift + 5 * (1 - 2 * kappa / steps)
        return F.logsigmoid(2 * level if self.form == "tanh" else level)
