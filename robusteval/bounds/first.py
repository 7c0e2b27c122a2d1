"""Intervals of L2 and L1 balls, which a box around the ball would make far too wide."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robusteval.bounds.backward import affine_stops
from robusteval.bounds.interval import Bounds, intervals
from robusteval.bounds.margins import Problem, interval_margins, linear_margins
from robusteval.bounds.tighten import Units
from robusteval.threat import Norm

DUAL = {Norm.L2: 2.0, Norm.L1: math.inf}


def enclosed(problem: Problem) -> list[Bounds]:
    """Return bounds of every node by intervals.

    In L2 and L1 they start where affine maps alone end: ``<a, x'>`` is within ``radius`` times the dual norm of ``a``.
    """
    bounds = intervals(problem.graph, problem.ball)
    if problem.ball.norm is Norm.LINF:
        return bounds
    return intervals(problem.graph, problem.ball, _first(problem, bounds))


def mixed_margins(problem: Problem) -> Tensor:
    """Return the larger of the margins (N, K - 1) from intervals and from a pass backwards on them (CROWN-IBP)."""
    bounds = enclosed(problem)
    return torch.maximum(interval_margins(problem, bounds), linear_margins(problem, bounds))


def _first(problem: Problem, bounds: list[Bounds]) -> dict[int, Bounds]:
    """Return bounds of the values that feed nonlinear nodes and depend on the input through affine maps alone."""
    found, stops, values = {}, affine_stops(problem.graph), problem.graph.values(problem.ball.x)
    for place in {node.inputs[0] for node in problem.graph.nodes if node.nonlinear} - stops:
        units = Units.of(problem, place)
        if set(units.rows) != {0}:
            continue  # it depends on nonlinear nodes, or memory does not allow it
        size = torch.linalg.vector_norm(units.rows[0].flatten(1), ord=DUAL[problem.ball.norm], dim=1)
        reach = (problem.ball.radius * size).view(units.shape)
        low, high = bounds[place]
        found[place] = torch.maximum(low, values[place] - reach), torch.minimum(high, values[place] + reach)
    return found
