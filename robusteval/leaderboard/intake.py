"""From an uploaded body to a stored bundle: streamed, hashed, looked at in a cage, moved into place."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robusteval.errors import UsageError
from robusteval.evaluation.suite import load_suite
from robusteval.evaluation.validate import read_report, validate, validator
from robusteval.leaderboard.bundle import MODEL, Limits, Refused, limits_of, unpack
from robusteval.leaderboard.entry import Entry, entry_of, harmless
from robusteval.report import SCHEMAS
from robusteval.suites import suite_files
from robusteval.threat import ThreatModel

SHOWN = 20


class TooLarge(Refused):
    """A body of more bytes than are taken."""


class TooSlow(Refused):
    """A body that does not end."""


class Conflict(Refused):
    """A body that is not the one its address names."""


@dataclass(frozen=True)
class Accepted:
    """What is known of a valid bundle."""

    entry: Entry
    with_model: bool


class Invalid(Refused):
    """A bundle whose report is wrong; ``problems`` say where."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(f"the report is not valid: {problems[0]}")
        self.problems = problems


@dataclass(frozen=True)
class Storage:
    """Bundles by their hash, and a folder for what is not one yet. ``root`` belongs to one server at a time."""

    root: Path

    @property
    def temporary(self) -> Path:
        """Where uploads lie until they are accepted; on the same file system as the bundles."""
        return self.root / "incoming"

    def bundle(self, sha256: str) -> Path:
        """Return where the bundle is, or will be."""
        return self.root / "bundles" / sha256[:2] / f"{sha256}.zip"

    def clean(self, known: set[str]) -> None:
        """Drop what a killed server was still receiving, and bundles that it had not told of yet."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        for path in self.root.glob("bundles/*/*.zip"):
            if path.stem not in known:
                path.unlink()

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """Lend an empty folder."""
        folder = Path(tempfile.mkdtemp(dir=self.temporary))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, received: Path, sha256: str) -> None:
        """Move a bundle into place so that it is there whole, even after a power failure, or not at all."""
        place = self.bundle(sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        _sync(received)
        received.replace(place)
        for folder in (place.parent, place.parent.parent):
            _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


async def receive(body: AsyncIterator[bytes], path: Path, limits: Limits) -> str:
    """Write a body to ``path`` as it comes and return its SHA-256; raise `TooLarge` or `TooSlow`."""
    try:
        async with asyncio.timeout(limits.patience):
            return await _receive(body, path, limits)
    except TimeoutError as error:
        raise TooSlow(f"the body did not arrive within {limits.patience} s.") from error


async def _receive(body: AsyncIterator[bytes], path: Path, limits: Limits) -> str:
    sha, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        async for block in body:
            size += len(block)
            if size > limits.upload:
                raise TooLarge(f"the body is larger than {limits.upload} bytes.")
            sha.update(block)
            file.write(block)
    return sha.hexdigest()


def warm() -> None:
    """Load, before any bundle is looked at, the plug-ins and schemas that checking a report needs."""
    for schema in SCHEMAS:
        validator(schema)
    for name in suite_files():
        with suppress(UsageError):  # some are for another norm
            load_suite(name, ThreatModel.parse("Linf", "8/255"))


def examine(bundle: str, folder: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Unpack and validate a bundle; runs in a cage. Return its facts, or what is wrong with it, as JSON."""
    place = Path(folder)
    try:
        unpack(Path(bundle), place, limits_of(limits))
    except Refused as refused:
        return {"refused": str(refused)}
    problems = validate(place)
    if problems:
        shown = [harmless(problem, 300) for problem in problems[:SHOWN]]
        return {"problems": [*shown, *([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])]}
    entry = entry_of(read_report(place))
    return {"entry": entry.model_dump(mode="json"), "with_model": (place / MODEL).is_dir()}


def accepted(answer: dict[str, Any]) -> Accepted:
    """Return what `examine` found; raise `Refused` or `Invalid`."""
    if "refused" in answer:
        raise Refused(answer["refused"])
    if "problems" in answer:
        raise Invalid(answer["problems"])
    return Accepted(Entry.model_validate(answer["entry"]), bool(answer["with_model"]))
