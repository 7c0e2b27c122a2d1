"""The contract of exporters: from a checked evaluation to the files that someone else takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from robusteval.catalog import Catalog
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.validate import read_report, read_rows
from robusteval.report import Report, SampleRow
from robusteval.runs import write_atomic
from robusteval.witnesses import load_witnesses, witness_files

EXPORTERS = Catalog("exporter", "exports")

Content = bytes | Tensor
"""A file's bytes, or a tensor that is stored as `torch.save` does."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation that `validate` found nothing wrong with: its report, its rows in order, its folder."""

    report: Report
    rows: tuple[SampleRow, ...]
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """Read a run folder; raise `RobustevalError` when it is missing or damaged."""
        return cls(read_report(folder), tuple(read_rows(folder)), folder)

    def witnesses(self) -> Iterator[tuple[list[int], Tensor]]:
        """Yield ids and adversarial inputs (M, C, H, W), file by file."""
        return (load_witnesses(path) for path in witness_files(self.folder))


@dataclass(frozen=True)
class Export:
    """What an exporter made: files by relative path, or every reason why the target's rules bar the report.

    ``notes`` are sentences for the user: what was left out and why, what is to be done by hand.
    """

    files: Mapping[str, Content] = field(default_factory=dict)
    barred: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """An exporter plug-in: a frozen dataclass whose fields are what no report can know.

    Every field has a default, so that what is missing can be asked for by name, all at once.
    """

    def __call__(self, run: Evaluation) -> Export:
        """Return the files; a pure function of the fields and the run. Raises `UsageError` for what is missing."""
        ...


def ask_for(exporter: Exporter, names: Iterable[str]) -> None:
    """Raise `UsageError` naming every field of ``names`` that the user has left out."""
    missing = [name for name in names if getattr(exporter, name) in (None, "")]
    if missing:
        listed = " ".join(f"--set {name}=..." for name in missing)
        raise UsageError(f"the report does not say {', '.join(missing)}: give {listed}, or --config FILE.toml.")


def write_files(files: Mapping[str, Content], folder: Path) -> dict[str, Path]:
    """Write ``files`` into ``folder``, each atomically; return name -> path in the order of their names."""
    for name, content in files.items():
        if isinstance(content, bytes):
            write_atomic(folder / name, content)
        else:
            _save(content, folder / name)
    return {name: folder / name for name in sorted(files)}


def _save(tensor: Tensor, path: Path) -> None:
    """Store a tensor, which may be gigabytes, without a copy in memory."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:  # by its name torch would store the name, too
            torch.save(tensor, file)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a disk is full
        partial.unlink(missing_ok=True)
        raise RobustevalError(f"cannot write '{path}': {error}.") from error
