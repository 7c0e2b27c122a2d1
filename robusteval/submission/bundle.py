"""What is sent: the files of a checked evaluation, optionally its model, alone or as one reproducible archive."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.validate import MANIFEST
from robusteval.models.io import load_folder, weights_digest
from robusteval.report import Manifest, Report
from robusteval.runs import file_digest, read_json

MODEL, MODEL_FILES = "model", ("config.json", "model.safetensors")
REPORTED = "report.md"
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip archive can hold."""


@dataclass(frozen=True)
class FileToSend:
    """A file by its name at the other end, where it lies here, and its content's facts."""

    name: str
    path: Path
    bytes: int
    sha256: str

    @classmethod
    def of(cls, name: str, path: Path) -> FileToSend:
        """Measure and hash the file at ``path``."""
        return cls(name, path, path.stat().st_size, file_digest(path))


def report_files(folder: Path) -> dict[str, Path]:
    """Return name -> path of `manifest.json` and everything that it lists, in the order of their names.

    ``folder`` was found valid. Raises `RobustevalError` for names that would not stay inside a folder elsewhere.
    """
    listed = Manifest.model_validate(read_json(folder / MANIFEST)).files
    names = sorted({MANIFEST, *(fact.path for fact in listed)})
    for name in names:
        if not _portable(name) or name.split("/")[0] == MODEL:
            raise RobustevalError(f"{MANIFEST} names {name!r}, which cannot be a file of a bundle.")
    if REPORTED not in names:
        raise RobustevalError(f"{MANIFEST} does not list {REPORTED}.")
    return {name: folder / name for name in names}


def _portable(name: str) -> bool:
    """Say whether a name is a plain relative path on every system."""
    parts = PurePosixPath(name).parts
    odd = not name.isprintable() or any(c in name for c in '\\:*?"<>|')
    return bool(parts) and not odd and "/".join(parts) == name and not {"..", "."} & set(parts) and parts[0] != "/"


def model_files(source: Path, report: Report, prefix: str = f"{MODEL}/") -> dict[str, Path]:
    """Return the files of a run or model folder; raise `UsageError` unless it is the model that was evaluated."""
    loaded = load_folder(source, report.data.shape, len(report.data.classes))
    if weights_digest(loaded.module) != report.model.weights_sha256:
        raise UsageError(f"'{source}' is not the model of the report: its weights have another SHA-256.")
    return {f"{prefix}{name}": Path(loaded.source) / name for name in MODEL_FILES}


def measure(files: Mapping[str, Path]) -> list[FileToSend]:
    """Return the files in the order of their names, measured and hashed."""
    return [FileToSend.of(name, files[name]) for name in sorted(files)]


def write_zip(files: Mapping[str, Path], path: Path) -> FileToSend:
    """Write an archive at ``path`` and return its facts; the same names and contents always give the same bytes.

    Nothing is compressed: compressors differ between machines. Order, times, modes and system are fixed. Raises
    `RobustevalError` when a file cannot be read or the archive not be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(files):
                _add(archive, name, files[name])
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RobustevalError(f"cannot write '{path}': {error.strerror}.") from error
    return FileToSend.of(path.name, path)


def _add(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.create_system, entry.external_attr = 3, 0o100644 << 16  # as on Unix, whatever the system
    entry.file_size = path.stat().st_size
    with path.open("rb") as source, archive.open(entry, "w") as target:
        shutil.copyfileobj(source, target, 1 << 20)
