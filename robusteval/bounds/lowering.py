"""From a traced network to the nodes of a `Graph`.

An affine operation is run as it was traced, so that stride, padding, dilation and groups need no formula of their own;
its adjoint comes from autograd.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from robusteval.bounds.activations import Activation
from robusteval.bounds.nodes import TRACED, Affine, Node, UnsupportedError
from robusteval.bounds.ops import (
    ABSOLUTE,
    ACTIVATIONS,
    ADJOINTS,
    ALIASES,
    LINEAR,
    MIXING,
    POOLS,
    SHAPED,
    Call,
    max_pool,
)
from robusteval.bounds.pooling import MaxPool

aten = torch.ops.aten
EVERY_SAMPLE = (0, 0, sys.maxsize)
"""Dimension, start and end of a slice that is the whole batch, however large."""


def lower(traced: fx.GraphModule, dtype: torch.dtype, given: Sequence[Tensor] = ()) -> Iterator[Node]:
    """Yield what depends on the input of a trace, in order, logits last; what does not becomes constants of ``dtype``.

    The first placeholder is the input, the others are ``given``: what is computed stays attached to their graphs.
    Raises `UnsupportedError` for an operation without a rule.
    """
    places: dict[fx.Node, int] = {}
    constants: dict[fx.Node, Any] = {}
    values = iter(given)
    for step in traced.graph.nodes:
        if step.op == "get_attr":
            constants[step] = _precise(_detached(getattr(traced, step.target)), dtype)
        elif step.op == "placeholder" and places:
            constants[step] = _precise(next(values), dtype)
        elif _writes_back(step, places):
            continue
        elif step.op == "output":
            _check_output(step.args[0], places)
        elif step.op != "placeholder" and not any(used in places for used in step.all_input_nodes):
            constants[step] = _precise(_constant(step, constants), dtype)
        elif (same := _alias_of(step)) is not None:
            places[step] = places[same]
        else:
            node = _node(step, places, constants)
            places[step] = len(set(places.values()))
            yield node


def _writes_back(step: fx.Node, places: Mapping[fx.Node, int]) -> bool:
    """Whether a step only tells the input what was done to it in place, which the graph does to a copy."""
    if step.target is not aten.copy_.default or step.users:
        return False
    return step.args[0].op == "placeholder" and step.args[0] in places  # type: ignore[union-attr]


def _alias_of(step: fx.Node) -> Any:
    """Return the argument that a step only hands on, None where it computes something."""
    if step.target is operator.getitem and step.args[1] != 0:
        raise UnsupportedError("unsupported: the second output of an operation")
    if step.target is operator.getitem or step.target in ALIASES:
        return step.args[0]
    # The `:` in `x[:, 1:]`, which torch 2.6 traces as a slice of the batch.
    if step.target is aten.slice.Tensor and step.args[1:] == EVERY_SAMPLE:
        return step.args[0]
    if step.target is aten.slice_scatter.default and step.args[2:] == EVERY_SAMPLE:
        return step.args[1]
    return None


def _check_output(out: Any, places: Mapping[fx.Node, int]) -> None:
    if not isinstance(out, fx.Node) or places.get(out) != max(places.values()):
        raise UnsupportedError("unsupported: the network's output is not its last operation")


def _constant(step: fx.Node, constants: Mapping[fx.Node, Any]) -> Any:
    """Compute what does not depend on the input; refuse what depends on chance, on state or on the batch's size."""
    op: Any = step.target
    if isinstance(op, OpOverload) and (op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags):
        raise UnsupportedError(f"unsupported: {op}")
    value = op(*_fill(step.args, constants), **_fill(step.kwargs, constants))
    if isinstance(value, Tensor) and TRACED in value.shape:
        raise UnsupportedError(f"unsupported: {op} of the batch's size")
    return value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _precise(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if value.dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(f"unsupported: weights of {value.dtype}")
    return value.to(dtype)


def _node(step: fx.Node, places: Mapping[fx.Node, int], constants: Mapping[fx.Node, Any]) -> Node:
    shape = _per_sample(step)
    if step.op == "placeholder":
        return Node(None, (), shape)
    free = [used for used in step.all_input_nodes if used in places]
    return Node(_operation(step, free, constants), tuple(places[used] for used in free), shape)


def _per_sample(step: fx.Node) -> tuple[int, ...]:
    """Return the shape of a value without its batch; raise `UnsupportedError` where it has none."""
    value = step.meta["val"]
    value = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != TRACED:
        raise UnsupportedError(f"unsupported: {step.target} mixes samples")
    return tuple(value.shape[1:])


def _fill(given: Any, known: Mapping[fx.Node, Any]) -> Any:
    """Return arguments with the nodes that are known replaced by their values."""
    return fx.node.map_arg(given, lambda node: known.get(node, node))


def _operation(step: fx.Node, free: list[fx.Node], constants: Mapping[fx.Node, Any]) -> Affine | Activation | MaxPool:
    op: Any = step.target
    args, kwargs = list(_fill(step.args, constants)), dict(_fill(step.kwargs, constants))
    if op in ACTIVATIONS and len(free) == 1:
        return ACTIVATIONS[op](*args[1:], **kwargs)
    if op in POOLS:
        return max_pool(_per_sample(free[0]), _per_sample(step), *args[1:])
    if op in LINEAR and LINEAR[op](args, kwargs):
        return _affine((op, args, kwargs), free)
    raise UnsupportedError(f"unsupported: {op}")


def _affine(call: Call, free: list[fx.Node]) -> Affine:
    """Return the operation as a function of its ``free`` arguments alone."""
    absolute = ABSOLUTE[call[0]](*call) if call[0] in ABSOLUTE else call

    def magnitude(*values: Tensor) -> Tensor:
        zeros = (torch.zeros_like(value[:1]) for value in values)
        return _run(absolute, free, *values) - _run(absolute, free, *zeros)

    f = partial(_run, call, free)
    return Affine(f, magnitude, _adjoint(call, f), call[0] in MIXING)


def _adjoint(call: Call, f: Callable[..., Tensor]) -> Callable[[Tensor, list[tuple[int, ...]]], tuple[Tensor, ...]]:
    """Return the adjoint of an affine map: by a formula where there is a cheap one, else by autograd."""
    if call[0] in ADJOINTS:
        return ADJOINTS[call[0]](*call[1])

    live = any(isinstance(arg, Tensor) and arg.requires_grad for arg in (*call[1], *call[2].values()))

    def adjoint(a: Tensor, shapes: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
        if not len(a):  # torch ends the process when some convolutions go back through no samples
            return tuple(a.new_zeros(0, *shape) for shape in shapes)
        with torch.enable_grad():
            zeros = [a.new_zeros(len(a), *shape, requires_grad=True) for shape in shapes]
            return torch.autograd.grad(f(*zeros), zeros, a, create_graph=live or a.requires_grad)

    return adjoint


def _run(call: Call, free: list[fx.Node], *values: Tensor) -> Tensor:
    op, known = call[0], dict(zip(free, values, strict=True))
    args = list(_fill(call[1], known))
    if op in SHAPED:
        args[1] = [len(values[0]), *args[1][1:]]
        op = SHAPED[op]
    out = op(*args, **_fill(call[2], known))
    result: Tensor = out[0] if isinstance(out, tuple | list) else out
    return result
