"""Tracing: any `nn.Module` as a graph of affine maps and activations.

The module's own code is run on tensors without data (`make_fx`), so a branch that depends on pixels cannot be traced
and is refused, as is every operation without a rule in `ops`. Nothing is guessed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from robusteval.bounds.lowering import lower
from robusteval.bounds.nodes import TRACED, Graph, UnsupportedError

AGREEMENT = 1e-4
"""Largest difference between the logits of network and graph, relative to the largest, put down to float32."""


def trace(model: nn.Module, x: Tensor) -> Graph:
    """Return ``model``, in eval mode, of float32 or float64, as a graph of the precision of ``x`` (N, C, H, W).

    ``x`` are some of its inputs. Raises `UnsupportedError` for a network that cannot be traced, or whose graph computes
    something else on them.
    """
    network = copied(model)
    graph = Graph(tuple(lower(traced(network, x, precision(model)), x.dtype)))
    if not reproduces(graph, network, x):
        raise UnsupportedError("unsupported: the traced graph does not compute what the network does")
    return graph


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a network, which may change its own state when it is run; raise `UnsupportedError`."""
    try:
        return copy.deepcopy(model)
    except Exception as error:  # the network is anybody's code
        raise _untraceable(error) from error


def traced(
    f: Callable[..., Any],
    x: Tensor,
    own: torch.dtype,
    *more: Tensor,
    table: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """Return the operations of ``f(x, *more)`` for inputs like ``x`` (N, C, H, W) but of the type ``own``.

    An operation with an entry in ``table`` is replaced by those of that. Raises `UnsupportedError`.
    """
    example = torch.zeros(TRACED, *x.shape[1:], dtype=own, device=x.device)
    try:
        with torch.no_grad():
            pure = torch.func.functionalize(f)
            trace = make_fx(pure, dict(table or {}), tracing_mode="fake", _allow_non_fake_inputs=True)
            steps: fx.GraphModule = trace(example, *more)
    except Exception as error:  # the network is anybody's code
        raise _untraceable(error) from error
    steps.graph.eliminate_dead_code()
    return steps


def _untraceable(error: Exception) -> UnsupportedError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UnsupportedError(f"unsupported: the network cannot be traced ({line[:120]})")


def reproduces(graph: Graph, network: nn.Module, x: Tensor) -> bool:
    """Whether the graph computes what the network does, on ``x`` and for other numbers of samples."""
    own = precision(network)
    return all(_agrees(graph, network, part, own) for part in (x, x[:1], torch.cat([x[:1]] * 3)))


def precision(model: nn.Module) -> torch.dtype:
    """Return the type that the network computes in."""
    double = any(parameter.dtype is torch.float64 for parameter in model.parameters())
    return torch.float64 if double else torch.float32


def _agrees(graph: Graph, network: nn.Module, x: Tensor, own: torch.dtype) -> bool:
    """Compare with the network as it is used, in its ``own`` precision and for this number of samples."""
    with torch.no_grad():
        try:
            said, computed = network(x.to(own).clone()), graph(x)
        except Exception:  # the network is anybody's code, and the graph was traced for another number of samples
            return False
    if not isinstance(said, Tensor) or said.shape != computed.shape:
        return False
    return bool(((computed - said).abs() <= AGREEMENT * (1 + said.abs().max())).all())
