"""Datasets whose download, checksums and parsing torchvision has already; here they are found and explained."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from robusteval.datasets.base import DataInfo, Part, Split, TensorPixels
from robusteval.errors import RobustevalError

DEFAULT_DIR = "data"
"""Where files are looked for, and downloaded to, unless a folder is named: below the current directory."""


def root_of(data_dir: str | None) -> Path:
    """Return the data folder, `data` by default, with ``~`` expanded."""
    return Path(data_dir or DEFAULT_DIR).expanduser()


def download(source: str, title: str, root: Path, **which: Any) -> Any:
    """Return ``torchvision.datasets.<source>`` under ``root``, fetching its files when they are not there."""
    try:
        return _build(source, root, download=True, **which)
    except (RuntimeError, OSError) as error:
        raise RobustevalError(f"{title} could not be downloaded to '{root}': {error}") from error


def load_checked(source: str, title: str, root: Path, needs: str, fetch: bool, **which: Any) -> Any:
    """Return ``torchvision.datasets.<source>``, which compares published MD5 sums before it parses a file.

    ``needs`` is the file or folder below ``root`` that has to be there: it tells missing from damaged. Raises
    `RobustevalError` for both.
    """
    if fetch:
        return download(source, title, root, **which)
    if not (root / needs).exists():
        raise RobustevalError(
            f"{title} was not found: looked for '{root / needs}'; "
            "name the folder that holds it with --data-dir or fetch it with --download."
        )
    try:
        return _build(source, root, download=False, **which)
    except (RuntimeError, OSError) as error:
        raise RobustevalError(
            f"'{root / needs}' is incomplete or damaged: it does not have the published MD5 sums of {title}; "
            "remove it and fetch it again with --download."
        ) from error


def as_split(info: DataInfo, part: Part, images: Any, labels: Any) -> Split:
    """Return a split of numpy uint8 ``images`` (N, C, H, W) and integer ``labels`` (N,) in the order given."""
    data = torch.as_tensor(images).contiguous()
    return Split(info, part, TensorPixels(data), torch.as_tensor(labels).long(), torch.arange(len(data)))


def _build(source: str, root: Path, **arguments: Any) -> Any:
    from torchvision import datasets

    with contextlib.redirect_stdout(sys.stderr):  # torchvision prints its progress; stdout is for results
        return getattr(datasets, source)(str(root), **arguments)
