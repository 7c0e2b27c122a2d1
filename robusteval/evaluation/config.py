"""The settings of an evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from robusteval.errors import UsageError
from robusteval.evaluation.ladder import largest
from robusteval.report import Search
from robusteval.settings import Budget, PluginSpec, Settings

MIN_BATCH = 16
"""Batches are filled up to this size: below it CPU kernels sum in another order, which would show in the last bit."""
EXECUTION_ONLY = frozenset({"data_dir", "download", "batch_size", "workers", "allow"})
"""Settings that say where things are or how to run, and cannot change a verdict."""


class SmoothingChanges(Settings):
    """What to change in a suite's [smoothing]; None leaves it as it is."""

    sigma: float | None = None
    n0: int | None = None
    n: int | None = None
    alpha: float | None = None
    looks: tuple[int, ...] | None = None


class EvalConfig(Settings):
    """Everything `evaluate` can be told.

    ``chunk_size`` is the batch that attacks see, ``batch_size`` how many images the device holds at once (None: a
    chunk; at least `MIN_BATCH`), ``limit`` the number of test images from the start (None: all).
    ``witnesses`` is the folder of another evaluation whose adversarial inputs are tried first.
    ``precision`` and ``compiled`` are how attacks run the model while they search; float32 decides.
    ``smoothing`` changes the suite's noise and samples, where it is about a smoothed classifier.
    ``queries`` is how many forward passes all attacks together may spend on a sample, None: no limit.
    ``mean`` and ``std`` (one value per channel) say how a bare weights file was trained.
    ``curve`` asks for other budgets, too: a list, or True for the customary multiples of ``eps``; several budgets given
    as ``eps`` are a curve whose largest is eps.
    ``model``, ``dataset``, ``norm`` and ``eps`` may be None until `defaults.fill_in` has filled them in.
    """

    model: str | None = None
    architecture: PluginSpec | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dataset: str | None = None
    data_dir: str | None = None
    download: bool = False
    norm: str | None = None
    eps: Budget | None = None
    curve: bool | tuple[Budget, ...] = False
    suite: str = "standard"
    smoothing: SmoothingChanges | None = None
    witnesses: str | None = None
    queries: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False
    limit: int | None = None
    seed: int = 0
    chunk_size: int = 250
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    extra_data: bool | None = None
    allow: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _several_budgets(cls, given: Any) -> Any:
        eps = given.get("eps") if isinstance(given, dict) else None
        labels = eps.split(",") if isinstance(eps, str) else eps
        if not isinstance(labels, list | tuple) or (isinstance(eps, str) and len(labels) == 1):
            return given
        if given.get("curve"):
            raise ValueError("several eps are a curve already; give one eps, or leave 'curve' out")
        several = tuple(str(label).strip() for label in labels)
        if not several:
            raise ValueError("give at least one eps")
        return {**given, "eps": largest(several), "curve": several}

    @field_validator("limit", "queries", "chunk_size", "batch_size", "workers")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("give at least 1")
        return value

    @property
    def search(self) -> Search:
        """How attacks run the model."""
        return Search(precision=self.precision, compiled=self.compiled)

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share."""
        settings: dict[str, Any] = self.model_dump(mode="json", exclude=set(EXECUTION_ONLY))
        return settings


def check_seed(seed: int) -> None:
    """Raise `UsageError` unless ``seed`` is one that every library accepts."""
    if not 0 <= seed < 2**31:
        raise UsageError(f"seed {seed} is out of range; give one from 0 to {2**31 - 1}.")
