"""The published nets that the studies measure, and the settings that load them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.models.base import Classifier, LoadedModel

CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}
SMALL = {"architecture": {"name": "small_cnn"}}


class _Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.shortcut = nn.Sequential(*([nn.Conv2d(width, out, 1, stride)] if stride > 1 else []))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(conv(relu(conv(x))) + shortcut(x))."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class Resnet2b(nn.Module):
    """The residual net `resnet2b` of VNN-COMP 2021 for normalised CIFAR-10 images (N, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(_Block(8, 16, 2), _Block(16, 16, 1))
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10)."""
        return self.linear2(F.relu(self.linear1(self.layer1(F.relu(self.conv1(x))).flatten(1))))


def resnet2b(path: Path) -> LoadedModel:
    """Load the published weights."""
    net = Resnet2b()
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["state_dict"])
    module = Classifier(net, CIFAR10["mean"], CIFAR10["std"]).eval()
    return LoadedModel(module, "resnet2b", str(path), "resnet2b", 10, (3, 32, 32))


def fashion_mnist(data: Path) -> Mapping[str, Any]:
    """Return settings for Fashion-MNIST."""
    return {"dataset": "fashion_mnist", "data_dir": str(data / "fashion-mnist")}


def fashion_mnist_wk(data: Path) -> Mapping[str, Any]:
    """Return settings for the net of Wong and Kolter (2018), trained for proofs at Linf 0.1."""
    return {**SMALL, **fashion_mnist(data), "model": str(data / "models" / "fashion_mnist_wk.pth")}


def cifar10(data: Path) -> Mapping[str, Any]:
    """Return settings for CIFAR-10 (JPEG) at Linf 2/255."""
    return {"dataset": "cifar10", "data_dir": str(data), "norm": "Linf", "eps": "2/255"}


def cifar_cnn_a_adv(data: Path) -> Mapping[str, Any]:
    """Return settings for the adversarially trained net `cifar_cnn_a_adv`."""
    return {**SMALL, **cifar10(data), **CIFAR10, "model": str(data / "models" / "cifar_cnn_a_adv.model")}
