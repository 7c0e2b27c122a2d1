"""Tracing a network once and bounding it again and again while its weights change, with gradients to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from robusteval.bounds.graph import copied, precision, reproduces, traced
from robusteval.bounds.lowering import lower
from robusteval.bounds.nodes import Graph, UnsupportedError

aten = torch.ops.aten


@dataclass(frozen=True)
class LiveTrace:
    """A network in eval mode whose parameters and buffers, called ``names``, are left open."""

    steps: fx.GraphModule
    names: tuple[str, ...]

    def bind(self, values: Mapping[str, Tensor], dtype: torch.dtype) -> Graph:
        """Return the graph for ``values``; what is bounded on it is attached to theirs."""
        return Graph(tuple(lower(self.steps, dtype, [values[name] for name in self.names])))


def trace_live(model: nn.Module, x: Tensor) -> LiveTrace:
    """Return the trace of ``model``, of float32 or float64, for inputs like ``x`` (N, C, H, W).

    BatchNorm becomes a product and a sum, as torch's own has no gradient for the statistics. Raises `UnsupportedError`
    as `graph.trace` does, and for weights that gradients would not reach.
    """
    network = copied(model).eval()
    values = owned(network)

    def run(point: Tensor, *given: Tensor) -> Any:
        return functional_call(network, dict(zip(values, given, strict=True)), (point,))

    steps = traced(run, x, precision(model), *(value.detach() for value in values.values()), table=_TABLE)
    live = LiveTrace(steps, tuple(values))
    _check_reach(live.steps)
    with torch.no_grad():
        graph = live.bind(values, x.dtype)
    if not reproduces(graph, network, x):
        raise UnsupportedError("unsupported: the traced graph does not compute what the network does")
    return live


def owned(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of ``model`` by name; one that is shared comes once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_reach(steps: fx.GraphModule) -> None:
    """Raise where a weight is no parameter of the network, or is cut off from its gradient."""
    for step in steps.graph.nodes:
        foreign = step.op == "get_attr" and getattr(getattr(steps, step.target), "requires_grad", False)
        if foreign or step.target is aten.detach.default:
            raise UnsupportedError("unsupported: weights that the gradient of a bound would not reach")


def _inference(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> Any:
    return NotImplemented if training else (_normalised(x, weight, bias, mean, var, eps), mean, var)


def _no_training(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float) -> Any:
    return _normalised(x, weight, bias, mean, var, eps), mean, var


def _normalised(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` of each channel as ``scale x + shift``."""
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = [1, -1, *[1] * (x.dim() - 2)]
    return x * scale.view(shape) + shift.view(shape)


_TABLE: Mapping[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _inference,
    aten.cudnn_batch_norm.default: _inference,
    aten._native_batch_norm_legit_no_training.default: _no_training,
}
