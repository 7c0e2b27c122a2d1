"""How the figures of an analysis look and how they are written: PNG, SVG and the numbers behind them as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robusteval.runs import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = NDArray[np.float64]

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito (2008): told apart by readers with any colour vision."""

BINS = 60
GREY = {"color": "0.6", "linewidth": 0.8, "zorder": 0}


def colours(count: int) -> list[str]:
    """Return ``count`` colours, from the start again when they run out."""
    return list(islice(cycle(COLOURS), count))


def plain(text: str) -> str:
    """Return ``text`` so that matplotlib draws it as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def grid(rows: int, columns: int, title: str, size: tuple[float, float] = (4.6, 2.5), **kwargs: Any) -> tuple[Any, Any]:
    """Return (figure, array of axes (rows, columns)); ``size`` is one panel's, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, size[0] * columns), size[1] * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(plain(title), fontsize="medium")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def legend(figure: Figure, axes: Any, markerscale: float = 1.0) -> None:
    """Put the legend of ``axes`` below all panels, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 40 else min(4, len(labels))
    where: Any = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(handles, labels, fontsize="small", markerscale=markerscale, **where)


def log_axis(axis: Any) -> None:
    """Label a logarithmic axis, its limits set, in plain numbers: 1, 2 and 5 of few decades, powers of ten of many."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``name.png`` and ``name.svg`` to ``folder``, each atomically, the same bytes for the same figure."""
    import matplotlib

    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")  # once for both formats: it takes as long as drawing
    with matplotlib.rc_context({"svg.hashsalt": "robusteval"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
            write_atomic(folder / f"{name}.{kind}", buffer.getvalue())


def save_csv(folder: Path, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write ``name.csv`` to ``folder`` atomically; numbers have nine significant digits, enough for any float32."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([format(cell, ".9g") if isinstance(cell, float) else cell for cell in row])
    write_atomic(folder / f"{name}.csv", text.getvalue().encode())


def bins(values: Numbers) -> Numbers:
    """Return the edges of about `BINS` equal bins that hold all ``values`` (N,); 0 is a multiple of their width."""
    low, high = float(values.min()), float(values.max())
    width = (high - low) / BINS or 1.0
    return width * np.arange(np.floor(low / width - 1e-6), np.ceil(high / width + 1e-6) + 1)


def shares(values: Numbers, edges: Numbers, out_of: int | None = None) -> Numbers:
    """Return the fraction of ``out_of`` (default: of all) samples in each bin, (len(edges) - 1,)."""
    return np.histogram(values, edges)[0] / (out_of or max(1, len(values)))
