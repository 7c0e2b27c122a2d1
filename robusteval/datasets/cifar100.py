"""CIFAR-100."""

from __future__ import annotations

from dataclasses import dataclass, replace

from robusteval.datasets._torchvision import as_split, load_checked, root_of
from robusteval.datasets.base import DataInfo, Part, Split

FOLDER = "cifar-100-python"

INFO = DataInfo(
    title="CIFAR-100",
    shape=(3, 32, 32),
    classes=(),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    eps={"Linf": "8/255", "L2": "0.5", "L1": "12"},
    benchmark="cifar100",
    flip=True,
    pad=4,
)


@dataclass(frozen=True)
class Cifar100:
    """32x32 photographs of 100 fine classes, 50 000 + 10 000 (Krizhevsky 2009).

    The folder `cifar-100-python` of the original Python version lies in ``data_dir``, `data` below the current
    directory by default; files that differ from the published ones are refused. Class names come from the files.
    """

    data_dir: str | None = None
    download: bool = False

    def load(self, part: Part) -> Split:
        """Return the images (N, 3, 32, 32) in file order; raise `RobustevalError` for missing or damaged files."""
        root = root_of(self.data_dir)
        root = root.parent if root.name == FOLDER else root
        loaded = load_checked("CIFAR100", INFO.title, root, FOLDER, self.download, train=part == "train")
        info = replace(INFO, classes=tuple(loaded.classes))
        return as_split(info, part, loaded.data.transpose(0, 3, 1, 2), loaded.targets)
