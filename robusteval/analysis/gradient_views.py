"""What is shown of input gradients: their norms, clean and under attack, and the norms against the margin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from robusteval.analysis import figures
from robusteval.analysis.figures import BLUE, GREY, ORANGE, Numbers
from robusteval.analysis.gradients import FIELDS, NORMS, Gradients, Slopes
from robusteval.errors import RobustevalError
from robusteval.threat import Norm

Found = Mapping[str, Gradients]
"""label of a model -> its gradients."""

POINTS = {"clean": BLUE, "adversarial": ORANGE}
FLOOR = 1e-10
"""Norms below it are drawn here: a logarithm has no zero. The CSV has the norms themselves."""

DRAWN = 2000
"""Samples in a scatter plot; the CSV has all."""

NAMES = {
    "ce_l1": r"$\|\nabla_x\,\mathrm{CE}\|_1$",
    "ce_l2": r"$\|\nabla_x\,\mathrm{CE}\|_2$",
    "margin_l1": r"$\|\nabla_x\,\mathrm{margin}\|_1$",
    "margin_l2": r"$\|\nabla_x\,\mathrm{margin}\|_2$",
}


def check_finite(found: Found) -> None:
    """Raise `RobustevalError` naming a model whose gradients are not numbers: they cannot be drawn."""
    for label, one in found.items():
        for point in POINTS:
            bad = max(int((~getattr(getattr(one, point), field).isfinite()).sum()) for field in FIELDS)
            if bad:
                raise RobustevalError(f"model '{label}' gives NaN or infinite gradients at {bad} {point} inputs.")


def summary(slopes: Slopes, norm: Norm) -> dict[str, float]:
    """Return mean margin, median norms, and the median linear estimate of the distance to the boundary in ``norm``."""
    medians = {f"{name}_median": _median(getattr(slopes, name)) for name in NORMS}
    distance = slopes.distance(norm)
    if distance is not None:
        medians["linear_distance_median"] = _median(distance)
    return {"margin_mean": float(slopes.margin.double().mean()), **medians}


def _median(values: Tensor) -> float:
    return float(np.median(values.double().numpy()))


def draw(found: Found, norm: Norm, title: str, folder: Path) -> None:
    """Write every figure and its CSV to ``folder``."""
    _norms(found, f"Input-gradient norms: {title}", folder)
    kind = "l2" if norm is Norm.L2 else "l1"
    _scatter(found, kind, f"Input-gradient norms against margins: {title}", folder)
    figures.save_csv(folder, "scatter", ("model", "id", "label", "input", *FIELDS), _samples(found))


def _norms(found: Found, title: str, folder: Path) -> None:
    """Draw the distributions, a row per norm, clean inputs beside adversarial ones, a colour per model."""
    figure, axes = figures.grid(len(NORMS), len(POINTS), title, size=(4.6, 2.0), sharex="row", sharey="row")
    rows: list[tuple[Any, ...]] = []
    for row, name in zip(axes, NORMS, strict=True):
        logs = {(label, point): _log10(one, point, name) for label, one in found.items() for point in POINTS}
        edges = figures.bins(np.concatenate(list(logs.values())))
        for panel, point in zip(row, POINTS, strict=True):
            for label, colour in zip(found, figures.colours(len(found)), strict=True):
                share = figures.shares(logs[label, point], edges)
                panel.stairs(share, 10**edges, color=colour, linewidth=1.4, label=figures.plain(label))
                bins = zip((10 ** edges[:-1]).tolist(), (10 ** edges[1:]).tolist(), share.tolist(), strict=True)
                rows += [(label, point, name, *cells) for cells in bins]
            panel.set(xscale="log", xlabel=NAMES[name] + ", per unit of pixel value")
        figures.log_axis(row[0].xaxis)
        row[0].set_ylabel("share per bin")
    for panel, point in zip(axes[0], POINTS, strict=True):
        panel.set_title(f"{point} inputs")
    figures.legend(figure, axes[0, 0])
    figures.save(figure, folder, "norms")
    figures.save_csv(folder, "norms", ("model", "input", "norm", "bin_low", "bin_high", "share"), rows)


def _log10(one: Gradients, point: str, name: str) -> Numbers:
    values: Numbers = getattr(getattr(one, point), name).double().numpy()
    return np.log10(np.maximum(values, FLOOR))


def _scatter(found: Found, kind: str, title: str, folder: Path) -> None:
    """Draw norm ``kind`` of both gradients against the margin, a row per model; at most `DRAWN` samples."""
    names = (f"ce_{kind}", f"margin_{kind}")
    figure, axes = figures.grid(len(found), 2, title, size=(4.6, 2.7), sharex=True, sharey="col")
    for row, (label, one) in zip(axes, found.items(), strict=True):
        for panel, name in zip(row, names, strict=True):
            for point, colour in POINTS.items():
                slopes = getattr(one, point)
                y = 10 ** _log10(one, point, name)[:DRAWN]
                # thousands of points are a picture inside the SVG, or the file has megabytes
                style = {"s": 5, "alpha": 0.5, "linewidths": 0, "color": colour, "rasterized": True}
                panel.scatter(slopes.margin[:DRAWN].numpy(), y, label=f"{point} inputs", **style)
            panel.axvline(0, **GREY)
            panel.set(yscale="log", ylabel=NAMES[name], title=figures.plain(label))
    for panel in axes[-1]:
        figures.log_axis(panel.yaxis)
        panel.set_xlabel("logit margin at the same input")
    figures.legend(figure, axes[0, 0], markerscale=3)
    figures.save(figure, folder, "scatter")


def _samples(found: Found) -> Iterator[tuple[Any, ...]]:
    for label, one in found.items():
        for point in POINTS:
            columns = (one.ids, one.labels, *(getattr(getattr(one, point), name) for name in FIELDS))
            for number, target, *values in zip(*(column.tolist() for column in columns), strict=True):
                yield label, number, target, point, *values
