"""Residual blocks and initialisation that several architectures share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

# Bounded, because a model's config.json may come from a stranger.
Width = Annotated[int, Field(ge=1, le=4096)]


def conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the image size at stride 1; no bias, a BatchNorm has one."""
    return nn.Conv2d(channels, out, 3, stride, 1, bias=False)


def conv1x1(channels: int, out: int, stride: int) -> nn.Conv2d:
    """Return the 1x1 convolution of a projection shortcut."""
    return nn.Conv2d(channels, out, 1, stride, bias=False)


def he_init(network: nn.Module) -> nn.Module:
    """Draw every convolution from N(0, 2 / fan_out), biases 0 (He et al., 2015, arXiv 1502.01852)."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d) and not part.weight.is_meta:  # on meta, a draw would only load a compiler
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return network


def stage(
    block: Callable[[int, int, int], nn.Module], channels: int, out: int, count: int, stride: int
) -> nn.Sequential:
    """Chain ``count`` blocks ``block(in, out, stride)``; only the first changes width and resolution."""
    first = block(channels, out, stride)
    return nn.Sequential(first, *(block(out, out, 1) for _ in range(count - 1)))


class BasicBlock(nn.Module):
    """``relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))`` (He et al., 2015, arXiv 1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, out, stride)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, channels, H, W) to (N, out, H/stride, W/stride)."""
        branch = self.relu(self.bn1(self.conv1(x)))
        total: Tensor = self.relu(self.bn2(self.conv2(branch)) + self.shortcut(x))
        return total


class PreActBlock(nn.Module):
    """``shortcut(x) + conv2(relu(bn2(conv1(relu(bn1(x))))))`` (He et al., 2016, arXiv 1603.05027).

    A projection shortcut starts from ``relu(bn1(x))`` when ``shared`` (the paper), else from ``x``.
    """

    def __init__(self, channels: int, out: int, stride: int, shared: bool = True) -> None:
        super().__init__()
        self.shared = shared
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, out, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(conv1x1(channels, out, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, channels, H, W) to (N, out, H/stride, W/stride)."""
        active = self.relu(self.bn1(x))
        skipped = x
        if self.shortcut is not None:
            skipped = self.shortcut(active if self.shared else x)
        branch: Tensor = self.conv2(self.relu(self.bn2(self.conv1(active))))
        return branch + skipped
