"""Interval bound propagation (Gowal et al. 2018, arXiv 1810.12715): every value's bounds from those of its inputs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from robusteval.bounds.ball import Ball
from robusteval.bounds.nodes import Affine, Graph, Node

Bounds = tuple[Tensor, Tensor]


def intervals(graph: Graph, ball: Ball, known: Mapping[int, Bounds] | None = None) -> list[Bounds]:
    """Return lower and upper bounds (N, *shape) of every node, given those ``known`` of some."""
    bounds: list[Bounds] = []
    for place, node in enumerate(graph.nodes):
        if known and place in known:
            bounds.append(known[place])
        else:
            bounds.append(_bounds(node, ball, [bounds[i] for i in node.inputs]))
    return bounds


def _bounds(node: Node, ball: Ball, inputs: list[Bounds]) -> Bounds:
    if node.op is None:
        return ball.box
    if not isinstance(node.op, Affine):
        return node.op.interval(*inputs[0])
    centre = node.op.f(*((low + high) / 2 for low, high in inputs))
    reach = node.op.magnitude(*((high - low) / 2 for low, high in inputs))
    return centre - reach, centre + reach
