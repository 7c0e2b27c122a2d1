"""Training figures for TensorBoard, which is optional."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from robusteval.errors import UsageError
from robusteval.training.epoch import OnEvent


def check_installed() -> None:
    """Raise `UsageError` unless TensorBoard is installed."""
    if find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs TensorBoard: pip install 'robusteval[tensorboard]'.")


def tensorboard(folder: Path) -> OnEvent:
    """Return a listener that writes each epoch's figures to ``folder``, going on after the epochs already there."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def listen(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "epoch":
            for name in sorted(fields.keys() - {"epoch"}):
                writer.add_scalar(name, fields[name], fields["epoch"])
            writer.flush()

    return listen
