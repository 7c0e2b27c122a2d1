"""Training curves as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from robusteval.runs import write_atomic
from robusteval.training.checkpoint import Row, best_row

LINES = {
    "train_accuracy": ("training, on what is trained on", ":"),
    "val_clean": ("validation, clean", "-"),
    "val_pgd": ("validation, PGD", "-"),
}


def training_curves(history: Sequence[Row], title: str, path: Path) -> None:
    """Draw accuracy and loss by epoch, the best epoch marked, and write a PNG to ``path`` atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, loss = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for key, (label, style) in LINES.items():
        accuracy.plot(epochs, [100 * row[key] for row in history], style, label=label)
    best = best_row(history)
    accuracy.plot(best["epoch"], 100 * best["val_pgd"], "ko", label=f"best epoch: {best['epoch']:.0f}")
    accuracy.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 101))
    accuracy.legend(fontsize="small")
    loss.plot(epochs, [row["train_loss"] for row in history], "k-")
    loss.set(xlabel="epoch", ylabel="training loss")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())
