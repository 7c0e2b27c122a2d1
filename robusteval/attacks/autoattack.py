"""AutoAttack's components, as pyautoattack runs them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import pyautoattack
import torch
from torch import Tensor, nn

from robusteval.attacks._losses import margin_loss
from robusteval.attacks.base import AttackResult
from robusteval.attacks.square import Square
from robusteval.rng import SampleRng, seeded
from robusteval.threat import Norm, ThreatModel

Component = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
FEWEST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
"""Fewest classes for which a component's DLR loss is defined."""

RANDOMISED = ("apgd-ce", "apgd-dlr")
"""The components of version "rand", those that average gradients over draws of a randomised model."""


@dataclass
class _Log:
    """Stands in for AutoAttack's logger and keeps its warnings, without the counts that vary from call to call."""

    warnings: list[str] = field(default_factory=list)

    def warning(self, message: str) -> None:
        self.warnings.append(re.sub(r"there are \d+ points", "there are points", message))


def square_runs(norm: Norm, height: int, width: int) -> bool:
    """Say whether pyautoattack's Square survives its start, a grid of windows that leaves images of some sizes."""
    side = height // 5
    begin = (height - 5 * side) // 2
    inside = side and all(begin + side * (length // side) <= length for length in (height, width))
    return norm is Norm.LINF or side == 1 or bool(inside)


def _margin_loss_of(attack: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``z_t - z_y`` for the target APGD is at: the targeted DLR loss without its four-class scale."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        target: Tensor = attack.y_target
        return logits[rows, target] - logits[rows, y]

    return loss


@dataclass(frozen=True)
class AutoAttack:
    """One component of AutoAttack (Croce & Hein 2020, arXiv 2003.01690), run by pyautoattack.

    ``version`` decides restarts, targets and how often a gradient is averaged, as it does there. Every component
    starts from the clean inputs and is seeded with the batch's one seed, as AutoAttack does: the inputs given are one
    AutoAttack batch. With fewer than 10 classes there are as many targets as wrong classes; where DLR losses are
    undefined, with fewer than three classes or, targeted, four, they give way to the plain margin; for image sizes on
    which its L2 and L1 Square fails, such as 24 x 24, ours takes its place. In "rand" no sample is passed over because
    one draw of the model has it wrong, and what is returned is the point of largest loss. All this is noted.
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = tuple({"component": name} for name in get_args(Component))

    component: Component
    version: Literal["standard", "plus", "rand"] = "standard"

    def __post_init__(self) -> None:
        if self.version == "rand" and self.component not in RANDOMISED:
            raise ValueError(f"version 'rand' has the components {' and '.join(RANDOMISED)}, not '{self.component}'")

    @property
    def gradient_free(self) -> bool:
        """Whether the component takes no gradient."""
        return self.component == "square"

    def supports(self, threat: ThreatModel) -> bool:
        """Linf, L2 and L1."""
        return threat.norm in (Norm.LINF, Norm.L2, Norm.L1)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return what the component's `perturb` returns, float32, held within ``threat``."""
        if self.component == "square" and not square_runs(threat.norm, *x.shape[2:]):
            found = Square(rescale=False)(model, x, y, threat, rng).candidates
            size = " x ".join(map(str, x.shape[2:]))
            return AttackResult(found, (f"square: our implementation, as pyautoattack's fails on {size} images",))
        log = _Log()
        with seeded(rng.batch, x.device), torch.no_grad():  # it draws from the global generators
            classes = model(x[:1]).shape[1]
            norm, eps = threat.norm.value, threat.radius
            suite = pyautoattack.AutoAttack(
                model, norm=norm, eps=eps, seed=rng.batch, version=self.version, device=x.device
            )
            suite.apgd.logger = suite.apgd_targeted.logger = log
            adaptations = self._adapt(suite, classes)
            candidates = self._perturb_of(suite)(x.clone(), y.clone())
        found = threat.hold(x, candidates.detach())
        return AttackResult(found, tuple(adaptations), tuple(dict.fromkeys(log.warnings)))

    def _adapt(self, suite: Any, classes: int) -> list[str]:
        """Make the component work for few classes and randomised models; return what had to change."""
        adaptations = []
        if self.version == "rand":
            adaptations.append(
                f"{self.component}: attacks every sample and returns the point of largest loss, as one draw of a "
                "randomised model shows neither that a sample is misclassified nor that a point breaks it"
            )
        if classes < FEWEST_CLASSES.get(self.component, 2):
            suite.apgd.dlr_loss = margin_loss
            suite.apgd_targeted.dlr_loss_targeted = _margin_loss_of(suite.apgd_targeted)
            margin, loss = ("z_t - z_y", "targeted DLR") if self.component == "apgd-t" else ("max z_k - z_y", "DLR")
            adaptations.append(
                f"{self.component}: margin {margin} as loss, as {loss} is undefined for {classes} classes"
            )
        for name, attack in (("apgd-t", suite.apgd_targeted), ("fab-t", suite.fab)):
            if self.component == name and attack.n_target_classes > classes - 1:
                adaptations.append(f"{name}: {classes - 1} targets instead of {attack.n_target_classes}")
                attack.n_target_classes = classes - 1
        return adaptations

    def _perturb_of(self, suite: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the `perturb` that AutoAttack's own loop would call, set up as that loop does."""
        if self.component == "fab-t":
            suite.fab.targeted, suite.fab.n_restarts = True, 1
        suite.apgd.loss = "dlr" if self.component == "apgd-dlr" else "ce"
        attacks = {"apgd-t": suite.apgd_targeted, "fab": suite.fab, "fab-t": suite.fab, "square": suite.square}
        perturb: Callable[..., Tensor] = attacks.get(self.component, suite.apgd).perturb
        return partial(perturb, best_loss=True) if self.version == "rand" else perturb
