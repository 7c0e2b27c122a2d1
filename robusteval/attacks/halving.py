"""Targeted Auto-PGD by successive halving: every target is tried, the promising ones longer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from robusteval.attacks._apgd_steps import AnyClimb, Loss, begin, checkpoints, join, parts_of
from robusteval.attacks._finds import Finds
from robusteval.attacks._losses import targeted
from robusteval.attacks._nearness import is_near
from robusteval.attacks.base import AttackResult
from robusteval.rng import SampleRng
from robusteval.threat import Norm, ThreatModel

ROWS, HELD = 250, 2000
"""How many climbs run at once (more need memory, fewer leave a device idle), and how many are held, of whole inputs."""


@dataclass(frozen=True)
class Halving:
    """Auto-PGD towards many classes at once, of which the least promising are given up on the way.

    Each input starts one climb towards each of its ``targets`` most likely wrong classes from each of ``restarts``
    random points, of which more begin with those of fewer. After the steps that ``keep`` names, only so many of an
    input's climbs go on: those whose loss is largest (successive halving, Jamieson & Talwalkar 2016, arXiv 1502.07943,
    over the targets of APGD-T, Croce & Hein 2020, arXiv 2003.01690). A climb's own steps are those of Auto-PGD with
    ``steps`` in all. An input leaves, with all its climbs, as soon as one has it misclassified within ``threat``. With
    ``reach`` it also leaves, after the last of ``keep``, if what is left of its margin is at least ``reach`` times what
    it lost so far, unless it hardly moved (`_nearness.is_near`).
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"steps": 30, "targets": 4, "keep": [[5, 2], [10, 1]]},
        {"steps": 20, "targets": 2, "keep": [], "loss": "dlr"},
        {"steps": 20, "targets": 3, "keep": [[5, 1]], "reach": 0.5},
        {"steps": 20, "targets": 2, "restarts": 3, "keep": [[5, 2]]},
    )

    steps: int = 100
    targets: int = 9
    restarts: int = 1
    keep: tuple[tuple[int, int], ...] = ((10, 3), (30, 1))
    reach: float | None = None
    loss: Literal["margin", "dlr"] = "margin"
    rho: float = 0.75
    momentum: float = 0.75

    def __post_init__(self) -> None:
        places, counts = (
            [place for place, _ in self.keep],
            [self.targets * self.restarts, *(count for _, count in self.keep)],
        )
        if self.steps < 1 or self.targets < 1 or self.restarts < 1:
            raise ValueError("halving needs steps >= 1, targets >= 1 and restarts >= 1")
        if places != sorted(set(places)) or any(not 0 < place < self.steps for place in places):
            raise ValueError(f"halving keeps fewer climbs after ascending numbers of steps below {self.steps}")
        if counts != sorted(counts, reverse=True) or min(counts) < 1:
            raise ValueError(f"halving keeps ever fewer of {counts[0]} climbs, and at least 1")
        if self.reach is not None and not (self.keep and self.reach > 0):
            raise ValueError("halving needs reach > 0, and a place in keep after which to ask")
        if not 0 <= self.rho <= 1 or not 0 < self.momentum <= 1:
            raise ValueError("halving needs rho in [0, 1] and momentum in (0, 1]")

    def supports(self, threat: ThreatModel) -> bool:
        """Linf and L2."""
        return threat.norm in (Norm.LINF, Norm.L2)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return, per input, the first misclassified point met, else the point of largest margin."""
        with torch.no_grad():
            logits = model(x)
        finds = Finds(x, logits.argmax(1) != y)
        count = min(self.targets, logits.shape[1] - 1)
        loss, adaptations = targeted(self.loss, self.targets, logits.shape[1])
        left, each = finds.left(), count * self.restarts
        for rows in left.tensor_split(parts_of(len(left), HELD // each)):
            if len(rows):
                begun = self._begin(logits[rows], x[rows], y[rows], threat, rng.take(rows), count)
                self._climb(model, loss, replace(begun, rows=rows[begun.rows]), each, logits, threat, finds)
        return AttackResult(threat.hold(x, finds.points), tuple(adaptations))

    def _climb(
        self,
        model: nn.Module,
        loss: Loss,
        climb: AnyClimb,
        count: int,
        logits: Tensor,
        threat: ThreatModel,
        finds: Finds,
    ) -> None:
        """Let the climbs of some inputs, ``count`` each, compete; ``logits`` (N, K) are those of all clean inputs."""
        for first, last, kept in self._rounds():
            if len(climb.rows) == 0:
                break
            parts = climb.parts(count, ROWS)
            climb = join([self._climbed(model, loss, part, threat, finds, range(first, last)) for part in parts])
            climb, count = climb.keep(leading(climb.rows, climb.best_value, kept)), min(count, kept)
            if self.reach is not None and last == self.keep[-1][0]:
                _offer(climb, finds)
                clean = -loss(logits[climb.rows].double(), climb.y, climb.target)
                near = is_near(clean, -climb.best_value, self.reach)
                climb = climb.keep(torch.isin(climb.rows, climb.rows[near]))
        _offer(climb, finds)

    def _begin(self, logits: Tensor, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng, count: int) -> AnyClimb:
        """Return climbs towards ``count`` classes from every start for each input, next to each other."""
        wrong = logits.scatter(1, y[:, None], -torch.inf).sort(dim=1, descending=True, stable=True).indices
        places = torch.arange(len(x), device=x.device).repeat_interleave(count * self.restarts)
        drawn = [rng.draw(threat.sample, x, "halving", self.loss, start) for start in range(self.restarts)]
        point = torch.stack(drawn, dim=1).repeat_interleave(count, dim=1).flatten(0, 1)
        target = wrong[:, :count].repeat(1, self.restarts).flatten()
        return begin(threat, places, x[places], y[places], target, point, fresh=True)

    def _rounds(self) -> Iterator[tuple[int, int, int]]:
        """Yield between which steps a round climbs, and how many of an input's climbs outlast it."""
        first = 0
        for place, count in (*self.keep, (self.steps + 1, 1)):
            yield first, place, count
            first = place

    def _climbed(
        self, model: nn.Module, loss: Loss, climb: AnyClimb, threat: ThreatModel, finds: Finds, steps: range
    ) -> AnyClimb:
        """Return the climbs of the inputs left."""
        looks = [0, *checkpoints(threat.norm, self.steps)]
        for step in steps:
            wrong = climb.look(model, loss, slope=step < self.steps)
            if wrong.any():
                broken, point, value = climb.rows[wrong], climb.point[wrong], climb.value[wrong]
                best = leading(broken, value, 1)
                finds.breaks(broken[best], point[best])
                climb = climb.keep(~torch.isin(climb.rows, broken))
                if len(climb.rows) == 0:
                    break
            if step in looks[1:]:
                climb.check(threat, self.rho, step - looks[looks.index(step) - 1])
            if step < self.steps:
                climb.move(threat, self.momentum if step else 1.0)
        return climb


def _offer(climb: AnyClimb, finds: Finds) -> None:
    """Offer the best climb of each input."""
    best = climb.keep(leading(climb.rows, climb.best_value, 1))
    finds.offer(best.rows, best.best, best.best_value)


def leading(rows: Tensor, values: Tensor, count: int) -> Tensor:
    """Return a mask (n,) of the ``count`` largest ``values`` (n,) of each of ``rows`` (n,), the earlier of equals."""
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    grouped, place = rows[order], torch.arange(len(rows), device=rows.device)
    first = torch.ones_like(grouped, dtype=torch.bool)
    first[1:] = grouped[1:] != grouped[:-1]
    rank = place - torch.where(first, place, 0).cummax(0).values
    return torch.zeros_like(first).scatter(0, order, rank < count)
