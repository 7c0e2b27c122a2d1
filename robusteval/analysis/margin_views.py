"""What is shown of logit margins: histograms, raw and scale-free, by class, and the set L against the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusteval.analysis import figures
from robusteval.analysis.figures import BLUE, GREY, ORANGE, Numbers
from robusteval.analysis.margins import Margins
from robusteval.errors import RobustevalError

Found = Mapping[str, Mapping[str, Margins]]
"""label of a model -> "train" or "test" -> its margins."""

PARTS = {"train": ORANGE, "test": BLUE}
MANY_CLASSES = 20


def check_finite(found: Found) -> None:
    """Raise `RobustevalError` naming a model whose margins are not numbers: they cannot be drawn."""
    for label, parts in found.items():
        bad = sum(int((~(one.clean.isfinite() & one.adversarial.isfinite())).sum()) for one in parts.values())
        if bad:
            raise RobustevalError(f"model '{label}' gives NaN or infinite logits for {bad} samples.")


def summary(margins: Margins, m: float, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the figures of one model on one split: of all samples, of L, of the rest and of each class."""
    hard = margins.hardest(m)
    groups = {"all": torch.ones_like(hard), "L": hard, "rest": ~hard}
    by_class = {name: _group(margins, margins.labels == k) for k, name in enumerate(classes)}
    return {**{name: _group(margins, mask) for name, mask in groups.items()}, "classes": by_class}


def _group(margins: Margins, mask: Tensor) -> dict[str, Any]:
    """Return means over the samples in ``mask`` (N,) bool; None where there are none."""

    def mean(values: Tensor) -> float | None:
        return float(values[mask].double().mean()) if mask.any() else None

    return {
        "samples": int(mask.sum()),
        "clean_accuracy": mean(margins.right),
        "robust_accuracy": mean(margins.held),
        "clean_margin": mean(margins.clean),
        "adversarial_margin": mean(margins.adversarial),
        "scaled_margin": mean(margins.scaled),
    }


def draw(found: Found, records: Mapping[str, Mapping[str, Any]], m: float, title: str, folder: Path) -> None:
    """Write every figure and its CSV to ``folder``; ``records`` holds the `summary` of each model and split."""
    raw = {
        "PGD": {label: {part: _numbers(one.adversarial) for part, one in by.items()} for label, by in found.items()},
        "clean": {label: {part: _numbers(one.clean) for part, one in by.items()} for label, by in found.items()},
    }
    scaled = {label: {part: _numbers(one.scaled) for part, one in by.items()} for label, by in found.items()}
    _histograms(raw, "logit margin", f"Logit margins: {title}", folder, "margins")
    unit = "logit margin / standard deviation of the sample's logits"
    _histograms({"PGD": scaled}, unit, f"Scale-free margins: {title}", folder, "scaled")
    _hard(found, m, f"Set L, the {m:g} % smallest margins of a split, and the rest: {title}", folder)
    _classes(records, f"By class: {title}", folder)
    figures.save_csv(folder, "samples", _SAMPLE, _samples(found, m))


def _numbers(values: Tensor) -> Numbers:
    return values.double().numpy()


def _histograms(
    kinds: Mapping[str, Mapping[str, Mapping[str, Numbers]]], xlabel: str, title: str, folder: Path, name: str
) -> None:
    """Draw density and cumulative form, a row per model, train and test; ``kinds``: PGD (solid), clean (dotted)."""
    edges = figures.bins(np.concatenate([v for of in kinds.values() for by in of.values() for v in by.values()]))
    labels = list(kinds["PGD"])
    figure, axes = figures.grid(len(labels), 2, title, sharex=True, sharey="col")
    rows: list[tuple[Any, ...]] = []
    for (density, cumulative), label in zip(axes, labels, strict=True):
        for kind, models in kinds.items():
            style = {"linestyle": "-" if kind == "PGD" else ":", "linewidth": 1.5 if kind == "PGD" else 1.1}
            for part, values in models[label].items():
                share = figures.shares(values, edges)
                height, total = share / np.diff(edges), np.cumsum(share)
                line = {**style, "color": PARTS[part], "label": f"{part}, {kind}"}
                density.stairs(height, edges, fill=False, **line)
                cumulative.plot(edges, np.concatenate([[0.0], total]), **line)
                rows += [(label, part, kind, *row) for row in _floats(edges[:-1], edges[1:], height, total)]
        density.set(ylabel="density", title=figures.plain(label))
        cumulative.set(ylabel="share of samples below", ylim=(0, 1.02), title=figures.plain(label))
        for panel in (density, cumulative):
            panel.axvline(0, **GREY)
    for panel in axes[-1]:
        panel.set_xlabel(xlabel)
    figures.legend(figure, axes[0, 0])
    figures.save(figure, folder, name)
    header = ("model", "split", "input", "bin_low", "bin_high", "density", "cumulative")
    figures.save_csv(folder, name, header, rows)


def _floats(*columns: Numbers) -> Iterator[tuple[float, ...]]:
    return zip(*(column.tolist() for column in columns), strict=True)


def _hard(found: Found, m: float, title: str, folder: Path) -> None:
    """Draw the margins of L and of the rest, a row per model, a column per split, with their means."""
    edges = figures.bins(np.concatenate([_numbers(one.adversarial) for by in found.values() for one in by.values()]))
    parts = list(next(iter(found.values())))
    figure, axes = figures.grid(len(found), len(parts), title, sharex=True, sharey=True)
    rows: list[tuple[Any, ...]] = []
    for row, (label, by) in zip(axes, found.items(), strict=True):
        row[0].set_ylabel("share of samples per bin")
        for panel, (part, one) in zip(row, by.items(), strict=True):
            mask, values = one.hardest(m).numpy(), _numbers(one.adversarial)
            below = np.zeros(len(edges) - 1)
            for group, chosen, colour in (("L", mask, ORANGE), ("rest", ~mask, BLUE)):
                share = figures.shares(values[chosen], edges, len(values))
                panel.stairs(below + share, edges, baseline=below, fill=True, color=colour, alpha=0.6, label=group)
                below = below + share  # stacked: the two meet within one bin
                if chosen.any():
                    line = {"color": colour, "linestyle": "--", "linewidth": 1.3}
                    panel.axvline(values[chosen].mean(), label=f"mean of {group}", **line)
                rows += [(label, part, group, *cells) for cells in _floats(edges[:-1], edges[1:], share)]
            panel.axvline(0, **GREY)
            panel.set_title(figures.plain(f"{label}, {part}"))
    for panel in axes[-1]:
        panel.set_xlabel("logit margin under PGD")
    figures.legend(figure, axes[0, 0])
    figures.save(figure, folder, "hard")
    figures.save_csv(folder, "hard", ("model", "split", "group", "bin_low", "bin_high", "share"), rows)


def _classes(records: Mapping[str, Mapping[str, Any]], title: str, folder: Path) -> None:
    """Draw mean margin and robust accuracy by class, a row per split, a colour per model."""
    parts = list(next(iter(records.values())))
    figure, axes = figures.grid(len(parts), 2, title, size=(5.4, 2.6), sharex=True, sharey="col")
    rows: list[tuple[Any, ...]] = []
    for row, part in zip(axes, parts, strict=True):
        for i, (label, colour) in enumerate(zip(records, figures.colours(len(records)), strict=True)):
            classes = records[label][part]["classes"]
            x = np.arange(len(classes)) + (i - (len(records) - 1) / 2) * 0.6 / len(records)
            for panel, key, unit in zip(row, ("adversarial_margin", "robust_accuracy"), (1, 100), strict=True):
                heights = [np.nan if of[key] is None else unit * of[key] for of in classes.values()]
                panel.vlines(x, 0, heights, color=colour, linewidth=1.2)
                panel.plot(x, heights, "o", color=colour, markersize=4, label=figures.plain(label))
            rows += [(label, part, name, *of.values()) for name, of in classes.items()]
        row[0].set(ylabel="mean margin under PGD", title=part)
        row[1].set(ylabel="robust accuracy, %", ylim=(0, 104), title=part)
        row[0].axhline(0, **GREY)
    for panel in axes[-1]:
        _class_ticks(panel, list(classes))
    figures.legend(figure, axes[0, 0])
    figures.save(figure, folder, "classes")
    figures.save_csv(folder, "classes", ("model", "split", "class", *_group_keys(records)), rows)


def _class_ticks(panel: Any, names: list[str]) -> None:
    if len(names) > MANY_CLASSES:
        panel.set_xlabel("class, by its index")
        return
    upright = max(map(len, names)) <= 3
    panel.set_xticks(
        range(len(names)), map(figures.plain, names), rotation=0 if upright else 45, ha="center" if upright else "right"
    )
    panel.set_xlabel("class")


def _group_keys(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(next(iter(next(iter(records.values())).values()))["all"])


_SAMPLE = ("model", "split", "id", "label", "clean", "adversarial", "scaled", "in_L")


def _samples(found: Found, m: float) -> Iterator[tuple[Any, ...]]:
    for label, by in found.items():
        for part, one in by.items():
            columns = (one.ids, one.labels, one.clean, one.adversarial, one.scaled, one.hardest(m).int())
            for cells in zip(*(column.tolist() for column in columns), strict=True):
                yield label, part, *cells
