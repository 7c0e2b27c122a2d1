"""Checks of exporters: pure, offline by contract, files that lie where they are meant to."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path, PurePosixPath

import torch

from robusteval.exports.base import Content, Evaluation, Export, Exporter
from robusteval.runs import file_digest


def check_exporter(exporter: Exporter, run: Evaluation) -> None:
    """Call ``exporter``, built with all that it asks for, on a valid ``run``; raise `AssertionError` for what is wrong.

    Its files must be the same twice, have plain relative names and hold bytes or a tensor; it gives files or reasons
    why there are none, as sentences; and the run's folder stays as it is.
    """
    what = type(exporter).__name__
    assert is_dataclass(exporter), f"{what} is not a dataclass"
    before = _snapshot(run.folder)
    first, second = exporter(run), exporter(run)
    assert _snapshot(run.folder) == before, f"{what} changes the run's folder"
    assert _same(first, second), f"{what} gives different results for the same run"
    assert bool(first.files) != bool(first.barred), f"{what} gives neither files nor reasons, or both"
    for said in (*first.barred, *first.notes):
        sentence = bool(said) and said.isprintable() and said.strip() == said
        assert sentence, f"{what} says {said!r}, which is no sentence"
    for name, content in first.files.items():
        path = PurePosixPath(name)
        inside = not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and "\\" not in name
        assert inside, f"{what} names a file {name!r}, outside its folder"
        assert isinstance(content, bytes | torch.Tensor), f"{what} makes {name} of a {type(content).__name__}"


def _snapshot(folder: Path) -> dict[str, str]:
    return {str(path): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _same(a: Export, b: Export) -> bool:
    alike = a.files.keys() == b.files.keys() and all(_equal(a.files[name], b.files[name]) for name in a.files)
    return alike and (a.barred, a.notes) == (b.barred, b.notes)


def _equal(a: Content, b: Content) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a == b
