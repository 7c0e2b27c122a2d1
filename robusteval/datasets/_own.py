"""What datasets of the user's own files share: where they lie, and the facts that nobody states about them."""

from __future__ import annotations

from pathlib import Path

from robusteval.datasets.base import DataInfo
from robusteval.errors import UsageError

_SMALL = 64


def own_place(name: str, path: str | None, data_dir: str | None, download: bool) -> Path:
    """Return the one place that was given for the dataset ``name``; raise `UsageError` for none, two or a download."""
    if download:
        raise UsageError(f"dataset '{name}' is your own images, so there is nothing to download.")
    if path is not None and data_dir is not None and path != data_dir:
        raise UsageError(f"dataset '{name}' has two places, '{path}' and '{data_dir}'; give one.")
    place = path or data_dir
    if not place:
        raise UsageError(f"dataset '{name}' needs a place; write {name}:PATH or use --data-dir.")
    return Path(place).expanduser()


def own_info(title: str, shape: tuple[int, int, int], classes: tuple[str, ...]) -> DataInfo:
    """Return facts for images (C, H, W), C 1 or 3: the mean and std customary for natural images (ImageNet's)."""
    grey = shape[0] == 1
    return DataInfo(
        title=title,
        shape=shape,
        classes=classes,
        mean=(0.449,) if grey else (0.485, 0.456, 0.406),
        std=(0.226,) if grey else (0.229, 0.224, 0.225),
        eps={"Linf": "8/255" if max(shape[1:]) <= _SMALL else "4/255"},
    )
