"""The settings of a comparison; a preset is one of them as a TOML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from robusteval.errors import UsageError, nearest, unknown
from robusteval.evaluation.config import EvalConfig
from robusteval.settings import PluginSpec, Settings
from robusteval.training.config import TrainConfig

FOLDER = Path(__file__).parent

_OWN = {"train": {"objective", "seed"}, "evaluate": {"model", "architecture", "dataset", "data_dir", "norm", "eps"}}
_OWN["evaluate"] |= {"download", "suite", "workers", "device"}
"""Settings of a cell that the comparison itself decides."""


class Contender(PluginSpec):
    """An objective in the comparison; ``label`` names its row and its folders."""

    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:  # said here, as `resolve` cannot look into lists
                raise ValueError(f"an objective has no '{key}'.{nearest(key, cls.model_fields)}")
        return {"label": value.get("name", ""), **value} if isinstance(value, dict) else value

    @field_validator("label")
    @classmethod
    def _names_a_folder(cls, label: str) -> str:
        if not re.fullmatch(r"[\w.+-]+", label) or label.startswith("."):
            raise ValueError("it names a folder: use letters, digits, '_', '.', '+' and '-'")
        return label


class CompareConfig(Settings):
    """Everything `compare` depends on.

    All runs share the recipe ``train`` and are attacked with ``suite``; the first ``full_seeds`` seeds of each
    objective with ``full_suite``, which must begin with the stages of ``suite`` and so includes it. ``reference`` is
    the label that the others are tested against. Seeds are 0 to ``seeds - 1``. ``params`` maps labels to
    hyper-parameters that replace those of the list, so that one of a preset can be set alone.
    """

    title: str = "Comparison of training objectives"
    objectives: tuple[Contender, ...] = Field(min_length=1)
    params: dict[str, dict[str, Any]] = Field(default_factory=dict)
    reference: str = "at"
    seeds: int = Field(default=3, ge=1, le=1000)
    suite: str = "apgd"
    full_suite: str = "standard"
    full_seeds: int = Field(default=1, ge=0)
    margin_steps: int = Field(default=20, ge=1)
    train: TrainConfig = TrainConfig()
    evaluate: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        labels = [row.label for row in self.objectives]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"label '{label}' is repeated")
        for label in self.params:
            if label not in labels:
                raise ValueError(f"there is no objective '{label}'.{nearest(label, labels)}")
        if "reference" in self.model_fields_set and self.reference not in labels:
            raise ValueError(f"reference '{self.reference}' is no objective's label.{nearest(self.reference, labels)}")
        for part, own in _OWN.items():
            for key in sorted(getattr(self, part).model_fields_set & own):
                raise ValueError(f"{part}.{key} is decided by the comparison and cannot be set")
        return self

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """The objectives with their hyper-parameters."""
        own = ((row, self.params.get(row.label, {})) for row in self.objectives)
        return tuple(row.model_copy(update={"params": {**row.params, **params}}) for row, params in own)

    def pick(self, labels: tuple[str, ...]) -> CompareConfig:
        """Return the comparison with only the rows called ``labels``, in that order; raise `UsageError`."""
        rows = {row.label: row for row in self.objectives}
        for label in labels:
            if label not in rows:
                raise unknown("objective of this comparison", label, rows)
        return self.model_copy(update={"objectives": tuple(rows[label] for label in dict.fromkeys(labels))})

    def identity(self) -> dict[str, Any]:
        """Return the settings that all cells of a folder must share; rows and seeds may be added to it later."""
        own = self.model_dump(mode="json", include={"suite", "full_suite", "margin_steps"})
        train, evaluate = self.train.identity(), self.evaluate.identity()
        shared = {
            "train": {key: value for key, value in train.items() if key not in _OWN["train"]},
            "evaluate": {key: value for key, value in evaluate.items() if key not in _OWN["evaluate"]},
        }
        return {"command": "compare", **own, **shared}


def presets() -> dict[str, Path]:
    """Return preset name -> file."""
    return {path.stem: path for path in sorted((FOLDER / "presets").glob("*.toml"))}


def source(preset: str | None, config: Path | None) -> Path | None:
    """Return the file that a preset's name, or else ``config``, stands for; raise `UsageError`."""
    if preset is None:
        return config
    if config is not None:
        raise UsageError(f"--preset {preset} and --config {config} are both a whole comparison; give one of them.")
    if preset not in presets():
        raise unknown("preset", preset, presets())
    return presets()[preset]
