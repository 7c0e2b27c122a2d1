"""Handwritten digits, 8x8, that come with scikit-learn: no download, seconds to train on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robusteval.datasets.base import DataInfo, Part, Split, TensorPixels, interleave

TEST_COUNT = 360

INFO = DataInfo(
    title="Digits",
    shape=(1, 8, 8),
    classes=tuple("0123456789"),
    mean=(0.3053,),
    std=(0.3760,),
    eps={"Linf": "0.1"},
)


@dataclass(frozen=True)
class Digits:
    """8x8 handwritten digits that come with scikit-learn (Alpaydin & Kaynak 1998, UCI).

    1797 images, grey levels 0..16 divided by 16. There is no official split of scikit-learn's copy, so a fixed one
    is made: images are ordered by the SHA-256 of their bytes (a shuffle that no library version can change),
    interleaved by class, and the first 360 are the test set, so the first n test images are a fair sample too.
    ``data_dir`` and ``download`` are accepted and unused, as there is nothing to fetch.
    """

    data_dir: str | None = None
    download: bool = False

    def load(self, part: Part) -> Split:
        """Return 1437 training or 360 test images (N, 1, 8, 8)."""
        images, labels = _shuffled()
        order = interleave(labels)
        rows = order[:TEST_COUNT] if part == "test" else order[TEST_COUNT:]
        return Split(INFO, part, TensorPixels(images[rows]), labels[rows], torch.arange(len(rows)))


def _shuffled() -> tuple[Tensor, Tensor]:
    """Return all images (1797, 1, 8, 8) float32 in [0,1] and labels, in the order of their digests."""
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    levels = levels.astype(np.uint8)
    order = sorted(range(len(levels)), key=lambda row: hashlib.sha256(levels[row].tobytes()).digest())
    images = torch.from_numpy(levels[order]).float().div(16).reshape(-1, 1, 8, 8)
    return images, torch.from_numpy(labels[order].astype(np.int64))
