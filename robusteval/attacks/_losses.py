"""Losses on logits that attacks ascend. All map logits (N, K) and labels (N,) to (N,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """``-log softmax(z)_y``."""
    return F.cross_entropy(logits, y, reduction="none")


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """``log((1 - p_y) / p_y) = log sum_{k != y} exp(z_k) - z_y``, with p the softmax.

    It grows with the cross-entropy, which is ``log(1 + exp(log_odds))``, so a method that uses only directions
    of gradients and comparisons of values does the same on both; but it does not underflow where p_y is 1.
    """
    return _others(logits, y).logsumexp(1) - _pick(logits, y)


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """``max_{k != y} z_k - z_y``: positive iff misclassified (ties aside); minus the logit margin."""
    return _others(logits, y).max(1).values - _pick(logits, y)


def targeted_margin_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """``z_t - z_y``."""
    return _pick(logits, target) - _pick(logits, y)


def dlr_loss(logits: Tensor, y: Tensor) -> Tensor:
    """``(max_{k != y} z_k - z_y) / (z_(1) - z_(3))``, z_(i) the i-th largest of at least 3 logits.

    The difference of logits ratio of Croce & Hein 2020 (arXiv 2003.01690), which scaling the logits leaves as it is.
    """
    top = logits.topk(3).values
    return margin_loss(logits, y) / _divisor(top[:, 0] - top[:, 2])


def targeted_dlr_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)`` for at least 4 classes (Croce & Hein 2020)."""
    top = logits.topk(4).values
    return targeted_margin_loss(logits, y, target) / _divisor(top[:, 0] - (top[:, 2] + top[:, 3]) / 2)


def _pick(logits: Tensor, label: Tensor) -> Tensor:
    return logits.gather(1, label[:, None]).squeeze(1)


def _others(logits: Tensor, y: Tensor) -> Tensor:
    """Return the logits with the label's own at minus infinity."""
    return logits.scatter(1, y[:, None], -torch.inf)


def _divisor(spread: Tensor) -> Tensor:
    """Keep equal logits from a division by zero; the smallest float there is, as logits may have any scale."""
    return spread.clamp_min(torch.finfo(spread.dtype).tiny)


def targeted(name: str, targets: int, classes: int) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], list[str]]:
    """Return the loss called ``name`` towards a class, and what has to change for a model of ``classes`` classes."""
    adaptations = []
    if name == "dlr" and classes < 4:
        name = "margin"
        adaptations.append(f"margin as loss, as targeted DLR is undefined for {classes} classes")
    if targets > classes - 1:
        adaptations.append(f"{classes - 1} targets instead of {targets}")
    return TARGETED[name], adaptations


TARGETED = {"dlr": targeted_dlr_loss, "margin": targeted_margin_loss}
LOSSES = {"ce": log_odds, "margin": margin_loss}
"""What an untargeted attack called with ``loss`` ascends; the log-odds for "ce", whose directions are the same."""
