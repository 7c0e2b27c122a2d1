"""Bundles that are meant to do harm: refused, with a reason, and nothing of them stays."""

from __future__ import annotations

import io
import json
import pickle
import random
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from leaderboard_kit import API, LIMITS, SCRIPT, Board, Files, changed, packed, resealed, sha256

from robusteval.leaderboard.bundle import MIB, Refused, check_depth, unpack


def _link(files: Files) -> bytes:
    body = io.BytesIO(packed(files))
    with zipfile.ZipFile(body, "a") as archive:
        info = zipfile.ZipInfo("witnesses/link.json")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return body.getvalue()


def _twice(files: Files) -> bytes:
    body = io.BytesIO(packed(files))
    with zipfile.ZipFile(body, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("report.json", files["report.json"])
    return body.getvalue()


def _flagged(files: Files) -> bytes:
    """Mark every entry as encrypted, in the directory too."""
    body = bytearray(packed(files))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = body.find(mark)
        while at >= 0:
            body[at + place] |= 1
            at = body.find(mark, at + 4)
    return bytes(body)


def _understated(files: Files) -> bytes:
    """Say in the directory that a file is smaller than it is."""
    body = bytearray(packed(resealed({**files, "notes.md": b"x" * 5000})))
    at = body.rfind(b"notes.md") - 46 + 24
    body[at : at + 4] = (10).to_bytes(4, "little")
    return bytes(body)


def _with(name: str, data: bytes) -> Callable[[Files], bytes]:
    return lambda files: packed(resealed({**files, name: data}))


def _deep(text: bytes) -> Callable[[Files], bytes]:
    return lambda files: packed(resealed({**files, "report.json": text}))


HOSTILE: dict[str, tuple[Callable[[Files], bytes], str]] = {
    "no zip": (lambda _: b"hello", "not a zip"),
    "empty": (lambda _: b"", "not a zip"),
    "cut off": (lambda files: packed(files)[:-30], "not a zip"),
    "a comment": (lambda files: packed(files)[:-2] + b"\x01\x00x", "comment"),
    "bomb": (_with("bomb.md", bytes(6 * MIB)), "compressed more than"),
    "too much in all": (
        lambda files: packed(files | {f"{i}.md": bytes(MIB) for i in range(9)}),
        "more than 8 MiB",
    ),
    "many": (lambda files: packed(files | {f"{i}.md": b"" for i in range(40)}), "more than 32 entries"),
    "above": (_with("../../evil.json", b"{}"), "is not taken"),
    "absolute": (_with("/etc/evil.json", b"{}"), "is not taken"),
    "backslash": (_with("..\\evil.json", b"{}"), "is not taken"),
    "hidden": (_with(".bashrc.json", b"{}"), "is not taken"),
    "a folder": (lambda files: packed(files | {"witnesses/": b""}), "is not taken"),
    "file and folder": (lambda files: packed(resealed({**files, "a.md": b"", "a.md/b.md": b""})), "both"),
    "a link": (_link, "is a link"),
    "twice": (_twice, "twice"),
    "twice but for case": (_with("REPORT.json", b"{}"), "twice"),
    "encrypted": (_flagged, "encrypted"),
    "bzip2": (lambda files: packed(files, zipfile.ZIP_BZIP2), "than deflate"),
    "understated": (_understated, "zip"),
    "unlisted": (lambda files: packed({**files, "extra.json": b"{}"}), "does not list"),
    "script": (_with("page.html", SCRIPT.encode()), "no kind of file"),
    "pickle": (_with("model.pt", pickle.dumps({})), "pickled"),
    "pickle in the model": (lambda files: packed({**files, "model/model.bin": pickle.dumps({})}), "pickled"),
    "half a model": (lambda files: packed({**files, "model/config.json": b"{}"}), "both files"),
    "no report": (
        lambda files: packed(resealed({k: v for k, v in files.items() if k != "report.json"})),
        "no report.json",
    ),
    "no manifest": (lambda files: packed({k: v for k, v in files.items() if k != "manifest.json"}), "no manifest.json"),
    "deep": (_deep(b"[" * 100_000), "nests deeper"),
    "deep and closed": (_deep(b'{"a":' * 500 + b"1" + b"}" * 500), "nests deeper"),
    "huge": (_deep(random.Random(0).randbytes(MIB).hex().encode()), "larger than"),
    "one endless line": (
        _with("samples.jsonl", b'{"id": "' + b"".join(str(i).encode() for i in range(300_000))),
        "line",
    ),
    "another file": (lambda files: packed({**files, "report.md": b"changed"}), "not the file that"),
    "forged": (lambda files: packed(changed(files, results__empirical__count=12)), "empirical"),
    "not a number": (lambda files: packed(changed(files, seconds=float("nan"))), "finite number"),
    "another kind": (lambda files: packed(changed(files, kind="x")), "report.json"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bundles_are_refused_and_leave_nothing(board: Board, files: Files, name: str) -> None:
    make, said = HOSTILE[name]
    before, body = board.stored(), make(files)
    answer = board.put(body)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/json")
    assert said in answer.json()["detail"] + " ".join(answer.json()["problems"])
    assert board.stored() == before
    assert list(board.root.joinpath("incoming").iterdir()) == []
    assert board.client.get(f"{API}/{sha256(body)}").status_code == 404


def test_depth_is_counted_outside_strings_in_linear_time() -> None:
    check_depth(json.dumps({"a": ["[" * 500 + '\\"', "]"]}).encode(), "x", 2)
    check_depth(b'"' + b'\\"' * 1_000_000, "x", 2)
    with pytest.raises(Refused, match="deeper than 2"):
        check_depth(b'["\\"", [[', "x", 2)


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    """Entries that share their bytes make a small file large (Fifield 2019): each says that it is the whole."""
    body = bytearray(packed({"manifest.json": b"{}" * 99, "report.json": b"1" * 99}, zipfile.ZIP_STORED))
    first, second = body.find(b"PK\x01\x02"), body.rfind(b"PK\x01\x02")
    body[second + 20 : second + 24] = (1000).to_bytes(4, "little")
    assert first != second
    (tmp_path / "zip").write_bytes(body)
    (tmp_path / "out").mkdir()
    with pytest.raises(Refused, match="overlap"):
        unpack(tmp_path / "zip", tmp_path / "out", LIMITS)
