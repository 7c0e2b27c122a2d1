"""What a dataset is: a split of images in [0,1] with labels, in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.rng import generator
from robusteval.settings import Settings

Part = Literal["train", "test"]


@dataclass(frozen=True)
class DataInfo:
    """Facts about a dataset that do not depend on the split.

    ``benchmark`` is RobustBench's name when the images are exactly the ones it uses, else None;
    ``eps`` holds the customary eps per norm; ``flip`` and ``pad`` are label-preserving augmentations.
    """

    title: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eps: Mapping[str, str] = field(default_factory=dict)
    benchmark: str | None = None
    flip: bool = False
    pad: int = 0

    def customary_eps(self, norm: str) -> str:
        """Return the eps that papers use on this dataset; raise `UsageError` when there is none for ``norm``."""
        if norm not in self.eps:
            known = ", ".join(f"{key} {value}" for key, value in self.eps.items()) or "none"
            raise UsageError(f"{self.title} has no customary eps for {norm}; give --eps. Customary: {known}.")
        return self.eps[norm]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


class Pixels(Protocol):
    """Where a split's images come from; decodes only what is asked for."""

    def read(self, rows: Tensor) -> Tensor:
        """Return float32 images (len(rows), C, H, W) in [0,1] for the int64 ``rows``."""
        ...

    def update_hash(self, sha: hashlib._Hash, rows: Tensor) -> None:
        """Feed the stored bytes of ``rows``, in order, to ``sha``."""
        ...


@dataclass(frozen=True)
class TensorPixels:
    """Images held in memory, (N, C, H, W), as uint8 in 0..255 or float32 in [0,1]."""

    data: Tensor

    def read(self, rows: Tensor) -> Tensor:
        """Return float32 images in [0,1]."""
        picked = self.data[rows]
        return picked.float() / 255 if picked.dtype == torch.uint8 else picked

    def update_hash(self, sha: hashlib._Hash, rows: Tensor) -> None:
        """Hash the raw array bytes, 1024 images at a time."""
        for start in range(0, len(rows), 1024):
            sha.update(self.data[rows[start : start + 1024]].numpy().tobytes())


@dataclass(frozen=True)
class Split:
    """Images with labels in a fixed order. ``ids`` (N,) int64 are stable: the position in the whole part."""

    info: DataInfo
    part: str
    pixels: Pixels
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, rows: Tensor | Sequence[int] | slice) -> Tensor:
        """Return float32 images (len(rows), C, H, W) in [0,1]; ``rows`` are positions in this split."""
        return self.pixels.read(self.ids[rows])

    def take(self, rows: Tensor | Sequence[int] | slice) -> Split:
        """Return the split that has only ``rows``, ids kept."""
        return replace(self, labels=self.labels[rows], ids=self.ids[rows])

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over ids, labels and the stored image bytes, in order."""
        sha = hashlib.sha256(repr((self.info.shape, len(self))).encode())
        sha.update(self.ids.numpy().tobytes() + self.labels.numpy().tobytes())
        self.pixels.update_hash(sha, self.ids)
        return sha.hexdigest()


class Dataset(Protocol):
    """A dataset plug-in: a frozen dataclass whose fields say where the files are.

    Every plug-in may be built with ``data_dir`` and ``download``; both have defaults.
    """

    def load(self, part: Part) -> Split:
        """Return a part in its canonical order; raise `RobustevalError` when files are missing."""
        ...


def in_order(split: Split) -> Split:
    """Return the split with ascending ids, so that nothing depends on how a dataset shuffles its samples."""
    return split if bool((split.ids.diff() > 0).all()) else split.take(split.ids.argsort())


def interleave(labels: Tensor) -> Tensor:
    """Return the order (N,) int64 in which every prefix has each class in its overall proportion.

    Sample k of a class of n has the key (k + 1/2) / n, so a prefix is within one sample per class of its share;
    equal classes come out round robin. Within a class, and between equal keys, the given order is kept.
    """
    keys = torch.zeros(len(labels), dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().squeeze(1)
        keys[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return keys.argsort(stable=True)


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Cut a class-stratified validation split of ``count`` samples off; return (rest, validation)."""
    if not 0 < count < len(split):
        raise UsageError(f"a validation split of {count} cannot be cut from {len(split)} training samples.")
    order = torch.randperm(len(split), generator=generator(seed, "validation split"))
    chosen = order[interleave(split.labels[order])[:count]].sort().values
    keep = torch.ones(len(split), dtype=torch.bool)
    keep[chosen] = False
    return split.take(keep.nonzero().squeeze(1)), split.take(chosen)


class Cut(Settings):
    """How a run cut the training part: ``held_out`` samples to validate on, at most ``limit`` others to train on."""

    held_out: int = Field(gt=0)
    seed: int
    limit: int | None = Field(default=None, gt=0)

    def __call__(self, whole: Split) -> tuple[Split, Split]:
        """Return the samples that are trained on and those held out, each class in proportion; raise `UsageError`."""
        train, validation = hold_out(whole, self.held_out, self.seed)
        if self.limit and self.limit < len(train):
            _, train = hold_out(train, self.limit, self.seed)
        return train, validation
