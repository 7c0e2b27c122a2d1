"""A proof that another can check: how the bounds of one sample's margins were found, without the search for them.

Whatever stands in a proof, what `holds` confirms is true: what is no slope, side or multiplier is refused, and the
parts of a search must cover the ball. So a proof may come from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robusteval.bounds.alpha import Chosen
from robusteval.bounds.domains import LARGEST, Domains, Leaves, kinks_of
from robusteval.bounds.first import mixed_margins
from robusteval.bounds.margins import Problem, chosen_margins, linear_margins
from robusteval.bounds.tighten import ABOVE, BELOW, SIGNS, Round, repeated
from robusteval.bounds.tree import Tree

MOST_ROUNDS = 2
"""How often a search passes backwards from a node: with CROWN's slopes, and with slopes of its own."""

_PLACE = r"(0|[1-9]\d{0,5})"
_SLOPES = rf"(chosen|round\.{_PLACE}\.{_PLACE}\.[12])"
_MOST = 2**31 - 1
FORMS: tuple[tuple[str, torch.dtype, float, float], ...] = (
    (r"rivals|leaves\.rival", torch.int32, 0, _MOST),
    (rf"kinks\.{_PLACE}", torch.int32, 0, _MOST),
    (rf"{_SLOPES}\.columns\.{_PLACE}", torch.int32, 0, _MOST),
    (rf"{_SLOPES}\.slopes\.{_PLACE}", torch.float16, 0, 1),
    (rf"round\.{_PLACE}\.{_PLACE}", torch.uint8, 0, BELOW | ABOVE),
    (r"leaves\.sign", torch.int8, -1, 1),
    (r"leaves\.value", torch.float16, 0, LARGEST),
)
"""Names of the tensors of a proof, with their types and the least and largest values."""

DISTINCT = frozenset(pattern for pattern, *_ in FORMS[1:3])


@dataclass(frozen=True)
class Proof:
    """How one sample's margins were bounded: first inner values in ``rounds``, then the margins.

    Those over the classes ``rivals`` (R,) by ``chosen`` slopes, those in ``leaves`` part by part, at the kinks of
    ``values`` by node; all others by CROWN's slopes.
    """

    rounds: Sequence[Round]
    rivals: Tensor
    chosen: Chosen | None = None
    values: Mapping[int, Tensor] = field(default_factory=dict)
    leaves: Leaves | None = None


def holds(problem: Problem, proof: Proof, enough: float) -> bool:
    """Say whether ``proof`` shows that all margins of a problem of one sample exceed ``enough``.

    Raises `LookupError`, `ValueError`, `TypeError` or `RuntimeError` where it does not fit the network.
    """
    if len(proof.rounds) > MOST_ROUNDS * len(problem.graph.nodes):
        raise ValueError("more rounds than any search takes")
    bounds = repeated(problem, proof.rounds)
    margins = linear_margins(problem, bounds)[0]
    if not (margins > enough).all():
        margins = torch.maximum(margins, mixed_margins(problem)[0])
    if proof.chosen:
        better = chosen_margins(problem, bounds, proof.rivals, proof.chosen)
        margins[proof.rivals] = torch.maximum(margins[proof.rivals], better)
    proved = margins > enough
    if proof.leaves:
        tree = Tree(problem, bounds, kinks_of(problem.graph, proof.values))
        low = torch.cat([tree.low(part) for part in _parts(proof.leaves.domains(tree.leak), tree.batch)])
        for rival in torch.unique(proof.leaves.rival).tolist():
            own = proof.leaves.rival == rival
            proved[rival] |= bool((low[own] > enough).all()) and covers(proof.leaves.sign[own])
    return bool(proved.all())


def _parts(domains: Domains, size: int) -> list[Domains]:
    return [domains.take(slice(first, first + size)) for first in range(0, len(domains), size)]


def covers(sign: Tensor) -> bool:
    """Say whether parts with these signs (L, U) leave nothing of the ball out, as the leaves of a tree do not.

    All leaves of a tree fix the kink at its root; each half of the ball is then left to those of its side.
    """
    pending = [sign]
    while pending:
        part = pending.pop()
        if (part == 0).all(1).any():
            continue
        common = (part != 0).all(0).nonzero().flatten()
        if not len(part) or not len(common):
            return False
        side, rest = part[:, common[0]], part.clone()
        rest[:, common[0]] = 0
        pending += [rest[side > 0], rest[side < 0]]
    return True


def packed(proof: Proof) -> dict[str, Tensor]:
    """Return ``proof`` as tensors by name; `unpacked` gives it back."""
    found = {"rivals": proof.rivals.int()}
    for number, one in enumerate(proof.rounds):
        found[f"round.{number}.{one.place}"] = one.sides
        for side, chosen in (one.chosen or {}).items():
            found |= _packed_slopes(f"round.{number}.{one.place}.{side}", chosen)
    if proof.chosen:
        found |= _packed_slopes("chosen", proof.chosen)
    found |= {f"kinks.{source}": values.int() for source, values in proof.values.items()}
    if proof.leaves:
        found |= {"leaves.rival": proof.leaves.rival.int(), "leaves.sign": proof.leaves.sign}
        found["leaves.value"] = proof.leaves.value
    return found


def _packed_slopes(name: str, chosen: Chosen) -> dict[str, Tensor]:
    found = {}
    for place, columns in chosen.columns.items():
        found[f"{name}.columns.{place}"] = columns.int()
        found[f"{name}.slopes.{place}"] = chosen.slopes[place]
    return found


def unpacked(tensors: Mapping[str, Tensor]) -> Proof:
    """Return the proof that `packed` made; raise `LookupError` or `ValueError` for anything else."""
    for name, value in tensors.items():
        _check(name, value)
    named = (re.fullmatch(r"round\.(\d+)\.(\d+)", name) for name in tensors)
    numbered = sorted((int(found[1]), int(found[2]), found[0]) for found in named if found)
    rounds = []
    for _, place, name in numbered:
        chosen = {side: _unpacked_slopes(f"{name}.{side}", tensors) for side in SIGNS}
        rounds.append(Round(place, tensors[name], chosen if any(one.columns for one in chosen.values()) else None))
    slopes = _unpacked_slopes("chosen", tensors)
    values = {int(name.split(".")[1]): tensors[name].long() for name in tensors if name.startswith("kinks.")}
    leaves = None
    if "leaves.rival" in tensors:
        leaves = Leaves(tensors["leaves.rival"].long(), tensors["leaves.sign"], tensors["leaves.value"])
    return Proof(rounds, tensors["rivals"].long(), slopes if slopes.columns else None, values, leaves)


def _unpacked_slopes(name: str, tensors: Mapping[str, Tensor]) -> Chosen:
    start = f"{name}.columns."
    places = [int(key.removeprefix(start)) for key in tensors if key.startswith(start)]
    columns = {place: tensors[f"{start}{place}"].long() for place in places}
    return Chosen(columns, {place: tensors[f"{name}.slopes.{place}"] for place in places})


def _check(name: str, value: Tensor) -> None:
    """Raise `ValueError` for a tensor that `packed` never makes."""
    for pattern, kind, low, high in FORMS:
        if re.fullmatch(pattern, name):
            good = value.dtype is kind and bool(((value >= low) & (value <= high)).all())
            twice = pattern in DISTINCT and len(torch.unique(value)) < value.numel()
            if good and not twice:
                return
    raise ValueError(f"'{name}' is not as in a proof")
