"""Adversarial inputs as small pictures inside a page: the clean image, the adversarial one, their difference."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from robusteval.datasets.base import Split
from robusteval.witnesses import load_witnesses, witness_files

MOST, MOST_BYTES = 200, 2_500_000
"""Samples that get pictures, and bytes all pictures may take; whichever is reached first."""
SIDE = 96
"""Longest side in pixels; larger images are shrunk by a whole factor."""


@dataclass(frozen=True)
class Picture:
    """PNG data URIs of one sample; ``scale`` is by how much the difference, centred on grey, is magnified."""

    adversarial: str
    clean: str | None = None
    difference: str | None = None
    scale: float | None = None

    @property
    def bytes(self) -> int:
        """Length of all URIs."""
        return sum(len(uri or "") for uri in (self.adversarial, self.clean, self.difference))


@dataclass(frozen=True)
class Gallery:
    """Pictures by sample id, how many witnesses have none, and what a reader should know about them."""

    pictures: Mapping[int, Picture] = field(default_factory=dict)
    left_out: int = 0
    notes: tuple[str, ...] = ()


NO_DATA = "Clean images are left out: the data set was not there when this page was made."


def gallery(folder: Path, clean: Split | None) -> Gallery:
    """Return pictures of the first witnesses in ``folder``, with clean images where the samples are known."""
    pictures: dict[int, Picture] = {}
    total, size, shape = 0, 0, (0, 0)
    for sample, x_adv in _witnesses(folder):
        total += 1
        if len(pictures) == MOST or size > MOST_BYTES or len(pictures) < total - 1:
            continue
        one = _picture(x_adv, None if clean is None else _clean(clean, sample))
        shape, size = (x_adv.shape[-2], x_adv.shape[-1]), size + one.bytes
        pictures[sample] = one
    notes = [NO_DATA] if clean is None and pictures else []
    if _factor(*shape) > 1:
        notes.append(f"Pictures are shrunk {_factor(*shape)} times; the inputs are {shape[0]} x {shape[1]} pixels.")
    return Gallery(pictures, total - len(pictures), tuple(notes))


def _witnesses(folder: Path) -> Iterator[tuple[int, Tensor]]:
    for path in witness_files(folder):
        ids, inputs = load_witnesses(path)
        yield from sorted(zip(ids, inputs, strict=True), key=lambda pair: pair[0])


def _clean(split: Split, sample: int) -> Tensor:
    position = int(torch.searchsorted(split.ids, sample))
    return split.images([position])[0]


def _picture(x_adv: Tensor, x: Tensor | None) -> Picture:
    """Draw a witness (C, H, W) and, where the clean image is known, how it differs: grey is no change."""
    if x is None:
        return Picture(data_uri(x_adv))
    delta = x_adv.double() - x.double()
    peak = float(delta.abs().max())
    scale = 0.5 / peak if peak > 0 else None
    return Picture(data_uri(x_adv), data_uri(x), data_uri(0.5 + delta * (scale or 0.0)), scale)


def _factor(height: int, width: int) -> int:
    return max(1, -(-max(height, width) // SIDE))


def data_uri(image: Tensor) -> str:
    """Return an image (C, H, W) in [0,1] as a PNG data URI; what is neither grey nor RGB becomes its mean channel."""
    shown = image if image.shape[0] in (1, 3) else image.double().mean(0, keepdim=True)
    pixels = (shown.double().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    factor = _factor(picture.height, picture.width)
    buffer = io.BytesIO()
    (picture.reduce(factor) if factor > 1 else picture).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
