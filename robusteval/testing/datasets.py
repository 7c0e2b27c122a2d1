"""The conformance suite of datasets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robusteval.datasets.base import DataInfo, Dataset, Part, Split
from robusteval.testing._purity import require
from robusteval.threat import ThreatModel

_LOOKED_AT = 256


def check_dataset(dataset: Dataset, part: Part) -> None:
    """Raise `AssertionError` unless ``dataset`` keeps the contract of `robusteval.datasets.base.Dataset`.

    Loads ``part`` twice, hashes it whole and looks at no more than 256 images of it.
    """
    split, again = dataset.load(part), dataset.load(part)
    require(split.part == part, f"{dataset} calls its part '{part}' '{split.part}'")
    _check_info(split.info)
    _check_labels(split)
    _check_images(split)
    _check_views(split)
    _check_hash(split, again)


def _check_info(info: DataInfo) -> None:
    channels = info.shape[0]
    for name, values in (("mean", info.mean), ("std", info.std)):
        require(len(values) == channels, f"{name} {values} is not one value for each of {channels} channels")
        require(all(math.isfinite(value) for value in values), f"{name} {values} is not finite")
    require(min(info.std) > 0, f"std {info.std} divides by zero")
    require(min(info.shape) > 0, f"shape {info.shape} has no pixels")
    require(info.title.strip(), "the title is empty")
    require(info.num_classes >= 2, f"{info.num_classes} classes are not a classification")
    require(len(set(info.classes)) == info.num_classes, "two classes have one name")
    for norm, eps in info.eps.items():
        ThreatModel.parse(norm, eps)


def _check_labels(split: Split) -> None:
    labels, classes = split.labels, split.info.num_classes
    require(labels.dtype == torch.int64, f"labels are {labels.dtype}, not int64")
    require(labels.shape == (len(split),), f"{len(split)} samples have labels of shape {tuple(labels.shape)}")
    present = set(labels.tolist())
    require(present <= set(range(classes)), f"labels {sorted(present)} are not all in 0..{classes - 1}")
    missing = sorted(set(range(classes)) - present)
    require(not missing, f"no {split.part} sample is of the classes {missing[:10]}")
    expected = torch.arange(len(split))
    require(split.ids.dtype == torch.int64, f"ids are {split.ids.dtype}, not int64")
    require(torch.equal(split.ids, expected), "the ids of a whole part are not its positions 0, 1, 2, ...")
    prefix = labels[: max(4, min(100, len(split) // classes))]
    require(split.part != "test" or len(set(prefix.tolist())) > 1, f"the first {len(prefix)} samples are one class")


def _looked_at(split: Split) -> Tensor:
    return torch.linspace(0, len(split) - 1, min(_LOOKED_AT, len(split))).long()


def _check_images(split: Split) -> None:
    rows = _looked_at(split)
    images = split.images(rows)
    expected = (len(rows), *split.info.shape)
    require(images.shape == expected, f"images have shape {tuple(images.shape)}, not {expected}")
    require(images.dtype == torch.float32, f"images are {images.dtype}, not float32")
    low, high = float(images.min()), float(images.max())
    require(0 <= low <= high <= 1, f"pixels reach from {low} to {high}, not within [0,1]")
    require(low < high, "all pixels are equal")
    require(torch.equal(images, split.images(rows)), "reading the same images twice gives different pixels")


def _check_views(split: Split) -> None:
    """Require that positions mean the same in `images`, in `take` and in a split taken from a split."""
    rows = _looked_at(split).flip(0)
    images, taken = split.images(rows), split.take(rows)
    require(torch.equal(taken.images(slice(None)), images), "take(rows).images(...) are not images(rows)")
    require(torch.equal(taken.ids, split.ids[rows]), "take(rows) does not keep the ids")
    require(torch.equal(taken.labels, split.labels[rows]), "take(rows) does not keep the labels")
    require(torch.equal(taken.images([1, 0]), images[[1, 0]]), "images([1, 0]) of a taken split are other images")
    require(torch.equal(taken.take([1]).images([0]), images[1:2]), "take of a taken split finds other images")
    if len(rows) > 1:
        require(torch.equal(split.images(slice(0, 2)), split.images([0, 1])), "slices and lists of rows differ")


def _check_hash(split: Split, again: Split) -> None:
    whole = split.content_hash
    require(len(whole) == 64, f"content hash '{whole}' is not a SHA-256")
    require(again.content_hash == whole, "loading twice gives two content hashes")
    require(split.take(slice(0, len(split) - 1)).content_hash != whole, "a subset has the content hash of the whole")
    swapped = [1, 0, *range(2, min(len(split), _LOOKED_AT))]
    straight, crossed = split.take(sorted(swapped)), split.take(swapped)
    require(straight.content_hash != crossed.content_hash, "the content hash does not depend on the order")
