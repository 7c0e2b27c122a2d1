"""Lower bounds of a classifier's margins over a ball of inputs, cheap ones first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robusteval.bounds.alpha import Ascent, Chosen
from robusteval.bounds.backward import Relaxation, affine_stops, in_chunks, least, pull, relax
from robusteval.bounds.ball import Ball
from robusteval.bounds.interval import Bounds
from robusteval.bounds.nodes import Graph
from robusteval.errors import RobustevalError

BYTES = 8
ENOUGH = 1e-4
"""A margin, relative to the logits, beyond which no better bound is looked for."""

TENSORS = 8
"""Tensors of a node's size that a query needs at once: coefficients before and after, planes, autograd's copies."""

REUSED = 2**23
"""Bytes of a tensor up to which C allocators hand out memory in use before: larger ones come page by page, zeroed."""


class MemoryBudgetError(RobustevalError):
    """Not even one query fits into the memory allowed."""


@dataclass(frozen=True)
class Problem:
    """``margins[n, j] = z_y - z_k`` of each sample for its K - 1 other classes, over a ball.

    ``memory`` is how many bytes the queries of one step may take. ``parallel`` is Fast-Lin as published: lower planes
    parallel to the upper ones, and bounds of undecided values by them alone, not cut with intervals. ``units`` keeps
    what is the same for all problems about ``graph`` that are taken from this one.
    """

    graph: Graph
    ball: Ball
    y: Tensor
    memory: int = 2**31
    parallel: bool = False
    units: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)

    def take(self, row: int | Tensor) -> Problem:
        """Return the problem of one sample, or of those at the places ``row``."""
        rows = row if isinstance(row, Tensor) else torch.tensor([row], device=self.y.device)
        return replace(self, ball=self.ball.take(rows), y=self.y[rows])

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
    def fits(self) -> int:
        """How many queries fit into the memory allowed."""
        fits = self.memory // (TENSORS * self._query)
        if fits < 1:
            raise MemoryBudgetError(f"memory: one query needs {TENSORS * self._query / 2**20:.0f} MiB")
        return fits

    @property
    def chunk(self) -> int:
        """How many queries to ask at once where nothing is kept for a gradient."""
        return self.fits if self.y.is_cuda else min(self.fits, max(1, REUSED // self._query))

    @cached_property
    def _query(self) -> int:
        """The largest tensor of one query, in bytes."""
        return max(node.size for node in self.graph.nodes) * BYTES

    def shaped(self, values: Tensor) -> Tensor:
        """Return values of all queries as (N, K - 1)."""
        return values.view(len(self.y), -1)


def interval_margins(problem: Problem, bounds: list[Bounds]) -> Tensor:
    """Return margins (N, K - 1) from intervals: the last affine maps are folded into the queries."""
    stops = affine_stops(problem.graph)

    def bound(rows: slice) -> Tensor:
        owner = problem.owner[rows]
        reached, constant = pull(problem.graph, {problem.last: problem.queries[rows]}, owner, Relaxation({}), stops)
        return least(reached, constant, owner, problem.ball, bounds)

    return problem.shaped(in_chunks(len(problem.owner), problem.chunk, bound))


def linear_margins(problem: Problem, bounds: list[Bounds]) -> Tensor:
    """Return margins (N, K - 1) from a full pass backwards on the planes that ``bounds`` give."""
    relaxation = Relaxation(relax(problem.graph, bounds, problem.parallel))

    def bound(rows: slice) -> Tensor:
        owner = problem.owner[rows]
        reached, constant = pull(problem.graph, {problem.last: problem.queries[rows]}, owner, relaxation)
        return least(reached, constant, owner, problem.ball)

    return problem.shaped(in_chunks(len(problem.owner), problem.chunk, bound))


def optimised_margins(
    problem: Problem, bounds: list[Bounds], ascent: Ascent, margins: Tensor
) -> tuple[Tensor, list[dict[int, Chosen]]]:
    """Return ``margins`` (N, K - 1), improved by choosing slopes for each that is not clearly positive.

    Also, for each sample and class whose margin was improved, these slopes.
    """
    planes = relax(problem.graph, bounds, problem.parallel)
    size = problem.graph(problem.ball.x).abs().amax(1)
    enough = (ENOUGH * (1 + size))[problem.owner]
    best = margins.flatten().clone()
    left = (best <= enough).nonzero().squeeze(1)
    found: list[dict[int, Chosen]] = [{} for _ in problem.y]
    for few in torch.split(left, max(1, problem.fits // TENSORS)):
        queries, owner = {problem.last: problem.queries[few]}, problem.owner[few]
        low, slopes = ascent(problem.graph, problem.ball, queries, owner, planes, enough[few])
        for row in (low > best[few]).nonzero().flatten().tolist():
            sample, own = int(owner[row]), {place: slope[row : row + 1] for place, slope in slopes.items()}
            found[sample][int(few[row]) % margins.shape[1]] = Chosen.of(planes, sample, own)
        best[few] = torch.maximum(best[few], low)
    return problem.shaped(best), found


def chosen_margins(problem: Problem, bounds: list[Bounds], rivals: Tensor, chosen: Chosen) -> Tensor:
    """Return the margins (R,) over the classes ``rivals`` (R,) that ``chosen`` slopes give for one sample."""
    planes, owner = relax(problem.graph, bounds), torch.zeros_like(rivals)

    def bound(rows: slice) -> Tensor:
        own = chosen.take(rows).spread(problem.graph, planes, owner[rows])
        queries = {problem.last: problem.queries[rivals[rows]]}
        reached, constant = pull(problem.graph, queries, owner[rows], Relaxation(planes, own))
        return least(reached, constant, owner[rows], problem.ball)

    return in_chunks(len(rivals), problem.chunk, bound)
