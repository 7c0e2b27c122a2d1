"""Check a report with the model and the data at hand: its evidence is replayed, nothing is searched for.

What stays a claim is what no evidence tells: seconds, passes, versions, and that attacks tried as hard as they say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from robusteval.catalog import first_problem
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.aftermath import abstentions, aftermath
from robusteval.evaluation.assemble import SAMPLES
from robusteval.evaluation.chunks import witness_path
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import Plan, checks, prepare, within_memory
from robusteval.evaluation.preflight import STOPPING
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.proofs import load_proofs, proof_path
from robusteval.evaluation.replay import DRAWN_AGAIN, Chunk, Replayed, replay
from robusteval.evaluation.suite import Suite, load_suite
from robusteval.evaluation.validate import read_report, validate
from robusteval.models.base import LoadedModel, frozen
from robusteval.models.io import parameter_count, weights_digest
from robusteval.provenance import deterministic
from robusteval.report import ModelFacts, Report, SampleRow, Search, broken_at
from robusteval.rng import SampleRng, derive_seed
from robusteval.runs import CONFIG, LAUNCH, read_json
from robusteval.settings import PluginSpec
from robusteval.suites import suite_files
from robusteval.witnesses import load_witnesses


@dataclass(frozen=True)
class Verification:
    """What is wrong with a report, sample by sample where it can be said, and what was replayed at which cost."""

    problems: tuple[str, ...]
    replayed: Replayed = field(default_factory=Replayed)
    seconds: float = 0.0
    run_seconds: float = 0.0


@dataclass(frozen=True)
class Source:
    """Where the one who checks has model and data; None: where the run says, if that is a file or folder here.

    ``votes`` is the share of samples on which a smoothed classifier's votes are drawn again.
    """

    model: str | None = None
    architecture: PluginSpec | None = None
    dataset: str | None = None
    data_dir: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    votes: float = DRAWN_AGAIN


def subject(folder: Path, source: Source) -> Plan:
    """Load what the report in ``folder`` is about; raise `UsageError` where the user must say where it is.

    A report may come from anyone, so a model that is code or is fetched from elsewhere is only loaded if the user
    names it.
    """
    report = read_report(folder)
    try:
        stated = {key: value for key, value in read_json(folder / CONFIG).items() if key in EvalConfig.model_fields}
        config = EvalConfig.model_validate(stated)
    except (ValidationError, AttributeError) as error:
        said = first_problem(error) if isinstance(error, ValidationError) else "it is no table"
        raise RobustevalError(f"'{folder / CONFIG}' is damaged: {said}") from error
    model = source.model or config.model
    if source.model is None and not (model and Path(model).exists()):
        raise UsageError(f"the report is about model '{model}', which is no file here; name it with --model.")
    several = tuple(point.eps for point in report.curve)
    changes: dict[str, Any] = {
        "model": model,
        "dataset": source.dataset or report.data.name,
        "data_dir": source.data_dir or _data_dir(folder),
        "norm": report.threat.norm,
        "eps": report.threat.eps,
        "curve": several or False,
        "limit": report.data.evaluated,
        "seed": report.seed,
        **report.search.model_dump(),
        "queries": report.queries,
        "chunk_size": report.chunk_size,
        "batch_size": source.batch_size,
        "device": source.device,
        "witnesses": None,
        "download": False,
        "allow": tuple(finding.name for finding in report.findings if finding.name in STOPPING),
    }
    if source.architecture or Path(str(model)).is_dir():
        changes["architecture"] = source.architecture
    return prepare(config.model_copy(update=changes), suite=Suite.of(report.suite))


def _data_dir(folder: Path) -> str | None:
    """Return where the data lay when the run was made, if it was made on this machine."""
    launch = read_json(folder / LAUNCH) if (folder / LAUNCH).is_file() else {}
    stated = launch.get("data_dir") if isinstance(launch, dict) else None
    return stated if isinstance(stated, str) and Path(stated).exists() else None


def verify(folder: Path, source: Source) -> Verification:
    """Check everything in ``folder`` that evidence tells; see `Verification`.

    Raises `UsageError` when model or data cannot be found, `RobustevalError` when the model cannot be run.
    """
    began = time.perf_counter()
    problems = validate(folder)
    if problems:
        return Verification(tuple(problems), seconds=time.perf_counter() - began)
    report, plan = read_report(folder), subject(folder, source)
    problems = mismatches(folder, report, plan)
    done = Replayed()
    if not problems:
        problems += _missing_findings(report, plan)
        lines = (folder / SAMPLES).read_text(encoding="utf-8").splitlines()
        with deterministic(threads=1), frozen(plan.model.module) as module:
            for index in plan.chunks:
                again = partial(_replayed, module, folder, index, lines, plan, source.votes)
                done = done.joined(within_memory(plan, again))
        problems += done.problems
    return Verification(tuple(problems), done, time.perf_counter() - began, report.seconds)


def _other_subject(report: Report, plan: Plan) -> Iterator[str]:
    """Yield why this is not what the report is about."""
    if report.model.weights_sha256 != weights_digest(plan.model.module):
        yield "the model has other weights than the report says"
    if report.data.sha256 != plan.split.content_hash:
        yield f"{report.data.title} holds other samples here than the report says"
    if report.data.total != plan.available:
        yield f"the report says that {report.data.part} has {report.data.total} samples; it has {plan.available}"
    if report.data.benchmark != plan.split.info.benchmark:
        yield f"the report says benchmark {report.data.benchmark}; the data are {plan.split.info.benchmark}"
    if (report.data.title, report.data.part, report.data.shape, report.data.classes) != _described(plan):
        yield f"the report describes other data than {' '.join(map(str, _described(plan)[:2]))}"
    yield from _other_model(report.model, plan.model)
    if report.suite.name in suite_files():
        ours = load_suite(report.suite.name, plan.threat)
        if (report.suite.title, report.suite.reference) != (ours.title, ours.reference):
            yield f"the report calls suite '{ours.name}' {report.suite.title!r}; it is {ours.title!r}"


def _described(plan: Plan) -> tuple[str, str, tuple[int, ...], tuple[str, ...]]:
    info = plan.split.info
    return info.title, plan.split.part, info.shape, info.classes


def _other_model(stated: ModelFacts, model: LoadedModel) -> Iterator[str]:
    """Yield what the report states of the model and its own card contradicts; bare weights have none."""
    if stated.parameters != parameter_count(model.module):
        yield f"the report says {stated.parameters} parameters; the model has {parameter_count(model.module)}"
    if not model.training:
        return
    for name in ("architecture", "extra_data", "training"):
        said, known = getattr(stated, name), getattr(model, name)
        if said and known is not None and said != (dict(known) if name == "training" else known):
            yield f"the model's card has another {name} than the report"


def mismatches(folder: Path, report: Report, plan: Plan) -> list[str]:
    """Return in what the model, the data or the settings of ``plan`` are not those of the report in ``folder``."""
    return [*_other_subject(report, plan), *_other_settings(folder, report)]


def _other_settings(folder: Path, report: Report) -> Iterator[str]:
    """Yield what the run's settings and its report say differently."""
    stated: Mapping[str, object] = read_json(folder / CONFIG)
    expected = {
        "seed": report.seed,
        **report.search.model_dump(),
        "chunk_size": report.chunk_size,
        "norm": report.threat.norm,
        "eps": report.threat.eps,
        "queries": report.queries,
        "weights_sha256": report.model.weights_sha256,
        "data_sha256": report.data.sha256,
        "suite_sha256": report.suite.sha256,
    }
    usual = Search().model_dump()  # of reports from before these could be set
    for key, value in expected.items():
        if stated.get(key, usual.get(key)) != value:
            yield f"{CONFIG} says {key} = {stated.get(key)!r}, the report {value!r}"


def _missing_findings(report: Report, plan: Plan) -> Iterator[str]:
    """Yield findings about model or stages that the report leaves out."""
    broken = broken_at(report.threat.eps, report.stages, report.curve)
    classes, norm = plan.split.info.num_classes, plan.threat.norm
    found = [*checks(plan), *aftermath(report.results, report.stages, broken, plan.suite, classes, norm)]
    found += abstentions(report.guarantee, report.data.evaluated) if report.guarantee else ()
    stated = {(finding.name, finding.severity, finding.origin) for finding in report.findings}
    for name, severity, origin in dict.fromkeys((one.name, one.severity, one.origin) for one in found):
        if (name, severity, origin) not in stated:
            yield f"the finding '{name}' ({severity}, by {origin}) is missing from the report"


def _replayed(module: nn.Module, folder: Path, index: int, lines: Sequence[str], plan: Plan, votes: float) -> Replayed:
    size, seed = plan.config.chunk_size, plan.config.seed
    rows = slice(index * size, (index + 1) * size)
    stored = [SampleRow.model_validate_json(line) for line in lines[rows]]
    path = witness_path(folder, index)
    ids, x_adv = load_witnesses(path) if path.exists() else ([], torch.zeros(0))
    witnesses: dict[int, Tensor] = dict(zip(ids, x_adv, strict=True))
    x, y = plan.split.images(rows).to(plan.device), plan.split.labels[rows].to(plan.device)
    rng = SampleRng(seed, tuple(plan.split.ids[rows].tolist()), derive_seed(seed, "chunk", index))
    probe, proofs = Probe(module, plan.batch_size), load_proofs(proof_path(folder, index))
    return replay(Chunk(probe, x, y, stored, witnesses, proofs, rng), plan, votes)
