"""Weights to begin with where a network is trained on interval bounds."""

from __future__ import annotations

import math

import torch
from torch import nn


def ibp_init(model: nn.Module, rng: torch.Generator) -> None:
    """Draw every weight tensor but the last from ``N(0, 2 pi / fan_in^2)`` (Shi et al. 2021, arXiv 2103.17268).

    Interval bounds then neither grow nor shrink from layer to layer, where usual initialisations let them explode.
    Only tensors of two or more dimensions are drawn; as in the authors' code the last one, of the logits, stays, as do
    biases. ``model`` is on the CPU.
    """
    *hidden, _ = [weight for weight in model.parameters() if weight.dim() > 1]
    with torch.no_grad():
        for weight in hidden:
            weight.normal_(0.0, math.sqrt(2 * math.pi) / weight[0].numel(), generator=rng)
