"""From what the user typed after `--dataset` to a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robusteval.catalog import Catalog
from robusteval.errors import UsageError

if TYPE_CHECKING:  # a misspelt name is answered without loading torch
    from robusteval.datasets.base import Dataset

DATASETS = Catalog("dataset", "datasets")


def open_dataset(spec: str, data_dir: str | None = None, download: bool = False) -> Dataset:
    """Return the dataset called ``spec``, ``NAME`` or ``NAME:PATH``; no data file is read yet.

    A path may follow datasets that have a field ``path``. ``data_dir`` is the folder (or archive) with the files,
    ``download`` allows fetching them. Raises `UsageError` for an unknown name, a path after a name that takes none,
    and a place or download the dataset cannot use.
    """
    name, colon, path = spec.strip().partition(":")
    params: dict[str, Any] = {}
    if data_dir is not None:
        params["data_dir"] = data_dir
    if download:
        params["download"] = True
    if colon:
        params["path"] = _path_of(name, path)
    dataset: Dataset = DATASETS.build(name, params)
    return dataset


def _path_of(name: str, path: str) -> str:
    if "path" not in getattr(DATASETS.get(name), "__dataclass_fields__", {}):
        raise UsageError(f"dataset '{name}:{path}': '{name}' takes no path after ':'; use --data-dir for its files.")
    if not path:
        raise UsageError(f"dataset '{name}:' names no path; write {name}:PATH.")
    return path
