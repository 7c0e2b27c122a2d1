"""Branch and bound: a margin's sign, decided by splitting the ball along the kinks of the network.

Bunel et al. 2020, JMLR 21(42), with the bounds of beta-CROWN (Wang et al. 2021, arXiv 2103.06624) and the branching of
De Palma et al. 2021, arXiv 2104.06718: kinks are scored, and for the best few both halves are tried.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from robusteval.bounds.domains import Domains, Leaves, joined
from robusteval.bounds.leaf import settled
from robusteval.bounds.margins import Problem
from robusteval.bounds.tree import Tree

PER_KINK = 34
"""Bytes that a domain in the queue takes per kink: its sign, slope and multiplier, and a copy of them."""

PER_PROVED = 6
"""Bytes that a proved part takes per kink: its sign and value, and a copy of them."""

DESCENTS = 5
"""Steps to the minimum of the network's linearisation, from each point where a bound is attained."""


@dataclass(frozen=True)
class Limits:
    """When a sample is given up: after the ascent for so many ``domains``, or ``seconds``."""

    domains: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """``leaves`` that prove it, or a misclassified ``point`` (*shape) of the ball, or a ``reason`` why it is open."""

    leaves: Leaves | None
    point: Tensor | None
    reason: str


def decide(tree: Tree, roots: Domains, enough: float, limits: Limits, batch: int, tries: int) -> Outcome:
    """Return whether all margins of one sample exceed ``enough``.

    ``batch`` is how many domains are split at once, memory permitting, and ``tries`` of how many kinks both halves are
    bounded before one is chosen.
    """
    began, visited, doubt = time.monotonic(), len(roots), ""
    queue, lowest, point = roots, torch.inf, None
    proved = [Leaves.of(roots.take(slice(0, 0)))]
    while len(queue):
        limit = _reached(limits, visited, time.monotonic() - began, _size(queue, proved, tree), tree)
        if limit:
            worst = f"bound {float(queue.low.min()):.3g} and {len(queue)} of {visited} subproblems left"
            doubt = f"out of {limit}: {worst}"
            break
        order = queue.low.argsort(stable=True)
        size = max(1, min(batch, tree.batch // 2))
        taken, queue = queue.take(order[:size]), queue.take(order[size:])
        insight = tree.insight(taken)
        ended = (taken.sign != 0).all(1)
        leaves = [settled(tree, taken.take(slice(row, row + 1)), enough) for row in ended.nonzero().flatten().tolist()]
        least, found = descended(tree.problem, torch.cat([insight.point, *(place for _, place in leaves)]))
        if least < lowest:
            lowest, point = least, found
        if lowest < -enough:
            break
        proved += [Leaves.of(leaf) for leaf, _ in leaves]
        if any(not float(leaf.low) > enough for leaf, _ in leaves):
            doubt = f"a margin of {lowest:.3g}, too near 0, or planes that no split makes exact"
        if not ended.all():
            parents, gap = taken.take(~ended), insight.gap[~ended]
            children = tree.bounded(parents.split(_chosen(tree, parents, gap, tries)), enough)
            visited += len(children)
            done = children.low > enough
            proved.append(Leaves.of(children.take(done)))
            queue = joined([queue, children.take(~done)])
    if lowest < 0:
        return Outcome(None, point, "")
    return Outcome(None if doubt else Leaves.joined(proved), None, doubt)


def _size(queue: Domains, proved: list[Leaves], tree: Tree) -> int:
    """Return the bytes that the parts to be split and the proved ones take."""
    return (len(queue) * PER_KINK + sum(len(part.rival) for part in proved) * PER_PROVED) * tree.size


def _reached(limits: Limits, visited: int, seconds: float, size: int, tree: Tree) -> str:
    """Return which limit the search has come to, or nothing."""
    if visited >= limits.domains:
        return "subproblems"
    if size > tree.problem.memory:
        return "memory"
    return "seconds" if seconds > limits.seconds else ""


def _chosen(tree: Tree, domains: Domains, gap: Tensor, tries: int) -> Tensor:
    """Return for each domain the kink (D,) whose worse half has the best bound, among those of the largest ``gap``."""
    kinks = gap.topk(min(tries, gap.shape[1]), dim=1).indices
    free = domains.sign.gather(1, kinks) == 0
    if kinks.shape[1] == 1:
        return kinks[:, 0]
    worse = []
    for kink, allowed in zip(kinks.unbind(1), free.unbind(1), strict=True):
        halves = tree.bounded(domains.split(kink), torch.inf, steps=0).low.view(2, -1)
        worse.append(torch.where(allowed, halves.amin(0), -torch.inf))
    best = torch.stack(worse, 1).argmax(1)
    return kinks.gather(1, best[:, None]).squeeze(1)


def descended(problem: Problem, points: Tensor) -> tuple[float, Tensor]:
    """Return the least margin over all classes found from ``points`` (P, *shape) of one sample's ball, and where.

    Each step goes to where the ball minimises the network's linearisation (Frank & Wolfe 1956, with steps of 1).
    """
    label = problem.y.expand(len(points))
    ball = problem.ball.take(label.new_zeros(len(points)))
    lowest, best = torch.inf, points[0]
    for _ in range(DESCENTS):
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            logits = problem.graph(points)
            own = logits.gather(1, label[:, None]).squeeze(1)
            margin = own - logits.scatter(1, label[:, None], -torch.inf).amax(1)
            grad = torch.autograd.grad(margin.sum(), points)[0]
        if float(margin.min()) < lowest:
            lowest, best = float(margin.min()), points[margin.argmin()].detach()
        points = ball.minimiser(grad, torch.arange(len(points), device=label.device))
    return lowest, best
