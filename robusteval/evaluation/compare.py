"""The place of a result among RobustBench entries, from the facts of a report alone."""

from __future__ import annotations

from collections.abc import Iterable

from robusteval.baselines.rank import Baseline, Placement, comparable, place, source
from robusteval.evaluation.suite import load_suite
from robusteval.report import Comparison, DataFacts, Finding, ModelFacts, Neighbour, Results, Search, StageSpec
from robusteval.threat import ThreatModel


def compare(
    stages: Iterable[StageSpec],
    findings: Iterable[Finding],
    model: ModelFacts,
    data: DataFacts,
    threat: ThreatModel,
    results: Results,
    queries: int | None,
    search: Search,
) -> Comparison:
    """Return the place among comparable entries, or why there is none; a pure function, so that anyone can redo it."""
    limited = None if queries is None else f"attacks had only {queries} queries per sample."
    low = None if search.precision == "float32" else f"attacks searched in {search.precision}."
    reason = _not_comparable(tuple(stages), findings, threat) or limited or low
    if reason:
        return _comparison(Placement(reason=reason), [])
    placement = place(
        title=data.title,
        benchmark=data.benchmark,
        threat=threat,
        robust=results.empirical.rate,
        interval=(results.empirical.low, results.empirical.high),
        extra_data=model.extra_data,
        complete=data.evaluated == data.total,
    )
    return _comparison(placement, comparable(data.benchmark, threat.norm, threat.eps, model.extra_data))


def _not_comparable(stages: tuple[StageSpec, ...], findings: Iterable[Finding], threat: ThreatModel) -> str | None:
    doubts = sorted({one.name for one in findings if one.severity == "error" or one.name == "masked-gradients"})
    if doubts:
        return f"the result is doubtful ({', '.join(doubts)})."
    if not threat.convex:
        return f"RobustBench has no entries for {threat.norm.value}."
    standard = load_suite("standard", threat).specs
    if not all(spec in stages for spec in standard):
        return "the suite does not contain AutoAttack standard, by which RobustBench ranks."
    return None


def _comparison(placement: Placement, rivals: list[Baseline]) -> Comparison:
    best = (placement.best,) if placement.best else ()
    shown = dict.fromkeys((*best, *placement.above, *placement.below))
    neighbours = [
        Neighbour(
            id=entry.id,
            architecture=entry.architecture,
            clean=entry.clean_acc,
            best_known=entry.best_known,
            extra_data=entry.additional_data,
            rank=1 + sum(rival.best_known > entry.best_known for rival in rivals),
        )
        for entry in shown
    ]
    return Comparison(
        snapshot=source(),
        reason=placement.reason,
        rank=placement.rank,
        rank_best=placement.best_rank,
        rank_worst=placement.worst_rank,
        provisional=placement.provisional,
        entries=placement.entries,
        neighbours=tuple(neighbours),
        notes=placement.notes,
    )
