"""Street View House Numbers."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.datasets._torchvision import as_split, load_checked, root_of
from robusteval.datasets.base import DataInfo, Part, Split

INFO = DataInfo(
    title="SVHN",
    shape=(3, 32, 32),
    classes=tuple("0123456789"),
    mean=(0.4377, 0.4438, 0.4728),
    std=(0.1980, 0.2010, 0.1970),
    eps={"Linf": "8/255", "L2": "0.5"},
    pad=4,
)


@dataclass(frozen=True)
class Svhn:
    """32x32 house-number digits, 73 257 + 26 032 (Netzer et al. 2011); the `extra` images are not used.

    `train_32x32.mat` and `test_32x32.mat` lie in ``data_dir``, `data` below the current directory by default.
    """

    data_dir: str | None = None
    download: bool = False

    def load(self, part: Part) -> Split:
        """Return the images (N, 3, 32, 32) in file order; raise `RobustevalError` for missing or damaged files."""
        root = root_of(self.data_dir)
        loaded = load_checked("SVHN", INFO.title, root, f"{part}_32x32.mat", self.download, split=part)
        return as_split(INFO, part, loaded.data, loaded.labels)
