"""Plug-ins: found by file name or entry point, described without importing, built from plain data.

A plug-in is a file whose top-level class has the file's name, ignoring case and underscores
(`wide_resnet.py` holds `WideResNet`). Its docstring's first line is its description.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from robusteval.errors import UsageError, nearest, unknown

_PACKAGE = Path(__file__).resolve().parent


def _squash(name: str) -> str:
    return name.replace("_", "").lower()


def _find_class(path: Path) -> ast.ClassDef | None:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"plug-in file '{path}' is not valid Python: {error}.") from error
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    return next((node for node in classes if _squash(node.name) == _squash(path.stem)), None)


def resource_folder(name: str) -> Path:
    """Return the folder of `robusteval.<name>`: inside the installed package, or beside it in a checkout."""
    inside = _PACKAGE.joinpath(*name.split("."))
    return inside if inside.is_dir() else _PACKAGE.parent.joinpath(*name.split("."))


def _import_from(package: str, folder: Path, stem: str) -> ModuleType:
    """Import `package.stem`; a ``folder`` outside the package is added by explicit path, not by `sys.path`."""
    if package not in sys.modules and not folder.is_relative_to(_PACKAGE):
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise UsageError(f"'{folder}' is not a Python package.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{package}.{stem}")


@dataclass(frozen=True)
class Catalog:
    """All plug-ins of one kind, e.g. ``Catalog("attack", "attacks")``.

    Outside packages join by the entry-point group `robusteval.<folder>`.
    """

    kind: str
    folder: str

    @cached_property
    def _files(self) -> dict[str, tuple[Path, ast.ClassDef]]:
        found = {}
        for path in sorted(resource_folder(self.folder).glob("[!_]*.py")):
            node = _find_class(path)
            if node is not None:
                found[path.stem] = (path, node)
        return found

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=f"robusteval.{self.folder}")}

    def names(self) -> list[str]:
        """Return every plug-in name, sorted; imports nothing."""
        return sorted({*self._files, *self._entry_points})

    def describe(self) -> dict[str, str]:
        """Return name -> first line of the plug-in's docstring; imports nothing."""
        summaries = {name: f"from {point.value}" for name, point in self._entry_points.items()}
        for name, (_, node) in self._files.items():
            summaries[name] = (ast.get_docstring(node) or "").split("\n")[0]
        return dict(sorted(summaries.items()))

    def unconfirmed(self, name: str) -> str:
        """Return the docstring's paragraphs that say "NOT confirmed", as one line; imports nothing.

        Empty where there is none, and for entry points, whose files cannot be found without importing.
        """
        if name not in self._files:
            return ""
        paragraphs = (ast.get_docstring(self._files[name][1]) or "").split("\n\n")
        return " ".join(" ".join(text.split()) for text in paragraphs if "NOT confirmed" in text)

    def get(self, name: str) -> type[Any]:
        """Import and return the plug-in class; raise `UsageError` with the nearest name if there is none."""
        if name in self._files:
            path, node = self._files[name]
            module = _import_from(f"robusteval.{self.folder}", path.parent, path.stem)
            found: type[Any] = getattr(module, node.name)
            return found
        if name in self._entry_points:
            loaded: type[Any] = self._entry_points[name].load()
            return loaded
        raise unknown(self.kind, name, self.names())

    def build(self, name: str, params: Mapping[str, Any] | None = None) -> Any:
        """Build a plug-in from plain data; unknown and ill-typed parameters raise `UsageError`."""
        return construct(self.get(name), params or {}, f"{self.kind} '{name}'")


def parameters(plugin: Any) -> dict[str, Any]:
    """Return all hyper-parameters of a plug-in as JSON values, so that a record replays after defaults change."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(plugin)))
    return plain


@cache
def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)  # takes longer to make than to use


def construct(cls: type[Any], params: Mapping[str, Any], what: str) -> Any:
    """Build the dataclass ``cls`` from ``params`` with types checked and strings converted."""
    if not is_dataclass(cls):
        raise UsageError(f"{what}: {cls.__qualname__} is not a dataclass, so it cannot be a plug-in.")
    known = [field.name for field in fields(cls) if field.init]
    for key in params:
        if key not in known:
            listed = ", ".join(known) or "none"
            raise UsageError(f"{what} has no parameter '{key}'.{nearest(key, known)} Known: {listed}.")
    try:
        return _adapter(cls).validate_python(dict(params))
    except ValidationError as error:
        raise UsageError(f"{what}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """Say the first problem of a pydantic error in one sentence."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"'{where}' is missing."
    if first["type"] == "extra_forbidden":
        return f"there is no '{where}'."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    end = "" if message.endswith("?") else "."
    return f"{where} = {reprlib.repr(first['input'])} is not allowed: {message}{end}" if where else f"{message}{end}"
