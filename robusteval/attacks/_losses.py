"""Losses on logits that attacks ascend. All map logits (N, K) and labels (N,) to (N,)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """``-log softmax(z)_y``."""
    return F.cross_entropy(logits, y, reduction="none")


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """``max_{k != y} z_k - z_y``: positive iff misclassified (ties aside); minus the logit margin."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.max(1).values - own


LOSSES = {"ce": cross_entropy, "margin": margin_loss}
