"""Lower bounds of a classifier's margins over a ball of inputs, cheap ones first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robusteval.bounds.activations import Activation
from robusteval.bounds.alpha import Ascent
from robusteval.bounds.backward import Relaxation, affine_stops, in_chunks, least, pull, relax
from robusteval.bounds.ball import Ball
from robusteval.bounds.interval import Bounds, intervals
from robusteval.bounds.nodes import Affine, Graph
from robusteval.errors import RobustevalError
from robusteval.threat import Norm

BYTES = 8
ENOUGH = 1e-4
"""A margin, relative to the logits, beyond which no better bound is looked for."""

TENSORS = 8
"""Tensors of a node's size that a query needs at once: coefficients before and after, planes, autograd's copies."""


class MemoryBudgetError(RobustevalError):
    """Not even one query fits into the memory allowed."""


@dataclass(frozen=True)
class Problem:
    """``margins[n, j] = z_y - z_k`` of each sample for its K - 1 other classes, over a ball.

    ``memory`` is how many bytes the queries of one step may take. ``parallel`` is Fast-Lin as published: lower planes
    parallel to the upper ones, and bounds of undecided values by them alone, not cut with intervals.
    """

    graph: Graph
    ball: Ball
    y: Tensor
    memory: int = 2**31
    parallel: bool = False

    @property
    def last(self) -> int:
        """The place of the logits."""
        return len(self.graph.nodes) - 1

    @cached_property
    def queries(self) -> Tensor:
        """The rows ``e_y - e_k`` (N (K - 1), K)."""
        classes = self.graph.nodes[-1].size
        eye = torch.eye(classes, dtype=self.ball.x.dtype, device=self.y.device)
        rivals = torch.arange(classes, device=self.y.device).expand(len(self.y), classes)
        rivals = rivals[rivals != self.y[:, None]].view(len(self.y), classes - 1)
        return (eye[self.y][:, None] - eye[rivals]).flatten(0, 1)

    @cached_property
    def owner(self) -> Tensor:
        """The sample (N (K - 1),) of each query."""
        return torch.arange(len(self.y), device=self.y.device).repeat_interleave(self.graph.nodes[-1].size - 1)

    @cached_property
    def chunk(self) -> int:
        """How many queries fit into the memory allowed."""
        largest = max(node.size for node in self.graph.nodes)
        fits = self.memory // (TENSORS * largest * BYTES)
        if fits < 1:
            raise MemoryBudgetError(f"memory: one query needs {TENSORS * largest * BYTES / 2**20:.0f} MiB")
        return fits

    def shaped(self, values: Tensor) -> Tensor:
        """Return values of all queries as (N, K - 1)."""
        return values.view(len(self.y), -1)


def interval_margins(problem: Problem, bounds: list[Bounds]) -> Tensor:
    """Return margins (N, K - 1) from intervals: the last affine maps are folded into the queries."""
    stops, queries = affine_stops(problem.graph), {problem.last: problem.queries}
    reached, constant = pull(problem.graph, queries, problem.owner, Relaxation({}), stops)
    return problem.shaped(least(reached, constant, problem.owner, problem.ball, bounds))


def linear_margins(problem: Problem, bounds: list[Bounds]) -> Tensor:
    """Return margins (N, K - 1) from a full pass backwards on the planes that ``bounds`` give."""
    relaxation = Relaxation(relax(problem.graph, bounds, problem.parallel))

    def bound(rows: slice) -> Tensor:
        owner = problem.owner[rows]
        reached, constant = pull(problem.graph, {problem.last: problem.queries[rows]}, owner, relaxation)
        return least(reached, constant, owner, problem.ball)

    return problem.shaped(in_chunks(len(problem.owner), problem.chunk, bound))


def optimised_margins(problem: Problem, bounds: list[Bounds], ascent: Ascent, margins: Tensor) -> Tensor:
    """Return ``margins`` (N, K - 1), improved by choosing slopes for each that is not clearly positive."""
    planes = relax(problem.graph, bounds, problem.parallel)
    size = problem.graph(problem.ball.x).abs().amax(1)
    enough = (ENOUGH * (1 + size))[problem.owner]
    best = margins.flatten().clone()
    left = (best <= enough).nonzero().squeeze(1)

    def bound(rows: slice) -> Tensor:
        few = left[rows]
        queries = {problem.last: problem.queries[few]}
        return ascent(problem.graph, problem.ball, queries, problem.owner[few], planes, enough[few])

    if len(left):
        best[left] = torch.maximum(best[left], in_chunks(len(left), max(1, problem.chunk // TENSORS), bound))
    return problem.shaped(best)


def tightened(problem: Problem, ascent: Ascent | None = None) -> list[Bounds]:
    """Return bounds of all nodes, those that feed a nonlinear node by passes backwards from there (CROWN).

    Only values whose bounds leave the activation undecided are asked for. With ``ascent``, slopes are chosen for each.
    """
    known: dict[int, Bounds] = {}
    bounds = intervals(problem.graph, problem.ball)
    for node in problem.graph.nodes:
        if not node.nonlinear or node.inputs[0] in known or _exact(problem, node.inputs[0]):
            continue
        source = node.inputs[0]
        kinked = isinstance(node.op, Activation) and node.op.leak is not None
        for choose in (None, ascent) if ascent else (None,):
            known[source] = _tighten(problem, bounds, source, kinked, choose)
            bounds = intervals(problem.graph, problem.ball, known)
    return bounds


def _exact(problem: Problem, place: int) -> bool:
    """Whether intervals are exact there already: at most one mixing map away from a box."""
    mixing = 0
    while place != 0:
        node = problem.graph.nodes[place]
        if not isinstance(node.op, Affine) or len(node.inputs) != 1:
            return False
        mixing += node.op.mixing
        place = node.inputs[0]
    return mixing <= 1 and problem.ball.norm is Norm.LINF


def _tighten(problem: Problem, bounds: list[Bounds], place: int, kinked: bool, ascent: Ascent | None) -> Bounds:
    lower, upper = (bound.flatten(1).clone() for bound in bounds[place])
    wanted = (lower < 0) & (upper > 0) if kinked else lower < upper
    owner, value = wanted.nonzero(as_tuple=True)
    if len(owner):
        relaxation = Relaxation(relax(problem.graph, bounds, problem.parallel))
        low, high = (_bound_values(problem, relaxation, place, owner, value, sign, ascent) for sign in (1.0, -1.0))
        known = (lower[owner, value], upper[owner, value])
        lower[owner, value] = low if problem.parallel else torch.maximum(known[0], low)
        upper[owner, value] = -high if problem.parallel else torch.minimum(known[1], -high)
    shape = problem.graph.nodes[place].shape
    return lower.view(-1, *shape), upper.view(-1, *shape)


def _bound_values(
    problem: Problem,
    relaxation: Relaxation,
    place: int,
    owner: Tensor,
    value: Tensor,
    sign: float,
    ascent: Ascent | None,
) -> Tensor:
    """Return lower bounds (P,) of ``sign`` times single values of a node; ``owner`` ascends.

    Sample by sample, as the planes are then the same for all queries at hand.
    """
    found: list[Tensor] = []
    units = Units.of(problem, place)
    for sample in torch.unique(owner).tolist():
        own, one = value[owner == sample], owner.new_tensor([sample])

        def bound(rows: slice, own: Tensor = own, one: Tensor = one) -> Tensor:
            queries, offset = units.take(own[rows], sign)
            if ascent:
                stable = -offset  # beyond 0 nothing is to be gained
                found = ascent(problem.graph, problem.ball, queries, one.expand(len(offset)), relaxation.planes, stable)
                return found + offset
            reached, constant = pull(problem.graph, queries, one, relaxation)
            return least(reached, constant + offset, one, problem.ball)

        found.append(in_chunks(len(own), max(1, problem.chunk // (TENSORS if ascent else 1)), bound))
    return torch.cat(found)


@dataclass(frozen=True)
class Units:
    """Queries for single values of a node: where memory allows, pulled back as far as affine maps reach.

    That much is the same for every sample. ``rows`` (V, *shape) by node and ``offset`` (V,) are for all V values.
    """

    place: int
    shape: tuple[int, ...]
    rows: dict[int, Tensor]
    offset: Tensor

    @classmethod
    def of(cls, problem: Problem, place: int) -> Units:
        """Return the queries for every value of the node at ``place``."""
        graph, node = problem.graph, problem.graph.nodes[place]
        stops, values = affine_stops(graph), torch.arange(node.size, device=problem.y.device)
        plain = cls(place, node.shape, {}, torch.zeros(node.size, dtype=problem.ball.x.dtype, device=values.device))
        if node.size * sum(graph.nodes[stop].size for stop in stops if stop < place) > problem.memory // (2 * BYTES):
            return plain
        parts = [plain.take(part, 1.0) for part in torch.split(values, problem.chunk)]
        pulled = [pull(graph, queries, values[:1], Relaxation({}), stops) for queries, _ in parts]
        rows = {stop: torch.cat([reached[stop] for reached, _ in pulled]) for stop in pulled[0][0]}
        return cls(place, node.shape, rows, torch.cat([constant for _, constant in pulled]))

    def take(self, values: Tensor, sign: float) -> tuple[dict[int, Tensor], Tensor]:
        """Return the queries for ``sign`` times some ``values`` (P,), and their constants (P,)."""
        if self.rows:
            return {stop: sign * rows[values] for stop, rows in self.rows.items()}, sign * self.offset[values]
        unit = self.offset.new_zeros(len(values), len(self.offset))
        unit[torch.arange(len(values), device=values.device), values] = sign
        return {self.place: unit.view(-1, *self.shape)}, self.offset[values]
