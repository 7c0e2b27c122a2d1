"""The end of a branch: where the side of every kink is fixed, the network is affine and a convex program decides."""

from __future__ import annotations

from dataclasses import replace

import numpy
import torch
from scipy.optimize import OptimizeResult, linprog, minimize
from torch import Tensor

from robusteval.bounds.backward import Relaxation, pull
from robusteval.bounds.ball import Ball
from robusteval.bounds.domains import Domains
from robusteval.bounds.tree import Tree
from robusteval.threat import Norm

Program = tuple[Tensor, Tensor, Tensor, Tensor]
"""The margin's coefficients (V,) and constant (1,), and those (C, V) and (C,) of what must not be negative.

The constraints are in the order of the kinks whose sign is fixed.
"""

PENALTY = 1e4
"""What breaking a constraint costs, relative to the margin's largest coefficient; it bounds the multipliers."""

PROGRAM = {"presolve": False, "maxiter": 100_000}  # HiGHS may never return from presolving some programs
ASCENT = {"maxfun": 500, "ftol": 1e-14, "gtol": 1e-9}


def settled(tree: Tree, leaf: Domains, enough: float) -> tuple[Domains, Tensor]:
    """Return one domain with the best multipliers, and the point (1, *shape) of the ball that goes with them.

    A bound from those multipliers is as sound as from any others, so nothing rests on the solver.
    """
    program = _program(tree, leaf)
    if not all(part.isfinite().all() for part in program):
        return leaf, tree.problem.ball.x
    if tree.problem.ball.norm is Norm.L2:
        multipliers, point = _smoothed(tree.problem.ball, program, enough)
    else:
        multipliers, point = _programmed(tree.problem.ball, program)
    push = torch.zeros_like(leaf.push)
    push[leaf.sign != 0] = torch.relu(multipliers)
    return tree.bounded(replace(leaf, push=push), torch.inf, steps=0), point


def _smoothed(ball: Ball, program: Program, enough: float) -> tuple[Tensor, Tensor]:
    """Return the multipliers (C,) and the solution (1, *shape) of an L2 ball's program, made strongly convex.

    The square of the distance is added, in a share that changes the optimum by less than half of ``enough``.
    """
    goal, constant, rows, offsets = program
    if not len(rows):
        return offsets, ball.minimiser(goal.view_as(ball.x), torch.zeros(1, dtype=torch.long, device=goal.device))
    one, curvature = torch.zeros(1, dtype=torch.long, device=ball.x.device), enough / ball.radius**2

    def at(values: numpy.ndarray) -> tuple[Tensor, Tensor]:
        a = goal - torch.as_tensor(values).to(rows) @ rows
        return a, ball.minimiser(a.view_as(ball.x), one, curvature)

    def cost(values: numpy.ndarray) -> tuple[float, numpy.ndarray]:
        _, point = at(values)
        held = rows @ point.flatten() + offsets
        added = curvature / 2 * (point - ball.x).square().sum()
        dual = goal @ point.flatten() + constant - torch.as_tensor(values).to(rows) @ held + added
        return -float(dual), held.numpy(force=True)

    def proved(intermediate_result: OptimizeResult) -> None:
        if -intermediate_result.fun > 2 * enough:
            raise StopIteration

    box = [(0, None)] * len(rows)
    start = numpy.zeros(len(rows))
    found = minimize(cost, start, jac=True, method="L-BFGS-B", bounds=box, callback=proved, options=ASCENT)
    return torch.as_tensor(found.x).to(rows), at(found.x)[1]


def _programmed(ball: Ball, program: Program) -> tuple[Tensor, Tensor]:
    """Return the multipliers (C,) and the solution (1, *shape) of the linear program that Linf and L1 balls give.

    Its variables are how far each value goes up and down, and by how much each constraint is broken.
    """
    goal, _, rows, offsets = program
    cost, above, limit = (part.numpy(force=True) for part in (goal, rows, offsets + rows @ ball.x.flatten()))
    count, values = above.shape
    up, down = (bound.flatten().numpy(force=True) for bound in (ball.high, -ball.low))
    above = numpy.hstack([-above, above, -numpy.eye(count)])
    if ball.norm is Norm.L1:
        above = numpy.vstack([above, numpy.repeat([1.0, 0.0], [2 * values, count])])
        limit = numpy.append(limit, ball.radius)
    scale = abs(cost).max() or 1.0
    costs = numpy.concatenate([cost / scale, -cost / scale, numpy.full(count, PENALTY)])
    most = numpy.concatenate([up, down, numpy.full(count, numpy.inf)])
    box = numpy.stack([numpy.zeros_like(most), most], 1)
    found = linprog(costs, A_ub=above, b_ub=limit, bounds=box, options=PROGRAM)
    if found.status != 0:
        return torch.zeros_like(offsets), ball.x
    move = torch.as_tensor(found.x[:values] - found.x[values : 2 * values]).to(ball.x)
    return torch.as_tensor(-scale * found.ineqlin.marginals[:count]).to(rows), ball.x + move.view_as(ball.x)


def _program(tree: Tree, leaf: Domains) -> Program:
    graph, planes = tree.problem.graph, Relaxation(tree.relaxed(leaf))
    one, shape = leaf.rival.new_zeros(1), tree.problem.ball.x[:1]

    def back(place: int, query: Tensor) -> tuple[Tensor, Tensor]:
        reached, constant = pull(graph, {place: query}, one, planes)
        a = reached[0] if 0 in reached else shape.new_zeros(len(query), *shape.shape[1:])
        return a.flatten(1), constant

    goal, constant = back(tree.problem.last, tree.problem.queries[leaf.rival])
    parts = []
    for kinks in tree.kinks:
        sign, node = leaf.sign[0, kinks.columns], graph.nodes[kinks.source]
        fixed = sign.nonzero().squeeze(1)
        if len(fixed):
            unit = shape.new_zeros(len(fixed), node.size)
            unit[torch.arange(len(fixed)), kinks.values[fixed]] = sign[fixed].to(unit)
            parts.append(back(kinks.source, unit.view(-1, *node.shape)))
    empty = shape.new_zeros(0, goal.shape[1]), shape.new_zeros(0)
    rows, offsets = (torch.cat(column) for column in zip(empty, *parts, strict=True))
    return goal[0], constant, rows, offsets
