"""A sweep's files: the heat map and the numbers in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robusteval.analysis import figures
from robusteval.comparison.sweep import FIGURES, Point, best_point, record
from robusteval.comparison.write import write_csv
from robusteval.runs import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEM = "sweep"


def write_sweep(points: Sequence[Point], facts: dict[str, Any], out: Path) -> None:
    """Write `sweep.csv`, `sweep.json`, and, where the grid has at least one point, `sweep.png` and `sweep.svg`."""
    records = record(points)
    keys = ("mean", "std", "min", "max", "n")
    write_csv(
        out / f"{STEM}.csv",
        [
            {key: entry[key] for key in ("m", "lam", "best")}
            | {f"val_{name}_{key}": entry["values"][name][key] for name in FIGURES for key in keys}
            for entry in records
        ],
    )
    write_json(out / f"{STEM}.json", {"kind": "robusteval-sweep", "facts": facts, "points": records})
    if any(point.m for point in points):
        draw(points, facts, out)


def draw(points: Sequence[Point], facts: dict[str, Any], folder: Path) -> None:
    """Draw one map per accuracy over (M, lambda), the best cell framed, and what M = 0 has in the title."""
    title = (
        f"validation accuracy, %: {facts['dataset']}, {facts['norm']} eps {facts['eps']}, {facts['epochs']} epochs, "
        f"{facts['validation_samples']} samples, {facts['seeds']} seed{'' if facts['seeds'] == 1 else 's'}"
    )
    figure, panels = figures.grid(1, 3, title, (13 / 3, 3.3))
    best = best_point(points)
    reference = next((point for point in points if not point.m), None)
    names = ("clean", f"PGD-{facts['steps']} on CE", f"stronger of PGD-{facts['steps']} on CE and on the margin")
    for axes, key, name in zip(panels[0], FIGURES, names, strict=True):
        at = f"M = 0 (AT): {100 * reference.values[key].mean:.1f}" if reference else "M = 0 (AT): not done"
        axes.set_title(f"{name}\n{at}" + (", the best" if best is reference else ""), fontsize="medium")
        _map(axes, [point for point in points if point.m], key, best)
    figures.save(figure, folder, STEM)


def _map(axes: Axes, points: Sequence[Point], name: str, best: Point) -> None:
    ms, lams = sorted({point.m for point in points}), sorted({point.lam for point in points})
    grid = np.full((len(ms), len(lams)), np.nan)
    for point in points:
        grid[ms.index(point.m), lams.index(point.lam)] = 100 * point.values[name].mean
    axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="w" if value <= middle else "k")
    if best.m:
        corner = (lams.index(best.lam) - 0.5, ms.index(best.m) - 0.5)
        axes.add_patch(_frame(corner))
    axes.set_xticks(range(len(lams)), [f"{lam:g}" for lam in lams])
    axes.set_yticks(range(len(ms)), [f"{m:g}" for m in ms])
    axes.set(xlabel="lambda", ylabel="M, %")


def _frame(corner: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2.5)
