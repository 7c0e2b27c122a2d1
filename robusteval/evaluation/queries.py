"""A budget of queries: how often, per sample, attacks may ask the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robusteval.attacks._losses import margin_loss
from robusteval.attacks.base import Attack, AttackResult
from robusteval.errors import RobustevalError
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel


class QueriesSpentError(RobustevalError):
    """An attack asked more than it may."""


class Meter(nn.Module):
    """The model as an attack on one sample sees it: each image is a query, and no more than ``allowed`` are answered.

    ``found`` (1, C, H, W) is the nearest misclassified query within ``threat`` so far: an attack that is cut off has
    found it, whether or not it knows. With ``steady`` it is the most clearly misclassified one, as of a randomised
    model's answers the nearest is the luckiest.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, allowed: int, steady: bool) -> None:
        super().__init__()
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.allowed, self.steady, self.asked = allowed, steady, 0
        self.found: Tensor | None = None
        self._worth = -torch.inf
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K); raise `QueriesSpentError` where that would be too many."""
        if self.asked + len(x) > self.allowed:
            raise QueriesSpentError(f"more than {self.allowed} queries were asked for.")
        self.asked += len(x)
        logits: Tensor = self.model(x)
        self._watch(x.detach().float(), logits.detach())
        return logits

    def _watch(self, x: Tensor, logits: Tensor) -> None:
        origin, y = self.x.expand(len(x), *self.x.shape[1:]), self.y.expand(len(x))
        hits = (logits.argmax(1) != y) & self.threat.contains(origin, x)
        worth = margin_loss(logits, y).double() if self.steady else -self.threat.distance(origin, x)
        worth = worth.masked_fill(~hits, -torch.inf)
        if len(x) and worth.max() > self._worth:
            self._worth, self.found = float(worth.max()), x[worth.argmax()][None].clone()


def rationed(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    rng: SampleRng,
    left: Sequence[int],
    steady: bool = False,
) -> tuple[AttackResult, list[int]]:
    """Attack each sample by itself with the queries ``left`` to it; return the result and how many are left then.

    ``steady`` is for randomised models (`Meter`).
    """
    results, remaining = [], []
    for i, allowed in enumerate(left):
        row = torch.tensor([i])
        meter = Meter(model, x[row], y[row], threat, allowed, steady)
        try:
            result = attack(meter, x[row], y[row], threat, rng.take(row))
        except QueriesSpentError:
            said = "its query budget ended it on some samples"
            result = AttackResult(x[row] if meter.found is None else meter.found, adaptations=(said,))
        results.append(result)
        remaining.append(allowed - meter.asked)
    adaptations = dict.fromkeys(text for result in results for text in result.adaptations)
    warnings = dict.fromkeys(text for result in results for text in result.warnings)
    candidates = torch.cat([result.candidates for result in results])
    return AttackResult(candidates, tuple(adaptations), tuple(warnings)), remaining
