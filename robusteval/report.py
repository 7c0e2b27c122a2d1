"""The published record of an evaluation: its shape, which is also its JSON Schema.

All rates are fractions in [0, 1], stored in full; eps is stored as it was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import scipy
from pydantic import BaseModel, ConfigDict, Field, model_validator

from robusteval.provenance import Environment
from robusteval.smoothing import LookPlan, beats, lower, upper
from robusteval.verdict import Verdict

CONFIDENCE = 0.95
Sha256 = Field(pattern="^[0-9a-f]{64}$")
MANY = 2**63 - 1
"""More passes or seconds than anybody has spent; without a limit a forged count could be too large to divide."""

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
        low, high = lower(count, total, tail), upper(count, total, tail)
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
    """One stage of a suite, as data.

    A ``minimal`` attack looks for the nearest adversarial input, once for every eps; a certifier that ``refutes`` may
    end in an adversarial input. With ``near`` an attack is given only the samples that
    `robusteval.attacks._nearness` selects.
    """

    name: str
    kind: Literal["attack", "certifier"]
    plugin: str
    params: dict[str, Any]
    minimal: bool = False
    refutes: bool = False
    near: float | None = None


class Repeat(Record):
    """How a randomised model's answer on an input is decided: by this many fresh evaluations.

    An input counts as adversarial only if, with ``confidence`` (Clopper & Pearson 1934, one-sided), more than half of
    all evaluations would err.
    """

    evaluations: int = Field(gt=1, le=100_000)
    confidence: float = Field(gt=0.5, lt=1)

    @property
    def cost(self) -> int:
        """How many passes decide an input."""
        return self.evaluations

    @property
    def needed(self) -> int:
        """How many evaluations must err; more than there are if no number would do."""
        return int(scipy.stats.binom.isf(1 - self.confidence, self.evaluations, 0.5)) + 1


class Smoothing(Record):
    """The model under test is the network smoothed with noise ``sigma`` (Cohen et al. 2019), and how that is judged.

    Of an input's noisy copies, ``n0`` choose a class, fresh ones test it: a certificate at the cumulative ``looks``,
    which share ``alpha``; whether the label is beaten, ``n`` draws at ``alpha``. Sigma is in pixel units of [0, 1].
    """

    sigma: float = Field(gt=0)
    n0: int = Field(gt=0, le=10_000_000)
    n: int = Field(gt=0, le=10_000_000)
    alpha: float = Field(gt=0, lt=0.5)
    looks: tuple[int, ...]

    @model_validator(mode="after")
    def _can_decide(self) -> Smoothing:
        if not beats(self.n, 0, self.alpha / 2):
            raise ValueError(f"{self.n} draws can decide nothing at alpha {self.alpha:g}")
        _ = self.plan
        return self

    @property
    def cost(self) -> int:
        """How many passes decide an input."""
        return self.n0 + self.n

    @property
    def plan(self) -> LookPlan:
        """When certificates look at their votes."""
        return LookPlan(self.sigma, self.looks, self.alpha)


class Poll(Record):
    """What ``n`` noisy copies of an input said: votes for the label, for the ``other`` class with most, for a rival.

    The ``rival`` is the class other than the label that independent copies had chosen before, so that the test against
    it is fair; ``other`` is chosen from these votes.
    """

    n: int = Field(gt=0)
    label_votes: int = Field(ge=0)
    other: int = Field(ge=0)
    other_votes: int = Field(ge=0)
    rival: int = Field(ge=0)
    rival_votes: int = Field(ge=0)

    @property
    def margin(self) -> float:
        """The label's share of the votes minus the other class's."""
        return (self.label_votes - self.other_votes) / self.n

    def wrong(self, alpha: float) -> bool:
        """Say whether the rival is more probable than the label; wrongly so with probability at most ``alpha``."""
        return beats(self.rival_votes, self.label_votes, alpha)

    def right(self, alpha: float) -> bool:
        """Say whether the label is the most probable class (Hung & Fithian 2019, arXiv 1610.03944), likewise."""
        return beats(self.label_votes, self.other_votes, alpha / 2)

    def abstains(self, alpha: float) -> bool:
        """Say whether neither is shown: Cohen et al.'s classifier would return no class."""
        return not self.wrong(alpha) and not self.right(alpha)


class Votes(Record):
    """What the verdict on the smoothed classifier at one sample rests on.

    ``clean`` and ``adversarial`` are the polls at the input and at the witness. ``chosen`` is the class that was to be
    certified, None where none was tried, ``counts`` its votes at the looks so far, ``radius`` the L2 radius they prove,
    rounded down, 0 where they abstain.
    """

    clean: Poll
    adversarial: Poll | None
    chosen: int | None = Field(ge=0)
    counts: tuple[int, ...]
    radius: float = Field(ge=0)


class SuiteFacts(Record):
    """Which suite ran. ``adaptations`` lists where it had to depart from its definition.

    ``repeat`` is None where a sample is evaluated once, ``smoothing`` unless the smoothed classifier was the model.
    """

    name: str
    title: str
    reference: str
    sha256: str = Sha256
    stages: tuple[StageSpec, ...]
    skip_certified: bool
    repeat: Repeat | None = None
    smoothing: Smoothing | None = None
    adaptations: tuple[str, ...]


class Search(Record):
    """How attacks ran the model while they searched; every verdict was decided in float32 by the model as it is."""

    precision: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False


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
    forward: int = Field(ge=0, le=MANY)
    backward: int = Field(ge=0, le=MANY)
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


class Guarantee(Record):
    """How far the verdicts on a smoothed classifier can be trusted together, beyond each one's ``alpha``.

    Of ``tried`` certificates ``false_expected`` may be false on average, with 95 % confidence at most ``false_most``,
    and all that were given are true with confidence ``all_true`` (Bonferroni): a false one may be at any eps. Likewise
    ``decisions`` on clean inputs and candidates. ``abstained`` clean inputs were not decided and count as not wrong;
    ``correct`` ones were shown to be right, which is the clean accuracy of Cohen et al.
    """

    tried: int = Field(ge=0)
    false_expected: float = Field(ge=0)
    false_most: int = Field(ge=0)
    all_true: float = Field(ge=0, le=1)
    decisions: int = Field(ge=0)
    wrong_expected: float = Field(ge=0)
    abstained: int = Field(ge=0)
    correct: int = Field(ge=0)
    draws: float = Field(ge=0)

    @classmethod
    def of(cls, rows: Iterable[SampleRow], stages: Iterable[StageResult], smoothing: Smoothing) -> Guarantee:
        """Count over the rows; ``draws`` is the mean number of noisy copies that a certificate took, chosen included.

        Samples are independent, so the number of false certificates is at most binomial over all that were tried: not
        over those given, which are selected.
        """
        votes = [row.votes for row in rows if row.votes]
        taken = [len(vote.counts) for vote in votes if vote.chosen is not None]
        tried = sum(looks > 0 for looks in taken)
        decisions = len(votes) + sum(stage.entered for stage in stages if stage.kind == "attack")
        draws = sum(smoothing.n0 + (smoothing.looks[looks - 1] if looks else 0) for looks in taken)
        return cls(
            tried=tried,
            false_expected=smoothing.alpha * tried,
            false_most=int(scipy.stats.binom.ppf(CONFIDENCE, tried, smoothing.alpha)) if tried else 0,
            all_true=max(0.0, 1 - smoothing.alpha * tried),
            decisions=decisions,
            wrong_expected=smoothing.alpha * decisions,
            abstained=sum(vote.clean.abstains(smoothing.alpha) for vote in votes),
            correct=sum(vote.clean.right(smoothing.alpha) for vote in votes),
            draws=draws / len(taken) if taken else 0.0,
        )


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
    such a budget, ``search`` how they ran it. ``batch_size`` is the smallest used. ``results`` are for ``threat``;
    ``curve`` has a point for every budget, ascending, if there are several. Where ``suite.smoothing`` is set, all of it
    is about the smoothed classifier and statistical; ``guarantee`` says how sure.
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
    search: Search = Search()
    seconds: float = Field(ge=0)
    model: ModelFacts
    data: DataFacts
    threat: ThreatFacts
    suite: SuiteFacts
    results: Results
    curve: tuple[CurvePoint, ...] = ()
    guarantee: Guarantee | None = None
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

    On a smoothed classifier a prediction is the class with most ``votes``, a margin the label's share of them minus
    that of the strongest other class, and what is misclassified or broken is so with the suite's confidence.
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
    votes: Votes | None = None


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


class SuiteCost(Record):
    """A suite's robust samples of a calibration, and what it took on all of them: passes, and seconds of one worker."""

    name: str
    sha256: str = Sha256
    robust: int = Field(ge=0)
    forward: int = Field(ge=0, le=MANY)
    backward: int = Field(ge=0, le=MANY)
    seconds: float = Field(ge=0, le=MANY)


class Calibration(Record):
    """`calibration.json`: by how much the robust accuracy of a report's suite differs from that of another suite.

    Both were run on the same random ``samples`` of the report with SHA-256 ``report_sha256``. ``difference`` is the
    robust accuracy of ``suite`` minus that of ``against``, as a fraction; ``low`` and ``high`` are the ends of its 95 %
    interval over draws of samples (Tango 1998, Statistics in Medicine 17(8)).
    """

    schema_version: Literal["1.0"] = "1.0"
    kind: Literal["robusteval-calibration"] = "robusteval-calibration"
    created: str
    report_sha256: str = Sha256
    seed: int
    samples: tuple[int, ...]
    clean: int = Field(ge=0)
    suite: SuiteCost
    against: SuiteCost
    only_suite_breaks: tuple[int, ...]
    only_against_breaks: tuple[int, ...]
    difference: float = Field(ge=-1, le=1)
    low: float = Field(ge=-1, le=1)
    high: float = Field(ge=-1, le=1)
    environment: Environment


SCHEMAS: Mapping[str, type[Record]] = {
    "report": Report,
    "sample": SampleRow,
    "manifest": Manifest,
    "calibration": Calibration,
}


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
