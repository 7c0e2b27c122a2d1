"""A training run before its first step: settings resolved, plug-ins built, data loaded and split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch

from robusteval.catalog import parameters
from robusteval.datasets.base import Cut, DataInfo, Split
from robusteval.datasets.open import open_dataset
from robusteval.errors import UsageError
from robusteval.models.base import Classifier, check_fit
from robusteval.models.io import ARCHITECTURES, build_model
from robusteval.provenance import pick_device
from robusteval.rng import derive_seed, generator
from robusteval.runs import digest
from robusteval.threat import Norm, ThreatModel
from robusteval.training.config import TrainConfig
from robusteval.training.extra import extra_rows, join, refuse_overlap
from robusteval.training.initialise import ibp_init
from robusteval.training.network import prepared
from robusteval.training.objective import OBJECTIVES, Objective
from robusteval.training.parallel import ALONE, Team, launched_team, own_device

TINY_BATCH = 2**16
"""Pixel values in a batch up to which one CPU thread is the default."""


@dataclass(frozen=True)
class Plan:
    """What a run will do. ``config`` is resolved: no eps, size or hyper-parameter is left to a default.

    ``cut`` parted ``train`` from ``validation``; the last ``extra`` rows of ``train`` are the extra data.
    """

    config: TrainConfig
    objective: Objective
    threat: ThreatModel
    train: Split
    validation: Split
    cut: Cut
    device: torch.device
    data_sha256: str
    extra: int = 0
    team: Team = ALONE

    @property
    def info(self) -> DataInfo:
        """Facts about the dataset."""
        return self.train.info

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; a last batch of one sample per process is dropped: BatchNorm needs two."""
        full, rest = divmod(len(self.train) - self.extra, self.config.batch_size)
        return full + (rest >= 2 * self.team.size)

    @property
    def threads(self) -> int | None:
        """CPU threads, None for torch's choice: one for tiny batches, where several mostly wait for each other."""
        tiny = self.config.batch_size * math.prod(self.info.shape) <= TINY_BATCH
        return self.config.threads or (1 if tiny else None)

    @property
    def dtype(self) -> torch.dtype:
        """The type of inputs and weights."""
        return torch.float64 if self.config.precision == "float64" else torch.float32

    @property
    def population(self) -> int:
        """One more than the largest sample id."""
        return 1 + int(max(self.train.ids.max(), self.validation.ids.max()))

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this run this run, as JSON values: the settings and the data's hash."""
        return {"command": "train", **self.config.identity(), "data_sha256": self.data_sha256}

    @property
    def name(self) -> str:
        """A folder name that the same settings always give."""
        parts = (self.config.objective.name, self.config.dataset, self.config.model.name)
        words = "-".join("".join(c if c.isalnum() or c == "_" else "_" for c in part) for part in parts)
        return f"{words}-{digest(self.identity)[:8]}"

    def build_model(self) -> Classifier:
        """Return freshly initialised weights, drawn from the run's seed; the global generator is left as found."""
        info, seed = self.info, derive_seed(self.config.seed, "weights")
        model = build_model(self.config.model, info.shape, info.num_classes, info.mean, info.std, seed)
        if self.config.init == "ibp":
            ibp_init(model, generator(self.config.seed, "ibp weights"))
        return cast(Classifier, prepared(model.to(self.device), self.config))


def prepare(config: TrainConfig) -> Plan:
    """Load the data and resolve every setting; raise `UsageError` for one that cannot be."""
    objective = OBJECTIVES.build(config.objective.name, config.objective.params)
    architecture = ARCHITECTURES.build(config.model.name, config.model.params)
    team, device = launched_team(), own_device(pick_device(config.device))
    whole = open_dataset(config.dataset, config.data_dir, config.download).load("train")
    threat = ThreatModel.parse(config.norm, config.eps or whole.info.customary_eps(Norm.parse(config.norm).value))
    if not threat.convex:
        raise UsageError(f"{threat} cannot be trained against: its ball is not convex; use Linf, L2 or L1.")
    size = config.validation.size or min(1000, len(whole) // 10)
    cut = Cut(held_out=size, seed=config.validation.seed, limit=config.train_limit)
    train, validation = cut(whole)
    if config.batch_size < 2 * team.size:
        raise UsageError(
            f"batch_size = {config.batch_size} is less than two samples for each of {team.size} processes."
        )
    if len(train) < 2:
        raise UsageError(
            f"validation.size = {size} leaves {len(train)} of {len(whole)} samples to train on; at least 2."
        )
    sha256 = whole.content_hash
    extra = 0
    if config.extra.dataset:
        extra_rows(config.batch_size, config.extra.fraction)
        more = open_dataset(config.extra.dataset, config.extra.data_dir).load("train")
        refuse_overlap(more, validation)
        train, extra = join(train, more, len(whole)), len(more)
        sha256 = digest([sha256, more.content_hash])
    resolved = config.model_copy(
        update={
            "objective": config.objective.model_copy(update={"params": parameters(objective)}),
            "model": config.model.model_copy(update={"params": parameters(architecture)}),
            "norm": threat.norm.value,
            "eps": threat.label,
            "validation": config.validation.model_copy(update={"size": size}),
        }
    )
    plan = Plan(resolved, objective, threat, train, validation, cut, device, sha256, extra, team)
    check_fit(plan.build_model(), plan.info.shape, plan.info.num_classes, f"model '{config.model.name}'")
    return plan
