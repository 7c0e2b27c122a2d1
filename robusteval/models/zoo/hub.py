"""Models on the Hugging Face Hub that this package saved."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from robusteval.errors import RobustevalError, UsageError
from robusteval.models._card import CONFIG, WEIGHTS
from robusteval.models.base import LoadedModel, Shape
from robusteval.models.io import load_folder
from robusteval.models.zoo._fetch import fetching

_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Hub:
    """Hugging Face Hub repositories with a model folder of this package, `hub:<user>/<repo>[@<revision>]`."""

    def load(self, rest: str, shape: Shape, num_classes: int) -> LoadedModel:
        """Download `config.json` and `model.safetensors` and load them as any model folder; no code is run.

        Raises `UsageError` for a malformed name or other data, `RobustevalError` when huggingface_hub is missing,
        the download fails, or the folder is damaged.
        """
        matched = _REPOSITORY.fullmatch(rest)
        if matched is None:
            raise UsageError(f"'hub:{rest}' is not of the form hub:<user>/<repo> or hub:<user>/<repo>@<revision>.")
        repository, revision = matched.groups()
        try:
            hub = importlib.import_module("huggingface_hub")
        except ImportError as error:
            raise RobustevalError(
                f"'hub:{rest}' needs huggingface_hub: {error}; pip install huggingface_hub."
            ) from error
        with fetching(f"'hub:{rest}'"):
            files = [Path(hub.hf_hub_download(repository, name, revision=revision)) for name in (WEIGHTS, CONFIG)]
        loaded = load_folder(files[0].parent, shape, num_classes)
        return replace(loaded, name=repository, source=f"hub:{rest}")
