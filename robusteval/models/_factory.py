"""Models that a user's own function makes: ``package.module:factory``."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.errors import RobustevalError, UsageError, nearest
from robusteval.models.base import LoadedModel, summary

_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_factory(spec: str) -> bool:
    """Say whether ``spec`` has the form ``package.module:factory``."""
    return _PATTERN.fullmatch(spec) is not None


class BlackBox(nn.Module):
    """A function on numpy arrays as a model without gradients.

    ``predict`` takes images (N, C, H, W) float32 in [0,1] and returns scores (N, K), or classes (N,) as integers.
    It is not ``batched``: every image counts, so that no batch is filled up with images that nobody asked about.
    """

    batched: ClassVar[bool] = False

    def __init__(self, predict: Callable[[Any], Any], num_classes: int) -> None:
        super().__init__()
        self.predict, self.num_classes = predict, num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (N, K) float32, 1 and 0 where the function tells classes only."""
        said = np.asarray(self.predict(x.detach().cpu().numpy().astype(np.float32)))
        if said.ndim == 1 and np.issubdtype(said.dtype, np.integer):
            if said.size and not 0 <= said.min() <= said.max() < self.num_classes:
                raise RobustevalError(f"the model names class {said.max()} or {said.min()} of {self.num_classes}.")
            said = np.eye(self.num_classes)[said]
        return torch.from_numpy(said.astype(np.float32)).to(x.device)


def load_factory(spec: str, sources: Iterable[str], num_classes: int) -> LoadedModel:
    """Import and call ``package.module:factory``, the current folder importable; runs that code.

    The factory takes no arguments and returns an `nn.Module` from images in [0,1] to logits, or a function for
    `BlackBox`; a name that stands for such a function of one argument is one itself. Raises `UsageError` when it
    cannot be found or returns something else, `RobustevalError` when it fails. ``sources`` are the names that the user
    may have meant by a module that does not exist.
    """
    name, _, attribute = spec.partition(":")
    with _current_folder_importable():
        factory = _find(_import(name, sources), attribute, spec)
        try:
            module = factory() if callable(factory) and not _predicts(factory) else factory
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise RobustevalError(f"model factory '{spec}' failed: {summary(error)}") from error
    if not isinstance(module, nn.Module) and _predicts(module):
        named = getattr(module, "__name__", type(module).__name__)
        return LoadedModel(BlackBox(module, num_classes), name=spec, source=spec, architecture=f"function {named}")
    if not isinstance(module, nn.Module):
        kinds = "a torch.nn.Module or a function of one array of images"
        raise UsageError(f"model factory '{spec}' gave {type(module).__name__}, not {kinds}.")
    return LoadedModel(module, name=spec, source=spec, architecture=type(module).__name__)


def _predicts(found: Any) -> TypeGuard[Callable[[Any], Any]]:
    """Say whether ``found`` can be called with one argument and not without."""
    if not callable(found) or isinstance(found, type | nn.Module):
        return False
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:  # some built-in functions do not say
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in kinds and one.default is one.empty for one in parameters) == 1


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
