"""Where the shapes of a page's figures lie, in percent of their frame, so that they fit every screen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robusteval.report import Rate, Report, SampleRow
from robusteval.verdict import Verdict

STACK = {
    Verdict.CERTIFIED: "proved robust",
    Verdict.UNKNOWN: "open: neither proved nor broken",
    Verdict.BROKEN: "broken by an attack",
    Verdict.MISCLASSIFIED: "misclassified as it is",
}
"""Verdicts from the left: the ends of these bars are certified, empirical and clean accuracy."""
BINS = 30
FINITE = float(np.finfo(np.float32).max)
STEPS = 400
"""Corners of a staircase at most; more cannot be seen."""


@dataclass(frozen=True)
class Bar:
    """A rectangle: ``x``, ``y``, ``width`` and ``height`` in percent, and which verdict fills it."""

    verdict: str
    x: float
    width: float
    y: float = 0.0
    height: float = 100.0
    count: int = 0


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    place: float
    label: str


@dataclass(frozen=True)
class Histogram:
    """Stacked bars of counts, and the axes."""

    bars: tuple[Bar, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    summary: str


@dataclass(frozen=True)
class Point:
    """A rate at an eps, in percent of the frame, ``low`` and ``high`` its interval; y grows downwards."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Robust accuracy against eps: the staircase of witnesses as an SVG path in 1000 x 1000, and points."""

    path: str
    empirical: tuple[Point, ...]
    certified: tuple[Point, ...]
    x: tuple[Tick, ...]
    own: float


def stacked(verdicts: Mapping[Verdict, int]) -> tuple[Bar, ...]:
    """Return one bar per verdict, side by side, together 100 percent wide."""
    total, bars, left = sum(verdicts.values()), [], 0
    for verdict in STACK:
        count = verdicts.get(verdict, 0)
        bars.append(Bar(verdict.value, _share(left, total), _share(count, total), count=count))
        left += count
    return tuple(bars)


def _share(count: int, total: int) -> float:
    return round(100 * count / max(total, 1), 3)


def by_class(rows: Iterable[SampleRow]) -> dict[int, Counter[Verdict]]:
    """Return label -> counts of verdicts, ascending."""
    counts: dict[int, Counter[Verdict]] = {}
    for row in rows:
        counts.setdefault(row.label, Counter())[row.verdict] += 1
    return dict(sorted(counts.items()))


def histogram(values: Sequence[tuple[float, Verdict]]) -> Histogram | None:
    """Return stacked bars of some ``values`` by verdict; None where there are none."""
    if not values:
        return None
    all_values = np.clip([value for value, _ in values], -FINITE, FINITE)  # a report may say 1e308
    edges = np.histogram_bin_edges(all_values, BINS)
    verdicts = np.array([verdict.value for _, verdict in values])
    counts = {one.value: np.histogram(all_values[verdicts == one.value], edges)[0] for one in STACK}
    tallest = max(int(sum(counts.values()).max()), 1)  # type: ignore[union-attr]
    bars, below = [], np.zeros(BINS, dtype=int)
    for name, heights in counts.items():
        for place in np.flatnonzero(heights).tolist():
            height, base = 100 * int(heights[place]) / tallest, 100 * int(below[place]) / tallest
            where = (
                round(100 * place / BINS, 3),
                round(100 / BINS, 3),
                round(100 - base - height, 3),
                round(height, 3),
            )
            bars.append(Bar(name, *where, int(heights[place])))
        below += heights
    low, middle, high = np.quantile(all_values, (0.25, 0.5, 0.75)).tolist()
    summary = (
        f"{len(values)} samples from {all_values.min():.4g} to {all_values.max():.4g}, "
        f"median {middle:.4g}, half of them between {low:.4g} and {high:.4g}"
    )
    return Histogram(tuple(bars), _ticks(edges[0], edges[-1]), (Tick(100, "0"), Tick(0, str(tallest))), summary)


def _ticks(low: float, high: float) -> tuple[Tick, ...]:
    from matplotlib.ticker import MaxNLocator

    span = high - low
    places = (place for place in MaxNLocator(5).tick_values(low, high) if low <= place <= high)
    return tuple(Tick(round(100 * (place - low) / span, 3), f"{place:.4g}") for place in places)


def eps_curve(report: Report, rows: Iterable[SampleRow]) -> Curve | None:
    """Return the curve of a report with several eps, as `eps_curve.write_curve` draws it."""
    if not report.curve:
        return None
    reached = sorted(row.adv_distance for row in rows if row.adv_distance is not None)
    most = max([report.curve[-1].radius, *reached])
    clean = report.results.clean
    kept = range(0, len(reached), max(1, math.ceil(len(reached) / STEPS)))
    path = [f"M0 {1000 - 1000 * clean.rate:.1f}"]
    for place in kept:
        path.append(f"H{1000 * reached[place] / most:.1f}")
        path.append(f"V{1000 - 1000 * (clean.count - place - 1) / clean.total:.1f}")
    if reached:  # thinned out, the last step must still end where it does
        path.append(f"V{1000 - 1000 * (clean.count - len(reached)) / clean.total:.1f}")
    places = [100 * point.radius / most for point in report.curve]
    proved = [(place, point.results.certified) for place, point in zip(places, report.curve, strict=True)]
    return Curve(
        path=" ".join([*path, "H1000"]),
        empirical=tuple(_point(x, point.results.empirical) for x, point in zip(places, report.curve, strict=True)),
        certified=tuple(_point(x, rate) for x, rate in proved if rate is not None),
        x=(Tick(0, "0"), *(Tick(round(x, 3), point.eps) for x, point in zip(places, report.curve, strict=True))),
        own=round(100 * report.threat.radius / most, 3),
    )


def _point(x: float, rate: Rate) -> Point:
    return Point(round(x, 3), *(round(100 - 100 * value, 3) for value in (rate.rate, rate.low, rate.high)))
