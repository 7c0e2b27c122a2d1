"""Classifiers of the timm library."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from robusteval.errors import RobustevalError, UsageError
from robusteval.models.base import Classifier, LoadedModel, Shape
from robusteval.models.zoo._fetch import fetching, unknown_entry


@dataclass(frozen=True)
class Timm:
    """Pretrained classifiers of the timm library, `timm:<architecture>` or `timm:<architecture>.<tag>`."""

    def load(self, rest: str, shape: Shape, num_classes: int) -> LoadedModel:
        """Load a classifier, normalised as its pretrained configuration says; the data come already resized.

        Raises `UsageError` for an unknown name or other data, `RobustevalError` when timm is missing or the
        download fails.
        """
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise RobustevalError(f"'timm:{rest}' needs the timm package: {error}; pip install timm.") from error
        config = timm.models.get_pretrained_cfg(rest, allow_unregistered=False) if timm.is_model(rest) else None
        if config is None or not timm.models.is_model_pretrained(rest):
            raise unknown_entry("timm", rest, [*timm.list_models(), *timm.list_models(pretrained=True)])
        if config.num_classes != num_classes or shape[0] != config.input_size[0]:
            raise UsageError(
                f"'timm:{rest}' takes {config.input_size[0]}-channel images of {config.num_classes} classes, "
                f"not {shape[0]}-channel images of {num_classes}."
            )
        with fetching(f"'timm:{rest}'"):
            backbone = timm.create_model(rest, pretrained=True, pretrained_cfg_overlay=_source(timm, config.hf_hub_id))
        module = Classifier(backbone, tuple(config.mean), tuple(config.std))
        return LoadedModel(module, rest, f"timm:{rest}", rest, num_classes)


def _source(timm: ModuleType, repository: str | None) -> dict[str, str]:
    """Fetch the weights ourselves where timm cannot: timm 1.0.9 does not know newer versions of huggingface_hub."""
    if repository is None or timm.models._hub.has_hf_hub():
        return {}
    hub = importlib.import_module("huggingface_hub")
    return {"file": hub.hf_hub_download(repository, "model.safetensors")}
