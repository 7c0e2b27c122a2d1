"""All that a run carries from one epoch to the next, on disk between them."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robusteval.errors import RobustevalError
from robusteval.models.base import Classifier
from robusteval.runs import write_atomic
from robusteval.training.bounds import Traces

CHECKPOINT = "checkpoint.pt"

Row = dict[str, float]
"""One epoch's figures."""


def best_row(history: Sequence[Row]) -> Row:
    """Return the epoch with the highest validation PGD accuracy; of equal ones the best clean one, the earliest.

    Where the objective's adversary grows, only epochs at the largest it reached count: against a small one, accuracy
    is easily had.
    """
    return max(history, key=lambda row: (row.get("train_reached", 1.0), row["val_pgd"], row["val_clean"]))


@dataclass
class TrainState:
    """The mutable heart of a run. Nothing random is in it: every draw is derived from the seed and the step.

    ``network`` runs ``model``, whose weights it shares; ``proxy`` is another one for weight perturbation.
    """

    model: Classifier
    network: nn.Module
    average: Classifier | None
    proxy: nn.Module | None
    optimizer: torch.optim.Optimizer
    objective: dict[str, Tensor] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)
    traces: Traces = field(default_factory=Traces)

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return len(self.history)

    @property
    def evaluated(self) -> Classifier:
        """The weights that are validated and saved: the moving average where there is one."""
        return self.average or self.model

    @property
    def best(self) -> Row:
        """The epoch that `best_row` selects."""
        return best_row(self.history)


def save(state: TrainState, folder: Path) -> None:
    """Write the checkpoint atomically: the moment an epoch counts as done."""
    content = {
        "model": state.model.state_dict(),
        "average": state.average.state_dict() if state.average else None,
        "optimizer": state.optimizer.state_dict(),
        "objective": state.objective,
        "history": state.history,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(folder / CHECKPOINT, buffer.getvalue())


def restore(state: TrainState, folder: Path, device: torch.device) -> bool:
    """Load the checkpoint into ``state`` if there is one; raise `RobustevalError` if it is damaged."""
    path = folder / CHECKPOINT
    if not path.exists():
        return False
    try:
        content = _read(path, device)
        state.model.load_state_dict(content["model"])
        if state.average:
            state.average.load_state_dict(content["average"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.objective, state.history = content["objective"], content["history"]
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise RobustevalError(f"checkpoint '{path}' is damaged ({reason}); start over with --fresh.") from error
    return True


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums that it writes
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"wrong checksum in {damaged}")
    content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return content
