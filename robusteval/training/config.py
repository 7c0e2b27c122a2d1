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
    """Stochastic gradient descent with momentum, or Adam, which takes the rate and the decay alone.

    Weight decay acts on every parameter; Adam's is added to the gradient (Kingma & Ba 2015, arXiv 1412.6980).
    """

    name: Literal["sgd", "adam"] = "sgd"
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


class Average(Settings):
    """An average of the weights, which is then what is validated and saved.

    ema: exponential, after every step, with the decay ``min(decay, (1 + s) / (10 + s))`` at step s, as SEAT uses it
    (Wang & Wang 2022, ICLR). swa: uniform over the ends of epochs (Izmailov et al. 2018, arXiv 1803.05407). Both
    begin at the fraction ``start`` of the training; before it the average is a copy. ``buffers`` says where
    BatchNorm's statistics come from: averaged like the weights, copied from the model, or recomputed on the clean
    training images before each validation.
    """

    name: Literal["none", "ema", "swa"] = "none"
    decay: float = Field(default=0.999, ge=0, lt=1)
    start: float = Field(default=0.0, ge=0, lt=1)
    buffers: Literal["average", "copy", "recompute"] = "average"


class AWP(Settings):
    """Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884); ``gamma`` 0 turns it off.

    ``gamma`` is each weight tensor's relative perturbation; it begins at the fraction ``start`` of the training.
    """

    gamma: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    start: float = Field(default=0.0, ge=0, lt=1)


class Extra(Settings):
    """More training data: ``fraction`` of every batch comes from the training part of ``dataset``.

    ``dataset`` None turns it off. An epoch keeps its number of steps, so it sees ``1 - fraction`` of the original data.
    """

    dataset: str | None = None
    data_dir: str | None = None
    fraction: float = Field(default=0.5, gt=0, lt=1)


class ObjectiveSpec(PluginSpec):
    """A training objective; naming it is optional, so that its hyper-parameters can be set alone."""

    name: str = "sovr"


class ModelSpec(PluginSpec):
    """An architecture; naming it is optional, so that its hyper-parameters can be set alone."""

    name: str = "small_cnn"


class TrainConfig(Settings):
    """Everything a training run depends on. ``eps`` None is the dataset's customary one for ``norm``.

    ``train_limit`` keeps so many training samples, each class in proportion, after the validation samples were cut
    off. ``init`` "ibp" draws the weights for training on interval bounds. ``augment`` allows the crops and flips that
    the dataset declares label-preserving. ``label_smoothing`` acts on the cross-entropy that is descended, not on the
    one attacks ascend. ``precision`` bfloat16 runs the network under autocast; weights, losses, bounds and rankings
    stay float32, and validation decides in float32.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    download: bool = False
    model: ModelSpec = ModelSpec()
    init: Literal["architecture", "ibp"] = "architecture"
    objective: ObjectiveSpec = ObjectiveSpec()
    norm: str = "Linf"
    eps: Budget | None = None
    adversary: Adversary = Adversary()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=128, ge=2)
    clip_grad_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    average: Average = Average()
    awp: AWP = AWP()
    extra: Extra = Extra()
    train_limit: int | None = Field(default=None, ge=2)
    validation: Validation = Validation()
    augment: bool = True
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, the settings that runs must share to be the same run."""
        return self.model_dump(mode="json", exclude=set(EXECUTION_ONLY))
