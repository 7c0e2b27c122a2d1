"""Weights as plain tensors: read from files without running code, fitted to a network, hashed."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from robusteval.errors import RobustevalError, nearest
from robusteval.models.base import summary

SUFFIXES = (".safetensors", ".pt", ".pth", ".model", ".bin", ".ckpt", ".tar")
_NESTS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_NORMALISATION = (("mean", "std"), ("mu", "sigma"), ("normalize.mean", "normalize.std"))
Network = TypeVar("Network", bound=nn.Module)
_NESTING_LIMIT = 4  # wrappers inside wrappers; bounded, because a pickled dict may contain itself


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 over names (sorted), dtypes, shapes and bytes of every tensor in the state dict."""
    return state_digest({name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)})


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names (sorted), dtypes, shapes and bytes; the same on every device."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def parameter_count(module: nn.Module) -> int:
    """Return the number of trainable scalars; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or `torch.save` file onto the CPU; pickled code never runs.

    A state dict inside `state_dict`, `model_state_dict`, `model` or `net` is found. Raises `RobustevalError`
    when the file is damaged, holds pickled objects other than tensors, or has no tensors.
    """
    stored = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pickle(path)
    tensors = {str(name): value for name, value in _unwrap(stored).items() if isinstance(value, Tensor)}
    if not tensors:
        raise RobustevalError(f"'{path}' holds no state dict: it has no named tensors.")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise RobustevalError(f"'{path}': '{name}' is not a dense tensor, so it cannot be used as a weight.")
    return tensors


def _unwrap(stored: object) -> Mapping[Any, Any]:
    for _ in range(_NESTING_LIMIT):
        if isinstance(stored, Mapping):
            wrapped = (stored[key] for key in _NESTS if isinstance(stored.get(key), Mapping))
            stored = next(wrapped, stored)
    return stored if isinstance(stored, Mapping) else {}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise RobustevalError(f"'{path}' cannot be read as safetensors: {summary(error)}") from error
    return tensors


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere inside the unpickler
        raise RobustevalError(_explain_unreadable(path, error)) from error


def _explain_unreadable(path: Path, error: Exception) -> str:
    message = str(error)
    refused = isinstance(error, pickle.UnpicklingError) or "TorchScript" in message or "legacy .tar" in message
    if refused and _starts_like_pickle(path):
        blamed = re.search(r"GLOBAL ([\w.]+)|TorchScript", message)
        what = f" ({blamed[1] or 'a TorchScript program'})" if blamed else ""
        return (
            f"'{path}' was refused: it holds pickled Python objects{what}, and code inside a model file "
            "is never executed; save its plain state dict instead."
        )
    if isinstance(error, PermissionError):
        return f"'{path}' cannot be read: {error.strerror}."
    return f"'{path}' cannot be read as PyTorch weights: it is truncated, damaged or another kind of file."


def _starts_like_pickle(path: Path) -> bool:
    with path.open("rb") as handle:
        start = handle.read(2)
    return start == b"PK" or start[:1] == b"\x80"


def strip_prefixes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers (DataParallel, `torch.compile`, normalisation) put before every name."""
    stripped = dict(state)
    buffers = {name for pair in _NORMALISATION for name in pair}
    for _ in range(_NESTING_LIMIT):
        names = [name for name in stripped if name not in buffers]
        prefix = next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None)
        if prefix is None or not expected.keys().isdisjoint(names):
            break
        stripped = {name.removeprefix(prefix): value for name, value in stripped.items()}
    return stripped


def pop_normalisation(
    state: dict[str, Tensor], expected: Mapping[str, Tensor], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Take a stored (mean, std) that is not part of the network out of ``state``; None when there is none."""
    for names in _NORMALISATION:
        if all(name in state and name not in expected for name in names):
            mean, std = (state.pop(name).double().flatten().tolist() for name in names)
            repeat = channels if len(mean) == len(std) == 1 else 1
            return tuple(mean * repeat), tuple(std * repeat)
    return None


def add_counters(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Add the BatchNorm counters that files before PyTorch 0.4.1 lack; evaluation does not use them."""
    for name in expected:
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros((), dtype=torch.int64))


def skeleton(build: Callable[[], Network]) -> Network:
    """Build a network on the meta device: shapes without memory."""
    with torch.device("meta"):
        return build()


def assemble(build: Callable[[], Network], state: Mapping[str, Tensor], what: str) -> Network:
    """Return the network that ``build`` makes, with copies of the weights ``state``; leaves the global RNG alone.

    Raises `RobustevalError` as `compare` does, before anything of the network's size is allocated.
    """
    module = skeleton(build)
    expected = module.state_dict()
    compare(state, expected, what)
    fitted = {name: state[name].to(blank.dtype, copy=True).contiguous() for name, blank in expected.items()}
    module.load_state_dict(fitted, assign=True)
    if any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
        with torch.random.fork_rng(devices=[]):  # buffers that are computed, not stored
            module = build()
        module.load_state_dict(fitted)
    return module


def compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise `RobustevalError` naming the first weight that is missing, superfluous, of another shape or not finite."""
    for name, blank in expected.items():
        _compare(name, state, blank, what)
    for name in state:
        if name not in expected:
            raise RobustevalError(
                f"{what}: the weights have '{_plain(name)}' of shape {tuple(state[name].shape)}, "
                f"which the architecture does not.{nearest(_plain(name), map(_plain, expected))}"
            )


def _plain(name: str) -> str:
    return name.removeprefix("backbone.")


def _compare(name: str, state: Mapping[str, Tensor], blank: Tensor, what: str) -> None:
    if name not in state:
        raise RobustevalError(
            f"{what}: the weights lack '{_plain(name)}' of shape {tuple(blank.shape)}."
            f"{nearest(_plain(name), map(_plain, state))}"
        )
    stored = state[name]
    if stored.shape != blank.shape:
        raise RobustevalError(
            f"{what}: '{_plain(name)}' has shape {tuple(stored.shape)} in the weights "
            f"and {tuple(blank.shape)} in the architecture."
        )
    if stored.is_floating_point() != blank.is_floating_point() or stored.is_complex():
        raise RobustevalError(f"{what}: '{_plain(name)}' is {stored.dtype} in the weights, not {blank.dtype}.")
    if not stored.isfinite().all():
        raise RobustevalError(f"{what}: '{_plain(name)}' holds NaN or infinite values.")
