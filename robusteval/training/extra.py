"""Extra training data: two datasets read as one, and batches that hold a fixed share of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusteval.datasets.base import DataInfo, Pixels, Split, interleave
from robusteval.errors import UsageError, nearest
from robusteval.rng import generator

CHUNK = 1024


@dataclass(frozen=True)
class JoinedPixels:
    """The images of ``base``, and from id ``population`` on those of ``extra``."""

    base: Pixels
    extra: Pixels
    population: int

    def read(self, rows: Tensor) -> Tensor:
        """Return float32 images (len(rows), C, H, W) in [0,1]."""
        added = rows >= self.population
        if not added.any():
            return self.base.read(rows)
        extra = self.extra.read(rows[added] - self.population)
        images = extra.new_empty(len(rows), *extra.shape[1:])
        images[added] = extra
        images[~added] = self.base.read(rows[~added])
        return images

    def update_hash(self, sha: hashlib._Hash, rows: Tensor) -> None:
        """Hash the stored bytes of the base rows in order, then of the extra ones; the ids tell how they mingle."""
        added = rows >= self.population
        self.base.update_hash(sha, rows[~added])
        self.extra.update_hash(sha, rows[added] - self.population)


def join(base: Split, extra: Split, population: int) -> Split:
    """Return ``base`` followed by ``extra``, whose ids move up by ``population``: above every id of ``base``.

    The facts are those of ``base``. Classes are matched by name; those of ``extra`` that are mere numbers, as in an
    .npz file, are positions in the classes of ``base``. Raises `UsageError` when images differ in shape or a class of
    ``extra`` is none of ``base``.
    """
    if extra.info.shape != base.info.shape:
        shapes = ["x".join(map(str, info.shape)) for info in (extra.info, base.info)]
        raise UsageError(
            f"extra data '{extra.info.title}' has {shapes[0]} images, but {base.info.title} has {shapes[1]} ones."
        )
    labels = _translated(base.info, extra)
    if int(base.ids.max()) >= population:
        raise ValueError(f"population {population} is not above the base's largest id {int(base.ids.max())}")
    return replace(
        base,
        pixels=JoinedPixels(base.pixels, extra.pixels, population),
        labels=torch.cat([base.labels, labels]),
        ids=torch.cat([base.ids, extra.ids + population]),
    )


def _translated(info: DataInfo, extra: Split) -> Tensor:
    """Return the labels of ``extra`` as positions in ``info.classes``."""
    names = list(info.classes)
    if extra.info.classes == tuple(map(str, range(extra.info.num_classes))):
        highest = int(extra.labels.max())
        if highest >= len(names):
            raise UsageError(
                f"extra data '{extra.info.title}' has label {highest}, but {info.title} has {len(names)} classes, 0 to "
                f"{len(names) - 1}."
            )
        return extra.labels
    for name in extra.info.classes:
        if name not in names:
            raise UsageError(
                f"extra data '{extra.info.title}' has class '{name}', which {info.title} has not.{nearest(name, names)}"
            )
    return torch.tensor([names.index(name) for name in extra.info.classes])[extra.labels]


def refuse_overlap(extra: Split, held_out: Split) -> None:
    """Raise `UsageError` if ``extra`` holds images of ``held_out``, pixel for pixel: they select the best epoch."""
    kept = {image.numpy().tobytes() for image in held_out.images(slice(None))}
    found = sum(
        image.numpy().tobytes() in kept
        for rows in torch.split(torch.arange(len(extra)), CHUNK)
        for image in extra.images(rows)
    )
    if found:
        raise UsageError(
            f"extra data '{extra.info.title}' holds {found} images that are held out for validation; "
            "take them out, or train without extra data."
        )


def extra_rows(batch_size: int, fraction: float) -> int:
    """Return how many samples of a batch are extra ones; raise `UsageError` if that is none or all."""
    count = round(batch_size * fraction)
    if not 0 < count < batch_size:
        raise UsageError(
            f"extra.fraction = {fraction} makes {count} of a batch of {batch_size} extra samples; at least one must be "
            "extra and at least one not."
        )
    return count


def mixed_batches(
    count_base: int, count_extra: int, batch_size: int, fraction: float, steps: int, seed: int, epoch: int
) -> Iterator[Tensor]:
    """Yield the rows (batch_size,) of an epoch's ``steps`` batches; extra rows are those from ``count_base`` on.

    Every batch has `extra_rows` extra rows, spread evenly through it, so that processes which share it get their
    part of each kind. Either kind runs through all its samples in a fresh order before one comes again, on from
    epoch to epoch.
    """
    added = extra_rows(batch_size, fraction)
    base = _stream(count_base, epoch * steps, steps, batch_size - added, seed, "order")
    extra = _stream(count_extra, epoch * steps, steps, added, seed, "extra order")
    spread = interleave(torch.arange(batch_size) >= batch_size - added)
    return iter(torch.cat([base, extra + count_base], dim=1)[:, spread])


def _stream(length: int, done: int, steps: int, width: int, seed: int, purpose: str) -> Tensor:
    """Return rows (steps, width): positions ``done * width`` on of an endless series of permutations of ``length``."""
    first, end = done * width, (done + steps) * width
    numbers = range(first // length, -(-end // length))
    orders = [torch.randperm(length, generator=generator(seed, purpose, number)) for number in numbers]
    begin = first - numbers.start * length
    return torch.cat(orders)[begin : begin + end - first].reshape(steps, width)
