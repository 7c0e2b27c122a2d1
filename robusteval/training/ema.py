"""An exponential moving average of a model."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move ``average`` towards ``model`` after optimizer step ``step`` (from 0).

    The decay warms up as ``min(decay, (1 + step) / (10 + step))``. BatchNorm's running statistics are averaged like
    the weights, as SEAT does (Wang & Wang 2022, ICLR); integer buffers are copied. Nothing is aliased.
    """
    rate = 1 - min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, rate)
        else:
            mean.copy_(value)
