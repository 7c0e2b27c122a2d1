"""Logit margins, clean and under attack."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusteval.analysis._points import Told, Values, nobody, walk
from robusteval.attacks._losses import margin_loss
from robusteval.datasets.base import Split
from robusteval.threat import ThreatModel

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Margins:
    """Margins ``z_y - max_{k != y} z_k`` of the samples of one split; all (N,), float32 on the CPU.

    Accuracy is decided by ``argmax == label``. Where the label shares the largest logit, argmax takes the first
    class; a tie that the label loses is stored as the largest negative normal float32, so that a margin is >= 0
    exactly if the sample is classified correctly.
    """

    ids: Tensor
    """(N,) int64"""
    labels: Tensor
    """(N,) int64"""
    clean: Tensor
    """Margin of the clean input, positive = correct."""
    adversarial: Tensor
    """Margin at the PGD point."""
    scaled: Tensor
    """``adversarial`` divided by the standard deviation over the classes of the logits there."""

    @property
    def right(self) -> Tensor:
        """(N,) bool: classified correctly without an attack."""
        return self.clean >= 0

    @property
    def held(self) -> Tensor:
        """(N,) bool: classified correctly both without an attack and at the PGD point."""
        return self.right & (self.adversarial >= 0)

    @property
    def clean_accuracy(self) -> float:
        """Fraction of the samples that are right."""
        return float(self.right.double().mean())

    @property
    def robust_accuracy(self) -> float:
        """Fraction of the samples that are right both clean and under PGD."""
        return float(self.held.double().mean())

    def hardest(self, m: float) -> Tensor:
        """(N,) bool: the set L, the floor(m / 100 * N) samples with the smallest adversarial margins.

        Of equal margins the sample with the smaller id comes first, as in the objective `sovr`.
        """
        by_id = self.ids.argsort()
        order = by_id[self.adversarial[by_id].argsort(stable=True)]
        mask = torch.zeros(len(self.ids), dtype=torch.bool)
        mask[order[: math.floor(m / 100 * len(self.ids) + 1e-9)]] = True
        return mask


def measure(
    model: nn.Module,
    split: Split,
    threat: ThreatModel,
    *,
    steps: int = 20,
    seed: int = 0,
    batch: int = 256,
    told: Told = nobody,
) -> Margins:
    """Return the margins of ``model`` (inputs in [0,1], any device) on ``split``, clean and under PGD.

    PGD ascends cross-entropy from one uniform start in ``steps`` steps of eps / 4, as training's validation does. A
    sample's draw depends only on (seed, id), and on the CPU its result does not depend on ``batch``. The model's
    flags are left as found.
    """
    return Margins(split.ids, split.labels, *walk(model, split, threat, _look, steps, seed, batch, told))


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """``z_y - max_{k != y} z_k``, a tie that argmax decides against ``y`` as ``-TINY``. (N, K), (N,) -> (N,)."""
    value = -margin_loss(logits, y)
    lost = (value == 0) & (logits.argmax(1) != y)
    return torch.where(lost, -TINY, value)


def scale_free(logits: Tensor, y: Tensor) -> Tensor:
    """Return the margin divided by the standard deviation of the sample's logits. (N, K), (N,) -> (N,).

    It does not change when all logits are multiplied by a positive number or shifted; 0 where they are all equal.
    """
    return -margin_loss(logits, y) / logits.std(1, correction=0).clamp_min(TINY)


def _look(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Values:
    with torch.no_grad():
        clean, attacked = model(x).float(), model(x_adv).float()
    return margin(clean, y), margin(attacked, y), scale_free(attacked, y)
