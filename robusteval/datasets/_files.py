"""Which image files a folder or a tar archive holds: part -> class -> files. Nothing is ever unpacked to disk."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from robusteval.datasets.base import Part
from robusteval.errors import RobustevalError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_PARTS = ("train", "test", "val")
_MAX_FILE = 64 << 20
_MAX_KEPT = 4 << 30


@dataclass(frozen=True)
class ImageFile:
    """One encoded image: on disk, or held in memory when it came out of an archive."""

    name: str
    source: Path | bytes

    def open(self) -> BinaryIO:
        """Return a stream of the encoded bytes; raise `RobustevalError` where there is none or over 64 MiB."""
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        try:
            if self.source.stat().st_size > _MAX_FILE:
                raise RobustevalError(f"image '{self.name}' is larger than {_MAX_FILE >> 20} MiB.")
            return self.source.open("rb")
        except OSError as error:
            raise RobustevalError(f"image '{self.name}' cannot be read: {error.strerror}.") from error


Classes = dict[str, list[ImageFile]]


def list_files(path: Path, part: Part) -> dict[str, Classes]:
    """Return part ('train', 'test') -> class -> files sorted by name.

    From an archive the files of ``part`` come with their bytes, of the other part only one file per class.
    Raises `RobustevalError` when ``path`` is neither a folder nor a readable tar archive.
    """
    if path.is_dir():
        found = _list_folder(path)
    elif path.is_file():
        found = _list_archive(path, part)
    else:
        raise RobustevalError(f"there is no folder or archive '{path}'.")
    if "val" in found:
        found.setdefault("test", found["val"])
        del found["val"]
    return {name: {label: sorted(files[label], key=_name) for label in sorted(files)} for name, files in found.items()}


def _name(file: ImageFile) -> str:
    return file.name


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not name.startswith(".")


def _list_folder(root: Path) -> dict[str, Classes]:
    found: dict[str, Classes] = {}
    for part in _PARTS:
        if (root / part).is_dir():
            labels = (f for f in (root / part).iterdir() if f.is_dir() and not f.name.startswith("."))
            found[part] = {folder.name: _images_in(folder) for folder in labels}
    return found


def _images_in(folder: Path) -> list[ImageFile]:
    paths = (path for path in folder.iterdir() if _is_image(path.name) and path.is_file())
    return [ImageFile(str(path), path) for path in paths]


def _list_archive(path: Path, part: Part) -> dict[str, Classes]:
    wanted = ("train",) if part == "train" else ("test", "val")
    found: dict[str, Classes] = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            _collect(archive, path, wanted, found)
    except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise RobustevalError(f"'{path}' is not a readable tar archive: {error}.") from error
    return found


def _collect(archive: tarfile.TarFile, path: Path, wanted: tuple[str, ...], found: dict[str, Classes]) -> None:
    seen: set[str] = set()
    kept = 0
    for member in archive:
        place = _place(member)
        if place is None:
            continue
        part, label = place
        if member.name in seen:
            raise RobustevalError(f"'{path}' holds '{member.name}' twice.")
        seen.add(member.name)
        files = found.setdefault(part, {}).setdefault(label, [])
        if part in wanted or not files:
            kept += member.size
            _check_sizes(path, member, kept)
            stream = archive.extractfile(member)
            data = stream.read() if stream else b""
            files.append(ImageFile(f"{path.name}:{member.name}", data))


def _place(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return (part, class) of a regular image file `[top/]part/class/file`, None for all else."""
    pieces = PurePosixPath(member.name).parts
    if not member.isfile() or len(pieces) not in (3, 4) or ".." in pieces or pieces[0] == "/":
        return None
    part, label, name = pieces[-3:]
    if part not in _PARTS or label.startswith(".") or not _is_image(name):
        return None
    return part, label


def _check_sizes(path: Path, member: tarfile.TarInfo, kept: int) -> None:
    if member.size > _MAX_FILE:
        raise RobustevalError(f"image '{path.name}:{member.name}' is larger than {_MAX_FILE >> 20} MiB.")
    if kept > _MAX_KEPT:
        raise RobustevalError(
            f"'{path}' holds more than {_MAX_KEPT >> 30} GiB of images; unpack it and name the folder."
        )
