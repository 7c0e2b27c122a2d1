"""One typed configuration tree out of defaults < recipe < TOML < `--set key=value` < flags."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from robusteval.catalog import first_problem
from robusteval.errors import UsageError, nearest


class Settings(BaseModel):
    """Base of every configuration node: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PluginSpec(Settings):
    """A plug-in by name, with the hyper-parameters that differ from its defaults."""

    name: str
    params: dict[str, Any] = {}


Budget = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]
"""A size such as ``"2/255"`` or ``"0.5"``, kept as it was spelled; TOML may give it as a number."""

Tree = TypeVar("Tree", bound=Settings)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UsageError(f"'{dotted}' cannot be set: '{key}' is a value, not a group of settings.")
    tree[last] = value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``over`` on ``base``, node by node; where it names another plug-in, that one's hyper-parameters go."""
    merged = dict(base)
    if "params" in merged and over.get("name", merged.get("name")) != merged.get("name"):
        del merged["params"]
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raise `UsageError` when it cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"config file '{path}' cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config file '{path}' is not TOML: {error}.") from error


def read_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Return key -> value of ``key=value`` strings, values as they were typed; raise `UsageError` for other forms."""
    pairs = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise UsageError(f"--set '{assignment}' is not of the form key=value.")
        pairs[key.strip()] = value.strip()
    return pairs


def _explain(error: ValidationError, cls: type[Settings]) -> str:
    first = error.errors()[0]
    if first["type"] != "extra_forbidden":
        return first_problem(error)
    *parents, key = (str(part) for part in first["loc"])
    node: Any = cls
    for parent in parents:
        field = node.model_fields.get(parent)
        choices = (field.annotation, *get_args(field.annotation)) if field else ()
        node = next((choice for choice in choices if hasattr(choice, "model_fields")), None)
        if node is None:
            return first_problem(error)
    known = list(node.model_fields)
    where = ".".join([*parents, key])
    return f"unknown setting '{where}'.{nearest(key, known)} Known: {', '.join(known)}."


def resolve(
    cls: type[Tree],
    toml: Path | None,
    assignments: Iterable[str],
    flags: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
) -> Tree:
    """Build ``cls`` from its defaults, ``base``, a TOML file, ``key=value`` strings and flags, the later the stronger.

    ``base`` is a tree like the TOML file's; ``flags`` maps dotted keys to values; None means that the flag was not
    given. Raises `UsageError`.
    """
    tree = _merge(base or {}, read_toml(toml) if toml else {})
    changes: dict[str, Any] = {}
    for key, typed in read_assignments(assignments).items():
        _put(changes, key, _parse_value(typed))
    for key, value in flags.items():
        if value is not None:
            _put(changes, key, value)
    try:
        return cls.model_validate(_merge(tree, changes))
    except ValidationError as error:
        raise UsageError(_explain(error, cls)) from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> leaf value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
