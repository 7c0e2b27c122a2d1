"""The exact margin trajectories as a figure and as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.analysis import figures
from robusteval.analysis.figures import BLUE, GREY, ORANGE, PURPLE, Numbers
from robusteval.analysis.trajectory import ce_margin, overtaking, ovr_margin
from robusteval.errors import UsageError

POINTS = 241
START = 0.01
MAX_CLASSES = 10**9
WEIGHTS = (1e-6, 1e6)


@dataclass(frozen=True)
class Problem:
    """The simple problem for several numbers of ``classes``: at which ``times``, and how the losses are weighted."""

    classes: tuple[int, ...] = (10, 100, 1000)
    times: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    weight: float = 2.0
    lam: float = 1.0

    def __post_init__(self) -> None:
        for count in self.classes:
            if not 2 <= count <= MAX_CLASSES:
                raise UsageError(f"--classes {count} is out of range; give numbers from 2 to {MAX_CLASSES}.")
        for time in self.times:
            if not (math.isfinite(time) and time > 0):
                raise UsageError(f"--times {time:g} is not a time; give finite numbers above 0.")
        for name in ("weight", "lam"):
            value = getattr(self, name)
            if not WEIGHTS[0] <= value <= WEIGHTS[1]:
                raise UsageError(f"--{name} {value:g} is out of range; give one from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}.")


def record(problem: Problem) -> dict[str, Any]:
    """Return margins, ratios and overtaking times as JSON, by number of classes."""
    times = np.array(problem.times)
    return {
        "times": list(problem.times),
        "weight": problem.weight,
        "lam": problem.lam,
        "classes": {str(classes): _one(classes, times, problem) for classes in problem.classes},
        "statement": statement(problem),
    }


def _one(classes: int, times: Numbers, problem: Problem) -> dict[str, Any]:
    curves = _curves(classes, times, problem)
    overtakes = {}
    for name, weight in (("ce", 1.0), ("weighted_ce", problem.weight)):
        time, margin = overtaking(classes, weight, problem.lam)
        overtakes[name] = {"t": time, "margin": margin}
    return {**{name: curve.tolist() for name, curve in curves.items()}, "overtakes": overtakes}


def _curves(classes: int, times: Numbers, problem: Problem) -> dict[str, Numbers]:
    ce, ovr = ce_margin(times, classes), ovr_margin(times, problem.lam)
    weighted = ce_margin(times, classes, problem.weight)
    return {"ce": ce, "weighted_ce": weighted, "ovr": ovr, "ratio": ovr / ce, "ratio_weighted": ovr / weighted}


def statement(problem: Problem) -> str:
    """Say what the factor two is and is not."""
    text = "The factor 2 between the margins is asymptotic: OVR grows like 2 log t, CE, weighted or not, like log t."
    late = []
    for classes in problem.classes:
        time, margin = overtaking(classes, 1.0, problem.lam)
        if time > 0:
            late.append(f"K = {classes} at t = {time:.4g} (margin {margin:.3g})")
    if problem.lam == 1:
        text += " At equal weights OVR is behind at first for K >= 5, and never behind for K = 2, 3, 4."
    elif problem.lam < 1:
        text += f" With lam = {problem.lam:g} < 1 OVR is behind at first for every K."
    return text + (f" It overtakes CE for {', '.join(late)}." if late else " Here it is never behind CE.")


def draw(problem: Problem, folder: Path) -> None:
    """Write the figure with its CSV, and the CSV of the values at the problem's times, to ``folder``."""
    end = max(*problem.times, *(2 * overtaking(classes, 1.0, problem.lam)[0] for classes in problem.classes), 10.0)
    times = np.geomspace(START, end, POINTS)
    title = "Margins under gradient flow on free logits (the simple problem)"
    figure, axes = figures.grid(2, len(problem.classes), title, size=(4.0, 3.0), sharex=True, sharey="row")
    rows: list[tuple[Any, ...]] = []
    for column, classes in zip(axes.T, problem.classes, strict=True):
        curves = _curves(classes, times, problem)
        _margins(column[0], classes, times, curves, problem)
        _ratios(column[1], times, curves, problem)
        rows += [
            (classes, *cells) for cells in zip(times.tolist(), *map(np.ndarray.tolist, curves.values()), strict=True)
        ]
    axes[0, 0].set_ylabel(r"margin $z_y - z_k$")
    axes[1, 0].set_ylabel("margin of OVR / margin of CE\n(colour: of which CE)")
    figures.log_axis(axes[0, 0].xaxis)
    figures.legend(figure, axes[0, 0])
    figures.save(figure, folder, "trajectory")
    header = ("classes", "t", "ce", "weighted_ce", "ovr", "ratio", "ratio_weighted")
    figures.save_csv(folder, "trajectory", header, rows)
    figures.save_csv(folder, "table", header, _table(problem))


def _table(problem: Problem) -> Sequence[tuple[Any, ...]]:
    return [
        (classes, *cells)
        for classes in problem.classes
        for cells in zip(
            problem.times,
            *(c.tolist() for c in _curves(classes, np.array(problem.times), problem).values()),
            strict=True,
        )
    ]


def _margins(panel: Any, classes: int, times: Numbers, curves: dict[str, Numbers], problem: Problem) -> None:
    panel.plot(times, curves["ce"], color=BLUE, label="CE")
    panel.plot(times, curves["weighted_ce"], color=PURPLE, label=f"CE, weight {problem.weight:g}")
    panel.plot(times, curves["ovr"], color=ORANGE, label=rf"OVR, $\lambda$ = {problem.lam:g}")
    later = times[times >= 1]
    panel.plot(later, np.log(later), "--", color=BLUE, linewidth=0.9, label=r"$\log t$")
    panel.plot(later, 2 * np.log(later), "--", color=ORANGE, linewidth=0.9, label=r"$2 \log t$")
    time, margin = overtaking(classes, 1.0, problem.lam)
    if time > 0:
        panel.plot(time, margin, "ko", markersize=5, label="OVR overtakes CE")
        panel.set_title(f"K = {classes}: OVR overtakes at t = {time:.4g}", fontsize="medium")
    else:
        panel.set_title(f"K = {classes}: OVR is never behind", fontsize="medium")
    panel.set_xscale("log")


def _ratios(panel: Any, times: Numbers, curves: dict[str, Numbers], problem: Problem) -> None:
    panel.plot(times, curves["ratio"], color=BLUE)
    panel.plot(times, curves["ratio_weighted"], color=PURPLE)
    for height in (1, 2):
        panel.axhline(height, **GREY)
    panel.set(
        xscale="log", xlabel="time t of the gradient flow", ylim=(0, max(2.1, 1.05 * float(curves["ratio"].max())))
    )
