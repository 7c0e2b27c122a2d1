"""The seven-layer convolutional net of certified training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from robusteval.models._blocks import Width
from robusteval.models.base import Shape


def _conv(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]


@dataclass(frozen=True)
class CNN7:
    """Five 3x3 convolutions and two linear layers with BatchNorm (Shi et al., 2021, arXiv 2103.17268).

    The net called "large" by Gowal et al. (2018, arXiv 1810.12715), with a BatchNorm after every layer but the
    last. ``width`` is the channels before the one stride-2 convolution, twice that after it; ``hidden`` is the
    units of the hidden linear layer.
    """

    width: Width = 64
    hidden: Annotated[int, Field(ge=1, le=65536)] = 512

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        """Return the net for images (C, H, W) of any size."""
        channels, height, width = shape
        narrow, wide = self.width, 2 * self.width
        features = wide * ((height + 1) // 2) * ((width + 1) // 2)
        return nn.Sequential(
            *_conv(channels, narrow),
            *_conv(narrow, narrow),
            *_conv(narrow, wide, stride=2),
            *_conv(wide, wide),
            *_conv(wide, wide),
            nn.Flatten(),
            nn.Linear(features, self.hidden),
            nn.BatchNorm1d(self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, num_classes),
        )
