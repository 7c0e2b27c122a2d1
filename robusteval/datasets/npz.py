"""Generated training images in one NumPy archive."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robusteval.datasets._own import own_info, own_place
from robusteval.datasets._torchvision import as_split
from robusteval.datasets.base import Part, Split
from robusteval.errors import RobustevalError, UsageError

KEYS = ("image", "label")
MAX_CLASSES = 1 << 16
_UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, MemoryError, OverflowError, SyntaxError, RuntimeError, TypeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Npz:
    """Generated training images: an .npz file with arrays `image` and `label`, as diffusion models' samples come.

    ``path`` (or ``data_dir``) is the file. `image` is uint8 (N, H, W, C), C 1 or 3, or (N, H, W); `label` is (N,)
    integers, and the classes are called 0, 1, ... up to the largest. That is the layout of the DDPM images of Gowal
    et al. (2021, arXiv 2110.09468) and the EDM images of Wang et al. (2023, arXiv 2302.04638). There is no test part.
    A sample's id is its position in the file; mean and std are constants, as for `imagefolder`.
    """

    path: str | None = None
    data_dir: str | None = None
    download: bool = False

    def __post_init__(self) -> None:
        own_place("npz", self.path, self.data_dir, self.download)

    def load(self, part: Part) -> Split:
        """Return the images (N, C, H, W), held in memory; raise `RobustevalError` for a file that is not as above."""
        path = own_place("npz", self.path, self.data_dir, self.download)
        if part != "train":
            raise UsageError(f"'{path}' holds training images only, so there is no {part} part.")
        images, labels = _checked(path, *_read(path))
        _, height, width, channels = images.shape
        info = own_info(path.resolve().name, (channels, height, width), tuple(map(str, range(int(labels.max()) + 1))))
        return as_split(info, part, images.transpose(0, 3, 1, 2), labels.astype(np.int64))


def _read(path: Path) -> tuple[Array, Array]:
    """Return both arrays of the archive at ``path``; nothing is unpickled."""
    if not path.is_file():
        raise RobustevalError(f"there is no file '{path}'.")
    if not zipfile.is_zipfile(path):
        raise RobustevalError(f"'{path}' is not an .npz archive, or it is cut off.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = list(archive.files)
            arrays = [archive[key] for key in KEYS if key in found]
    except _UNREADABLE as error:
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise RobustevalError(f"'{path}' is damaged or not an .npz archive of arrays: {reason}.") from error
    if len(arrays) < len(KEYS):
        missing = next(key for key in KEYS if key not in found)
        raise RobustevalError(f"'{path}' has no array '{missing}'; it holds {', '.join(found[:10]) or 'nothing'}.")
    return arrays[0], arrays[1]


def _checked(path: Path, images: Array, labels: Array) -> tuple[Array, Array]:
    """Return images (N, H, W, C) and labels (N,), or raise `RobustevalError` saying what is wrong with them."""
    images, labels = np.asarray(images), np.asarray(labels)  # a member that is no array comes as bytes
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise RobustevalError(
            f"'{path}': array 'image' is {images.dtype} of shape {images.shape}; it must be uint8 (N, H, W, C) with "
            "1 or 3 channels, or (N, H, W)."
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise RobustevalError(
            f"'{path}': array 'label' is {labels.dtype} of shape {labels.shape}; it must be {len(images)} integers, "
            "one for each image."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or not 0 < high < MAX_CLASSES:
        raise RobustevalError(
            f"'{path}': labels reach from {low} to {high}; they must be classes 0, 1, ..., at least 2 and at most "
            f"{MAX_CLASSES} of them."
        )
    return images, labels
