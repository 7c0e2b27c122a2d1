"""Chunk files: what a chunk's judgement looks like on disk.

Witnesses and proofs are written first, the rows last: a chunk is done exactly when its rows are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from robusteval.catalog import first_problem
from robusteval.errors import RobustevalError
from robusteval.evaluation.judge import Judgement
from robusteval.evaluation.proofs import proof_path, save_proofs
from robusteval.report import SampleRow, StageResult
from robusteval.runs import write_atomic
from robusteval.witnesses import WITNESSES

CHUNKS = "chunks"


class ChunkResult(BaseModel):
    """Rows and stage costs of one chunk, and how many images the device held at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[SampleRow, ...]
    stages: tuple[StageResult, ...]
    batch_size: int


def chunk_path(run: Path, index: int) -> Path:
    """Where the rows of chunk ``index`` are."""
    return run / CHUNKS / f"{index:05d}.json"


def witness_path(run: Path, index: int) -> Path:
    """Where the witnesses of chunk ``index`` are."""
    return run / WITNESSES / f"{index:05d}.safetensors"


def save_chunk(run: Path, index: int, judgement: Judgement, batch_size: int) -> None:
    """Write a judged chunk: tensors `ids` (M,) int64 and `x_adv` (M, C, H, W) float32, its proofs, then its rows."""
    if judgement.witnesses:
        tensors = {
            "ids": torch.tensor(list(judgement.witnesses), dtype=torch.int64),
            "x_adv": torch.stack([witness.x_adv for witness in judgement.witnesses.values()]),
        }
        write_atomic(witness_path(run, index), safetensors.torch.save(tensors))
    else:
        witness_path(run, index).unlink(missing_ok=True)
    save_proofs(proof_path(run, index), judgement.proofs)
    result = ChunkResult(rows=judgement.rows, stages=judgement.stages, batch_size=batch_size)
    write_atomic(chunk_path(run, index), result.model_dump_json().encode())


def load_chunk(run: Path, index: int) -> ChunkResult:
    """Read a finished chunk; raise `RobustevalError` when it is damaged."""
    path = chunk_path(run, index)
    try:
        return ChunkResult.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RobustevalError(f"'{path}' is damaged ({first_problem(error)}) Delete it and resume.") from error


def merge_stages(results: Iterable[tuple[StageResult, ...]]) -> tuple[StageResult, ...]:
    """Add up what the stages did over all chunks; each note is kept once."""
    merged = []
    for parts in zip(*results, strict=True):
        sums = {key: sum(getattr(part, key) for part in parts) for key in _SUMMED}
        said = {key: tuple(dict.fromkeys(text for part in parts for text in getattr(part, key))) for key in _SAID}
        merged.append(parts[0].model_copy(update={**sums, **said}))
    return tuple(merged)


_SUMMED = (
    *("entered", "closed", "broken", "rejected", "non_finite", "undecided"),
    *("forward", "backward", "zero_gradients", "non_finite_gradients", "seconds"),
)
_SAID = ("adaptations", "warnings")
