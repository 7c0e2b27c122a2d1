"""Files in the idx format of LeCun et al. (1998), plain or gzipped, read without trusting their headers."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robusteval.datasets._torchvision import download, root_of
from robusteval.datasets.base import DataInfo, Part, Split, TensorPixels
from robusteval.errors import RobustevalError

_SIDE = 28
_MAX_COUNT = 1_000_000
_PREFIX = {"train": "train", "test": "t10k"}

# The two datasets have files of the same names and sizes; their first labels tell them apart.
_FIRST_LABELS = {
    "MNIST": {"train": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4), "test": (7, 2, 1, 0, 4, 1, 4, 9, 5, 9)},
    "Fashion-MNIST": {"train": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5), "test": (9, 2, 1, 1, 6, 1, 4, 6, 5, 7)},
}


def load_idx(
    info: DataInfo, part: Part, data_dir: str | None, fetch: bool, source: str, folders: tuple[str, ...]
) -> Split:
    """Load a part of an MNIST-like dataset from two idx files.

    ``folders`` below the data folder are tried in order; ``source`` is torchvision's name of the dataset, used when
    nothing is found and ``fetch`` allows a download. Raises `RobustevalError` for missing and for damaged files.
    """
    root = root_of(data_dir)
    kinds = (f"{_PREFIX[part]}-images-idx3-ubyte", f"{_PREFIX[part]}-labels-idx1-ubyte")
    found = _find(root, folders, kinds)
    if found is None and fetch:
        download(source, info.title, root, train=part == "train")
        found = _find(root, folders, kinds)
    if found is None:
        looked = " and ".join(f"'{root / folder}'" for folder in folders)
        raise RobustevalError(
            f"{info.title} was not found: looked for {kinds[0]}[.gz] and {kinds[1]}[.gz] in {looked}; "
            "name their folder with --data-dir or fetch them with --download."
        )
    images = read_idx(found[0], (_SIDE, _SIDE)).unsqueeze(1)
    labels = read_idx(found[1], ()).long()
    _check_labels(info, part, found, len(images), labels)
    return Split(info, part, TensorPixels(images), labels, torch.arange(len(images)))


def read_idx(path: Path, item: tuple[int, ...]) -> Tensor:
    """Read an idx file of uint8 items of shape ``item``; return a uint8 tensor (N, *item).

    Raises `RobustevalError` unless magic number, sizes and the length of the payload agree.
    """
    rank = 1 + len(item)
    header = struct.Struct(f">{1 + rank}I")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            head = stream.read(header.size)
            count = _check_header(path, head, header, item)
            size = count * math.prod(item)
            payload = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RobustevalError(f"'{path}' cannot be read: {error}.") from error
    if len(payload) != size:
        how = "truncated" if len(payload) < size else "longer than that"
        raise RobustevalError(f"'{path}' is damaged: its header announces {size} bytes of data and it is {how}.")
    return torch.from_numpy(np.frombuffer(payload, np.uint8).copy()).reshape(count, *item)


def _check_header(path: Path, head: bytes, header: struct.Struct, item: tuple[int, ...]) -> int:
    if len(head) != header.size:
        raise RobustevalError(f"'{path}' is truncated: {len(head)} bytes, too short for an idx header.")
    magic, count, *sizes = header.unpack(head)
    expected = 0x0800 + 1 + len(item)
    if magic != expected:
        raise RobustevalError(f"'{path}' is not the idx file it should be: magic number {magic}, expected {expected}.")
    if tuple(sizes) != item or not 0 < count <= _MAX_COUNT:
        listed = "x".join(map(str, (count, *sizes)))
        wanted = "x".join(map(str, (f"1..{_MAX_COUNT}", *item)))
        raise RobustevalError(f"'{path}' has items of size {listed}, expected {wanted}.")
    return int(count)


def _find(root: Path, folders: tuple[str, ...], kinds: tuple[str, str]) -> tuple[Path, Path] | None:
    for folder in folders:
        paths = [
            next((p for p in (root / folder / kind, root / folder / f"{kind}.gz") if p.is_file()), None)
            for kind in kinds
        ]
        if paths[0] and paths[1]:
            return paths[0], paths[1]
    return None


def _check_labels(info: DataInfo, part: Part, found: tuple[Path, Path], count: int, labels: Tensor) -> None:
    if len(labels) != count:
        raise RobustevalError(f"'{found[0]}' has {count} images but '{found[1]}' has {len(labels)} labels.")
    if int(labels.max()) >= info.num_classes:
        raise RobustevalError(f"'{found[1]}' has the label {int(labels.max())}, allowed are 0..{info.num_classes - 1}.")
    for title, first in _FIRST_LABELS.items():
        if title != info.title and tuple(labels[:10].tolist()) == first[part]:
            raise RobustevalError(f"'{found[0].parent}' holds {title}, not {info.title}.")
