"""The published record of an evaluation: its shape, which is also its JSON Schema.

All rates are fractions in [0, 1], stored in full; eps is stored as it was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from scipy.special import betaincinv
from scipy.stats import binom

from robusteval.provenance import Environment
from robusteval.verdict import Verdict

CONFIDENCE = 0.95
Sha256 = Field(pattern="^[0-9a-f]{64}$")
Severity = Literal["info", "warning", "error"]
Origin = Literal["robusteval", "autoattack", "foolbox"]


class Record(BaseModel):
    """Base of everything in a report: frozen, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Rate(Record):
    """``count`` of ``total`` with its exact (Clopper-Pearson) 95 % interval over draws of test samples."""

    count: int = Field(ge=0)
    total: int = Field(gt=0)
    rate: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)

    @classmethod
    def of(cls, count: int, total: int) -> Rate:
        """Compute rate and interval (Clopper & Pearson 1934, Biometrika 26(4)) from a count."""
        tail = (1 - CONFIDENCE) / 2
        low = float(betaincinv(count, total - count + 1, tail)) if count else 0.0
        high = float(betaincinv(count + 1, total - count, 1 - tail)) if count < total else 1.0
        return cls(count=count, total=total, rate=count / total, low=low, high=high)


class ModelFacts(Record):
    """Which model. ``weights_sha256`` covers names, types, shapes and bytes of its state."""

    name: str
    source: str
    architecture: str
    parameters: int = Field(ge=0)
    weights_sha256: str = Sha256
    extra_data: bool | None
    training: dict[str, Any]


class DataFacts(Record):
    """Which samples: the first ``evaluated`` of the ``total`` in ``part``, in the dataset's fixed order.

    ``sha256`` covers ids, labels and pixels of the evaluated samples.
    """

    name: str
    title: str
    part: str
    total: int = Field(gt=0)
    evaluated: int = Field(gt=0)
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    benchmark: str | None
    sha256: str = Sha256


class ThreatFacts(Record):
    """Norm and budget; ``tolerance`` is the slack for float32 rounding.

    ``eps`` is exact, as written; in L0 it is the number of values that may change.
    """

    norm: Literal["Linf", "L2", "L1", "L0"]
    eps: str
    radius: float = Field(gt=0)
    tolerance: float = Field(ge=0)


class StageSpec(Record):
    """One stage of a suite, as data; a ``minimal`` one looks for the nearest adversarial input, once for every eps."""

    name: str
    kind: Literal["attack", "certifier"]
    plugin: str
    params: dict[str, Any]
    minimal: bool = False


class Repeat(Record):
    """How a randomised model's answer on an input is decided: by this many fresh evaluations.

    An input counts as adversarial only if, with ``confidence`` (Clopper & Pearson 1934, one-sided), more than half of
    all evaluations would err.
    """

    evaluations: int = Field(gt=1, le=100_000)
    confidence: float = Field(gt=0.5, lt=1)

    @property
    def needed(self) -> int:
        """How many evaluations must err; more than there are if no number would do."""
        return int(binom.isf(1 - self.confidence, self.evaluations, 0.5)) + 1


class SuiteFacts(Record):
    """Which suite ran. ``adaptations`` lists where it had to depart from its definition.

    ``repeat`` is None where a sample is evaluated once.
    """

    name: str
    title: str
    reference: str
    sha256: str = Sha256
    stages: tuple[StageSpec, ...]
    skip_certified: bool
    repeat: Repeat | None = None
    adaptations: tuple[str, ...]


class StageResult(Record):
    """What a stage did: samples it was given and closed, of these broken, and candidates that were not accepted.

    In a run for several budgets a stage has an entry ``name@eps`` for each, or one called ``name`` that served all;
    ``entered`` and ``closed`` are samples open at its ``eps``, which is None where there is only one budget.
    ``rejected`` candidates were misclassified but outside the threat model, ``non_finite`` ones NaN or infinite,
    ``undecided`` ones misclassified in most of the repeated evaluations, but too few to rule out chance.

    Its cost is in passes (one image through the network once) and in seconds of one worker; ``zero_gradients`` and
    ``non_finite_gradients`` are how many of the backward passes ended in an input gradient that led nowhere.
    """

    name: str
    kind: Literal["attack", "certifier"]
    eps: str | None = None
    entered: int = Field(ge=0)
    closed: int = Field(ge=0)
    broken: int = Field(ge=0)
    rejected: int = Field(ge=0)
    non_finite: int = Field(ge=0)
    undecided: int = Field(default=0, ge=0)
    forward: int = Field(ge=0)
    backward: int = Field(ge=0)
    zero_gradients: int = Field(default=0, ge=0)
    non_finite_gradients: int = Field(default=0, ge=0)
    seconds: float = Field(ge=0)
    adaptations: tuple[str, ...]
    warnings: tuple[str, ...]


class Finding(Record):
    """Something a reader must know before believing the numbers, and what to do about it."""

    name: str
    severity: Severity
    origin: Origin
    message: str
    advice: str


class Results(Record):
    """The bracket ``certified <= true robust accuracy <= empirical <= clean`` and what it is counted from.

    ``certified`` is None when the suite has no certifier.
    """

    verdicts: dict[Verdict, int]
    clean: Rate
    empirical: Rate
    certified: Rate | None


class CurvePoint(Record):
    """The bracket at one of several budgets, and how many samples each stage closed at it, and of these broke."""

    eps: str
    radius: float = Field(gt=0)
    results: Results
    closed: dict[str, int]
    broken: dict[str, int]


class Neighbour(Record):
    """A RobustBench entry; accuracies in percent as published."""

    id: str
    architecture: str
    clean: float
    best_known: float
    extra_data: bool
    rank: int = Field(gt=0)


class Comparison(Record):
    """The place among comparable RobustBench entries, or ``reason`` why there is none.

    ``rank_best`` and ``rank_worst`` are the ranks at the ends of the 95 % interval; ``provisional`` means that only
    part of the test set was evaluated.
    """

    snapshot: str
    reason: str | None
    rank: int | None
    rank_best: int | None
    rank_worst: int | None
    provisional: bool
    entries: int
    neighbours: tuple[Neighbour, ...]
    notes: tuple[str, ...]


class Report(Record):
    """`report.json`: the header of an evaluation; one line per sample is in `samples.jsonl`.

    ``queries`` is how often, at most, all attacks together asked the model about a sample at each eps, None without
    such a budget. ``results`` are for ``threat``; ``curve`` has a point for every budget, ascending, if there are
    several.
    """

    schema_version: Literal["1.0"] = "1.0"
    kind: Literal["robusteval-report"] = "robusteval-report"
    created: str
    command: str
    seed: int
    chunk_size: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    workers: int = Field(gt=0)
    queries: int | None = Field(default=None, gt=0)
    seconds: float = Field(ge=0)
    model: ModelFacts
    data: DataFacts
    threat: ThreatFacts
    suite: SuiteFacts
    results: Results
    curve: tuple[CurvePoint, ...] = ()
    stages: tuple[StageResult, ...]
    findings: tuple[Finding, ...]
    baselines: Comparison
    environment: Environment


class SampleRow(Record):
    """One line of `samples.jsonl`.

    ``margin`` is the clean logit margin ``z_y - max_{k != y} z_k``, over repeated evaluations the share of right
    ones minus that of wrong ones; ``stage`` closed the sample; ``reason`` says why a sample stayed open. The ``adv_``
    fields describe the witness of a broken sample: its prediction, its margin for the true class (negative or zero)
    and its distance in the threat's norm.

    Where the report has a curve, ``stages`` says what closed the sample at each of its budgets, and the witness is the
    nearest found, so it may lie beyond the report's eps.
    """

    id: int = Field(ge=0)
    label: int = Field(ge=0)
    prediction: int = Field(ge=0)
    margin: float
    verdict: Verdict
    stage: str | None = None
    stages: tuple[str | None, ...] = ()
    reason: str | None = None
    adv_prediction: int | None = None
    adv_margin: float | None = None
    adv_distance: float | None = None


class FileFact(Record):
    """A file of the report and its hash."""

    path: str
    bytes: int = Field(ge=0)
    sha256: str = Sha256


class Manifest(Record):
    """`manifest.json`: every file of the report."""

    schema_version: Literal["1.0"] = "1.0"
    kind: Literal["robusteval-manifest"] = "robusteval-manifest"
    files: tuple[FileFact, ...]


SCHEMAS: Mapping[str, type[Record]] = {"report": Report, "sample": SampleRow, "manifest": Manifest}


def json_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of ``name``, one of `SCHEMAS`."""
    schema = SCHEMAS[name].model_json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:robusteval:schema:v1:{name}",
        **schema,
    }


def count_verdicts(verdicts: Mapping[Verdict, int], certifying: bool) -> Results:
    """Turn counts of verdicts into accuracies; the bracket holds because all are counts of the same verdicts."""
    total = sum(verdicts.values())
    certified = verdicts[Verdict.CERTIFIED]
    robust = certified + verdicts[Verdict.UNKNOWN]
    return Results(
        verdicts=dict(verdicts),
        clean=Rate.of(robust + verdicts[Verdict.BROKEN], total),
        empirical=Rate.of(robust, total),
        certified=Rate.of(certified, total) if certifying else None,
    )


def closed_at(eps: str, stages: Iterable[StageResult], curve: Iterable[CurvePoint]) -> dict[str, int]:
    """Return stage -> how many samples it closed at the budget written ``eps``, which a ``curve`` must have."""
    at_points = {point.eps: point.closed for point in curve}
    return at_points[eps] if at_points else {stage.name: stage.closed for stage in stages}


def broken_at(eps: str, stages: Iterable[StageResult], curve: Iterable[CurvePoint]) -> dict[str, int]:
    """Return stage -> how many samples it broke at the budget written ``eps``, which a ``curve`` must have."""
    at_points = {point.eps: point.broken for point in curve}
    return at_points[eps] if at_points else {stage.name: stage.broken for stage in stages}
