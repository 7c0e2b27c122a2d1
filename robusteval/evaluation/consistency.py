"""Whether the numbers of a report follow from its rows: checks that need nothing but the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

from robusteval.evaluation.assemble import SAMPLES
from robusteval.evaluation.compare import compare
from robusteval.evaluation.config import SmoothingChanges
from robusteval.evaluation.consistency_votes import check_votes
from robusteval.evaluation.curve import curve, verdict_at
from robusteval.evaluation.judge import DOUBTFUL, LEADING, SURVIVED, UNDECIDED
from robusteval.evaluation.suite import load_suite, parts_of, suite_digest
from robusteval.report import Rate, Report, SampleRow, Search, StageResult, count_verdicts
from robusteval.suites import suite_files
from robusteval.threat import BUDGET_TOLERANCE, ThreatModel
from robusteval.verdict import Verdict

RATES = ("clean", "empirical", "certified")


def _check_rows(report: Report, rows: list[SampleRow]) -> Iterator[str]:
    if len(rows) != report.data.evaluated:
        yield f"{SAMPLES} has {len(rows)} rows, the report says {report.data.evaluated}"
    if report.data.evaluated > report.data.total:
        yield f"{report.data.evaluated} samples evaluated of only {report.data.total}"
    for position, row in enumerate(rows):
        if row.id != position:
            yield f"{SAMPLES} line {position + 1} is sample {row.id}; the first samples in order are expected"
            break
    able = _able(report)
    for row in rows:
        yield from (f"sample {row.id}: {problem}" for problem in _check_row(row, report, able))
        yield from (f"sample {row.id}: {problem}" for problem in _check_levels(row, report, able))


def _able(report: Report) -> dict[str, set[Verdict]]:
    """Return the verdicts that each turn can reach."""
    refuting = {spec.name for spec in report.suite.stages if spec.refutes}
    able = {}
    for turn in report.stages:
        broken = {Verdict.BROKEN} if turn.kind == "attack" or _stage(turn) in refuting else set()
        able[turn.name] = broken | ({Verdict.CERTIFIED} if turn.kind == "certifier" else set())
    return able


def _stage(turn: StageResult) -> str:
    return turn.name.removesuffix(f"@{turn.eps}")


def _reached(verdict: Verdict, closer: str | None, able: Mapping[str, set[Verdict]]) -> bool:
    """Whether ``closer`` can reach a verdict; what is misclassified or open was closed by none."""
    if closer is None:
        return verdict in (Verdict.MISCLASSIFIED, Verdict.UNKNOWN)
    return verdict in able.get(closer, ())


def _check_row(row: SampleRow, report: Report, able: Mapping[str, set[Verdict]]) -> Iterator[str]:
    classes, correct = len(report.data.classes), row.prediction == row.label
    if max(row.label, row.prediction, row.adv_prediction or 0) >= classes:
        yield f"names a class beyond the {classes} of the data"
    smoothing, misclassified = report.suite.smoothing, row.verdict is Verdict.MISCLASSIFIED
    if correct and misclassified if smoothing else correct == misclassified:
        yield f"is {row.verdict} with label {row.label} and prediction {row.prediction}"
    if (correct and row.margin < 0) or (not correct and row.margin > 0):
        yield f"has margin {row.margin} with label {row.label} and prediction {row.prediction}"
    if not _reached(row.verdict, row.stage, able):
        yield f"is {row.verdict} by stage '{row.stage}'"
    doubts = {turn.name for turn in report.stages if turn.undecided}
    undecided = [
        f"{name}: {'' if kind == 'certifier' else LEADING if smoothing else DOUBTFUL}"
        for name, kind in ((turn.name, turn.kind) for turn in report.stages)
        if kind == "certifier" or name in doubts
    ]
    unfounded = (SURVIVED, UNDECIDED) if smoothing else (SURVIVED,)
    explained = row.reason in unfounded or (row.reason or "").startswith(tuple(undecided))
    if explained != (row.verdict is Verdict.UNKNOWN):
        yield f"is {row.verdict} for the reason '{row.reason}'"
    yield from _check_witness_facts(row, report)


def _check_levels(row: SampleRow, report: Report, able: Mapping[str, set[Verdict]]) -> Iterator[str]:
    """Check a sample at each budget of the curve: a break holds for all larger ones, a proof for all smaller."""
    if len(row.stages) != len(report.curve):
        yield f"tells of {len(row.stages)} budgets, the report of {len(report.curve)}"
        return
    order = {name: place for place, name in enumerate(able)}
    levels = list(zip(report.curve, row.stages, strict=True))
    verdicts = [verdict_at(row, closer, point.radius) for point, closer in levels]
    broke = [verdict is Verdict.BROKEN for verdict in verdicts]
    breaks = [order.get(closer or "", 0) for closer, one in zip(row.stages, broke, strict=True) if one]
    if any(earlier < later for earlier, later in pairwise(breaks)):
        yield "is closed at an eps later than at a smaller one"
    proved = [verdict is Verdict.CERTIFIED for verdict in verdicts]
    if any(not smaller and larger for smaller, larger in pairwise(proved)):
        yield "is proved robust at an eps, but not at a smaller one"
    own = dict(zip((point.eps for point in report.curve), verdicts, strict=True))
    serving = {spec.name for spec in report.suite.stages if spec.minimal}
    turns = {turn.name: turn for turn in report.stages if turn.name not in serving}
    for (point, closer), verdict in zip(levels, verdicts, strict=True):
        if not _reached(verdict, closer, able):
            yield f"is {verdict} at eps {point.eps} by '{closer}', with its nearest witness at {row.adv_distance}"
        turn = turns.get(closer or "")
        if turn and turn.eps != point.eps and (verdict is Verdict.CERTIFIED or not _within(turn, own)):
            yield f"is {verdict} at eps {point.eps} by '{closer}', which was about another"
        if point.eps == report.threat.eps and closer != row.stage:
            yield f"is closed by '{row.stage}', and by '{closer}' at the same eps"


def _within(turn: StageResult, own: Mapping[str, Verdict]) -> bool:
    """Whether a sample that a turn broke is broken at the turn's own eps: its candidates are within that."""
    return turn.eps is not None and own[turn.eps] is Verdict.BROKEN


def _check_witness_facts(row: SampleRow, report: Report) -> Iterator[str]:
    facts = (row.adv_prediction, row.adv_margin, row.adv_distance)
    farthest = max((point.radius for point in report.curve), default=report.threat.radius)
    if row.verdict is not Verdict.BROKEN and (row.verdict is Verdict.MISCLASSIFIED or not report.curve):
        if any(fact is not None for fact in facts):
            yield f"is {row.verdict} but describes a witness"
        return
    if row.adv_prediction is None or row.adv_margin is None or row.adv_distance is None:
        if row.verdict is Verdict.BROKEN or any(fact is not None for fact in facts):
            yield f"is {row.verdict} without a description of its witness"
        return
    repeat = report.suite.repeat
    most = 1 - 2 * repeat.needed / repeat.evaluations + 1e-9 if repeat else 0.0
    if row.adv_prediction == row.label or row.adv_margin > most:
        yield f"is broken, but its witness is predicted {row.adv_prediction} with margin {row.adv_margin}"
    if not 0 <= row.adv_distance <= farthest + BUDGET_TOLERANCE:
        yield f"has a witness at distance {row.adv_distance}, beyond eps"
    if (row.verdict is Verdict.BROKEN) != (row.adv_distance <= report.threat.radius + BUDGET_TOLERANCE):
        yield f"is {row.verdict} with a witness at distance {row.adv_distance} for eps {report.threat.eps}"


def _check_results(report: Report, rows: list[SampleRow]) -> Iterator[str]:
    threat = ThreatModel.parse(report.threat.norm, report.threat.eps)
    if (threat.radius, BUDGET_TOLERANCE) != (report.threat.radius, report.threat.tolerance):
        yield f"radius {report.threat.radius} (tolerance {report.threat.tolerance}) is not eps {report.threat.eps}"
    certifying = any(stage.kind == "certifier" for stage in report.suite.stages)
    counts = Counter(row.verdict for row in rows)
    expected = count_verdicts({verdict: counts[verdict] for verdict in Verdict}, certifying)
    for name in RATES:
        stated, counted = getattr(report.results, name), getattr(expected, name)
        if not _same_rate(stated, counted):
            yield f"{name} accuracy is stated as {_show(stated)}, the rows give {_show(counted)}"
    if dict(report.results.verdicts) != dict(expected.verdicts):
        yield "the counts of verdicts do not follow from the rows"
    ran = report.suite
    if suite_digest(ran.stages, ran.skip_certified, ran.repeat, ran.smoothing) != ran.sha256:
        yield "the suite's hash does not match its stages"
    shipped = all(part in suite_files() for part in parts_of(report.suite.name))
    changes = SmoothingChanges(**ran.smoothing.model_dump()) if ran.smoothing else None
    if shipped and load_suite(ran.name, threat, changes).sha256 != ran.sha256:
        yield f"the suite is called '{report.suite.name}' but is not the suite of that name"
    facts, conditions = (report.model, report.data, threat, report.results), (report.queries, report.search)
    if compare(report.suite.stages, report.findings, *facts, *conditions) != report.baselines:
        yield "the comparison with RobustBench does not follow from the results"


def _check_curve(report: Report, rows: list[SampleRow]) -> Iterator[str]:
    if not report.curve:
        return
    budgets = [ThreatModel.parse(report.threat.norm, point.eps) for point in report.curve]
    if any(budget.radius != point.radius for budget, point in zip(budgets, report.curve, strict=True)):
        yield "a radius of the curve is not its eps"
    if any(smaller.eps >= larger.eps for smaller, larger in pairwise(budgets)):
        yield "the budgets of the curve do not ascend"
    if report.threat.eps not in [budget.label for budget in budgets] or len(budgets) < 2:
        yield f"the curve has no point at eps {report.threat.eps}, or no other"
    certifying = any(stage.kind == "certifier" for stage in report.suite.stages)
    for stated, counted in zip(report.curve, curve(rows, budgets, certifying), strict=True):
        rates = [(getattr(stated.results, name), getattr(counted.results, name)) for name in RATES]
        same = all(_same_rate(*pair) for pair in rates) and stated.results.verdicts == counted.results.verdicts
        if not same or (stated.closed, stated.broken) != (counted.closed, counted.broken):
            yield f"the curve at eps {stated.eps} does not follow from the rows"


def _same_rate(a: Rate | None, b: Rate | None) -> bool:
    if a is None or b is None:
        return a is b
    exact = (a.count, a.total, a.rate) == (b.count, b.total, b.rate)
    return exact and max(abs(a.low - b.low), abs(a.high - b.high)) < 1e-9


def _show(rate: Rate | None) -> str:
    return "none" if rate is None else f"{rate.count}/{rate.total} [{rate.low:.6f}, {rate.high:.6f}]"


def _check_stages(report: Report, rows: list[SampleRow]) -> Iterator[str]:
    ruling = report.suite.repeat or report.suite.smoothing
    if [(turn.name, turn.eps) for turn in report.stages] != _expected_turns(report):
        yield "the stages that ran are not those of the suite"
    if report.seconds != sum(turn.seconds for turn in report.stages):
        yield "the seconds are not those of the stages"
    if report.suite.adaptations != tuple(text for turn in report.stages for text in turn.adaptations):
        yield "the suite's adaptations are not those of its stages"
    levels = {point.eps: level for level, point in enumerate(report.curve)}
    ran = {turn.name: order for order, turn in enumerate(report.stages)}
    serving = {spec.name for spec in report.suite.stages if spec.minimal and report.curve}
    for turn in report.stages:
        level = levels[turn.eps] if turn.eps is not None else 0
        own = [row for row in rows if _closers(row)[level] == turn.name]
        broken = sum(_verdicts(row, report)[level] is Verdict.BROKEN for row in own)
        served = range(len(levels)) if turn.name in serving else (level,)
        entered = _entered(turn, served, len(own), rows, ran, report)
        stated, counted = (turn.closed, turn.broken, turn.entered), (len(own), broken, entered)
        if stated != counted:
            yield f"stage '{turn.name}' closed, broke and entered {stated}; the rows give {counted}"
        if max(turn.undecided if ruling else 0, turn.rejected, turn.non_finite) > turn.entered:
            yield f"stage '{turn.name}' tells of more candidates than the {turn.entered} samples it looked at"
        if turn.undecided and not ruling:
            yield f"stage '{turn.name}' left samples undecided, which only repeated evaluations can"
        if turn.kind == "attack" and turn.forward < turn.entered:
            yield f"stage '{turn.name}' looked at {turn.entered} samples in {turn.forward} forward passes"
    attacks = [turn for turn in report.stages if turn.kind == "attack"]
    checks = 1 + (ruling.cost if ruling else 1)  # a candidate is confirmed by so many
    checks += 0 if report.search == Search() else 3  # both precisions' answers, and a second attack's confirmation
    asked = sum(turn.forward - checks * turn.entered for turn in attacks)
    budget = (report.queries or 0) * report.results.clean.count * max(1, len(report.curve))
    if report.queries is not None and asked > budget:
        yield f"attacks asked {asked} times, beyond {report.queries} queries per sample"


def _entered(
    turn: StageResult, served: Iterable[int], closed: int, rows: list[SampleRow], ran: dict[str, int], report: Report
) -> int:
    """Count the samples that a stage looked at: for one with ``near``, what it states if that can be so.

    Rows do not tell which of the open samples came near another class.
    """
    still_open = sum(any(_enters(row, turn, level, ran, report) for level in served) for row in rows)
    choosy = any(spec.near is not None for spec in report.suite.stages if spec.name == _stage(turn))
    return turn.entered if choosy and closed <= turn.entered <= still_open else still_open


def _expected_turns(report: Report) -> list[tuple[str, str | None]]:
    """Return the runs that stages must have had, and the eps of each."""
    if not report.curve:
        return [(spec.name, None) for spec in report.suite.stages]
    first, *others = [point.eps for point in report.curve]
    specs, repeated = report.suite.stages, [spec.name for spec in report.suite.stages if not spec.minimal]
    at_first = [(spec.name if spec.minimal else f"{spec.name}@{first}", first) for spec in specs]
    return [*at_first, *((f"{name}@{eps}", eps) for eps in others for name in repeated)]


def _closers(row: SampleRow) -> tuple[str | None, ...]:
    return row.stages or (row.stage,)


def _verdicts(row: SampleRow, report: Report) -> tuple[Verdict, ...]:
    """Return the verdicts on a sample at every budget."""
    if not report.curve:
        return (row.verdict,)
    levels = zip(report.curve, row.stages, strict=True)
    return tuple(verdict_at(row, closer, point.radius) for point, closer in levels)


def _enters(row: SampleRow, turn: StageResult, level: int, ran: Mapping[str, int], report: Report) -> bool:
    """Whether a turn was given a sample: it was open at that eps, or certified and the suite attacks those, too.

    Proving stops at the first eps at which it fails.
    """
    if row.verdict is Verdict.MISCLASSIFIED:
        return False
    verdicts = _verdicts(row, report)
    was_open = ran.get(_closers(row)[level] or "", len(ran)) >= ran[turn.name]
    if turn.kind == "attack":
        return was_open or (verdicts[level] is Verdict.CERTIFIED and not report.suite.skip_certified)
    return was_open and all(verdict is Verdict.CERTIFIED for verdict in verdicts[:level][-1:])


CHECKS = (_check_rows, _check_results, _check_curve, _check_stages, check_votes)
"""Each takes a report and its rows, and yields what is wrong."""
