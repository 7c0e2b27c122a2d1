"""A comparison as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from robusteval.analysis import figures
from robusteval.comparison.markdown import fully_seeds
from robusteval.comparison.table import Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"


def draw(table: Table, folder: Path) -> None:
    """Write `table.png` and `table.svg`: accuracies by attack, differences from the reference, and margins."""
    rows = [row for row in table.rows if row.results]
    if not rows:
        return
    known, size = table.facts, (13 / 3, 1.2 + 0.42 * len(rows))
    title = (
        f"{known['dataset']}, {known['norm']} eps {known['eps']}, {known['model']['name']}, {known['epochs']} epochs"
    )
    figure, panels = figures.grid(1, 3, title, size, sharey=True, width_ratios=(2, 1.2, 1))
    accuracy, difference, margin = panels[0]
    _accuracies(accuracy, rows, table)
    _differences(difference, rows, table)
    _margins(margin, rows, table)
    accuracy.set_yticks(range(len(rows)), [row.label for row in rows])
    accuracy.invert_yaxis()
    figures.legend(figure, accuracy)
    figures.save(figure, folder, "table")


def _accuracies(axes: Axes, rows: list[Row], table: Table) -> None:
    """Draw means over seeds, with whiskers from the lowest to the highest run."""
    names = {"clean": "clean", "pgd": f"PGD-{table.config.margin_steps}"}
    names |= {stage: f"after {stage}" for stage in table.shared}
    some = f" ({fully_seeds(table)})" if table.some_fully else ""
    names |= {stage: f"after {stage}{some}" for stage in table.full[len(table.shared) :]}
    for turn, (column, title) in enumerate(names.items()):
        found = [(height, row.spreads[column]) for height, row in enumerate(rows) if column in row.spreads]
        means = [100 * value.mean for _, value in found]
        reach = [[100 * (v.mean - v.min) for _, v in found], [100 * (v.max - v.mean) for _, v in found]]
        heights = [height + 0.6 * (turn / (len(names) - 1) - 0.5) for height, _ in found]
        marker = MARKERS[turn % len(MARKERS)]
        label = figures.plain(title)
        axes.errorbar(means, heights, xerr=reach, fmt=marker, markersize=4, capsize=2, linewidth=1, label=label)
    axes.set_xlabel("accuracy, %")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _differences(axes: Axes, rows: list[Row], table: Table) -> None:
    axes.axvline(0, color="0.6", linewidth=0.8)
    for height, row in enumerate(rows):
        if row.robust:
            low, high = (100 * abs(end - row.robust.difference) for end in (row.robust.low, row.robust.high))
            point = 100 * row.robust.difference
            axes.errorbar([point], [height], xerr=[[low], [high]], fmt="o", color="C0", capsize=3, markersize=5)
            axes.plot([100 * v for v in row.robust.by_seed], [height + 0.18] * len(row.robust.by_seed), "k|", ms=5)
    what = figures.plain(f"difference from {table.config.reference} after {table.shared[-1]}, points")
    axes.set_xlabel(f"{what}\n(95 % interval; ticks: seeds)")
    axes.grid(axis="x", alpha=0.3)


def _margins(axes: Axes, rows: list[Row], table: Table) -> None:
    axes.axvline(0, color="0.6", linewidth=0.8)
    for marker, key in (("o", "mean"), ("s", "median")):
        values = [row.spreads[f"scaled_margin_{key}"].mean for row in rows]
        axes.plot(values, range(len(rows)), marker, markersize=5, label=key)
    axes.set_xlabel(f"logit margin under PGD-{table.config.margin_steps}\n/ std of the logits")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="x-small")
