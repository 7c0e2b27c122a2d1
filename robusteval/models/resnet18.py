"""ResNet-18 for small images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robusteval.models._blocks import BasicBlock, Width, conv3x3, he_init, stage
from robusteval.models.base import Shape


class _Network(nn.Module):
    def __init__(self, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = stage(BasicBlock, width, width, 2, 1)
        self.layer2 = stage(BasicBlock, width, 2 * width, 2, 2)
        self.layer3 = stage(BasicBlock, 2 * width, 4 * width, 2, 2)
        self.layer4 = stage(BasicBlock, 4 * width, 8 * width, 2, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(self.pool(out).flatten(1))
        return logits


@dataclass(frozen=True)
class ResNet18:
    """Residual net of 18 layers with a 3x3 stem and no max pooling (He et al., 2015, arXiv 1512.03385).

    ``width`` is the channels of the first stage, doubled in each of the three others. State-dict keys are those
    customary for CIFAR (and in RobustBench): conv1, bn1, layer1..4, linear.
    """

    width: Width = 64

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        """Return the net for images (C, H, W) of any size; three stages halve the resolution."""
        return he_init(_Network(shape[0], num_classes, self.width))
