"""An analysis on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Record = Mapping[str, Any]


def tables(record: Record) -> RenderableType:
    """Return the short tables of the ``record`` of any analysis."""
    kinds = {"margins": _margins, "gradients": _gradients, "trajectory": _trajectory}
    return kinds[record["analysis"]](record)


def _table(title: str, *header: str, caption: str | None = None) -> Table:
    table = Table(title=Text(title), caption=caption and Text(caption))
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _subject(record: Record) -> str:
    return f"{record['title']}, {record['norm']} eps {record['eps']}, PGD-{record['steps']}"


def _number(value: float | None, unit: float = 1, digits: int = 3) -> str:
    return "-" if value is None else f"{unit * value:.{digits}f}"


def _margins(record: Record) -> RenderableType:
    accuracies = _table(f"Accuracy: {_subject(record)}", "model", "split", "samples", "clean %", "under PGD %")
    caption = (
        f"L: the {record['m']:g} % of a split with the smallest margins under PGD; scaled: divided by the logits' std"
    )
    header = ("model", "split", "clean", "PGD", "PGD, L", "PGD, rest", "PGD, scaled")
    means = _table("Mean logit margin", *header, caption=caption)
    for label, parts in record["results"].items():
        for part, of in parts.items():
            whole = of["all"]
            percent = [_number(whole[key], 100, 2) for key in ("clean_accuracy", "robust_accuracy")]
            accuracies.add_row(*map(Text, (label, part, str(whole["samples"]), *percent)))
            groups = [_number(of[group]["adversarial_margin"]) for group in ("all", "L", "rest")]
            cells = (label, part, _number(whole["clean_margin"]), *groups, _number(whole["scaled_margin"]))
            means.add_row(*map(Text, cells))
    return Group(accuracies, means)


def _gradients(record: Record) -> RenderableType:
    caption = (
        "mean margin; medians of the norms of d CE/dx and d margin/dx (m.), per unit of pixel value, and of the "
        "distance to the boundary if the margin were linear, in pixel units"
    )
    header = ("model", "inputs", "margin", "CE L1", "CE L2", "m. L1", "m. L2", "distance")
    table = _table(f"Input gradients: {_subject(record)}, {record['split']}", *header, caption=caption)
    for label, points in record["results"].items():
        for point, of in points.items():
            norms = [f"{of[f'{name}_median']:.3g}" for name in ("ce_l1", "ce_l2", "margin_l1", "margin_l2")]
            distance = _number(of.get("linear_distance_median"), digits=4)
            table.add_row(*map(Text, (label, point, _number(of["margin_mean"]), *norms, distance)))
    return table


def _trajectory(record: Record) -> RenderableType:
    lam, weight = f"OVR lam={record['lam']:g}", f"CE w={record['weight']:g}"
    table = _table("Margins on the simple problem", "K", "t", "CE", weight, lam, "OVR / CE", f"OVR / {weight}")
    for classes, of in record["classes"].items():
        for row, time in enumerate(record["times"]):
            margins = [f"{of[name][row]:.6f}" for name in ("ce", "weighted_ce", "ovr")]
            ratios = [f"{of[name][row]:.2f}" for name in ("ratio", "ratio_weighted")]
            table.add_row(classes, f"{time:g}", *margins, *ratios, end_section=row == len(record["times"]) - 1)
    return Group(table, Text(record["statement"]))
