"""Parts of one sample's ball, on which the signs of some activations' arguments are fixed.

Bounds there are those of beta-CROWN (Wang et al. 2021, arXiv 2103.06624): a kink whose side is known is linear, and
each such constraint has a multiplier of at least 0. All slopes and multipliers give sound bounds; good ones are sought.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusteval.bounds.activations import Activation, Planes
from robusteval.bounds.alpha import undecided_kinks
from robusteval.bounds.backward import AnyPlanes, relax
from robusteval.bounds.interval import Bounds
from robusteval.bounds.nodes import Graph

LARGEST = 4096.0
"""The largest multiplier that is kept in a proof, so that what float64 rounds stays far below the tolerance."""


@dataclass(frozen=True)
class Domains:
    """D parts of one sample's ball, each with the margin over one class that is to be bounded there.

    ``rival`` (D,) is the row of the problem's queries. For each of the tree's U kinks, ``sign`` (D, U) is 1 or -1 where
    the argument's sign is fixed and else 0, ``slope`` the lower slope and ``push`` the multiplier. ``low`` (D,) are
    lower bounds of the margins.
    """

    rival: Tensor
    sign: Tensor
    slope: Tensor
    push: Tensor
    low: Tensor

    def __len__(self) -> int:
        return len(self.rival)

    def take(self, rows: Tensor | slice) -> Domains:
        """Return the domains at ``rows``."""
        return Domains(self.rival[rows], self.sign[rows], self.slope[rows], self.push[rows], self.low[rows])

    def split(self, kink: Tensor) -> Domains:
        """Return both halves of each domain, at its ``kink`` (D,): those where the argument is positive first."""
        halves = []
        for side in (1, -1):
            sign = self.sign.scatter(1, kink[:, None], side)
            halves.append(replace(self, sign=sign))
        return joined(halves)


def joined(parts: list[Domains]) -> Domains:
    """Return all domains of ``parts`` in order."""
    columns = zip(*((part.rival, part.sign, part.slope, part.push, part.low) for part in parts), strict=True)
    return Domains(*(torch.cat(column) for column in columns))


@dataclass(frozen=True)
class Leaves:
    """L parts of the ball on which a search proved the margin over class ``rival`` (L,), in half precision.

    ``sign`` (L, U) are the sides of the U kinks, 0 where both are in; ``value`` (L, U) is there the lower slope, and
    elsewhere the multiplier of the side.
    """

    rival: Tensor
    sign: Tensor
    value: Tensor

    @classmethod
    def of(cls, domains: Domains) -> Leaves:
        """Keep of ``domains`` what is needed to bound them again."""
        value = torch.where(domains.sign == 0, domains.slope, domains.push.clamp_max(LARGEST))
        return cls(domains.rival, domains.sign, value.half())

    def domains(self, leak: Tensor) -> Domains:
        """Return the parts, with nothing known of their margins; ``leak`` (U,) is the least slope of each kink."""
        value = self.value.to(leak)
        slope, push = torch.maximum(value, leak).clamp_max(1.0), torch.relu(value) * (self.sign != 0)
        return Domains(self.rival, self.sign, slope, push, leak.new_full((len(value),), -torch.inf))

    @classmethod
    def joined(cls, parts: list[Leaves]) -> Leaves:
        """Return all of ``parts`` in order."""
        columns = zip(*((part.rival, part.sign, part.value) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))


@dataclass(frozen=True)
class Kinks:
    """Values of one node, the argument of the activations ``places``, that may have either sign.

    ``values`` are their places in the node (flat), ``columns`` those among all U; ``leak`` is the smallest lower slope
    that is sound for all of these activations.
    """

    source: int
    places: tuple[int, ...]
    values: Tensor
    columns: slice
    leak: float


def undecided(graph: Graph, bounds: list[Bounds]) -> dict[int, Tensor]:
    """Return, by node whose values have kinks, those values (flat) of one sample whose sign ``bounds`` leave open."""
    planes, found = relax(graph, bounds), {}
    for source, places in _kinked(graph).items():
        open_ = torch.stack([undecided_kinks(planes_at(planes, place)) for place in places]).all(0)
        values = open_.flatten().nonzero().squeeze(1)
        if len(values):
            found[source] = values
    return found


def kinks_of(graph: Graph, values: Mapping[int, Tensor]) -> tuple[Kinks, ...]:
    """Return the kinks at ``values``, by node; raise `KeyError` for a node whose values have none."""
    found, first, kinked = [], 0, _kinked(graph)
    for source, own in values.items():
        places = tuple(kinked[source])
        leak = max(float(graph.nodes[place].op.leak) for place in places)  # type: ignore[union-attr, arg-type]
        found.append(Kinks(source, places, own, slice(first, first + len(own)), leak))
        first += len(own)
    return tuple(found)


def _kinked(graph: Graph) -> dict[int, list[int]]:
    """Return, by node, the activations with a kink whose argument it is."""
    found: dict[int, list[int]] = {}
    for place, node in enumerate(graph.nodes):
        if isinstance(node.op, Activation) and node.op.leak is not None:
            found.setdefault(node.inputs[0], []).append(place)
    return found


def planes_at(planes: dict[int, AnyPlanes], place: int) -> Planes:
    """Return the planes of an activation."""
    found = planes[place]
    assert isinstance(found, Planes)
    return found
