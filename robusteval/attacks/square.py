"""Square Attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from robusteval.attacks._finds import Finds
from robusteval.attacks._losses import log_odds, margin_loss
from robusteval.attacks._square_steps import propose, share, sides, starts, width_of
from robusteval.attacks.base import AttackResult
from robusteval.rng import SampleRng
from robusteval.threat import Norm, ThreatModel

LOSSES = {"margin": margin_loss, "ce": log_odds}
BLOCK = 128
"""Queries for which a sample's random numbers are drawn at once."""


@dataclass(frozen=True)
class Square:
    """Square Attack: random search by logits alone (Andriushchenko et al. 2020, arXiv 1912.00049).

    A query changes the best point so far in a random square window: in Linf to ``x + eps s``, s a random sign per
    channel; in L2 and L1 it moves perturbation from one window to another. It is kept if the loss rises. The window
    covers a share of the image that is ``p_init`` at first and halved on a schedule, made for 10000 queries or, with
    ``rescale``, stretched to ``queries``. No gradient is taken: it works where gradients are masked or absent.

    Each query is one forward pass of the samples not yet broken, and a sample's windows are its own. With ``at_once``
    above 1 so many queries start from the same point and the best is kept: a little is lost early, when most are, but
    few samples fill a device's batch.
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"queries": 1250, "loss": "ce", "restarts": 2, "rescale": False, "p_init": 0.4},
        {"queries": 1250, "at_once": 4},
    )

    gradient_free: ClassVar[bool] = True

    queries: int = 5000
    p_init: float = 0.8
    loss: Literal["margin", "ce"] = "margin"
    rescale: bool = True
    restarts: int = 1
    at_once: int = 1

    def __post_init__(self) -> None:
        if self.queries < 1 or self.restarts < 1 or not 0 < self.p_init <= 1:
            raise ValueError("Square needs queries >= 1, restarts >= 1 and p_init in (0, 1]")
        if self.at_once < 1 or BLOCK % self.at_once:
            raise ValueError(f"Square needs at_once that divides {BLOCK}")
        if self.at_once > 1 and self.at_once >= self.queries:
            raise ValueError("Square needs more queries than it asks at once")

    def supports(self, threat: ThreatModel) -> bool:
        """Linf, L2 and L1."""
        return threat.norm in (Norm.LINF, Norm.L2, Norm.L1)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return, per input, the first misclassified point met, else the point of largest loss."""
        finds = Finds(x, torch.zeros_like(y, dtype=torch.bool))
        with torch.no_grad():
            for restart in range(self.restarts):
                if len(finds.left()):
                    self._search(model, x, y, threat, rng, restart, finds)
        return AttackResult(threat.hold(x, finds.points))

    def _search(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng, restart: int, finds: Finds
    ) -> None:
        """Query the model ``queries`` times about the samples that are left, and note in ``finds`` what is found."""
        rows = finds.left()
        best = point = rng.take(rows).draw(starts(threat), x[rows], "square", restart)
        value = torch.full_like(rows, -torch.inf, dtype=torch.float64)
        numbers = self._numbers(x[rows], rng.take(rows), restart, 0)
        for query in range(0, self.queries, self.at_once):  # the first is about the start alone
            if query and query % BLOCK == 0:
                numbers = self._numbers(x[rows], rng.take(rows), restart, query // BLOCK)
            several = self.at_once if query else 1
            if query:
                part = share(self.p_init, query, self.queries if self.rescale else 10000)
                size = sides(threat.norm, part, (x.shape[2], x.shape[3]))
                drawn = numbers[:, query % BLOCK :][:, :several].flatten(0, 1)
                clean, around = (kept.repeat_interleave(several, 0) for kept in (x[rows], best))
                point = propose(threat, clean, around, drawn, size)
            logits, label = model(point), y[rows].repeat_interleave(several)
            losses = LOSSES[self.loss](logits.double(), label).nan_to_num(-torch.inf, torch.inf, -torch.inf)
            wrong = logits.argmax(1) != label
            first = losses.masked_fill(wrong, torch.inf).view(-1, several).argmax(1)  # a break, else the largest loss
            chosen = first + several * torch.arange(len(rows), device=x.device)
            point, seen, wrong = point[chosen], losses[chosen], wrong[chosen]
            better = seen > value
            best, value = torch.where(better[:, None, None, None], point, best), torch.where(better, seen, value)
            if wrong.any():
                finds.breaks(rows[wrong], point[wrong])
                rows, best, value, numbers = (kept[~wrong] for kept in (rows, best, value, numbers))
                if len(rows) == 0:
                    return
        finds.offer(rows, best, value)

    def _numbers(self, x: Tensor, rng: SampleRng, restart: int, block: int) -> Tensor:
        """Draw the next block of random numbers from each sample's own stream. (n, BLOCK, width)."""
        width = width_of(x.shape[1])
        return rng.draw(lambda _, stream: torch.rand(1, BLOCK, width, generator=stream), x, "square", restart, block)
