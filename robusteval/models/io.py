"""Building, saving and loading classifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from robusteval.catalog import Catalog
from robusteval.errors import RobustevalError, UsageError, nearest
from robusteval.models._card import BEST, CONFIG, WEIGHTS, ModelCard, describe, make_card, read_card
from robusteval.models._factory import is_factory, load_factory
from robusteval.models._weights import (
    SUFFIXES,
    add_counters,
    assemble,
    compare,
    parameter_count,
    pop_normalisation,
    read_weights,
    skeleton,
    state_digest,
    strip_prefixes,
    weights_digest,
)
from robusteval.models.base import Classifier, LoadedModel, Shape, summary
from robusteval.runs import write_atomic, write_json
from robusteval.settings import PluginSpec

__all__ = [
    "ARCHITECTURES",
    "ZOO",
    "build_model",
    "load_folder",
    "load_model",
    "parameter_count",
    "save_model",
    "weights_digest",
]

ARCHITECTURES = Catalog("architecture", "models")
ZOO = Catalog("model source", "models.zoo")

Channels = tuple[float, ...]


def build_model(
    spec: PluginSpec, shape: Shape, num_classes: int, mean: Channels, std: Channels, seed: int | None = None
) -> Classifier:
    """Build an untrained classifier for images ``shape`` = (C, H, W) in [0,1], normalised with (x - mean) / std.

    With ``seed`` the initial weights depend on it alone and the global RNG is left as found; without, they are
    drawn from the global RNG. Raises `UsageError` when the architecture does not fit the data.
    """
    architecture = ARCHITECTURES.build(spec.name, spec.params)
    if not len(mean) == len(std) == shape[0]:
        raise UsageError(f"mean {mean} and std {std} need {shape[0]} values each, one per image channel.")
    if not all(math.isfinite(value) for value in (*mean, *std)) or min(std) <= 0:
        raise UsageError(f"mean {mean} and std {std} must be finite, std above 0.")
    try:
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return Classifier(architecture.build(shape, num_classes), mean, std)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        where = f"for images of shape {shape} and {num_classes} classes"
        raise UsageError(f"architecture '{describe(spec)}' cannot be built {where}: {summary(error)}") from error


def save_model(folder: Path, model: Classifier, card: Mapping[str, Any]) -> None:
    """Write `model.safetensors`, then `config.json`, each atomically; `load_model` gives the same bits back.

    ``card`` has `architecture` {name, params}, `shape`, `num_classes`, and may have `classes`, a free `training`
    dict and decimal `mean` and `std`; `format` and `weights_sha256` are filled in. Raises `RobustevalError` when
    the card is wrong or is not this model's.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    normalisation = {"mean": tuple(model.mean.flatten().tolist()), "std": tuple(model.std.flatten().tolist())}
    checked = make_card({**normalisation, **card, "weights_sha256": state_digest(state)})
    _check_state(checked, state, "the model cannot be saved")
    write_atomic(folder / WEIGHTS, safetensors.torch.save(state))
    write_json(folder / CONFIG, checked.model_dump(mode="json"))


def _rebuild(card: ModelCard) -> Classifier:
    return build_model(card.architecture, card.shape, card.num_classes, card.mean, card.std)


def _check_state(card: ModelCard, state: Mapping[str, Tensor], what: str) -> None:
    compare(state, skeleton(lambda: _rebuild(card)).state_dict(), what)
    for name in ("mean", "std"):
        if not torch.equal(state[name].float().flatten(), torch.tensor(getattr(card, name), dtype=torch.float32)):
            raise RobustevalError(f"{what}: {name} = {getattr(card, name)} is not the one stored with the weights.")


def load_model(
    spec: str,
    architecture: PluginSpec | None,
    shape: Shape,
    num_classes: int,
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
    device: torch.device | str = "cpu",
    source_params: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load the model that ``spec`` names, in eval mode, for images ``shape`` = (C, H, W) in [0,1].

    ``spec`` is tried, in this order, as

    1. a weights file (.safetensors, .pt, .pth, .model, .bin, .ckpt, .tar), which needs ``architecture``;
    2. a model folder (`config.json` and `model.safetensors`), or a run folder that has one as `best/`;
    3. ``<source>:<name>`` for a zoo adapter (robustbench, torchvision, timm, hub), built with ``source_params``;
    4. ``package.module:factory``: code that the user names, called without arguments.

    Only 4 runs code that came with the model. Published weight files mostly take [0,1] directly, so a file is
    not normalised unless it stores `mean`/`std` (or `mu`/`sigma`) or else ``mean`` and ``std`` are given, which
    say how *that network* was trained (do not pass the dataset's as a matter of course).
    Raises `UsageError` when ``spec`` names nothing or the model is for other data, `RobustevalError` when the
    file is damaged, refused or does not match.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        loaded = _from_file(path, architecture, shape, num_classes, mean, std)
    elif architecture is not None and (path.is_dir() or ":" in spec):
        raise UsageError(f"'{spec}' brings its own architecture; drop '{describe(architecture)}'.")
    elif path.is_dir():
        loaded = load_folder(path, shape, num_classes)
    elif ":" in spec:
        loaded = _from_source(spec, shape, num_classes, source_params or {})
    else:
        raise _unresolved(spec, path)
    return replace(loaded, module=loaded.module.eval().to(device))


def _from_file(
    path: Path,
    spec: PluginSpec | None,
    shape: Shape,
    num_classes: int,
    mean: Channels | None,
    std: Channels | None,
) -> LoadedModel:
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"'{path}' is not a weights file: its name must end in one of {', '.join(SUFFIXES)}.")
    if spec is None:
        known = ", ".join(ARCHITECTURES.names())
        raise UsageError(f"'{path}' holds bare weights, so their architecture must be named. Known: {known}.")
    if (mean is None) != (std is None):
        raise UsageError(f"mean = {mean} and std = {std}: give both or neither.")
    given = (mean or (0.0,) * shape[0], std or (1.0,) * shape[0])
    blank = skeleton(lambda: build_model(spec, shape, num_classes, *given).backbone).state_dict()
    state = strip_prefixes(read_weights(path), blank)
    add_counters(state, blank)
    used = pop_normalisation(state, blank, shape[0]) or given
    full = {f"backbone.{name}": value for name, value in state.items()}
    full |= {name: torch.tensor(value).view(1, -1, 1, 1) for name, value in zip(("mean", "std"), used, strict=True)}
    what = f"'{path}' does not fit {describe(spec)} for images of shape {shape} and {num_classes} classes"
    module = assemble(lambda: build_model(spec, shape, num_classes, *used), full, what)
    return LoadedModel(module, path.stem, str(path), describe(spec), num_classes, shape)


def load_folder(folder: Path, shape: Shape, num_classes: int) -> LoadedModel:
    """Load a folder that `save_model` wrote, or the `best/` of a run folder, for images ``shape``.

    Raises `UsageError` when the model is for other data, `RobustevalError` when the folder holds no model, or its
    card or weights are damaged or not the ones that were saved together.
    """
    if not (folder / WEIGHTS).is_file() and (folder / BEST).is_dir():
        folder = folder / BEST
    for part in (WEIGHTS, CONFIG):
        if not (folder / part).is_file():
            raise UsageError(f"'{folder}' holds no model: it has no {part}.")
    card = read_card(folder)
    if (card.shape, card.num_classes) != (tuple(shape), num_classes):
        raise UsageError(
            f"'{folder}' is a model for images of shape {card.shape} and {card.num_classes} classes; "
            f"the data has {tuple(shape)} and {num_classes}."
        )
    state = read_weights(folder / WEIGHTS)
    if state_digest(state) != card.weights_sha256:
        raise RobustevalError(
            f"'{folder / WEIGHTS}' is not the file that was saved: its SHA-256 is not the one in {CONFIG}."
        )
    _check_state(card, state, f"'{folder}'")
    module = assemble(lambda: _rebuild(card), state, f"'{folder}'")
    extra = card.training.get("extra_data")
    return LoadedModel(
        module,
        name=_name(folder),
        source=str(folder),
        architecture=describe(card.architecture),
        num_classes=card.num_classes,
        shape=card.shape,
        extra_data=extra if isinstance(extra, bool) else None,
        training=card.training,
    )


def _name(folder: Path) -> str:
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name == BEST else resolved.name


def _from_source(spec: str, shape: Shape, num_classes: int, params: Mapping[str, Any]) -> LoadedModel:
    source, _, rest = spec.partition(":")
    if source in ZOO.names():
        if not rest:
            raise UsageError(f"'{spec}' lacks the name of a model after the colon.")
        loaded: LoadedModel = ZOO.build(source, params).load(rest, shape, num_classes)
        return loaded
    if not is_factory(spec):
        known = f"{', '.join(ZOO.names())}, or package.module:factory"
        raise UsageError(f"unknown model source '{source}'.{nearest(source, ZOO.names())} Known: {known}.")
    return load_factory(spec, ZOO.names(), num_classes)


def _unresolved(spec: str, path: Path) -> UsageError:
    if spec in ARCHITECTURES.names():
        return UsageError(f"'{spec}' is an architecture without weights: name a weights file or a model folder too.")
    if spec in ZOO.names():
        return UsageError(f"'{spec}' is a model source: write '{spec}:<name of a model>'.")
    siblings = {str(path.parent / child.name) for child in path.parent.iterdir()} if path.parent.is_dir() else set()
    sources = ", ".join(f"{name}:<name>" for name in ZOO.names())
    return UsageError(
        f"no model '{spec}': there is no such file or folder.{nearest(str(path), siblings)} "
        f"A model is a folder, a weights file, {sources} or package.module:factory."
    )
