"""Two evaluations side by side: what differs between them, and a paired test on the samples that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from robusteval.errors import CheckFailed, UsageError
from robusteval.evaluation.curve import verdict_at
from robusteval.evaluation.validate import read_report, read_rows, validate
from robusteval.mcnemar import METHOD, mcnemar
from robusteval.report import Rate, Record, Report, SampleRow
from robusteval.settings import flatten
from robusteval.threat import parse_eps
from robusteval.verdict import ROBUST, Verdict

Measure = Literal["clean", "robust", "certified"]
COUNTED: dict[Measure, tuple[Verdict, ...]] = {
    "clean": (*ROBUST, Verdict.BROKEN),
    "robust": ROBUST,
    "certified": (Verdict.CERTIFIED,),
}
"""Which verdicts count as right."""


class Fact(Record):
    """A fact that the two reports state differently; None where one does not state it."""

    what: str
    a: Any
    b: Any


class Accuracy(Record):
    """An accuracy of both on the shared samples, at ``eps`` unless it is the clean one, and the paired comparison.

    ``only_a`` and ``only_b`` samples are right in one alone; ``difference`` is B's accuracy minus A's.
    """

    measure: Measure
    eps: str | None
    a: Rate
    b: Rate
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p: float


class Change(Record):
    """A sample whose verdict differs, and which stage closed it in each."""

    id: int
    label: int
    a: Verdict
    b: Verdict
    a_stage: str | None
    b_stage: str | None


class Diff(Record):
    """What `diff` finds; ``changes`` are at ``eps``, on the first ``samples`` of the data."""

    kind: Literal["robusteval-diff"] = "robusteval-diff"
    a: str
    b: str
    samples: int
    norm: str
    eps: str
    method: str = METHOD
    facts: tuple[Fact, ...]
    accuracies: tuple[Accuracy, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """One evaluation: its report and rows."""

    report: Report
    rows: Sequence[SampleRow]

    @property
    def levels(self) -> dict[Fraction, int]:
        """Return eps -> its place in the curve."""
        labels = [point.eps for point in self.report.curve] or [self.report.threat.eps]
        return {parse_eps(label): level for level, label in enumerate(labels)}

    def at(self, eps: Fraction, count: int) -> list[tuple[Verdict, str | None]]:
        """Return verdict and closing stage of the first ``count`` samples at ``eps``."""
        rows, level = self.rows[:count], self.levels[eps]
        if not self.report.curve:
            return [(row.verdict, row.stage) for row in rows]
        radius = self.report.curve[level].radius
        return [(verdict_at(row, row.stages[level], radius), row.stages[level]) for row in rows]


def load(folder: Path) -> Side:
    """Read an evaluation's folder; raise `CheckFailed` where its numbers do not follow from its rows."""
    problems = validate(folder)
    if problems:
        raise CheckFailed(f"'{folder}' is not a valid report, so nothing follows from it: {problems[0]}")
    return Side(read_report(folder), read_rows(folder))


def diff(a: Side, b: Side) -> Diff:
    """Compare two evaluations; raise `UsageError` where their samples, threat models or questions are not the same."""
    notes, count = [], _shared_samples(a, b)
    if a.report.data.sha256 != b.report.data.sha256:
        notes.append(
            f"A has {len(a.rows)} samples, B {len(b.rows)}: the first {count} are compared. Their labels agree; "
            "whether their pixels do cannot be checked, as each hash is over all samples of its run."
        )
    shared, own = _shared_eps(a, b), parse_eps(a.report.threat.eps)
    eps = own if own in shared else shared[-1]
    measured = [_accuracy("clean", a, b, eps, count)]
    for one in shared:
        measured += [_accuracy(measure, a, b, one, count) for measure in _measures(a, b)]
    return Diff(
        a=_name(a),
        b=_name(b),
        samples=count,
        norm=a.report.threat.norm,
        eps=_label(a, eps),
        facts=tuple(_facts(a.report, b.report)),
        accuracies=tuple(measured),
        changes=tuple(_changes(a, b, eps, count)),
        notes=(*notes, *_warnings(a.report, b.report)),
    )


def _name(side: Side) -> str:
    return f"{side.report.model.name}, suite {side.report.suite.name}, seed {side.report.seed}"


def _label(side: Side, eps: Fraction) -> str:
    labels = [point.eps for point in side.report.curve] or [side.report.threat.eps]
    return labels[side.levels[eps]]


def _shared_samples(a: Side, b: Side) -> int:
    """Return how many samples, from the first, both evaluated."""
    ours, theirs = a.report.data, b.report.data
    if ours.sha256 == theirs.sha256:
        return len(a.rows)
    for what in ("name", "part", "shape", "classes", "total"):
        if getattr(ours, what) != getattr(theirs, what):
            raise UsageError(f"the samples are not the same: the {what} of the data differs, so nothing can be paired.")
    if len(a.rows) == len(b.rows):
        raise UsageError("the samples are not the same: as many, with another SHA-256, so nothing can be paired.")
    count = min(len(a.rows), len(b.rows))
    odd = next((x.id for x, y in zip(a.rows, b.rows, strict=False) if x.label != y.label), None)
    if odd is not None:
        raise UsageError(f"the samples are not the same: sample {odd} has two labels, so nothing can be paired.")
    return count


def _shared_eps(a: Side, b: Side) -> list[Fraction]:
    ours, theirs = a.report.threat, b.report.threat
    if ours.norm != theirs.norm:
        raise UsageError(
            f"A is about {ours.norm}, B about {theirs.norm}: accuracies of two threat models do not compare."
        )
    if (a.report.suite.smoothing is None) != (b.report.suite.smoothing is None):
        raise UsageError(
            "one report is about a smoothed classifier, whose abstentions count as right; the other is not."
        )
    shared = sorted(a.levels.keys() & b.levels.keys())
    if not shared:
        raise UsageError(f"A is about {ours.norm} eps {ours.eps}, B about {theirs.eps}: they have no eps in common.")
    return shared


def _measures(a: Side, b: Side) -> tuple[Measure, ...]:
    certified = a.report.results.certified is not None and b.report.results.certified is not None
    return ("robust", "certified") if certified else ("robust",)


def _accuracy(measure: Measure, a: Side, b: Side, eps: Fraction, count: int) -> Accuracy:
    right = COUNTED[measure]
    ours, theirs = ([verdict in right for verdict, _ in side.at(eps, count)] for side in (a, b))
    only_a = sum(x and not y for x, y in zip(ours, theirs, strict=True))
    only_b = sum(y and not x for x, y in zip(ours, theirs, strict=True))
    test = mcnemar(only_a, only_b, count)
    return Accuracy(
        measure=measure,
        eps=None if measure == "clean" else _label(a, eps),
        a=Rate.of(sum(ours), count),
        b=Rate.of(sum(theirs), count),
        only_a=only_a,
        only_b=only_b,
        difference=test.difference,
        low=test.low,
        high=test.high,
        p=test.p,
    )


def _changes(a: Side, b: Side, eps: Fraction, count: int) -> list[Change]:
    """Return the samples whose verdicts differ; that only one of the two tried to prove anything is no difference."""
    both = all(side.report.results.certified is not None for side in (a, b))
    pairs = zip(a.rows, a.at(eps, count), b.at(eps, count), strict=False)
    return [
        Change(id=row.id, label=row.label, a=ours, b=theirs, a_stage=our_stage, b_stage=their_stage)
        for row, (ours, our_stage), (theirs, their_stage) in pairs
        if ours != theirs and (both or {ours, theirs} != set(ROBUST))
    ]


def _facts(a: Report, b: Report) -> list[Fact]:
    ours, theirs = (flatten(_told(report)) for report in (a, b))
    keys = dict.fromkeys([*ours, *theirs])
    return [Fact(what=key, a=ours.get(key), b=theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]


def _told(report: Report) -> dict[str, Any]:
    """Return what two runs may differ in, less what follows from it."""
    record = report.model_dump(mode="json")
    suite = {key: value for key, value in record["suite"].items() if key not in ("title", "reference", "stages")}
    kept = ("model", "data", "threat", "seed", "chunk_size", "batch_size", "queries", "environment")
    eps = [point.eps for point in report.curve] or [report.threat.eps]
    findings = [finding.name for finding in report.findings]
    return {key: record[key] for key in kept} | {"suite": suite, "every eps": eps, "findings": findings}


def _warnings(a: Report, b: Report) -> list[str]:
    said = []
    if (a.suite.sha256, a.queries) != (b.suite.sha256, b.queries):
        said.append(
            "The suites or their queries differ: robust accuracy is an upper bound, and the one that was attacked "
            "harder looks less robust for that alone."
        )
    if (a.results.certified is None) != (b.results.certified is None):
        said.append(f"Only {'B' if a.results.certified is None else 'A'} was certified, so that is not compared.")
    for name, report in (("A", a), ("B", b)):
        doubts = [finding.name for finding in report.findings if finding.severity != "info"]
        said += [f"{name} has findings that may make its numbers doubtful: {', '.join(doubts)}."] if doubts else []
    return said
