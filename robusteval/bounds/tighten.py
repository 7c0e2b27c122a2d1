"""Bounds of inner values by passes backwards (CROWN), and a record of them that another can repeat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusteval.bounds.activations import Activation, Planes
from robusteval.bounds.alpha import Ascent, Chosen
from robusteval.bounds.backward import AnyPlanes, Relaxation, affine_stops, in_chunks, least, pull, relax
from robusteval.bounds.interval import Bounds, intervals
from robusteval.bounds.margins import BYTES, TENSORS, Problem
from robusteval.bounds.nodes import Affine
from robusteval.threat import Norm

BELOW, ABOVE = 1, 2
SIGNS = {BELOW: 1.0, ABOVE: -1.0}


@dataclass(frozen=True)
class Round:
    """Passes backwards for some values of one sample's node ``place``.

    ``sides`` (V,) says which bounds of each value were asked for: `BELOW`, `ABOVE`, both or (0) neither. ``chosen`` are
    the slopes of these queries, side by side in ascending order of values; without, they are those of CROWN.
    """

    place: int
    sides: Tensor
    chosen: Mapping[int, Chosen] | None = None


@dataclass(frozen=True)
class Tightened:
    """Bounds (N, *shape) of all nodes, and for each sample the rounds that suffice to find such again."""

    bounds: list[Bounds]
    rounds: list[list[Round]]


def tightened(problem: Problem, ascent: Ascent | None = None, worth: Mapping[int, Tensor] | None = None) -> Tightened:
    """Bound all nodes, those that feed a nonlinear node by passes backwards from there (CROWN).

    Only values whose bounds leave the activation undecided are asked for, of a node in ``worth`` only those that this
    mask (N, V) selects. With ``ascent``, slopes are chosen for each.
    """
    known: dict[int, Bounds] = {}
    rounds: list[list[Round]] = [[] for _ in problem.y]
    bounds = intervals(problem.graph, problem.ball)
    for source, kinked in _asked_for(problem).items():
        for choose in (None, ascent) if ascent else (None,):
            lower, upper = (bound.flatten(1) for bound in bounds[source])
            wanted = (lower < 0) & (upper > 0) if kinked else lower < upper
            if worth and source in worth:
                wanted &= worth[source]
            sides = torch.where(wanted, BELOW | ABOVE, 0).to(torch.uint8)
            known[source], chosen = asked(problem, bounds, source, sides, choose)
            if kinked and not choose:
                sides, known[source] = _needed(sides, known[source], bounds[source])
            bounds = intervals(problem.graph, problem.ball, known)
            for sample in sides.any(1).nonzero().flatten().tolist():
                rounds[sample].append(Round(source, sides[sample], chosen[sample] or None))
    return Tightened(bounds, rounds)


def worthwhile(problem: Problem, share: float) -> dict[int, Tensor]:
    """Return masks (N, V), by node, of the ``share`` of undecided values that cost the margins most.

    What one costs is by how much the upper plane of its activation, on intervals, lowers all margins not yet positive.
    """
    bounds = intervals(problem.graph, problem.ball)
    costs: dict[int, Tensor] = {}
    planes = relax(problem.graph, bounds)
    sources = {source for source, kinked in _asked_for(problem).items() if kinked}
    above = {
        place: known.high.clone().requires_grad_()
        for place, known in planes.items()
        if isinstance(known, Planes) and problem.graph.nodes[place].inputs[0] in sources
    }
    watched = {place: replace(planes[place], high=high) for place, high in above.items()}
    for rows in torch.split(torch.arange(len(problem.owner), device=problem.y.device), max(1, problem.fits // TENSORS)):
        with torch.enable_grad():
            queries, owner = {problem.last: problem.queries[rows]}, problem.owner[rows]
            reached, constant = pull(problem.graph, queries, owner, Relaxation({**planes, **watched}))
            low = least(reached, constant, owner, problem.ball)
            total = low[low <= 0].sum()
            grads = torch.autograd.grad(total, list(above.values()), allow_unused=True) if above else ()
        for (place, high), grad in zip(above.items(), grads, strict=True):
            if grad is not None:
                source = problem.graph.nodes[place].inputs[0]
                costs[source] = costs.get(source, torch.zeros(())) - (grad * high.detach()).flatten(1)
    if not costs:
        return {}
    both = torch.cat(list(costs.values()), 1)
    kept = (share * (both > 0).sum(1, keepdim=True)).ceil().long().clamp_min(1)
    least_kept = both.sort(1, descending=True).values.gather(1, kept - 1)
    return {source: (cost >= least_kept) & (cost > 0) for source, cost in costs.items()}


def _asked_for(problem: Problem) -> dict[int, bool]:
    """Return the nodes, in order, whose bounds passes backwards may improve, and whether only their signs matter."""
    found: dict[int, bool] = {}
    for node in problem.graph.nodes:
        if node.nonlinear and node.inputs[0] not in found and not _exact(problem, node.inputs[0]):
            found[node.inputs[0]] = isinstance(node.op, Activation) and node.op.leak is not None
    return found


def repeated(problem: Problem, rounds: Iterable[Round]) -> list[Bounds]:
    """Return the bounds (1, *shape) of all nodes that ``rounds`` give again for a problem of one sample."""
    known: dict[int, Bounds] = {}
    bounds = intervals(problem.graph, problem.ball)
    for one in rounds:
        known[one.place], _ = asked(problem, bounds, one.place, one.sides[None], chosen=one.chosen)
        bounds = intervals(problem.graph, problem.ball, known)
    return bounds


def _needed(sides: Tensor, found: Bounds, before: Bounds) -> tuple[Tensor, Bounds]:
    """Return ``sides`` (N, V) and the bounds ``found`` without what was not needed to know the sign of a value.

    Half as many passes can then find the same again, and an activation's planes are the same.
    """
    lower, upper = found
    needed = torch.where(lower >= 0, BELOW, torch.where(upper <= 0, ABOVE, BELOW | ABOVE)).to(torch.uint8)
    sides = sides & needed.flatten(1)
    below, above = ((sides & side).view_as(lower) > 0 for side in (BELOW, ABOVE))
    return sides, (torch.where(below, lower, before[0]), torch.where(above, upper, before[1]))


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


def asked(
    problem: Problem,
    bounds: list[Bounds],
    place: int,
    sides: Tensor,
    ascent: Ascent | None = None,
    chosen: Mapping[int, Chosen] | None = None,
) -> tuple[Bounds, list[dict[int, Chosen]]]:
    """Return ``bounds`` (N, *shape) of the node at ``place``, improved for the ``sides`` (N, V) of its values.

    The slopes of the queries are found by ``ascent`` and returned for each sample, or they are those ``chosen``, by
    side, for a problem of one sample; by default they are CROWN's.
    """
    lower, upper = (bound.flatten(1).clone() for bound in bounds[place])
    found: list[dict[int, Chosen]] = [{} for _ in sides]
    if not sides.any():
        return bounds[place], found
    planes, units = relax(problem.graph, bounds, problem.parallel), Units.of(problem, place)
    for side, sign in SIGNS.items():
        for sample in (sides & side).any(1).nonzero().flatten().tolist():
            values = (sides[sample] & side).nonzero().squeeze(1)
            given = chosen[side] if chosen else None
            low, own = _bound_values(problem, planes, units, sample, values, sign, ascent or given)
            known, bound = (lower, low) if side == BELOW else (upper, -low)
            better = torch.maximum if side == BELOW else torch.minimum
            known[sample, values] = bound if problem.parallel else better(known[sample, values], bound)
            if own:
                found[sample][side] = own
    shape = problem.graph.nodes[place].shape
    return (lower.view(-1, *shape), upper.view(-1, *shape)), found


def _bound_values(
    problem: Problem,
    planes: Mapping[int, AnyPlanes],
    units: Units,
    sample: int,
    values: Tensor,
    sign: float,
    choice: Ascent | Chosen | None,
) -> tuple[Tensor, Chosen | None]:
    """Return lower bounds (P,) of ``sign`` times single ``values`` (P,) of one sample, and the slopes an ascent chose.

    For one sample, as the planes are then the same for all queries at hand.
    """
    one = values.new_tensor([sample])
    found: list[Chosen] = []

    def bound(rows: slice) -> Tensor:
        queries, offset = units.take(values[rows], sign)
        owner = one.expand(len(offset))
        if isinstance(choice, Ascent):
            stable = -offset  # beyond 0 nothing is to be gained
            low, slopes = choice(problem.graph, problem.ball, queries, owner, planes, stable)
            found.append(Chosen.of(planes, sample, slopes))
            return low + offset
        own = choice.take(rows).spread(problem.graph, planes, owner) if choice else {}
        reached, constant = pull(problem.graph, queries, owner if own else one, Relaxation(planes, own))
        return least(reached, constant + offset, one, problem.ball)

    low = in_chunks(len(values), max(1, problem.fits // TENSORS) if choice else problem.chunk, bound)
    return low, Chosen.joined(found) if found else None


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
        """Return the queries for every value of the node at ``place``, which the problem keeps if they are small."""
        if place not in problem.units:
            units = cls._pulled(problem, place)
            if units.size + sum(kept.size for kept in problem.units.values()) > problem.memory // (4 * BYTES):
                return units
            problem.units[place] = units
        kept: Units = problem.units[place]
        return kept

    @property
    def size(self) -> int:
        """Numbers held."""
        return sum(rows.numel() for rows in self.rows.values())

    @classmethod
    def _pulled(cls, problem: Problem, place: int) -> Units:
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
