"""Losses that objectives share. All map logits (N, K) and labels (N,) to (N,)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def one_vs_rest(logits: Tensor, y: Tensor) -> Tensor:
    """``softplus(-z_y) + sum_{k != y} softplus(z_k)``: binary cross-entropy summed over the classes."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return F.softplus(torch.where(own, -logits, logits)).sum(1)
