"""Importance by the margin between probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from robusteval.attacks._losses import margin_loss
from robusteval.training.objective import Loss, StepContext

from ._checks import require_finite, require_fraction, require_weight
from ._importance import normalised, spread
from ._mart import terms
from ._trades import compared

SLOPE = {"at": 10.0, "trades": 2.0, "mart": 10.0}
BIAS = {"at": -0.5, "trades": 0.0, "mart": -0.5}

Weighted = tuple[Tensor, Tensor, Tensor]
"""Loss of each sample (N,), logits of the perturbed inputs (N, K), weights (N,)."""


@dataclass(frozen=True)
class Mail:
    """MAIL: samples weighted by their probabilistic margins (Q. Wang et al., NeurIPS 2021, arXiv 2106.07904).

    With ``PM = max_{k != y} p_k(x') - p_y(x')`` and ``w = 3 sigmoid(slope * (PM + bias))``, both constants, ``form`` is

    - at: ``mean_B w CE(z(x'), y)``; slope 10, bias -0.5
    - trades: ``mean_B [ CE(z(x), y) + beta * w KL( p(x) || p(x') ) ]``; slope 2, bias 0, ``x'`` ascends the KL
    - mart: ``mean_B [ w BCE(x') + beta * KL( p(x) || p(x') ) * (1 - p_y(x)) ]``; the slope and bias of at, see `mart`

    Before the fraction ``begin`` of the training all w are 1, so it is `at`, `trades` or `mart`; officially 76 of 120
    epochs. PM has the sign of the official code; the paper's is the opposite.

    The factor 3 and the slopes of at and trades are the official code's; beta = 5 is its default. NOT confirmed: the
    slope and bias of mart, and whether the paper divides the weights by their mean over the batch, which
    ``normalise`` does instead of the factor 3. Say which form a result is of; published ones often do not.
    """

    form: Literal["at", "trades", "mart"] = "at"
    slope: float | None = None
    bias: float | None = None
    beta: float = 5.0
    begin: float = 76 / 120
    normalise: bool = False

    def __post_init__(self) -> None:
        slope = SLOPE[self.form] if self.slope is None else self.slope
        bias = BIAS[self.form] if self.bias is None else self.bias
        require_finite("slope", slope)
        require_finite("bias", bias)
        require_weight("beta", self.beta)
        require_fraction("begin", self.begin)
        # The record of a run is to hold the numbers, not that they were the defaults of their day.
        object.__setattr__(self, "slope", slope)
        object.__setattr__(self, "bias", bias)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch, and the mean and the spread of the weights."""
        values, logits, weights = {"at": self._at, "trades": self._trades, "mart": self._mart}[self.form](ctx)
        return Loss(values.mean(), logits, spread(ctx, weights))

    def _at(self, ctx: StepContext) -> Weighted:
        logits = ctx.model(ctx.attack(ctx.cross_entropy))
        weights = self._weights(ctx, logits)
        return weights * ctx.fit(logits), logits, weights

    def _trades(self, ctx: StepContext) -> Weighted:
        both = compared(ctx)
        weights = self._weights(ctx, both.logits)
        return ctx.fit(both.clean) + self.beta * (weights * both.divergence), both.logits, weights

    def _mart(self, ctx: StepContext) -> Weighted:
        found = terms(ctx)
        weights = self._weights(ctx, found.logits)
        return weights * found.boosted + self.beta * found.doubted, found.logits, weights

    def _weights(self, ctx: StepContext, logits: Tensor) -> Tensor:
        if ctx.progress < self.begin:
            return torch.ones_like(logits[:, 0])
        assert self.slope is not None
        assert self.bias is not None
        margins = margin_loss(logits.detach().softmax(1), ctx.y)
        level = self.slope * (margins + self.bias)
        return normalised(ctx, F.logsigmoid(level)) if self.normalise else 3 * level.sigmoid()
