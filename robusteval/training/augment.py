"""Random crops and flips, one draw per sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(x: Tensor, pad: int, flip: bool, rng: torch.Generator) -> Tensor:
    """Shift each image of ``x`` (N, C, H, W) by up to ``pad`` pixels over black, and mirror half of them."""
    if pad:
        x = _crop(F.pad(x, (pad, pad, pad, pad)), pad, rng)
    if flip:
        mirrored = torch.rand(len(x), generator=rng).to(x.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    return x


def _crop(padded: Tensor, pad: int, rng: torch.Generator) -> Tensor:
    count, channels, height, width = padded.shape
    offsets = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=rng)
    rows = (offsets[0] + torch.arange(height - 2 * pad)).to(padded.device)
    columns = (offsets[1] + torch.arange(width - 2 * pad)).to(padded.device)
    sample = torch.arange(count, device=padded.device)[:, None, None, None]
    channel = torch.arange(channels, device=padded.device)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
