"""Whether the model that came with a report does what the report says: predictions and adversarial inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from robusteval.datasets.base import Split, in_order
from robusteval.datasets.open import DATASETS, open_dataset
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.assemble import SAMPLES
from robusteval.evaluation.validate import read_report
from robusteval.leaderboard.bundle import MODEL, Refused, limits_of, unpack
from robusteval.models.base import check_fit, frozen
from robusteval.models.io import load_folder, weights_digest
from robusteval.provenance import deterministic
from robusteval.report import Report, SampleRow
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict
from robusteval.witnesses import load_witnesses, witness_files

BATCH = 250
ROUNDING = 1e-4
"""Logits of the same network on another machine differ by less than this share of their size."""


def checked(folder: Path, data_dir: str | None) -> tuple[str, str]:
    """Return ``checked``, ``refuted`` or, where nothing could be decided here, ``claimed``; and the reason.

    ``folder`` is a valid report with its model in ``model/``; ``data_dir`` has the data sets, each in a folder of its
    name or all in one. A predicted class counts as contradicted only beyond rounding.
    """
    report = read_report(folder)
    if report.suite.repeat or report.suite.smoothing:
        return "claimed", "Verdicts by repeated or noisy evaluations cannot be replayed."
    try:
        split = _split(report, data_dir)
        model = load_folder(folder / MODEL, report.data.shape, len(report.data.classes)).module
    except UsageError as error:
        return "claimed", f"It cannot be run here: {error}"
    except RobustevalError as error:
        return "refuted", f"The model that came along is damaged: {error}"
    problem = next(_problems(folder, report, split, model), None)
    if problem:
        return "refuted", problem
    return (
        "checked",
        f"{len(split)} predictions and {report.results.verdicts[Verdict.BROKEN]} broken samples were replayed.",
    )


def _split(report: Report, data_dir: str | None) -> Split:
    """Return the samples of the report; raise `UsageError` when this server does not have them."""
    name, missing = report.data.name, f"this server does not have the data set '{report.data.name}'."
    if name not in DATASETS.names() or "path" in getattr(DATASETS.get(name), "__dataclass_fields__", {}):
        raise UsageError(missing)
    own = Path(data_dir) / name if data_dir else None
    try:
        whole = in_order(open_dataset(name, str(own) if own and own.is_dir() else data_dir).load("test"))
    except RobustevalError as error:
        raise UsageError(missing) from error
    return whole.take(slice(0, report.data.evaluated))


def _problems(folder: Path, report: Report, split: Split, model: nn.Module) -> Iterator[str]:
    """Yield what is not as the report says, the cheapest first; all that follows presumes what came before."""
    if split.content_hash != report.data.sha256:
        yield f"The data are not those of '{report.data.name}'."
        return
    if weights_digest(model) != report.model.weights_sha256:
        yield "The weights that came along are not those of the report."
        return
    rows = [SampleRow.model_validate_json(line) for line in (folder / SAMPLES).read_bytes().splitlines()]
    if [row.label for row in rows] != split.labels.tolist():
        yield "The labels are not those of the data."
        return
    with torch.no_grad(), deterministic(threads=1), frozen(model) as network:
        check_fit(network, report.data.shape, len(report.data.classes), "The model")
        yield from _clean(rows, split, network)
        for path in witness_files(folder):
            yield from _witnesses(path, report, rows, split, network)


def _clean(rows: list[SampleRow], split: Split, network: nn.Module) -> Iterator[str]:
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        logits = _logits(network, split.images(slice(start, start + BATCH)))
        stated = torch.tensor([row.prediction for row in part])
        for row, lead in zip(part, _behind(logits, stated), strict=True):
            if lead > 0:
                yield f"Sample {row.id} is not predicted as class {row.prediction}."


def _witnesses(path: Path, report: Report, rows: list[SampleRow], split: Split, network: nn.Module) -> Iterator[str]:
    ids, everything = load_witnesses(path)
    widest = max((point.eps for point in report.curve), default=report.threat.eps, key=lambda eps: _radius(report, eps))
    threat = ThreatModel.parse(report.threat.norm, widest)
    for start in range(0, len(ids), BATCH):
        part = ids[start : start + BATCH]
        x, x_adv = split.images(part), everything[start : start + BATCH]
        distances, inside = threat.distance(x, x_adv), threat.contains(x, x_adv)
        labels = split.labels[part]
        leads = _ahead(_logits(network, x_adv), labels)
        for sample, near, distance, lead in zip(part, inside, distances.tolist(), leads, strict=True):
            stated = rows[sample].adv_distance
            if not near or stated is None or distance > stated + report.threat.tolerance:
                yield f"The adversarial input of sample {sample} is {distance:.6g} away, or outside [0, 1]."
            if lead > 0:
                yield f"The adversarial input of sample {sample} is classified correctly."


def _radius(report: Report, eps: str) -> float:
    return ThreatModel.parse(report.threat.norm, eps).radius


def _logits(network: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = network(x)
    return logits


def _behind(logits: Tensor, stated: Tensor) -> Tensor:
    """Return by how much the largest logit leads that of the ``stated`` class, less what rounding explains (N,)."""
    own = logits.gather(1, stated[:, None]).squeeze(1)
    return logits.amax(1) - own - _slack(logits)


def _ahead(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the label's logit leads every other, less what rounding explains (N,)."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return own - others - _slack(logits)


def _slack(logits: Tensor) -> Tensor:
    return ROUNDING * logits.abs().amax(1).clamp_min(1)


def replay(bundle: str, folder: str, data_dir: str | None, limits: dict[str, int]) -> tuple[str, str]:
    """Unpack a stored bundle and check it; runs in a cage."""
    try:
        unpack(Path(bundle), Path(folder), limits_of(limits))
    except Refused as refused:
        return "claimed", f"The bundle cannot be read any more: {refused}"
    return checked(Path(folder), data_dir)
