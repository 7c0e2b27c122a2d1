"""Importing PyPI's robustbench 1.1.1, which does not import as published."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from robusteval.errors import RobustevalError
from robusteval.models.base import summary


def import_robustbench() -> ModuleType:
    """Return `robustbench.utils`; raise `RobustevalError` when the package is missing or fails.

    The package depends on `pyautoattack` but imports it as `autoattack`, and it needs `pkg_resources`, which new
    versions of setuptools no longer have. Both names stand in `sys.modules` only during the import.
    """
    try:
        with _stand_ins(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("robustbench.utils")
    except Exception as error:  # importing it runs a large part of timm
        raise RobustevalError(f"the robustbench package cannot be imported: {summary(error)}") from error


@contextmanager
def _stand_ins() -> Iterator[None]:
    added: dict[str, ModuleType] = {}
    if not _exists("autoattack"):
        added["autoattack"] = importlib.import_module("pyautoattack")
        added["autoattack.state"] = importlib.import_module("pyautoattack.state")
    if not _exists("pkg_resources"):
        added["pkg_resources"] = _pkg_resources()
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def _exists(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _pkg_resources() -> ModuleType:
    """Make a module with the one function that robustbench uses."""
    module = ModuleType("pkg_resources")

    def resource_filename(name: str, resource: str) -> str:
        file = sys.modules[name].__file__
        assert file is not None
        return str(Path(file).parent / resource)

    vars(module)["resource_filename"] = resource_filename
    return module
