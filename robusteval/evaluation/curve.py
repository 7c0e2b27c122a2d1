"""Robust accuracy against eps, counted from the rows of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from robusteval.report import CurvePoint, SampleRow, count_verdicts
from robusteval.threat import BUDGET_TOLERANCE, ThreatModel
from robusteval.verdict import Verdict


def verdict_at(row: SampleRow, closer: str | None, radius: float) -> Verdict:
    """Return the verdict on a sample at a budget of ``radius``, where the stage ``closer`` closed it, if any.

    A break is known by its witness, which is the nearest that was found: certifiers may break samples as well.
    """
    if row.verdict is Verdict.MISCLASSIFIED:
        return Verdict.MISCLASSIFIED
    if row.adv_distance is not None and row.adv_distance <= radius + BUDGET_TOLERANCE:
        return Verdict.BROKEN
    return Verdict.CERTIFIED if closer else Verdict.UNKNOWN


def curve(rows: Sequence[SampleRow], budgets: Sequence[ThreatModel], certifying: bool) -> tuple[CurvePoint, ...]:
    """Return the bracket at every budget, ascending; nothing where there is only one."""
    if len(budgets) < 2:
        return ()
    return tuple(_point(rows, level, threat, certifying) for level, threat in enumerate(budgets))


def _point(rows: Sequence[SampleRow], level: int, threat: ThreatModel, certifying: bool) -> CurvePoint:
    closers = [row.stages[level] for row in rows]
    known = [verdict_at(row, closer, threat.radius) for row, closer in zip(rows, closers, strict=True)]
    counts = Counter(known)
    broken = (closer for closer, verdict in zip(closers, known, strict=True) if verdict is Verdict.BROKEN)
    return CurvePoint(
        eps=threat.label,
        radius=threat.radius,
        results=count_verdicts({verdict: counts[verdict] for verdict in Verdict}, certifying),
        closed=_counted(closers),
        broken=_counted(broken),
    )


def _counted(closers: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(closer for closer in closers if closer).items()))
