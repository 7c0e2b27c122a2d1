"""Better lower slopes by gradient ascent (alpha-CROWN, Xu et al. 2021, arXiv 2011.13824).

Any slope between the leak and 1 bounds an undecided ReLU from below, so every step gives sound bounds; the best one
is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robusteval.bounds.activations import Activation, Planes
from robusteval.bounds.backward import AnyPlanes, Relaxation, least, pull
from robusteval.bounds.ball import Ball
from robusteval.bounds.nodes import Graph


@dataclass(frozen=True)
class Chosen:
    """Lower slopes chosen for P queries: by node, for its values ``columns`` (F,), ``slopes`` (P, F)."""

    columns: dict[int, Tensor]
    slopes: dict[int, Tensor]

    @classmethod
    def of(cls, planes: Mapping[int, AnyPlanes], sample: int, slopes: Mapping[int, Tensor]) -> Chosen:
        """Return the ``slopes`` (P, *shape) by node that an ascent chose for one sample; half precision is enough."""
        columns = {place: undecided_kinks(planes[place])[sample].flatten().nonzero().squeeze(1) for place in slopes}
        return cls(columns, {place: slopes[place].flatten(1)[:, own].half() for place, own in columns.items()})

    @classmethod
    def joined(cls, parts: Sequence[Chosen]) -> Chosen:
        """Return the slopes of all queries of ``parts``, which are of one sample and the same planes."""
        columns = parts[0].columns
        return cls(columns, {place: torch.cat([part.slopes[place] for part in parts]) for place in columns})

    def take(self, rows: slice) -> Chosen:
        """Return the slopes of some queries."""
        return Chosen(self.columns, {place: slopes[rows] for place, slopes in self.slopes.items()})

    def spread(self, graph: Graph, planes: Mapping[int, AnyPlanes], owner: Tensor) -> dict[int, Tensor]:
        """Return slopes (P, *shape) by node: those chosen, elsewhere those of ``planes`` for the samples ``owner``.

        Whatever was chosen, they are sound: none is less than the leak or more than 1.
        """
        full = {}
        for place, columns in self.columns.items():
            base, leak = planes[place].low_slope[owner], float(graph.nodes[place].op.leak)  # type: ignore[union-attr, arg-type]
            own = self.slopes[place].to(base).clamp(leak, 1.0)
            full[place] = base.flatten(1).index_copy(1, columns, own).view_as(base)
        return full


@dataclass(frozen=True)
class Ascent:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980) on the slopes of each query by itself, projected after each step."""

    steps: int = 20
    lr: float = 0.25
    decay: float = 0.95

    def __call__(
        self,
        graph: Graph,
        ball: Ball,
        queries: Mapping[int, Tensor],
        owner: Tensor,
        planes: Mapping[int, AnyPlanes],
        enough: Tensor,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the best lower bounds (P,) of ``queries`` (P, *shape) by node, and the slopes that give them.

        One that is ``enough`` (P,) is left. Slopes are (P, *shape) by node.
        """
        best = torch.full_like(enough, -torch.inf)
        free = _free(graph, max(queries), planes, owner)
        slopes = {place: planes[place].low_slope[owner].clone() for place in free}  # type: ignore[union-attr]
        chosen = {place: slope.clone() for place, slope in slopes.items()}
        moments = {place: (torch.zeros_like(slope), torch.zeros_like(slope)) for place, slope in slopes.items()}
        rows = torch.arange(len(owner), device=owner.device)
        for step in range(self.steps + 1):
            with torch.enable_grad():
                for slope in slopes.values():
                    slope.requires_grad_()
                own = {place: query[rows] for place, query in queries.items()}
                reached, constant = pull(graph, own, owner[rows], Relaxation(planes, slopes))
                low = least(reached, constant, owner[rows], ball)
                total = low.sum()
            better = low.detach() > best[rows]
            best[rows] = torch.maximum(best[rows], low.detach())
            for place, slope in slopes.items():
                chosen[place][rows[better]] = slope.detach()[better]
            open_ = best[rows] <= enough[rows]
            if step == self.steps or not slopes or not open_.any():
                break
            grads = torch.autograd.grad(total, list(slopes.values()), allow_unused=True)
            for (place, slope), grad in zip(slopes.items(), grads, strict=True):
                if grad is not None:
                    leak = graph.nodes[place].op.leak  # type: ignore[union-attr]
                    slopes[place] = self._step(slope, grad * free[place][rows], moments[place], step, float(leak or 0))
            rows = rows[open_]
            slopes = {place: slope.detach()[open_] for place, slope in slopes.items()}
            moments = {place: (first[open_], second[open_]) for place, (first, second) in moments.items()}
        return best, chosen

    def _step(self, slope: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], step: int, leak: float) -> Tensor:
        return adam(slope.detach(), grad, moments, step, self.lr * self.decay**step).clamp(leak, 1.0)


def adam(value: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], step: int, lr: float) -> Tensor:
    """Return ``value`` after one step upwards, left where the gradient is 0; ``moments`` are updated in place."""
    first, second = moments
    first.mul_(0.9).add_(grad, alpha=0.1)
    second.mul_(0.999).addcmul_(grad, grad, value=0.001)
    size = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-12
    moved = value + lr * (first / (1 - 0.9 ** (step + 1))) / size
    return torch.where(grad == 0, value, moved)


def undecided_kinks(planes: AnyPlanes) -> Tensor:
    """Return where (N, *shape) a kink's planes differ, so that its lower slope may be chosen."""
    assert isinstance(planes, Planes)
    return (planes.high != 0) & (planes.high_slope < 1)


def _free(graph: Graph, start: int, planes: Mapping[int, AnyPlanes], owner: Tensor) -> dict[int, Tensor]:
    """Return, by node up to ``start``, which slopes (P, *shape) may be chosen: those of undecided kinks."""
    found = {}
    for place, node in enumerate(graph.nodes[: start + 1]):
        if isinstance(node.op, Activation) and node.op.leak is not None:
            undecided = undecided_kinks(planes[place])
            if undecided[owner].any():
                found[place] = undecided[owner]
    return found
