"""Fashion-MNIST."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.datasets._idx import load_idx
from robusteval.datasets.base import DataInfo, Part, Split

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

INFO = DataInfo(
    title="Fashion-MNIST",
    shape=(1, 28, 28),
    classes=CLASSES,
    mean=(0.2860,),
    std=(0.3530,),
    eps={"Linf": "0.1"},
    pad=2,
)


@dataclass(frozen=True)
class FashionMnist:
    """28x28 pictures of clothes, 60 000 + 10 000 (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747).

    The idx files, plain or gzipped, may lie in ``data_dir`` itself, in its folder `fashion-mnist`, or where
    torchvision puts them (`FashionMNIST/raw`). ``data_dir`` is `data` below the current directory by default;
    ``download`` fetches them.
    """

    data_dir: str | None = None
    download: bool = False

    def load(self, part: Part) -> Split:
        """Return the images (N, 1, 28, 28) in file order; raise `RobustevalError` for missing or damaged files."""
        folders = ("FashionMNIST/raw", "fashion-mnist", "")
        return load_idx(INFO, part, self.data_dir, self.download, "FashionMNIST", folders)
