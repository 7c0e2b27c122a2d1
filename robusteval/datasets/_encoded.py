"""Splits of encoded images (PNG, JPEG, ...): headers are checked at once, pixels decoded when asked for."""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from robusteval.datasets._files import Classes, ImageFile, list_files
from robusteval.datasets.base import DataInfo, Part, Split, interleave
from robusteval.errors import RobustevalError

Shape = tuple[int, int, int]
Describe = Callable[[Shape, tuple[str, ...]], DataInfo]

# Only these are tried: some of Pillow's other decoders start programs (Ghostscript).
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MAX_PIXELS = 1 << 24
_CACHE_BYTES = 1 << 29
_GREY_MODES = ("1", "L")
_MODES = (*_GREY_MODES, "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True, eq=False)
class EncodedPixels:
    """Image files of one shape (C, H, W); a split of up to 512 MiB of pixels is decoded only once."""

    files: Sequence[ImageFile]
    shape: Shape

    def read(self, rows: Tensor) -> Tensor:
        """Return float32 images (len(rows), C, H, W) in [0,1]; raise `RobustevalError` naming an undecodable file."""
        if len(self.files) * math.prod(self.shape) > _CACHE_BYTES:
            decoded = [self._decode(row) for row in rows.tolist()]
            return torch.stack(decoded).float() / 255 if decoded else torch.zeros(0, *self.shape)
        pixels, done = self._decoded
        for row in rows[~done[rows]].tolist():
            pixels[row] = self._decode(row)
            done[row] = True
        return pixels[rows].float() / 255

    def update_hash(self, sha: hashlib._Hash, rows: Tensor) -> None:
        """Hash the encoded bytes, each image preceded by its length."""
        for row in rows.tolist():
            with self.files[row].open() as stream:
                data = stream.read()
            sha.update(len(data).to_bytes(8, "big") + data)

    @cached_property
    def _decoded(self) -> tuple[Tensor, Tensor]:
        count = len(self.files)
        return torch.empty(count, *self.shape, dtype=torch.uint8), torch.zeros(count, dtype=torch.bool)

    def _decode(self, row: int) -> Tensor:
        channels, height, width = self.shape
        with _opened(self.files[row]) as image:
            if image.size != (width, height):
                raise RobustevalError(f"image '{self.files[row].name}' changed its size after the data was opened.")
            array = np.array(image.convert("L" if channels == 1 else "RGB"))
        return torch.from_numpy(array).view(height, width, channels).permute(2, 0, 1)


def load_images(path: Path, part: Part, describe: Describe) -> Split:
    """Load a part of the images at ``path``; ``describe`` turns (shape, classes) into the dataset's facts.

    Raises `RobustevalError` for a missing or empty part, fewer than two classes, classes that differ between the
    parts, images of several sizes, and files that are not images.
    """
    found = list_files(path, part)
    classes = _checked_classes(path, part, found)
    files = [(file, label) for label, name in enumerate(classes) for file in found[part][name]]
    labels = torch.tensor([label for _, label in files])
    order = interleave(labels)
    ordered = [files[row][0] for row in order.tolist()]
    others = [members[0] for name, labelled in found.items() if name != part for members in labelled.values()]
    shape = _common_shape([*ordered, *others])
    return Split(describe(shape, classes), part, EncodedPixels(ordered, shape), labels[order], torch.arange(len(order)))


def _checked_classes(path: Path, part: Part, found: dict[str, Classes]) -> tuple[str, ...]:
    if not any(found.get(part, {}).values()):
        folder = "test (or val)" if part == "test" else part
        raise RobustevalError(
            f"'{path}' has no {part} images; they are expected in {folder}/CLASS/, as .png, .jpg or alike."
        )
    for name, labelled in found.items():
        for label, files in labelled.items():
            if not files:
                raise RobustevalError(f"'{path}' has no {name} image of class '{label}'.")
    if len(found[part]) < 2:
        raise RobustevalError(
            f"'{path}' has one class only, '{next(iter(found[part]))}'; a classifier needs two or more."
        )
    if len(found) == 2 and (odd := sorted(set(found["train"]) ^ set(found["test"]))):
        where = "train" if odd[0] in found["train"] else "test"
        raise RobustevalError(
            f"'{path}' has class '{odd[0]}' in {where} only; train and test must have the same classes."
        )
    return tuple(found[part])


def _common_shape(files: Sequence[ImageFile]) -> Shape:
    """Read all headers; return (C, H, W), C = 1 when every image is grey."""
    first: tuple[int, int] | None = None
    grey = True
    for file in files:
        with _opened(file) as image:
            first = first or image.size
            if image.size != first:
                raise RobustevalError(
                    f"image '{file.name}' is {image.width}x{image.height} pixels but '{files[0].name}' is "
                    f"{first[0]}x{first[1]}; all images must have one size."
                )
            grey = grey and image.mode in _GREY_MODES
    width, height = first or (0, 0)
    return (1 if grey else 3), height, width


@contextmanager
def _opened(file: ImageFile) -> Iterator[Image.Image]:
    """Open an image; whatever a decoder raises becomes an error that names the file."""
    try:
        with file.open() as stream, Image.open(stream, formats=FORMATS) as image:
            _check(file, image)
            yield image
    except UnidentifiedImageError as error:
        raise RobustevalError(f"image '{file.name}' cannot be decoded: it is none of {', '.join(FORMATS)}.") from error
    except (
        OSError,
        EOFError,
        SyntaxError,
        ValueError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise RobustevalError(f"image '{file.name}' cannot be decoded: {error}.") from error


def _check(file: ImageFile, image: Image.Image) -> None:
    if image.width * image.height > _MAX_PIXELS:
        raise RobustevalError(
            f"image '{file.name}' is {image.width}x{image.height} pixels; at most {_MAX_PIXELS} are allowed."
        )
    if image.mode not in _MODES:
        raise RobustevalError(f"image '{file.name}' has mode '{image.mode}', allowed are {', '.join(_MODES)}.")
