"""Robust accuracy against eps, counted from the rows of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from robusteval.report import CurvePoint, SampleRow, StageResult, count_verdicts
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict

VERDICTS: Mapping[str | None, Verdict] = {
    None: Verdict.UNKNOWN,
    "attack": Verdict.BROKEN,
    "certifier": Verdict.CERTIFIED,
}
"""Kind of the stage that closed a sample -> its verdict."""


def curve(
    rows: Sequence[SampleRow], stages: Iterable[StageResult], budgets: Sequence[ThreatModel], certifying: bool
) -> tuple[CurvePoint, ...]:
    """Return the bracket at every budget, ascending; nothing where there is only one."""
    if len(budgets) < 2:
        return ()
    kinds = {stage.name: stage.kind for stage in stages}
    return tuple(_point(rows, level, threat, kinds, certifying) for level, threat in enumerate(budgets))


def _point(
    rows: Sequence[SampleRow], level: int, threat: ThreatModel, kinds: Mapping[str, str], certifying: bool
) -> CurvePoint:
    closers = [row.stages[level] for row in rows]
    known = [
        row.verdict if row.verdict is Verdict.MISCLASSIFIED else VERDICTS[kinds.get(closer or "")]
        for row, closer in zip(rows, closers, strict=True)
    ]
    counts = Counter(known)
    return CurvePoint(
        eps=threat.label,
        radius=threat.radius,
        results=count_verdicts({verdict: counts[verdict] for verdict in Verdict}, certifying),
        closed=dict(sorted(Counter(closer for closer in closers if closer).items())),
    )
