"""Your own images: a folder, or a tar archive of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robusteval.datasets._encoded import load_images
from robusteval.datasets.base import DataInfo, Part, Split
from robusteval.errors import UsageError

_SMALL = 64


@dataclass(frozen=True)
class ImageFolder:
    """Your own images: PATH/{train,test}/CLASS/*.png, a folder or a tar archive that is read without unpacking.

    ``path`` (or ``data_dir``) is the folder or the `.tar`, `.tar.gz`, `.tar.bz2`, `.tar.xz` file. `val` stands in for
    `test` where there is no `test`. Classes are the sorted folder names. All images have one size and become RGB,
    or one grey channel when every image of the part is grey; EXIF rotation is not applied. Classes are interleaved
    in proportion, so `--limit n` evaluates a fair sample and not the first class; a sample's id is its position in
    that order. mean and std are the constants customary for natural images (ImageNet's), not computed, so that a
    model does not depend on a scan of the data. No augmentation is assumed to keep labels.
    """

    path: str | None = None
    data_dir: str | None = None
    download: bool = False

    def __post_init__(self) -> None:
        if self.download:
            raise UsageError("dataset 'imagefolder' is your own images, so there is nothing to download.")
        if self.path is not None and self.data_dir is not None and self.path != self.data_dir:
            raise UsageError(f"dataset 'imagefolder' has two places, '{self.path}' and '{self.data_dir}'; give one.")
        if not (self.path or self.data_dir):
            raise UsageError("dataset 'imagefolder' needs a place; write imagefolder:PATH or use --data-dir.")

    def load(self, part: Part) -> Split:
        """Return images (N, C, H, W), decoded when they are read; raise `RobustevalError` naming the file at fault."""
        path = Path(self.path or self.data_dir or "").expanduser()
        title = path.resolve().name
        return load_images(path, part, lambda shape, classes: _info(title, shape, classes))


def _info(title: str, shape: tuple[int, int, int], classes: tuple[str, ...]) -> DataInfo:
    grey = shape[0] == 1
    return DataInfo(
        title=title,
        shape=shape,
        classes=classes,
        mean=(0.449,) if grey else (0.485, 0.456, 0.406),
        std=(0.226,) if grey else (0.229, 0.224, 0.225),
        eps={"Linf": "8/255" if max(shape[1:]) <= _SMALL else "4/255"},
    )
