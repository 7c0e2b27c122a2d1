"""Your own images: a folder, or a tar archive of one."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.datasets._encoded import load_images
from robusteval.datasets._own import own_info, own_place
from robusteval.datasets.base import Part, Split


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
        own_place("imagefolder", self.path, self.data_dir, self.download)

    def load(self, part: Part) -> Split:
        """Return images (N, C, H, W), decoded when they are read; raise `RobustevalError` naming the file at fault."""
        path = own_place("imagefolder", self.path, self.data_dir, self.download)
        title = path.resolve().name
        return load_images(path, part, lambda shape, classes: own_info(title, shape, classes))
