"""Models that a user's own function makes: ``package.module:factory``."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import nn

from robusteval.errors import RobustevalError, UsageError, nearest
from robusteval.models.base import LoadedModel, summary

_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_factory(spec: str) -> bool:
    """Say whether ``spec`` has the form ``package.module:factory``."""
    return _PATTERN.fullmatch(spec) is not None


def load_factory(spec: str, sources: Iterable[str]) -> LoadedModel:
    """Import and call ``package.module:factory``, the current folder importable; runs that code.

    The factory takes no arguments and returns an `nn.Module` from images in [0,1] to logits. Raises `UsageError`
    when it cannot be found or returns something else, `RobustevalError` when it fails. ``sources`` are the names
    that the user may have meant by a module that does not exist.
    """
    name, _, attribute = spec.partition(":")
    with _current_folder_importable():
        factory = _find(_import(name, sources), attribute, spec)
        try:
            module = factory() if callable(factory) else factory
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise RobustevalError(f"model factory '{spec}' failed: {summary(error)}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"model factory '{spec}' gave {type(module).__name__}, not a torch.nn.Module.")
    return LoadedModel(module, name=spec, source=spec, architecture=type(module).__name__)


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _import(name: str, sources: Iterable[str]) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        guess = nearest(name, sources) if error.name == name else ""
        raise UsageError(f"cannot import '{name}' for the model factory: {summary(error)}{guess}") from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(f"cannot import '{name}' for the model factory: {summary(error)}") from error


def _find(module: ModuleType, attribute: str, spec: str) -> object:
    if not hasattr(module, attribute):
        guess = nearest(attribute, (name for name in vars(module) if not name.startswith("_")))
        raise UsageError(f"'{module.__name__}' has no '{attribute}' for the model factory '{spec}'.{guess}")
    found: object = getattr(module, attribute)
    return found
