"""What selects the best epoch: clean accuracy and accuracy under PGD on held-out samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from robusteval.rng import generator
from robusteval.training.adversary import Adversary
from robusteval.training.plan import Plan

BATCH = 256


@dataclass(frozen=True)
class Scores:
    """Fractions of the validation samples: ``clean`` right, and right both clean and under PGD (``pgd``)."""

    clean: float
    pgd: float


Validate = Callable[[Plan, nn.Module], Scores]


def validate(plan: Plan, model: nn.Module) -> Scores:
    """Score ``model`` on the validation samples: PGD on cross-entropy, one uniform start, the same every epoch."""
    split, settings = plan.validation, plan.config.validation
    adversary = Adversary(steps=settings.steps)
    clean = pgd = 0
    for batch, rows in enumerate(torch.split(torch.arange(len(split)), BATCH)):
        x, y = split.images(rows).to(plan.device), split.labels[rows].to(plan.device)
        attack = adversary.bind(model, x, plan.threat, generator(settings.seed, "validation attack", batch))
        right = attack.logits(x).argmax(1) == y
        x_adv = attack(lambda logits, label=y: F.cross_entropy(logits, label, reduction="none"))  # type: ignore[misc]
        held = right & (attack.logits(x_adv).argmax(1) == y)
        clean, pgd = clean + int(right.sum()), pgd + int(held.sum())
    return Scores(clean / len(split), pgd / len(split))
