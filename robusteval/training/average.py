"""Averages of a model's weights: exponential and uniform."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from robusteval.training.config import Average


def after_step(average: nn.Module, model: nn.Module, settings: Average, step: int, steps: int) -> None:
    """Move an exponential ``average`` towards ``model`` after optimizer step ``step`` (from 0) of ``steps``."""
    if settings.name == "ema":
        since = step - settings.start * steps
        decay = min(settings.decay, (1 + since) / (10 + since)) if since >= 0 else 0.0
        _move(average, model, 1 - decay, settings)


def after_epoch(average: nn.Module, model: nn.Module, settings: Average, epoch: int, epochs: int) -> None:
    """Move a uniform ``average`` to include ``model`` at the end of ``epoch`` (from 0) of ``epochs``."""
    if settings.name == "swa":
        before = sum(1 for earlier in range(epoch) if (earlier + 1) / epochs > settings.start)
        _move(average, model, 1 / (1 + before), settings)


@torch.no_grad()
def _move(average: nn.Module, model: nn.Module, rate: float, settings: Average) -> None:
    """``average += rate * (model - average)``; integer buffers are copied, nothing is aliased."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, rate)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        if kept.is_floating_point() and settings.buffers == "average":
            kept.lerp_(buffer, rate)
        else:
            kept.copy_(buffer)


def recompute(average: nn.Module, images: Iterable[Tensor]) -> None:
    """Replace BatchNorm's running statistics by their means over ``images``, batches (N, C, H, W)."""
    update_bn(images, average)
