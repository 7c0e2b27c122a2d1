"""What selects the best epoch: clean accuracy and accuracy under PGD on held-out samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.models.base import frozen
from robusteval.rng import generator
from robusteval.training.adversary import Adversary
from robusteval.training.network import Network
from robusteval.training.plan import Plan

BATCH = 256


@dataclass(frozen=True)
class Scores:
    """Fractions of the validation samples: ``clean`` right, and right both clean and under PGD or FGSM."""

    clean: float
    pgd: float
    fgsm: float


Validate = Callable[[Plan, nn.Module], Scores]


def validate(plan: Plan, model: nn.Module) -> Scores:
    """Score ``model`` on the validation samples: PGD on cross-entropy, one uniform start, the same every epoch.

    FGSM is one step of eps from the clean input (Goodfellow et al. 2015, arXiv 1412.6572). The attacks run in the
    training's precision, the decisions are ``model``'s own.
    """
    split, settings, network = plan.validation, plan.config.validation, Network(model, plan.config)
    adversary = Adversary(steps=settings.steps)
    counts = [0, 0, 0]
    for batch, rows in list(enumerate(torch.split(torch.arange(len(split)), BATCH)))[plan.team.rank :: plan.team.size]:
        x, y = split.images(rows).to(plan.device, plan.dtype), split.labels[rows].to(plan.device)
        attack = adversary.bind(network, x, plan.threat, generator(settings.seed, "validation attack", batch))
        loss = partial(_cross_entropy, y)
        pgd, fgsm = attack(loss), attack(loss, start="none", steps=1, step_size=plan.threat.radius)
        clean, *held = (predict(model, point) == y for point in (x, pgd, fgsm))
        for index, right in enumerate((clean, *held)):
            counts[index] += int((right & clean).sum())
    return Scores(*(count / len(split) for count in plan.team.sum(counts, plan.device)))


def _cross_entropy(y: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Return the class (N,) that ``model`` in eval mode gives each input."""
    with torch.no_grad(), frozen(model):
        classes: Tensor = model(x).argmax(1)
    return classes
