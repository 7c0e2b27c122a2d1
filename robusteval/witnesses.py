"""Witness files: the adversarial inputs of a run, evidence for its breaks and ammunition against other models."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from robusteval.errors import RobustevalError

WITNESSES = "witnesses"


def witness_files(run: Path) -> list[Path]:
    """Return the witness files of an evaluation's folder, in order."""
    return sorted((run / WITNESSES).glob("*.safetensors"))


def load_witnesses(path: Path) -> tuple[list[int], Tensor]:
    """Read a witness file: ids and inputs (M, C, H, W); raise `RobustevalError` when it is damaged."""
    try:
        tensors = safetensors.torch.load_file(path)
        ids, x_adv = tensors["ids"], tensors["x_adv"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RobustevalError(f"witness file '{path}' is damaged: {error}.") from error
    if ids.dim() != 1 or ids.dtype != torch.int64 or x_adv.dim() != 4 or len(ids) != len(x_adv):
        raise RobustevalError(f"witness file '{path}' holds {tuple(ids.shape)} ids and {tuple(x_adv.shape)} inputs.")
    return ids.tolist(), x_adv
