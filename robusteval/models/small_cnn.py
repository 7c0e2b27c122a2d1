"""The small convolutional net of certified-robustness papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from robusteval.errors import UsageError
from robusteval.models._blocks import Width, he_init
from robusteval.models.base import Shape


@dataclass(frozen=True)
class SmallCNN:
    """Two strided 4x4 convolutions and two linear layers (Wong & Kolter, 2018, arXiv 1711.00851).

    ``width`` is the channels of the first convolution, the second has twice as many; ``hidden`` is the units of
    the hidden linear layer. State-dict keys are those of the published nets: 0, 2, 5, 7.
    """

    width: Width = 16
    hidden: Annotated[int, Field(ge=1, le=65536)] = 100

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        """Return the net for images (C, H, W); raise `UsageError` when H or W is below 4."""
        channels, height, width = shape
        if min(height, width) < 4:
            raise UsageError(f"small_cnn needs images of at least 4x4 pixels, not {height}x{width}.")
        features = 2 * self.width * (height // 4) * (width // 4)
        return he_init(
            nn.Sequential(
                nn.Conv2d(channels, self.width, 4, 2, 1),
                nn.ReLU(),
                nn.Conv2d(self.width, 2 * self.width, 4, 2, 1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(features, self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, num_classes),
            )
        )
