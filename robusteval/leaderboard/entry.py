"""What the leaderboard shows of a report: few facts, every text of it made harmless."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal, get_args

from pydantic import Field

from robusteval.report import Rate, Record, Report, Severity, Sha256
from robusteval.suites import suite_files

Status = Literal["claimed", "checked", "refuted"]
Track = Literal["standard", "queries", "randomised", "smoothed"]
NormName = Literal["Linf", "L2", "L1", "L0"]

MEANINGS: dict[str, str] = {
    "claimed": "The report is complete and follows from its own rows. Nobody here has run the model.",
    "checked": "This server ran the model and replayed the evidence: data and weights are those of the report, the "
    "clean predictions are as stated, every stored adversarial input is one, and every proof proves. So the model is "
    "no more robust than the empirical figure says, and no less than the certified one. That no stronger attack breaks "
    "more is not shown by this.",
    "refuted": "This server ran the model, and something the report says is not true.",
    "published": "RobustBench's figure, for comparison. Nothing was run here.",
}
TRACKS: dict[Track, str] = {
    "standard": "one deterministic evaluation decides an input",
    "queries": "attacks had a limited number of queries, so the figure says less",
    "randomised": "a randomised model, judged by repeated evaluations",
    "smoothed": "the smoothed classifier of a network, judged by votes",
}
MAX_TEXT, MAX_FLAGS = 120, 20


class Flag(Record):
    """The name of a finding; what it says is in the report itself."""

    name: str
    severity: Severity


class Point(Record):
    """The bracket at one of several budgets."""

    eps: str
    empirical: Rate
    certified: Rate | None


class Entry(Record):
    """The facts of one report, for one threat model. Rates are fractions; ``created`` is what the report says."""

    model: str
    architecture: str
    extra_data: bool | None
    weights_sha256: str = Sha256
    dataset: str
    data_title: str
    data_sha256: str = Sha256
    evaluated: int = Field(gt=0)
    total: int = Field(gt=0)
    norm: NormName
    eps: str
    radius: float = Field(gt=0)
    track: Track
    suite: str
    clean: Rate
    empirical: Rate
    certified: Rate | None
    curve: tuple[Point, ...]
    findings: tuple[Flag, ...]
    created: str


class Published(Record):
    """An entry of the leaderboard: whose, since when (UTC, ISO 8601), and what is known about its truth."""

    id: str = Sha256
    status: Status
    reason: str
    owner: str
    received: str
    report: Entry


def harmless(text: str, limit: int = MAX_TEXT) -> str:
    """Return ``text`` without control and direction characters, and not longer than ``limit``."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: limit + 1])
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}…"


def track_of(report: Report) -> Track:
    """Return among which results this one is to be read."""
    if report.suite.smoothing:
        return "smoothed"
    if report.suite.repeat:
        return "randomised"
    return "queries" if report.queries is not None else "standard"


def _suite(name: str) -> str:
    """Return the name of a suite of ours; of another's file only the end, marked: its name proves nothing."""
    ours = all(part in suite_files() for part in name.split("+"))
    return name if ours else f"{harmless(PurePath(name).name, 40)} (custom)"


def entry_of(report: Report) -> Entry:
    """Return what is shown of a report that was found valid."""
    model, data, threat, results = report.model, report.data, report.threat, report.results
    worst = sorted(report.findings, key=lambda one: get_args(Severity).index(one.severity), reverse=True)
    return Entry(
        model=harmless(model.name),
        architecture=harmless(model.architecture),
        extra_data=model.extra_data,
        weights_sha256=model.weights_sha256,
        dataset=harmless(data.name.partition(":")[0]),
        data_title=harmless(data.title),
        data_sha256=data.sha256,
        evaluated=data.evaluated,
        total=data.total,
        norm=threat.norm,
        eps=harmless(threat.eps),
        radius=threat.radius,
        track=track_of(report),
        suite=_suite(report.suite.name) + (f" in {low}" if (low := report.search.precision) != "float32" else ""),
        clean=results.clean,
        empirical=results.empirical,
        certified=results.certified,
        curve=tuple(
            Point(eps=harmless(point.eps), empirical=point.results.empirical, certified=point.results.certified)
            for point in report.curve
        ),
        findings=tuple(Flag(name=harmless(one.name), severity=one.severity) for one in worst[:MAX_FLAGS]),
        created=harmless(report.created),
    )
