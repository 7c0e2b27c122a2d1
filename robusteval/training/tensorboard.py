"""Training figures for TensorBoard, which is optional."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robusteval.errors import UsageError
from robusteval.training.epoch import OnEvent


def tensorboard(folder: Path) -> OnEvent:
    """Return a listener that writes each epoch's figures to ``folder``; raise `UsageError` if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs TensorBoard: pip install 'robusteval[tensorboard]'.") from error
    writer = SummaryWriter(str(folder))

    def listen(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "epoch":
            for name in sorted(fields.keys() - {"epoch"}):
                writer.add_scalar(name, fields[name], fields["epoch"])
            writer.flush()

    return listen
