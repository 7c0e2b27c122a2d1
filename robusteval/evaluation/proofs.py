"""Proof files: what certifiers leave behind, so that a proof can be seen again without searching for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from robusteval.errors import RobustevalError
from robusteval.runs import write_atomic
from robusteval.verdict import Evidence

PROOFS = "proofs"


def proof_path(run: Path, index: int) -> Path:
    """Where the proofs of chunk ``index`` are."""
    return run / PROOFS / f"{index:05d}.safetensors"


def save_proofs(path: Path, proofs: Mapping[int, Evidence]) -> None:
    """Write evidence by sample id, its tensors called `ID.NAME`; no file if there is none."""
    if not proofs:
        path.unlink(missing_ok=True)
        return
    tensors = {
        f"{sample}.{name}": tensor.cpu().contiguous() for sample, own in proofs.items() for name, tensor in own.items()
    }
    write_atomic(path, safetensors.torch.save(tensors))


def load_proofs(path: Path) -> dict[int, Evidence]:
    """Read evidence by sample id, none where there is no file; raise `RobustevalError` when it is damaged."""
    if not path.exists():
        return {}
    found: dict[int, dict[str, Tensor]] = {}
    try:
        for name, tensor in safetensors.torch.load_file(path).items():
            sample, _, rest = name.partition(".")
            found.setdefault(int(sample), {})[rest] = tensor
    except (OSError, SafetensorError, ValueError) as error:
        raise RobustevalError(f"proof file '{path}' is damaged: {error}.") from error
    return dict(found)
