"""Walking a split batch by batch, each sample attacked with randomness of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.attacks._steps import ascend
from robusteval.datasets.base import Split
from robusteval.evaluation.config import MIN_BATCH
from robusteval.evaluation.probe import failures
from robusteval.models.base import frozen
from robusteval.provenance import deterministic
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel

Told = Callable[[int], None]
"""Called with the number of samples done since the last call."""

Values = tuple[Tensor, ...]

Look = Callable[[nn.Module, Tensor, Tensor, Tensor], Values]
"""(model, x, x_adv, y) -> one value per sample and quantity, each (N,)."""


def nobody(done: int) -> None:
    """Tell nobody."""


def pgd(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng, steps: int) -> Tensor:
    """Return the last point of PGD on cross-entropy: a uniform start per sample, ``steps`` steps of eps / 4."""
    start = rng.draw(threat.sample, x, "analysis attack")
    end = ascend(
        lambda point: F.cross_entropy(model(point), y, reduction="none"), x, start, threat, steps, threat.radius / 4
    )
    return threat.hold(x, end)


def walk(
    model: nn.Module, split: Split, threat: ThreatModel, look: Look, steps: int, seed: int, batch: int, told: Told
) -> Values:
    """Attack every sample of ``split`` and return what ``look`` sees, each (len(split),) float32 on the CPU.

    A sample's result does not depend on its batch: its start comes from (seed, id), the CPU uses one thread, and a
    batch below `MIN_BATCH` is filled up with copies, because smaller ones sum in another order.
    """
    reference = next(model.parameters(), torch.zeros(1))
    seen: list[Values] = []
    with deterministic(threads=1), frozen(model), failures("the model"):
        for rows in torch.split(torch.arange(len(split)), batch):
            filled = torch.cat([rows, rows[:1].expand(max(0, MIN_BATCH - len(rows)))])
            x, y = split.images(filled).to(reference.device), split.labels[filled].to(reference.device)
            rng = SampleRng(seed, tuple(split.ids[filled].tolist()), batch=0)
            values = look(model, x, pgd(model, x, y, threat, rng, steps), y)
            seen.append(tuple(value.detach()[: len(rows)].float().cpu() for value in values))
            told(len(rows))
    return tuple(torch.cat(column) for column in zip(*seen, strict=True))
