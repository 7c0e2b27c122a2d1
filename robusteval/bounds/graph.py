"""Tracing: any `nn.Module` as a graph of affine maps and activations.

The module's own code is run on tensors without data (`make_fx`), so a branch that depends on pixels cannot be traced
and is refused, as is every operation without a rule in `ops`. Nothing is guessed.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
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
    own = _precision(model)
    example = torch.zeros(TRACED, *x.shape[1:], dtype=own, device=x.device)
    try:
        network = copy.deepcopy(model)  # it may change its own state
        with torch.no_grad():
            pure = torch.func.functionalize(network)
            traced = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(example)
    except Exception as error:  # the network is anybody's code
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"unsupported: the network cannot be traced ({line[:120]})") from error
    traced.graph.eliminate_dead_code()
    graph = Graph(tuple(lower(traced, x.dtype)))
    if not all(_agrees(graph, network, part, own) for part in (x, x[:1], torch.cat([x[:1]] * 3))):
        raise UnsupportedError("unsupported: the traced graph does not compute what the network does")
    return graph


def _precision(model: nn.Module) -> torch.dtype:
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
