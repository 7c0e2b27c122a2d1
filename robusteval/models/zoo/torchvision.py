"""Torchvision's ImageNet classifiers."""

from __future__ import annotations

from dataclasses import dataclass

import torchvision.models

from robusteval.errors import UsageError
from robusteval.models.base import Classifier, LoadedModel, Shape
from robusteval.models.zoo._fetch import fetching, unknown_entry


@dataclass(frozen=True)
class Torchvision:
    """Torchvision classifiers with their default ImageNet weights, `torchvision:resnet50`."""

    def load(self, rest: str, shape: Shape, num_classes: int) -> LoadedModel:
        """Load a classifier, normalised as its weights' transforms say; the data come already resized.

        Raises `UsageError` for an unknown name or other data, `RobustevalError` when the download fails.
        """
        known = torchvision.models.list_models(module=torchvision.models)
        if rest not in known:
            raise unknown_entry("torchvision", rest, known)
        weights = torchvision.models.get_model_weights(rest).DEFAULT
        classes = len(weights.meta["categories"])
        if classes != num_classes or shape[0] != 3:
            raise UsageError(
                f"'torchvision:{rest}' takes 3-channel images of {classes} classes, "
                f"not {shape[0]}-channel images of {num_classes}."
            )
        with fetching(f"'torchvision:{rest}'"):
            backbone = torchvision.models.get_model(rest, weights=weights)
        preset = weights.transforms()
        module = Classifier(backbone, tuple(preset.mean), tuple(preset.std))
        return LoadedModel(module, rest, f"torchvision:{rest}", rest, classes)
