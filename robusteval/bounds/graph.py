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

AGREEMENT = 1e-5
"""Largest difference between the logits of network and graph, relative to them, put down to rounding."""


def trace(model: nn.Module, x: Tensor) -> Graph:
    """Return ``model``, which is in eval mode, as a graph of the precision of ``x`` (N, C, H, W), some of its inputs.

    Raises `UnsupportedError` for a network that cannot be traced, or whose graph computes something else on ``x``.
    """
    network = copy.deepcopy(model).to(x.dtype).requires_grad_(False)
    example = torch.zeros(TRACED, *x.shape[1:], dtype=x.dtype, device=x.device)
    try:
        with torch.no_grad():
            traced = make_fx(network, tracing_mode="fake", _allow_non_fake_inputs=True)(example)
    except Exception as error:  # the network is anybody's code
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"unsupported: the network cannot be traced ({line[:120]})") from error
    traced.graph.eliminate_dead_code()
    graph = Graph(tuple(lower(traced)))
    if not _agrees(graph, network, x):
        raise UnsupportedError("unsupported: the traced graph does not compute what the network does")
    return graph


def _agrees(graph: Graph, network: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        said = network(x)
        try:
            computed = graph(x)
        except (RuntimeError, IndexError, ValueError):
            return False
    near = computed.shape == said.shape and ((computed - said).abs() <= AGREEMENT * (1 + said.abs()))
    return bool(torch.as_tensor(near).all())
