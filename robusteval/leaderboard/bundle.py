"""Unpacking a submitted zip that may be meant to do harm: names, sizes, ratios and nesting are all bounded."""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from robusteval.catalog import first_problem
from robusteval.errors import RobustevalError
from robusteval.evaluation.assemble import REPORT, SAMPLES
from robusteval.evaluation.validate import MANIFEST
from robusteval.render.html import HTML
from robusteval.report import Manifest

MIB = 2**20
MODEL = "model"
MODEL_FILES = frozenset({f"{MODEL}/model.safetensors", f"{MODEL}/config.json"})
SUFFIXES = frozenset({".json", ".jsonl", ".md", ".csv", ".png", ".svg", ".safetensors"})
PICKLED = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar", ".model", ".npy", ".npz", ".joblib"})
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,3}")
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)
_END, _ZIP64 = b"PK\x05\x06", b"PK\x06\x07"
_BLOCK = 256 * 1024
_FREE = MIB
"""Bytes that may come from any compression: short files of repeated text are no bombs."""


class Refused(RobustevalError):  # noqa: N818, it is an outcome
    """A bundle that is not taken; the message says why."""


@dataclass(frozen=True)
class Limits:
    """What a submission may cost: bytes, but for ``entries`` files, ``ratio``, ``depth`` of JSON and CPU ``seconds``.

    ``upload`` is the zip, ``total`` what is in it, ``document`` each JSON file and each line of the samples,
    ``samples`` all of them. ``memory`` is what a worker may take to look at it, ``check_memory`` and ``check_seconds``
    one that runs its model; an upload must end within ``patience`` seconds.
    """

    upload: int = 512 * MIB
    total: int = 2048 * MIB
    document: int = 8 * MIB
    samples: int = 256 * MIB
    entries: int = 4096
    ratio: int = 200
    depth: int = 64
    memory: int = 3072 * MIB
    seconds: int = 60
    patience: int = 900
    check_memory: int = 6144 * MIB
    check_seconds: int = 3600

    def plain(self) -> dict[str, int]:
        """Return the limits as JSON."""
        return asdict(self)


def unpack(bundle: Path, folder: Path, limits: Limits) -> None:
    """Write the files of ``bundle`` into the empty ``folder``; raise `Refused` at the first thing that is wrong."""
    try:
        with bundle.open("rb") as file:
            _check_directory(file, limits)
            with zipfile.ZipFile(file) as archive:
                entries = _checked_entries(archive, bundle.stat().st_size, limits)
                _unpack(archive, entries, folder, limits)
    except (FileExistsError, NotADirectoryError) as error:
        raise Refused("a name in the zip is both a file and a folder.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, NotImplementedError) as error:
        raise Refused(f"the body is not a sound zip file: {str(error)[:200]}.") from error


def _check_directory(file: BinaryIO, limits: Limits) -> None:
    """Bound the directory before it is read: it alone could fill the memory. Comments and zip64 are not needed."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 42))
    tail = file.read()
    if len(tail) < 22 or tail[-22:-18] != _END or tail[-2:] != bytes(2):
        raise Refused("the body is not a zip file, or one with a comment.")
    count, directory = struct.unpack("<HI", tail[-12:-6])
    if tail[:4] == _ZIP64 and len(tail) == 42:
        raise Refused("zip64 is not taken.")
    if count > limits.entries or directory > 512 * limits.entries:
        raise Refused(f"the zip has more than {limits.entries} entries.")


def _checked_entries(archive: zipfile.ZipFile, size: int, limits: Limits) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > limits.entries:
        raise Refused(f"the zip has more than {limits.entries} entries.")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        _check_entry(info, limits)
        if info.filename.lower() in entries:
            raise Refused(f"the zip has '{info.filename}' twice.")
        entries[info.filename.lower()] = info
    if sum(info.compress_size for info in infos) > size:
        raise Refused("entries of the zip overlap.")
    if sum(info.file_size for info in infos) > limits.total:
        raise Refused(f"the zip holds more than {limits.total // MIB} MiB.")
    return {info.filename: info for info in infos}


def _check_entry(info: zipfile.ZipInfo, limits: Limits) -> None:
    name, mode = info.filename, info.external_attr >> 16
    shown = ascii(info.orig_filename[:100])
    if name != info.orig_filename or not _NAME.fullmatch(name):
        raise Refused(f"the name {shown} is not taken: plain relative paths of letters, digits and _.- only.")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise Refused(f"{shown} is a link, a folder or a device; only files are taken.")
    suffix = Path(name).suffix.lower()
    if suffix in PICKLED:
        raise Refused(f"{shown} may hold pickled code; weights are taken as safetensors only.")
    if suffix not in SUFFIXES and name != HTML:
        raise Refused(f"{shown} is no kind of file that reports have.")
    if info.flag_bits & 0x1:
        raise Refused(f"{shown} is encrypted.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused(f"{shown} is compressed in another way than deflate.")
    if info.file_size > max(_FREE, limits.ratio * info.compress_size):
        raise Refused(f"{shown} is compressed more than {limits.ratio} times.")
    if info.file_size > _size_limit(name, limits):
        raise Refused(f"{shown} is larger than {_size_limit(name, limits)} bytes.")


def _size_limit(name: str, limits: Limits) -> int:
    if name == SAMPLES:
        return limits.samples
    return limits.document if name.endswith((".json", ".jsonl")) else limits.total


def _unpack(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], folder: Path, limits: Limits) -> None:
    for name in (MANIFEST, REPORT, SAMPLES):
        if name not in entries:
            raise Refused(f"the zip has no {name}.")
    _write(archive, entries.pop(MANIFEST), folder / MANIFEST, limits)
    listed = _listed(folder / MANIFEST)
    for name, info in entries.items():
        if name not in listed | MODEL_FILES:
            raise Refused(f"the zip has '{name}', which {MANIFEST} does not list.")
        _write(archive, info, folder / name, limits)
    if MODEL_FILES & entries.keys() not in (set(), MODEL_FILES):
        raise Refused(f"a model is both files: {' and '.join(sorted(MODEL_FILES))}.")


def _listed(path: Path) -> set[str]:
    try:
        return {fact.path for fact in Manifest.model_validate_json(path.read_bytes()).files}
    except ValidationError as error:
        raise Refused(f"{MANIFEST}: {first_problem(error)}") from error


def _write(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, limits: Limits) -> None:
    """Unpack one file; what the directory says of its size is not believed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with archive.open(info) as source, path.open("xb") as target:
        while block := source.read(_BLOCK):
            written += len(block)
            if written > info.file_size:
                raise Refused(f"'{info.filename}' is larger than the zip says.")
            target.write(block)
    if path.suffix == ".json":
        check_depth(path.read_bytes(), path.name, limits.depth)
    elif path.suffix == ".jsonl":
        _check_lines(path, limits)


def _check_lines(path: Path, limits: Limits) -> None:
    most = limits.document
    with path.open("rb") as lines:
        while line := lines.readline(most + 1):
            if len(line) > most:
                raise Refused(f"{path.name} has a line of more than {most} bytes.")
            check_depth(line, path.name, limits.depth)


def check_depth(text: bytes, what: str, most: int) -> None:
    """Raise `Refused` where JSON ``text`` nests deeper than ``most``; takes linear time and no memory."""
    depth = 0
    for token in _TOKENS.finditer(text):
        first = token[0][:1]
        depth += (first in b"[{") - (first in b"]}")
        if depth > most:
            raise Refused(f"{what} nests deeper than {most} levels.")


def limits_of(plain: dict[str, Any]) -> Limits:
    """Return the limits that `Limits.plain` gave."""
    return Limits(**plain)
