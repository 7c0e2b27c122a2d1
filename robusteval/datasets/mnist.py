"""MNIST."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.datasets._idx import load_idx
from robusteval.datasets.base import DataInfo, Part, Split

INFO = DataInfo(
    title="MNIST",
    shape=(1, 28, 28),
    classes=tuple("0123456789"),
    mean=(0.1307,),
    std=(0.3081,),
    eps={"Linf": "0.3", "L2": "1.5"},
)


@dataclass(frozen=True)
class Mnist:
    """28x28 handwritten digits, 60 000 + 10 000 (LeCun, Bottou, Bengio & Haffner 1998).

    The idx files, plain or gzipped, may lie in ``data_dir`` itself, in its folder `mnist`, or where torchvision puts
    them (`MNIST/raw`). ``data_dir`` is `data` below the current directory by default; ``download`` fetches them.
    """

    data_dir: str | None = None
    download: bool = False

    def load(self, part: Part) -> Split:
        """Return the images (N, 1, 28, 28) in file order; raise `RobustevalError` for missing or damaged files."""
        return load_idx(INFO, part, self.data_dir, self.download, "MNIST", ("MNIST/raw", "mnist", ""))
