"""Pre-activation ResNet-18 for small images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from robusteval.models._blocks import PreActBlock, Width, conv3x3, he_init, stage
from robusteval.models.base import Shape


class _Network(nn.Module):
    def __init__(self, channels: int, num_classes: int, spec: PreActResNet18) -> None:
        super().__init__()
        width = spec.width
        block = partial(PreActBlock, shared=spec.shared_shortcut)
        self.conv1 = conv3x3(channels, width)
        self.layer1 = stage(block, width, width, 2, 1)
        self.layer2 = stage(block, width, 2 * width, 2, 2)
        self.layer3 = stage(block, 2 * width, 4 * width, 2, 2)
        self.layer4 = stage(block, 4 * width, 8 * width, 2, 2)
        self.bn = nn.BatchNorm2d(8 * width) if spec.final_norm else None
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            out = self.relu(self.bn(out))
        logits: Tensor = self.linear(self.pool(out).flatten(1))
        return logits


@dataclass(frozen=True)
class PreActResNet18:
    """Pre-activation residual net of 18 layers with a 3x3 stem (He et al., 2016, arXiv 1603.05027).

    ``width`` is the channels of the first stage, doubled in each of the three others. ``final_norm`` puts BatchNorm
    and ReLU before pooling, ``shared_shortcut`` lets projections start from the activated features; the paper
    has both. RobustBench's plain entries (Wong2020Fast, Andriushchenko2020Understanding) have neither: their
    weights fit only with both switched off.
    """

    width: Width = 64
    final_norm: bool = True
    shared_shortcut: bool = True

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        """Return the net for images (C, H, W) of any size; three stages halve the resolution."""
        return he_init(_Network(shape[0], num_classes, self))
