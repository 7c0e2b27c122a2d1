"""Robust accuracy against eps: `curve.csv` and `curve.png`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from robusteval.report import CurvePoint, Report
from robusteval.runs import write_atomic
from robusteval.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE_TABLE, CURVE_PICTURE = "curve.csv", "curve.png"
RATES = ("clean_accuracy", "certified_accuracy", "robust_accuracy", "robust_low", "robust_high")
COLUMNS = ("eps", "radius", *RATES, *(verdict.value for verdict in Verdict))


def write_curve(report: Report, folder: Path) -> None:
    """Write table and picture of the curve in ``report`` into ``folder``, where its rows are."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    distances = [row["adv_distance"] for row in map(json.loads, lines)]
    write_atomic(folder / CURVE_TABLE, curve_table(report).encode())
    write_atomic(folder / CURVE_PICTURE, _picture(report, sorted(one for one in distances if one is not None)))


def curve_table(report: Report) -> str:
    """Return CSV: rates in [0, 1] in full, the 95 % interval of empirical robust accuracy, and counts of verdicts."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for point in report.curve:
        results = point.results
        certified = "" if results.certified is None else results.certified.rate
        counts = [results.verdicts[verdict] for verdict in Verdict]
        robust = results.empirical
        rates = (results.clean.rate, certified, robust.rate, robust.low, robust.high)
        writer.writerow([point.eps, point.radius, *rates, *counts])
    return text.getvalue()


def _picture(report: Report, reached: list[float]) -> bytes:
    """Draw the bracket at every budget, and between them the share of samples that no witness ``reached`` yet.

    That staircase is an upper bound of robust accuracy at every eps, as what is adversarial at a distance is so in
    every larger ball.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _staircase(axes, report, reached)
    _points(axes, report.curve)
    axes.axvline(report.threat.radius, color="0.7", lw=1, ls=":")
    axes.set_xticks([point.radius for point in report.curve], [point.eps for point in report.curve], rotation=45)
    axes.set(xlabel=f"{report.threat.norm} eps", ylabel="robust accuracy, %", ylim=(0, 101), xlim=(0, None))
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _staircase(axes: Axes, report: Report, reached: list[float]) -> None:
    clean = report.results.clean
    left = [100 * (clean.count - count) / clean.total for count in range(len(reached) + 1)]
    places = [0.0, *reached, max([report.curve[-1].radius, *reached])]
    axes.step(places, [*left, left[-1]], where="post", color="tab:red", lw=1, label="nearest witness")


def _points(axes: Axes, curve: tuple[CurvePoint, ...]) -> None:
    radii, robust = [point.radius for point in curve], [point.results.empirical for point in curve]
    spread = [[100 * (rate.rate - rate.low) for rate in robust], [100 * (rate.high - rate.rate) for rate in robust]]
    heights = [100 * rate.rate for rate in robust]
    axes.errorbar(radii, heights, spread, fmt="o", color="tab:red", capsize=3, label="empirical")
    proved = [(point.radius, 100 * point.results.certified.rate) for point in curve if point.results.certified]
    if proved:
        axes.plot(*zip(*proved, strict=True), "s", color="tab:blue", label="certified")
