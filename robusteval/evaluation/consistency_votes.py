"""Whether verdicts on a smoothed classifier follow from the votes in their rows."""

from __future__ import annotations

from collections.abc import Iterator

from robusteval.evaluation.judge import UNDECIDED
from robusteval.report import Guarantee, Poll, Report, SampleRow, Smoothing, Votes
from robusteval.smoothing import GRID, LookPlan
from robusteval.threat import BUDGET_TOLERANCE
from robusteval.verdict import Verdict


def check_votes(report: Report, rows: list[SampleRow]) -> Iterator[str]:
    """Recompute every poll, bound and radius from the counts, and the guarantee from all of them."""
    smoothing = report.suite.smoothing
    if smoothing is None:
        if report.guarantee or any(row.votes for row in rows):
            yield "votes or a guarantee are stated, but the suite is about no smoothed classifier"
        return
    for row in rows:
        if row.votes is None:
            yield f"sample {row.id}: has no votes"
            continue
        problems = (*_check_polls(row, row.votes, smoothing), *_check_certificate(row, row.votes, smoothing, report))
        polls = [poll for poll in (row.votes.clean, row.votes.adversarial) if poll]
        named = [*(poll.other for poll in polls), *(poll.rival for poll in polls), row.votes.chosen or 0]
        if max(named) >= len(report.data.classes):
            yield f"sample {row.id}: has votes for a class beyond the {len(report.data.classes)} of the data"
        yield from (f"sample {row.id}: {problem}" for problem in problems)
    if report.guarantee != Guarantee.of(rows, report.stages, smoothing):
        yield "the guarantee does not follow from the rows"


def _check_polls(row: SampleRow, votes: Votes, smoothing: Smoothing) -> Iterator[str]:
    said = [(votes.clean, row.prediction, row.margin, "clean input")]
    if (votes.adversarial is None) != (row.adv_prediction is None):
        yield "has votes at a witness that is not described, or none at one that is"
    elif votes.adversarial and row.adv_prediction is not None and row.adv_margin is not None:
        said.append((votes.adversarial, row.adv_prediction, row.adv_margin, "witness"))
        if not votes.adversarial.wrong(smoothing.alpha):
            yield "is broken by a witness at which the votes do not show that another class is more probable"
    for poll, prediction, margin, where in said:
        if not _possible(poll, row.label, smoothing.n):
            yield f"has impossible votes at the {where}"
        if prediction != (poll.other if poll.margin < 0 else row.label) or margin != poll.margin:
            yield f"has prediction {prediction} and margin {margin} at the {where}, which do not follow from its votes"
    if votes.clean.wrong(smoothing.alpha) != (row.verdict is Verdict.MISCLASSIFIED):
        yield f"is {row.verdict}, which does not follow from its votes"
    undecided = row.verdict is Verdict.UNKNOWN and votes.clean.abstains(smoothing.alpha)
    if undecided != (row.reason == UNDECIDED):
        yield f"is {row.verdict} for the reason '{row.reason}', which does not follow from its votes"


def _possible(poll: Poll, label: int, n: int) -> bool:
    same = poll.rival == poll.other
    most = poll.rival_votes == poll.other_votes if same else poll.rival_votes <= poll.other_votes
    total = poll.label_votes + poll.other_votes + (0 if same else poll.rival_votes)
    return poll.n == n and label not in (poll.rival, poll.other) and most and total <= n


def _check_certificate(row: SampleRow, votes: Votes, smoothing: Smoothing, report: Report) -> Iterator[str]:
    """Recompute what the votes prove, then replay the looks at each eps at which a certificate was tried."""
    plan, counts = smoothing.plan, votes.counts
    drawn = (0, *plan.looks[: len(counts)])
    fresh = [(n - m, k - j) for m, n, j, k in zip(drawn, drawn[1:], (0, *counts), counts, strict=False)]
    if len(counts) > len(plan.looks) or any(not 0 <= more <= draws for draws, more in fresh):
        yield f"has impossible votes for its certificate: {counts}"
        return
    if abs(votes.radius - plan.radius(counts)) > 2 / GRID:
        yield f"states radius {votes.radius}, its votes prove {plan.radius(counts)}"
    closers, reached, used = row.stages or (row.stage,), list(_tried(row, report)), 0
    for radius, proved in reached:
        used = _looks(plan, counts, radius + BUDGET_TOLERANCE, used) if votes.chosen == row.label else 0
        if proved != (plan.radius(counts[:used]) > radius + BUDGET_TOLERANCE):
            yield f"is {'' if proved else 'not '}certified at radius {radius}, which does not follow from its votes"
    kinds = {stage.name: stage.kind for stage in report.stages}
    certified = sum(kinds.get(closer or "") == "certifier" for closer in closers)
    if (votes.chosen is not None) != bool(reached) or used != len(counts) or certified != sum(ok for _, ok in reached):
        yield f"has votes for {len(counts)} looks of its certificate, which do not follow from the plan"


def _looks(plan: LookPlan, counts: tuple[int, ...], reach: float, taken: int) -> int:
    """Return after how many looks the plan stops, ``taken`` before; one more than there are votes for if it goes on."""
    more = range(taken, len(counts) + 1)
    return next((looks for looks in more if plan.stops(counts[:looks], reach)), len(counts) + 1)


def _tried(row: SampleRow, report: Report) -> Iterator[tuple[float, bool]]:
    """Yield each radius at which a certificate was tried and whether it got through, which is how the next is."""
    order = {stage.name: place for place, stage in enumerate(report.stages)}
    levels: list[tuple[str | None, float]] = [(point.eps, point.radius) for point in report.curve]
    for (eps, radius), closer in zip(
        levels or [(None, report.threat.radius)], row.stages or (row.stage,), strict=False
    ):
        turns = [stage.name for stage in report.stages if stage.kind == "certifier" and stage.eps == eps]
        closed = order.get(closer or "", len(order))
        if row.verdict is Verdict.MISCLASSIFIED or not turns or closed < order[turns[0]]:
            return
        yield radius, closer in turns
        if closer not in turns:
            return
