"""What a plug-in must leave as it found it."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def require(condition: object, message: str) -> None:
    """Raise `AssertionError` with ``message`` unless ``condition`` holds, under `python -O` as well."""
    if not condition:
        raise AssertionError(message)


def bits(tensor: Tensor | None) -> bytes | None:
    """Return the bytes of a tensor, so that NaN equals itself and -0.0 differs from 0.0."""
    return None if tensor is None else tensor.detach().cpu().contiguous().numpy().tobytes()


@contextmanager
def untouched(what: str, model: nn.Module, *tensors: Tensor, buffers: bool = True) -> Iterator[None]:
    """Require that the global state, ``model`` and ``tensors`` are, after the block, what they were before.

    Without ``buffers`` the model's buffers may change, as BatchNorm statistics do in training.
    """
    before = _state(model, tensors, buffers)
    yield
    after = _state(model, tensors, buffers)
    changed = [name for name, value in before.items() if after[name] != value]
    require(not changed, f"{what} changes {', '.join(changed)}")


def _state(model: nn.Module, tensors: tuple[Tensor, ...], buffers: bool) -> dict[str, object]:
    return {
        **_global_state(),
        **_model_state(model),
        "the model's buffers": [bits(buffer) for buffer in model.buffers()] if buffers else None,
        "its inputs": [bits(tensor) for tensor in tensors],
        "its inputs' requires_grad": [(tensor.requires_grad, tensor.grad is None) for tensor in tensors],
    }


def _global_state() -> dict[str, object]:
    return {
        "torch's global generator": bits(torch.get_rng_state()),
        "numpy's global generator": pickle.dumps(np.random.get_state()),
        "Python's global generator": random.getstate(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's determinism": torch.are_deterministic_algorithms_enabled(),
    }


def _model_state(model: nn.Module) -> dict[str, object]:
    parameters = list(model.parameters())
    return {
        "the model's mode": [part.training for part in model.modules()],
        "the model's hooks": [list(getattr(part, kind)) for part in model.modules() for kind in _HOOKS],
        "the parameters": [bits(parameter) for parameter in parameters],
        "the parameters' requires_grad": [parameter.requires_grad for parameter in parameters],
        "the parameters' gradients": [bits(parameter.grad) for parameter in parameters],
    }


def disturb() -> None:
    """Move the global generators on, as other code does between two calls of a plug-in."""
    torch.rand(7)
    np.random.random(7)
    random.random()


def marked(model: nn.Module) -> nn.Module:
    """Give ``model`` gradients and a hook of somebody else's, which a plug-in must not lose."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.125)
    model.register_forward_hook(lambda *_: None)
    return model


def guarded(model: nn.Module) -> nn.Module:
    """Return ``model``, on three channels, behind modules that act up in training mode; frozen, marked."""
    return marked(nn.Sequential(nn.BatchNorm2d(3, eps=1e-12), nn.Dropout(0.5), model).eval().requires_grad_(False))
