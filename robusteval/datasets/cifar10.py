"""CIFAR-10, as published or re-encoded as JPEG."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from robusteval.datasets._encoded import load_images
from robusteval.datasets._torchvision import as_split, load_checked, root_of
from robusteval.datasets.base import DataInfo, Part, Split
from robusteval.errors import RobustevalError

FOLDER = "cifar-10-batches-py"
JPEG_NAME = "cifar10-jpeg"

INFO = DataInfo(
    title="CIFAR-10",
    shape=(3, 32, 32),
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
    eps={"Linf": "8/255", "L2": "0.5", "L1": "12"},
    benchmark="cifar10",
    flip=True,
    pad=4,
)
JPEG_INFO = replace(INFO, title="CIFAR-10 (JPEG)", benchmark=None)


@dataclass(frozen=True)
class Cifar10:
    """32x32 photographs of 10 classes, 50 000 + 10 000 (Krizhevsky 2009).

    The folder `cifar-10-batches-py` of the original Python version lies in ``data_dir``, `data` below the current
    directory by default; files that differ from the published ones are refused. Where it is absent, a copy
    re-encoded as JPEG is taken (the folder `cifar10-jpeg` or the archive `cifar10-jpeg.tar.xz`, in ``data_dir`` or
    ``data_dir`` itself; see `imagefolder` for the layout and the order). Compression changes the images, so that copy
    is titled "CIFAR-10 (JPEG)" and is no benchmark. ``download`` fetches the original.
    """

    data_dir: str | None = None
    download: bool = False

    def load(self, part: Part) -> Split:
        """Return the images (N, 3, 32, 32); raise `RobustevalError` for missing or damaged files."""
        root = root_of(self.data_dir)
        root = root.parent if root.name == FOLDER else root
        copy = None if self.download or (root / FOLDER).exists() else _jpeg_copy(root)
        if copy is not None:
            return load_images(copy, part, lambda shape, classes: _jpeg_info(copy, shape, classes))
        loaded = load_checked("CIFAR10", INFO.title, root, FOLDER, self.download, train=part == "train")
        return as_split(INFO, part, loaded.data.transpose(0, 3, 1, 2), loaded.targets)


def _jpeg_copy(root: Path) -> Path | None:
    """Return the re-encoded copy that is, or lies in, ``root``; it is told by its name, as JPEG is a claim."""
    if root.name.startswith(JPEG_NAME) and root.exists():
        return root
    return next((root / name for name in (f"{JPEG_NAME}.tar.xz", JPEG_NAME) if (root / name).exists()), None)


def _jpeg_info(copy: Path, shape: tuple[int, int, int], classes: tuple[str, ...]) -> DataInfo:
    if shape != INFO.shape or classes != INFO.classes:
        size = "x".join(map(str, shape))
        raise RobustevalError(
            f"'{copy}' is not CIFAR-10: it has {len(classes)} classes ({', '.join(classes[:10])}) and {size} images; "
            f"use --dataset imagefolder:{copy} for other images."
        )
    return JPEG_INFO
