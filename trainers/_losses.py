"""Losses that objectives share. All map logits (N, K) and labels (N,) to (N,)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def one_vs_rest(logits: Tensor, y: Tensor) -> Tensor:
    """``softplus(-z_y) + sum_{k != y} softplus(z_k)``: binary cross-entropy summed over the classes."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return F.softplus(torch.where(own, -logits, logits)).sum(1)


def soft_margin(logits: Tensor, y: Tensor) -> Tensor:
    """``logsumexp_{k != y} z_k - z_y``: negative iff ``p_y > 1/2``."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.logsumexp(1) - logits.gather(1, y[:, None]).squeeze(1)


def log_complement(logits: Tensor, y: Tensor) -> Tensor:
    """``log(1 - p_y)``, exact also where ``p_y`` rounds to 1."""
    return logits.log_softmax(1).scatter(1, y[:, None], -torch.inf).logsumexp(1)
