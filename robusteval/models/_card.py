"""The card of a stored model: `config.json`, read as data from a stranger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, JsonValue, ValidationError, field_validator, model_validator

from robusteval.catalog import first_problem
from robusteval.errors import RobustevalError
from robusteval.runs import canonical_json
from robusteval.settings import PluginSpec, Settings

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
BEST = "best"

_Side = Annotated[int, Field(ge=1, le=65536)]
_Positive = Annotated[FiniteFloat, Field(gt=0)]


class ModelCard(Settings):
    """What `config.json` says: how to rebuild the network, what it was made for, which weights belong to it."""

    format: Literal["robusteval-model/1"] = "robusteval-model/1"
    architecture: PluginSpec
    shape: tuple[_Side, _Side, _Side]
    num_classes: Annotated[int, Field(ge=2, le=1_000_000)]
    classes: tuple[str, ...] = ()
    mean: tuple[FiniteFloat, ...]
    std: tuple[_Positive, ...]
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    training: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("training")
    @classmethod
    def _serialisable(cls, training: dict[str, JsonValue]) -> dict[str, JsonValue]:
        canonical_json(training)
        return training

    @model_validator(mode="after")
    def _consistent(self) -> ModelCard:
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise ValueError(f"mean and std need {self.shape[0]} values, one per channel")
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} class names are given for {self.num_classes} classes")
        return self


def make_card(facts: dict[str, Any]) -> ModelCard:
    """Check the facts of a model that is about to be stored; raise `RobustevalError` naming the wrong one."""
    try:
        return ModelCard.model_validate(facts)
    except ValidationError as error:
        raise RobustevalError(f"the model card is wrong: {first_problem(error)}") from error


def read_card(folder: Path) -> ModelCard:
    """Read `config.json`, no value converted to another type; raise `RobustevalError` naming the wrong one."""
    path = folder / CONFIG
    try:
        return ModelCard.model_validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise RobustevalError(f"cannot read '{path}': {error.strerror}.") from error
    except ValidationError as error:
        raise RobustevalError(f"'{path}' is not a model card: {first_problem(error)}") from error


def describe(spec: PluginSpec) -> str:
    """Return e.g. ``wide_resnet(depth=34)``."""
    params = ", ".join(f"{key}={value}" for key, value in sorted(spec.params.items()))
    return f"{spec.name}({params})" if params else spec.name
