"""The search tree of one sample: bounds on any parts of its ball (beta-CROWN, Wang et al. 2021, arXiv 2103.06624)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from robusteval.bounds.alpha import adam
from robusteval.bounds.backward import AnyPlanes, Relaxation, least, pull, relax
from robusteval.bounds.ball import Ball
from robusteval.bounds.domains import Domains, Kinks, kinks_of, planes_at, undecided
from robusteval.bounds.interval import Bounds
from robusteval.bounds.margins import BYTES, MemoryBudgetError, Problem

COPIES = 16
"""Tensors of the whole network's size that a domain needs at once: its bounds, planes, slopes, autograd's copies."""


@dataclass(frozen=True)
class Insight:
    """What the bounds of D domains rest on: where they are attained, and what each kink contributes.

    ``point`` (D, *shape) minimises them over the ball. ``gap`` (D, U) is by how much the planes of a kink cost.
    """

    point: Tensor
    gap: Tensor


@dataclass(frozen=True)
class Tree:
    """What all domains of one sample share: the problem, of one sample, ``bounds`` of all its values, and the kinks.

    ``steps`` and the rates are those of the ascent on slopes and multipliers.
    """

    problem: Problem
    bounds: list[Bounds]
    kinks: tuple[Kinks, ...]
    steps: int = 20
    slope_lr: float = 0.1
    push_lr: float = 0.05
    decay: float = 0.98

    @classmethod
    def of(cls, problem: Problem, bounds: list[Bounds], steps: int = 20) -> Tree:
        """Return the tree in which all kinks that ``bounds`` leave undecided may be split."""
        return cls(problem, bounds, kinks_of(problem.graph, undecided(problem.graph, bounds)), steps)

    @property
    def size(self) -> int:
        """The number U of kinks that can be split."""
        return sum(len(kinks.values) for kinks in self.kinks)

    @cached_property
    def batch(self) -> int:
        """How many domains fit into the memory allowed."""
        values = sum(node.size for node in self.problem.graph.nodes)
        fits = self.problem.memory // (COPIES * values * BYTES)
        if fits < 1:
            raise MemoryBudgetError(f"memory: one subproblem needs {COPIES * values * BYTES / 2**20:.0f} MiB")
        return fits

    def roots(self, rivals: Tensor, low: Tensor) -> Domains:
        """Return the whole ball, for each of the ``rivals`` (D,) whose margins are at least ``low`` (D,)."""
        zeros, planes = low.new_zeros(len(rivals), self.size), relax(self.problem.graph, self.bounds)
        parts = [planes_at(planes, kinks.places[0]).low_slope.flatten()[kinks.values] for kinks in self.kinks]
        slope = torch.maximum(torch.cat([low.new_zeros(0), *parts]), self.leak).expand_as(zeros)
        return Domains(rivals, zeros.to(torch.int8), slope, zeros, low)

    def bounded(self, domains: Domains, enough: float, steps: int | None = None) -> Domains:
        """Return ``domains`` with the best slopes and multipliers found, and ``low`` never less than before.

        A domain whose bound exceeds ``enough`` is left.
        """
        best, rows, current = domains, torch.arange(len(domains), device=domains.low.device), domains
        moments = [torch.zeros_like(domains.slope) for _ in range(4)]
        steps = (self.steps if steps is None else steps) if self.size else 0
        for step in range(steps + 1):
            low, grads = self.gradients(current) if step < steps else (self.low(current), None)
            better = low > best.low[rows]
            best = _update(best, rows[better], replace(current.take(better), low=low[better]))
            open_ = best.low[rows] <= enough
            if grads is None or not open_.any():
                break
            rows, current = rows[open_], current.take(open_)
            moments = [moment[open_] for moment in moments]
            slope, push = (grad[open_] for grad in grads)
            rate = self.decay**step
            slope = adam(current.slope, slope, (moments[0], moments[1]), step, self.slope_lr * rate)
            push = adam(current.push, push, (moments[2], moments[3]), step, self.push_lr * rate)
            current = replace(current, slope=torch.maximum(slope, self.leak).clamp_max(1.0), push=torch.relu(push))
        return best

    @cached_property
    def leak(self) -> Tensor:
        """The smallest lower slope (U,) of each kink."""
        return self.problem.ball.x.new_tensor([kinks.leak for kinks in self.kinks for _ in kinks.values])

    def low(self, domains: Domains) -> Tensor:
        """Return the lower bounds (D,) that the slopes and multipliers give."""
        return self._low(domains, self.relaxed(domains))[0]

    def gradients(self, domains: Domains) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the lower bounds (D,) and their gradients (D, U) for slopes and multipliers, where they count."""
        with torch.enable_grad():
            slope, push = (part.detach().requires_grad_() for part in (domains.slope, domains.push))
            low, _ = self._low(replace(domains, slope=slope, push=push), self.relaxed(domains))
            grads = torch.autograd.grad(low.sum(), (slope, push), allow_unused=True)
        first, second = (torch.zeros_like(slope) if grad is None else grad for grad in grads)
        return low.detach(), (first * (domains.sign == 0), second * (domains.sign != 0))

    def relaxed(self, domains: Domains) -> dict[int, AnyPlanes]:
        """Return the planes of every nonlinear node, where the sign of an argument is fixed with that side's line."""
        own = list(self.bounds)
        for node in self.problem.graph.nodes:
            if node.nonlinear:
                source = node.inputs[0]
                own[source] = tuple(bound.expand(len(domains), *bound.shape[1:]) for bound in self.bounds[source])  # type: ignore[assignment]
        for kinks in self.kinks:
            sign = domains.sign[:, kinks.columns]
            lower, upper = (bound.flatten(1).clone() for bound in own[kinks.source])
            lower[:, kinks.values] = torch.where(sign > 0, 0.0, lower[:, kinks.values])
            upper[:, kinks.values] = torch.where(sign < 0, 0.0, upper[:, kinks.values])
            shape = self.problem.graph.nodes[kinks.source].shape
            own[kinks.source] = lower.view(-1, *shape), upper.view(-1, *shape)
        return relax(self.problem.graph, own)

    def _low(self, domains: Domains, planes: dict[int, AnyPlanes]) -> tuple[Tensor, Tensor]:
        """Return lower bounds (D,) of the margins, and their coefficients (D, *shape) at the input."""
        slopes, pushes = {}, {}
        for kinks in self.kinks:
            sign, chosen = domains.sign[:, kinks.columns], domains.slope[:, kinks.columns]
            for place in kinks.places:
                base = planes_at(planes, place).low_slope.flatten(1)
                slope = torch.where(sign == 0, chosen, base[:, kinks.values])
                slopes[place] = self._placed(kinks, base, slope)
            push = -sign * domains.push[:, kinks.columns]
            pushes[kinks.places[0]] = self._placed(kinks, torch.zeros_like(base), push)
        owner = torch.arange(len(domains), device=domains.low.device)
        queries = {self.problem.last: self.problem.queries[domains.rival]}
        reached, constant = pull(self.problem.graph, queries, owner, Relaxation(planes, slopes, pushes))
        a = reached[0] if 0 in reached else self.problem.ball.x.new_zeros(len(domains), *self.problem.ball.x.shape[1:])
        return least({0: a}, constant, owner, self._balls(len(domains))), a

    def _placed(self, kinks: Kinks, base: Tensor, part: Tensor) -> Tensor:
        """Return ``base`` (D, V) with the values of the kinks replaced by ``part``, in the shape of their node."""
        return base.index_copy(1, kinks.values, part).view(-1, *self.problem.graph.nodes[kinks.source].shape)

    def _balls(self, count: int) -> Ball:
        return self.problem.ball.take(torch.zeros(count, dtype=torch.long, device=self.problem.y.device))

    def insight(self, domains: Domains) -> Insight:
        """Return where the bounds are attained, and which kinks they suffer from."""
        planes = self.relaxed(domains)
        with torch.enable_grad():
            places = [place for kinks in self.kinks for place in kinks.places]
            above = {place: planes_at(planes, place).high.clone().requires_grad_() for place in places}
            watched = {place: replace(planes_at(planes, place), high=high) for place, high in above.items()}
            low, a = self._low(domains, {**planes, **watched})
            grads = torch.autograd.grad(low.sum(), list(above.values()), allow_unused=True) if above else ()
        lost = {place: grad for place, grad in zip(above, grads, strict=True) if grad is not None}
        gap = torch.zeros_like(domains.slope)
        for kinks in self.kinks:
            for place in lost.keys() & set(kinks.places):
                gap[:, kinks.columns] -= (lost[place] * above[place].detach()).flatten(1)[:, kinks.values]
        owner = torch.arange(len(domains), device=domains.low.device)
        point = self._balls(len(domains)).minimiser(a.detach(), owner)
        return Insight(point, torch.where(domains.sign == 0, gap, -1.0))


def _update(domains: Domains, rows: Tensor, found: Domains) -> Domains:
    return replace(
        domains,
        slope=domains.slope.index_copy(0, rows, found.slope),
        push=domains.push.index_copy(0, rows, found.push),
        low=domains.low.index_copy(0, rows, found.low),
    )
