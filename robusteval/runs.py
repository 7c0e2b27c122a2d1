"""Run folders: atomic writes, one event log, settings that a resumed run must share, `latest`."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, cast

from robusteval.errors import RobustevalError, UsageError
from robusteval.settings import flatten

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

CONFIG = "config.json"
EVENTS = "events.jsonl"
LOCK = ".lock"
LAUNCH = "launch.json"
"""Where a run's data lay and how it was started: facts that a resumed run may change."""


def canonical_json(value: Any) -> str:
    """Serialise deterministically: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return the SHA-256 of ``value``'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` always holds either its old or its new content, even after a crash.

    Raises `RobustevalError` when the disk is full or the folder is read-only.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise RobustevalError(f"cannot write '{path}': {error.strerror}.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise RobustevalError(f"cannot write '{path}': {error.strerror}.") from error


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; raise `RobustevalError` naming the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RobustevalError(f"cannot read '{path}': {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise RobustevalError(f"'{path}' is not valid JSON: {error}.") from error


@dataclass(frozen=True)
class RunDir:
    """A folder that holds one run."""

    path: Path

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Take the folder for ``settings``, or resume in it; raise `UsageError` naming a field that differs."""
        config = self.path / CONFIG
        if config.exists():
            self._compare(flatten(read_json(config)), flatten(settings))
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*"))):
            raise UsageError(f"'{self.path}' exists and is not a run folder; choose another --out.")
        write_json(config, settings)

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        # hashes come last: they differ because of a setting, logits because of either
        for key in sorted({*old, *new}, key=lambda key: (key != "command", "sha256" in key, "logits" in key, key)):
            if old.get(key) != new.get(key):
                raise UsageError(
                    f"'{self.path}' was started with {key} = {old.get(key)!r}, not {new.get(key)!r}; "
                    "resume with the same settings or choose another --out."
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from working in this folder; raise `RobustevalError` when one already is.

        The lock dies with its process. Where the system has no `flock`, nothing is locked.
        """
        if fcntl is None:
            yield
            return
        with _opened(self.path / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RobustevalError(f"another process is working in '{self.path}'; wait or choose --out.") from error
            yield

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to `events.jsonl`."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **fields})
        try:
            with _opened(self.path / EVENTS, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise RobustevalError(f"cannot write '{self.path / EVENTS}': {error.strerror}.") from error


def _opened(path: Path, mode: str) -> TextIO:
    try:
        return cast(TextIO, path.open(mode, encoding="utf-8"))
    except OSError as error:
        raise RobustevalError(f"cannot write '{path}': {error.strerror}.") from error


def point_latest(run: Path) -> None:
    """Make `latest` beside ``run`` a symbolic link to it."""
    link = run.parent / "latest"
    temporary = run.parent / f".latest.{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run.name)
        temporary.replace(link)
    except OSError as error:
        raise RobustevalError(f"cannot point '{link}' at '{run.name}': {error.strerror}.") from error
