"""Wording that every rendering of a report shares."""

from __future__ import annotations

import math

from robusteval.report import (
    Calibration,
    Comparison,
    CurvePoint,
    Rate,
    Report,
    Search,
    StageResult,
    broken_at,
    closed_at,
)
from robusteval.verdict import Verdict

BRACKET = "certified <= true robust accuracy <= empirical <= clean"
NAMED = 20
"""How many samples are named."""


def percent(value: float, down: bool = False) -> str:
    """Format a fraction as percent with two decimals; ``down`` never rounds up, for what is guaranteed."""
    if down:
        return f"{math.floor(value * 10_000 + 1e-9) / 100:.2f} %"
    return f"{value * 100:.2f} %"


def interval(rate: Rate) -> str:
    """Format the 95 % interval, rounded outwards."""
    low, high = math.floor(rate.low * 10_000) / 100, math.ceil(rate.high * 10_000) / 100
    return f"[{low:.2f}, {high:.2f}]"


def accuracies(report: Report) -> list[tuple[str, str, str, str]]:
    """Return rows (name, percent, interval, count) for clean, empirical and certified accuracy."""
    results, sure = report.results, report.guarantee
    right = [Rate.of(sure.correct, results.clean.total)] if sure else []
    rows = [
        *(("clean accuracy, abstentions wrong", percent(rate.rate), rate) for rate in right),
        ("clean accuracy" + (", abstentions right" if sure else ""), percent(results.clean.rate), results.clean),
        (f"robust accuracy, empirical ({report.suite.name})", percent(results.empirical.rate), results.empirical),
    ]
    shown = [(name, value, interval(rate), f"{rate.count}/{rate.total}") for name, value, rate in rows]
    if results.certified is None:
        return [*shown, ("robust accuracy, certified", "not attempted", "", "")]
    certified = results.certified
    value = percent(certified.rate, down=True)
    return [*shown, ("robust accuracy, certified", value, interval(certified), f"{certified.count}/{certified.total}")]


CURVE_HEADER = ("eps", "certified", "robust, empirical", "95 % interval", "broken", "open")


def curve_rows(report: Report) -> list[tuple[str, ...]]:
    """Return a row `CURVE_HEADER` for every budget, ascending; none where there is only one."""
    return [_curve_row(point) for point in report.curve]


def _curve_row(point: CurvePoint) -> tuple[str, ...]:
    results = point.results
    certified = "not attempted" if results.certified is None else percent(results.certified.rate, down=True)
    counts = (str(results.verdicts[verdict]) for verdict in (Verdict.BROKEN, Verdict.UNKNOWN))
    return (point.eps, certified, percent(results.empirical.rate), interval(results.empirical), *counts)


def _serves_every_eps(stage: StageResult) -> bool:
    return stage.eps is not None and not stage.name.endswith(f"@{stage.eps}")


def stage_rows(report: Report) -> list[tuple[str, ...]]:
    """Return a row `STAGE_HEADER` for every stage.

    What a stage broke or proved is counted at its own eps, or at the report's if it served every eps.
    """
    rows: list[tuple[str, ...]] = []
    for place, stage in enumerate(report.stages):
        serves = _serves_every_eps(stage)
        eps = report.threat.eps if serves or stage.eps is None else stage.eps
        broken = broken_at(eps, report.stages, report.curve)
        proved = closed_at(eps, report.stages, report.curve).get(stage.name, 0) - broken.get(stage.name, 0)
        left = report.results.clean.count - sum(broken.get(done.name, 0) for done in report.stages[: place + 1])
        given = max(stage.entered, 1)
        rows.append(
            (
                f"{stage.name}, every eps" if serves else stage.name,
                str(stage.entered),
                str(broken.get(stage.name, 0)),
                str(proved) if stage.kind == "certifier" else "",
                percent(left / report.results.clean.total),
                f"{stage.forward / given:.0f}",
                f"{stage.backward / given:.0f}",
                f"{stage.seconds:.1f}",
            )
        )
    return rows


STAGE_HEADER = ("stage", "samples", "broken", "proved", "robust", "fwd", "bwd", "s")
STAGE_LEGEND = "robust: accuracy after the stage; fwd, bwd: passes per sample that entered it; s: worker seconds"


def cost(report: Report) -> str:
    """Say what the whole run cost per evaluated sample."""
    forward = sum(stage.forward for stage in report.stages) / report.data.evaluated
    backward = sum(stage.backward for stage in report.stages) / report.data.evaluated
    return f"{forward:.0f} forward and {backward:.0f} backward passes per sample, {report.seconds:.1f} worker seconds"


def rulings(report: Report) -> list[str]:
    """Say what else decided the verdicts: votes or repeated evaluations, a budget of queries, near stages."""
    said, repeat = _on_smoothing(report), report.suite.repeat
    if repeat:
        said.append(
            f"Each input is decided by {repeat.evaluations} fresh evaluations: it is classified correctly if most of "
            f"them are right, and adversarial only if at least {repeat.needed} err, so that with "
            f"{repeat.confidence:.3%} confidence more than half of all would."
        )
    if report.queries:
        each = " at each eps" if report.curve else ""
        said.append(f"All attacks together had {report.queries} queries per image{each}.")
    choosy = [spec.name for spec in report.suite.stages if spec.near is not None]
    if choosy:
        said.append(
            f"Only samples that others brought near another class, or could not move at all, were given to "
            f"{', '.join(choosy)}; the command calibrate measures what that and the rest of the suite miss."
        )
    how = [report.search.precision] * (report.search.precision != "float32") + ["compiled"] * report.search.compiled
    if how:
        said.append(f"Attacks searched with the model {', '.join(how)}; float32, not compiled, decided every verdict.")
    return said


def _on_smoothing(report: Report) -> list[str]:
    """Say what a report on a smoothed classifier is about, and how far its verdicts can be trusted."""
    smoothing, sure = report.suite.smoothing, report.guarantee
    if smoothing is None or sure is None:
        return []
    looks = ", ".join(map(str, smoothing.looks))
    said = [
        f"All numbers are about the smoothed classifier g(x) = argmax_c P(f(x + {smoothing.sigma:g} N(0, I)) = c), "
        f"not about the network f itself, and statistical: each decision is wrong with probability at most alpha.",
        f"An input is misclassified or adversarial only if the most frequent other class of {smoothing.n0} noisy "
        f"copies has more votes than the label in {smoothing.n} fresh ones, beyond alpha {smoothing.alpha:g}. "
        f"{sure.abstained} clean inputs are undecided by these votes (g abstains) and count as not wrong. Of "
        f"{sure.decisions} decisions at most {sure.wrong_expected:.3g} are wrong on average.",
    ]
    if report.results.certified is None:
        return said
    return [
        *said,
        f"Certificates: {smoothing.n0} noisy copies choose the class, the looks after {looks} fresh ones share alpha "
        f"{smoothing.alpha:g}; {sure.draws:.0f} copies per sample. Of {sure.tried} that were tried at most "
        f"{sure.false_expected:.3g} are false on average, with 95 % confidence at most {sure.false_most}; all hold "
        f"together with confidence {percent(sure.all_true, down=True)} (Bonferroni).",
    ]


def calibrated(found: Calibration, report: Report) -> list[str]:
    """Say how far apart the suite of ``report`` and another were, and what each took."""
    suite, against, total = found.suite, found.against, len(found.samples)
    low, high = math.floor(found.low * 10_000) / 100, math.ceil(found.high * 10_000) / 100
    said = [f"{total} random samples (seed {found.seed}), {found.clean} classified correctly, {found.created[:10]}"]
    for side in (suite, against):
        passes = f"{side.forward / total:.0f} forward and {side.backward / total:.0f} backward passes per sample"
        said.append(f"{side.name}: {side.robust} robust, {passes}, {side.seconds:.1f} s")
    said.append(
        f"robust accuracy at {report.threat.norm} eps {report.threat.eps}, {suite.name} minus {against.name}: "
        f"{100 * found.difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f} over draws of samples"
    )
    for name, ids in ((suite.name, found.only_suite_breaks), (against.name, found.only_against_breaks)):
        more = ", ..." if len(ids) > NAMED else ""
        said.append(f"broken by {name} alone: {', '.join(map(str, ids[:NAMED])) or 'none'}{more}")
    if report.queries or report.search != Search():
        said.append(f"{against.name} ran as it does by itself: in float32, not compiled, without a budget of queries")
    if suite.seconds:
        said.append(f"{against.name} took {against.seconds / suite.seconds:.3g} times as long")
    return said


def subject(report: Report) -> str:
    """Say which model, data and threat a report is about."""
    data, smoothing = report.data, report.suite.smoothing
    model = f"{report.model.name}, smoothed with sigma {smoothing.sigma:g}," if smoothing else report.model.name
    part = f"all {data.total}" if data.evaluated == data.total else f"the first {data.evaluated} of {data.total}"
    return f"{model} on {data.title}, {part} {data.part} images, {report.threat.norm} eps {report.threat.eps}"


def placement(comparison: Comparison) -> str:
    """Say the rank among comparable RobustBench entries, or why there is none."""
    if comparison.reason is not None:
        return f"No RobustBench rank: {comparison.reason}"
    provisional = "provisional " if comparison.provisional else ""
    text = f"RobustBench: {provisional}rank {comparison.rank} among {comparison.entries} comparable entries"
    if comparison.rank_best != comparison.rank_worst:
        text += f" ({comparison.rank_best} to {comparison.rank_worst} within the 95 % interval)"
    return f"{text}, snapshot {comparison.snapshot}."
