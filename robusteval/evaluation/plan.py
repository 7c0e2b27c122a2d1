"""What one evaluation needs, loaded and checked, and how it judges one chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from robusteval.datasets.base import Split, in_order
from robusteval.datasets.open import open_dataset
from robusteval.errors import UsageError
from robusteval.evaluation.chunks import ChunkResult, save_chunk
from robusteval.evaluation.config import MIN_BATCH, EvalConfig, check_seed
from robusteval.evaluation.defaults import fill_in
from robusteval.evaluation.judge import Judgement, judge
from robusteval.evaluation.ladder import budgets
from robusteval.evaluation.preflight import (
    SAMPLES,
    check_allowed,
    foreseen,
    inspect,
    noise_of_training,
    refuse_unless_allowed,
    training_alarms,
)
from robusteval.evaluation.probe import OutOfMemoryError, Probe, failures
from robusteval.evaluation.suite import Stage, Suite, load_suite
from robusteval.models.base import LoadedModel, check_fit, frozen
from robusteval.models.io import load_model, weights_digest
from robusteval.provenance import DECIDING, cpu_count, deterministic, pick_device, version_of
from robusteval.report import Finding, Search
from robusteval.rng import SampleRng, derive_seed, seeded
from robusteval.threat import Norm, ThreatModel

T = TypeVar("T")


@dataclass
class Halvings:
    """How often the batch size had to be halved in this process, as the device ran out of memory."""

    count: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything an evaluation needs, loaded and checked.

    ``split`` holds only the samples to evaluate; ``budgets`` are ``threat`` and what else is asked, ascending; a model
    that is ``in_memory`` only cannot be sent to workers. ``halvings`` is what was learned of the device meanwhile.
    """

    config: EvalConfig
    model: LoadedModel
    split: Split
    available: int
    threat: ThreatModel
    budgets: tuple[ThreatModel, ...]
    suite: Suite
    device: torch.device
    in_memory: bool
    halvings: Halvings = field(default_factory=Halvings)

    @property
    def chunks(self) -> range:
        """Indices of all chunks."""
        return range(-(-len(self.split) // self.config.chunk_size))

    @property
    def batch_size(self) -> int:
        """Images on the device at once, as far as its memory is known to reach; `Probe` fills up what is less."""
        asked = min(self.config.batch_size or self.config.chunk_size, self.config.chunk_size)
        return max(MIN_BATCH, asked >> self.halvings.count)

    @property
    def workers(self) -> int:
        """Processes: by default one per CPU core, one on an accelerator; never more than chunks."""
        if self.in_memory:
            return 1
        default = cpu_count() if self.device.type == "cpu" else 1
        return min(self.config.workers or default, len(self.chunks))


def prepare(config: EvalConfig, model: LoadedModel | None = None, suite: Suite | None = None) -> Plan:
    """Load data, model and suite; raise `UsageError` or `RobustevalError` for what does not fit together.

    ``model`` replaces loading ``config.model``, for a model that exists only in this process; ``suite`` replaces
    reading ``config.suite``.
    """
    check_seed(config.seed)
    check_allowed(config.allow)
    in_memory = model is not None
    if not in_memory:
        config = fill_in(config)
    norm, device = config.norm or Norm.LINF.value, pick_device(config.device)
    if config.eps is not None:
        ThreatModel.parse(norm, config.eps)  # a wrong budget is said before any file is read
    whole = in_order(open_dataset(config.dataset or "digits", config.data_dir, config.download).load("test"))
    split = whole.take(slice(0, config.limit)) if config.limit else whole
    info = split.info
    if info.num_classes < 2 or len(split) == 0:
        raise UsageError(f"{info.title} has {info.num_classes} classes and {len(split)} test images; need 2 and 1.")
    threat = ThreatModel.parse(norm, config.eps or info.customary_eps(Norm.parse(norm).value))
    asked = budgets(threat, config.curve)
    suite = suite or load_suite(config.suite, threat, config.smoothing)
    if config.search != Search() and (suite.repeat or suite.smoothing):
        raise UsageError(
            f"suite '{suite.name}' decides by votes, for which attacks must search in float32, not compiled."
        )
    if config.witnesses:
        suite = suite.after_transfer(config.witnesses)
    if model is None:
        sizes = (info.shape, info.num_classes)
        model = load_model(str(config.model), config.architecture, *sizes, mean=config.mean, std=config.std)
    curve = tuple(budget.label for budget in asked) if len(asked) > 1 else False
    config = config.model_copy(update={"norm": threat.norm.value, "eps": threat.label, "curve": curve})
    check_fit(model.module, info.shape, info.num_classes, f"model '{model.name}'")
    model.module.to(device)
    return Plan(config, model, split, len(whole), threat, asked, suite, device, in_memory)


def judge_chunk(plan: Plan, index: int, folder: Path, told: Callable[[str], None] = lambda stage: None) -> ChunkResult:
    """Judge chunk ``index`` on one CPU thread and write it to ``folder``."""
    size = plan.config.chunk_size
    rows = torch.arange(index * size, min((index + 1) * size, len(plan.split)))
    ids, seed = tuple(plan.split.ids[rows].tolist()), plan.config.seed
    judgement = judge_samples(plan, rows, SampleRng(seed, ids, derive_seed(seed, "chunk", index)), told)
    save_chunk(folder, index, judgement, plan.batch_size)
    return ChunkResult(rows=judgement.rows, stages=judgement.stages, batch_size=plan.batch_size)


def judge_samples(
    plan: Plan,
    rows: Tensor,
    rng: SampleRng,
    told: Callable[[str], None] = lambda stage: None,
    stages: Sequence[Stage] | None = None,
) -> Judgement:
    """Judge the samples at the places ``rows`` (n,) of the split on one CPU thread, by ``stages`` or the whole suite.

    Where the device runs out of memory, they are judged anew with batches of half the size, down to `MIN_BATCH`.
    """
    x, y, ids = plan.split.images(rows).to(plan.device), plan.split.labels[rows].to(plan.device), plan.split.ids[rows]
    suite = plan.suite
    how = (suite.skip_certified, suite.repeat or suite.smoothing, told, plan.budgets, plan.config.queries)

    def judged() -> Judgement:
        with deterministic(threads=1), seeded(rng.batch, plan.device), frozen(plan.model.module) as module:
            probe = Probe(module, plan.batch_size, plan.config.search)
            return judge(probe, x, y, ids, plan.threat, suite.stages() if stages is None else stages, rng, *how)

    return within_memory(plan, judged, told)


def within_memory(plan: Plan, compute: Callable[[], T], told: Callable[[str], None] = lambda stage: None) -> T:
    """Return what ``compute`` does; where the device runs out of memory, halve the plan's batches and call it again.

    A randomised model's error is raised: how a batch is split decides what such a model draws.
    """
    while True:
        try:
            return compute()
        except OutOfMemoryError:
            if plan.batch_size == MIN_BATCH or _randomised(plan):
                raise
            plan.halvings.count += 1
            told(f"out of memory, batch size {plan.batch_size}")


def preflight(plan: Plan) -> list[Finding]:
    """Return what the checks on the first samples find; raise `RobustevalError` for what is not allowed."""
    findings = checks(plan)
    refuse_unless_allowed(findings, plan.config.allow)
    return findings


def checks(plan: Plan) -> list[Finding]:
    """Run the checks on the first samples."""
    x, y = plan.split.images(slice(0, SAMPLES)).to(plan.device), plan.split.labels[:SAMPLES].to(plan.device)
    found_training, num_classes = plan.model.module.training, plan.split.info.num_classes

    def inspected() -> list[Finding]:
        drawing = seeded(derive_seed(plan.config.seed, "preflight"), plan.device)
        with deterministic(threads=1), drawing, frozen(plan.model.module) as module, failures("the model"):
            return inspect(module, x, y, num_classes, found_training, plan.threat, plan.batch_size)

    findings = foreseen(within_memory(plan, inspected), plan.suite.repeat is not None, plan.suite.gradient_free)
    findings += training_alarms(plan.model.training)
    if plan.suite.smoothing:
        findings += noise_of_training(plan.model.training, plan.suite.smoothing.sigma)
    return findings


def _randomised(plan: Plan) -> bool:
    return plan.suite.repeat is not None or "randomised" in plan.config.allow


def _behaviour(plan: Plan) -> str:
    """Hash the logits of the first samples: code that computes something else shows here.

    A randomised model is asked twice with one seed: "randomised" if it draws from elsewhere.
    """
    with torch.no_grad(), deterministic(threads=1), frozen(plan.model.module) as module, failures("the model"):
        said = [_thousandths(plan, module) for _ in range(2 if _randomised(plan) else 1)]
    same = torch.equal(said[0], said[-1])
    return hashlib.sha256(said[0].numpy().tobytes()).hexdigest() if same else "randomised"


def _thousandths(plan: Plan, module: nn.Module) -> Tensor:
    x = plan.split.images(slice(0, SAMPLES)).to(plan.device)
    with seeded(derive_seed(plan.config.seed, "behaviour"), plan.device):
        logits: Tensor = Probe(module, MIN_BATCH)(x)  # in parts that do not depend on --batch-size, to round alike
    return logits.double().mul(1000).round().cpu()


def identity(plan: Plan) -> dict[str, object]:
    """Return what a resumed run must share: settings, versions, and hashes of weights, data and suite."""
    return {
        "command": "evaluate",
        **plan.config.identity(),
        "device": plan.device.type,
        "versions": {package: version_of(package) for package in DECIDING},
        "weights_sha256": weights_digest(plan.model.module),
        "data_sha256": plan.split.content_hash,
        "logits_sha256": _behaviour(plan),
        "suite_sha256": plan.suite.sha256,
        # how a batch is split decides in which order a randomised model draws
        **({"batch_size": plan.batch_size} if _randomised(plan) else {}),
    }
