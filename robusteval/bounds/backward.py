"""Linear bounds by going backwards through a network (CROWN, Zhang et al. 2018, arXiv 1811.00866).

A *query* asks for a lower bound of ``<a, v>`` where v is a node's value for the inputs in one sample's ball. Going
back, ``a`` moves from node to node: through an affine map by its adjoint, through an activation by the plane that
bounds it from below or above, as the sign of ``a`` says. What arrives at the input is bounded exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robusteval.bounds.activations import Activation, Planes
from robusteval.bounds.ball import Ball
from robusteval.bounds.interval import Bounds
from robusteval.bounds.nodes import Affine, Graph, Node
from robusteval.bounds.pooling import MaxPool, PoolPlanes, put

AnyPlanes = Planes | PoolPlanes


@dataclass(frozen=True)
class Relaxation:
    """How each nonlinear node is bounded: ``planes`` by node, for N samples.

    For single queries, ``slopes`` (P, *shape) replace the lower slopes of unstable kinks, and ``pushes`` (P, *shape)
    are added to the coefficients of an activation's argument: multipliers of constraints on its sign.
    """

    planes: Mapping[int, AnyPlanes]
    slopes: Mapping[int, Tensor] = field(default_factory=dict)
    pushes: Mapping[int, Tensor] = field(default_factory=dict)


def relax(graph: Graph, bounds: list[Bounds], parallel: bool = False) -> dict[int, AnyPlanes]:
    """Return planes of every nonlinear node for the bounds (N, *shape) of its argument."""
    planes: dict[int, AnyPlanes] = {}
    for place, node in enumerate(graph.nodes):
        if isinstance(node.op, Activation):
            planes[place] = node.op.planes(*bounds[node.inputs[0]], parallel)
        elif isinstance(node.op, MaxPool):
            planes[place] = node.op.planes(*bounds[node.inputs[0]])
    return planes


def pull(
    graph: Graph,
    queries: Mapping[int, Tensor],
    owner: Tensor,
    relaxation: Relaxation,
    stops: Collection[int] = (0,),
) -> tuple[dict[int, Tensor], Tensor]:
    """Return what becomes of queries (P, *shape) on nodes, of the samples ``owner`` (P,), or all of one sample (1,).

    ``sum_s <query_s, v_s> >= constant + sum_t <coefficient_t, v_t>`` over the nodes ``stops`` that were reached:
    coefficients (P, *shape) by node, and constants (P,).
    """
    pending, reached = dict(queries), {}
    some = next(iter(queries.values()))
    constant = some.new_zeros(len(some))
    for place in range(max(pending), -1, -1):
        if place not in pending:
            continue
        coefficient = pending.pop(place)
        if place in stops:
            reached[place] = coefficient
            continue
        earlier, added = _through(graph, place, coefficient, owner, relaxation)
        constant = constant + added
        for source, part in zip(graph.nodes[place].inputs, earlier, strict=True):
            pending[source] = pending[source] + part if source in pending else part
    return reached, constant


def affine_stops(graph: Graph) -> set[int]:
    """Return the places where a way back through affine maps alone ends."""
    return {place for place, node in enumerate(graph.nodes) if not isinstance(node.op, Affine)}


def _through(
    graph: Graph, place: int, a: Tensor, owner: Tensor, relaxation: Relaxation
) -> tuple[tuple[Tensor, ...], Tensor]:
    node = graph.nodes[place]
    if isinstance(node.op, Affine):
        return node.op.adjoint(a, [graph.nodes[i].shape for i in node.inputs]), _offset(graph, node, a)
    planes = relaxation.planes[place]
    if isinstance(planes, PoolPlanes):
        return _through_pool(graph.nodes[node.inputs[0]], planes, a, owner)
    earlier, added = _through_activation(planes, a, owner, relaxation.slopes.get(place))
    if place in relaxation.pushes:
        earlier = earlier + relaxation.pushes[place]
    return (earlier,), added


def _offset(graph: Graph, node: Node, a: Tensor) -> Tensor:
    """Return ``<a, b>`` (P,) for an affine map of offset b."""
    assert isinstance(node.op, Affine)
    offset = node.op.f(*(a.new_zeros(1, *graph.nodes[i].shape) for i in node.inputs))
    return a.flatten(1) @ offset.flatten()


def _through_activation(planes: Planes, a: Tensor, owner: Tensor, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take the lower plane everywhere, then correct it where ``a`` is negative and the upper one differs.

    Most activations are stable, so the correction touches few values.
    """
    low_slope = planes.low_slope[owner] if slopes is None else slopes
    bent = planes.bent[torch.unique(owner)].any(0)
    if slopes is not None:
        bent = bent | (slopes != planes.high_slope[owner]).any(0)
    bent = bent.flatten().nonzero().squeeze(1)
    earlier = (a * low_slope).flatten(1)
    part, gap = a.flatten(1)[:, bent], _at(planes.high_slope, owner, bent) - low_slope.flatten(1)[:, bent]
    up = torch.relu(part)
    down = part - up
    added = (up * _at(planes.low, owner, bent) + down * _at(planes.high, owner, bent)).sum(1)
    return earlier.index_add(1, bent, down * gap).view_as(a), added


def _at(values: Tensor, owner: Tensor, columns: Tensor) -> Tensor:
    return values.flatten(1)[:, columns][owner]


def _through_pool(source: Node, planes: PoolPlanes, a: Tensor, owner: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    up = torch.relu(a)
    down = a - up
    places = planes.best[owner].expand_as(a)
    earlier = put(up + down * planes.high_slope[owner], places, source.shape)
    return (earlier,), (down * planes.high[owner]).flatten(1).sum(1)


def least(
    reached: Mapping[int, Tensor], constant: Tensor, owner: Tensor, ball: Ball, bounds: list[Bounds] | None = None
) -> Tensor:
    """Return lower bounds (P,) of what `pull` returned, from the ball at the input, from ``bounds`` elsewhere."""
    total = constant
    for place, a in reached.items():
        if place == 0:
            total = total + ball.least(a, owner)
        else:
            assert bounds is not None
            up = torch.relu(a)
            low, high = (part[owner] for part in bounds[place])
            total = total + (up * low + (a - up) * high).flatten(1).sum(1)
    return total


def in_chunks(count: int, size: int, bound: Callable[[slice], Tensor]) -> Tensor:
    """Return ``bound`` of ``count`` queries, ``size`` at a time."""
    return torch.cat([bound(slice(first, first + size)) for first in range(0, count, size)])
