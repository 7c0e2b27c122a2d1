"""Running other people's loaders without trusting what they load."""

from __future__ import annotations

import difflib
import os
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout

from robusteval.errors import RobustevalError, UsageError
from robusteval.models.base import summary

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_NETWORK = ("urllib", "urllib3", "requests", "httpx", "httpcore", "gdown", "huggingface_hub", "socket", "ssl")


@contextmanager
def fetching(what: str) -> Iterator[None]:
    """Run another library's loader: no unpickling, nothing on stdout, each failure a one-sentence `RobustevalError`."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings(), _weights_only():
        warnings.simplefilter("ignore")
        try:
            yield
        except RobustevalError:
            raise
        except Exception as error:  # every library fails in its own way
            raise RobustevalError(_explain(what, error)) from error


@contextmanager
def _weights_only() -> Iterator[None]:
    # PyTorch's own switch; it also overrules loaders that ask for weights_only=False.
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_FORCE)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _explain(what: str, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return f"{what} was refused: it holds pickled Python objects, and code inside a model file is never executed."
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in _NETWORK:
        return f"{what} cannot be downloaded (is there a network connection?): {summary(error)}"
    return f"{what} cannot be loaded: {summary(error)}"


def unknown_entry(source: str, name: str, known: Iterable[str]) -> UsageError:
    """Build the error for a name that a zoo does not have; zoos are too large to list."""
    spelled = {entry.lower(): entry for entry in known}
    matches = difflib.get_close_matches(name.lower(), sorted(spelled), n=1, cutoff=0.5)
    guess = f" Did you mean '{spelled[matches[0]]}'?" if matches else ""
    return UsageError(f"{source} has no pretrained model '{name}'.{guess}")
