"""Wide residual nets for small images."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from robusteval.errors import UsageError
from robusteval.models._blocks import conv1x1, conv3x3, he_init, stage
from robusteval.models.base import Shape


class _Block(nn.Module):
    """Pre-activation block whose projection starts from the activated features."""

    def __init__(self, channels: int, out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, out, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        # Named as in the TRADES code, whose weights many published defences share.
        self.convShortcut = conv1x1(channels, out, stride) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        skipped = x if self.convShortcut is None else self.convShortcut(active)
        branch: Tensor = self.conv2(self.dropout(self.relu(self.bn2(self.conv1(active)))))
        return skipped + branch


class _Network(nn.Module):
    def __init__(self, channels: int, num_classes: int, spec: WideResNet) -> None:
        super().__init__()
        count = (spec.depth - 4) // 6
        block = partial(_Block, dropout=spec.dropout)
        widths = [16, 16 * spec.width, 32 * spec.width, 64 * spec.width]
        stages = [stage(block, widths[i], widths[i + 1], count, 1 if i == 0 else 2) for i in range(3)]
        self.conv1 = conv3x3(channels, widths[0])
        self.block1, self.block2, self.block3 = (nn.Sequential(OrderedDict(layer=blocks)) for blocks in stages)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = self.pool(self.relu(self.bn1(out)))
        logits: Tensor = self.fc(out.flatten(1))
        return logits


@dataclass(frozen=True)
class WideResNet:
    """Wide residual net WRN-depth-width (Zagoruyko & Komodakis, 2016, arXiv 1605.07146).

    ``depth`` is 6n+4 for n blocks in each of three stages, which have 16, 32 and 64 times ``width`` channels;
    ``dropout`` is the probability of dropping a feature between the convolutions of a block. State-dict keys are
    those of TRADES and RobustBench.
    """

    depth: Annotated[int, Field(ge=10, le=1000)] = 28
    width: Annotated[int, Field(ge=1, le=64)] = 10
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            near = max(10, 6 * round((self.depth - 4) / 6) + 4)
            raise UsageError(f"wide_resnet: depth = {self.depth} is not 6n+4; the nearest is {near}.")

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        """Return the net for images (C, H, W) of any size; two stages halve the resolution."""
        return he_init(_Network(shape[0], num_classes, self))
