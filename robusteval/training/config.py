"""The settings of a training run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from robusteval.settings import Budget, PluginSpec, Settings
from robusteval.training.adversary import Adversary
from robusteval.training.schedule import Schedule

EXECUTION_ONLY = frozenset({"data_dir", "download", "device", "threads"})
"""Settings that say where and how a run is executed, not what it computes; a resumed run may change them."""


class Optimizer(Settings):
    """Stochastic gradient descent with momentum; weight decay acts on every parameter."""

    lr: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    nesterov: bool = False


class Validation(Settings):
    """The held-out part of the training data that selects the best epoch; the test part is never touched.

    ``size`` None is the smaller of 1000 and a tenth of the training data. ``seed`` draws the split and the attack,
    and is apart from the run's, so that runs with different seeds are selected on the same samples.
    """

    size: int | None = Field(default=None, ge=1)
    seed: int = 0
    steps: int = Field(default=20, ge=1)


class ObjectiveSpec(PluginSpec):
    """A training objective; naming it is optional, so that its hyper-parameters can be set alone."""

    name: str = "sovr"


class ModelSpec(PluginSpec):
    """An architecture; naming it is optional, so that its hyper-parameters can be set alone."""

    name: str = "small_cnn"


class TrainConfig(Settings):
    """Everything a training run depends on. ``eps`` None is the dataset's customary one for ``norm``.

    ``ema`` is the decay of an exponential moving average of the weights, which is then what is validated and
    saved; 0 turns it off. ``augment`` allows the crops and flips that the dataset declares label-preserving.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    download: bool = False
    model: ModelSpec = ModelSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    norm: str = "Linf"
    eps: Budget | None = None
    adversary: Adversary = Adversary()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=128, ge=2)
    ema: float = Field(default=0.0, ge=0, lt=1)
    validation: Validation = Validation()
    augment: bool = True
    precision: Literal["float32"] = "float32"
    seed: int = 0
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, the settings that runs must share to be the same run."""
        return self.model_dump(mode="json", exclude=set(EXECUTION_ONLY))
