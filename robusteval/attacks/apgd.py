"""Auto-PGD."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from robusteval.attacks import _losses
from robusteval.attacks._apgd_steps import AnyClimb, Loss, begin, checkpoints
from robusteval.attacks._finds import Finds
from robusteval.attacks.base import AttackResult
from robusteval.rng import SampleRng
from robusteval.threat import Norm, ThreatModel

WIDEST = 1e6
"""The largest ball to begin in, in multiples of eps; all inputs are within far smaller ones."""

UNTARGETED = {"ce": _losses.log_odds, "dlr": _losses.dlr_loss, "margin": _losses.margin_loss}


@dataclass(frozen=True)
class APGD:
    """Auto-PGD: ascent whose step sizes adapt to each sample (Croce & Hein 2020, arXiv 2003.01690).

    From a random start, ``x_{k+1} = P(x_k + a (z - x_k) + (1 - a) (x_k - x_{k-1}))`` with a = ``momentum`` and z the
    projected ascent step of x_k. At fixed checkpoints the step of a sample is halved, and it returns to its best
    point, where fewer than ``rho`` of the steps raised the loss. L1 (Croce & Hein 2021, arXiv 2103.01208): sparse
    steps without momentum, projected exactly on ball and box.

    With ``shrink`` a run begins in larger balls, of these multiples of eps one after the other, with 60 % of its steps
    in all; ``True`` stands for 3 and 2 in L1, as published, and for none in the other norms. Where gradients at the
    input mislead, a way in from outside may be found where none leads out.

    With ``targets`` = T there is a run towards each of the T most likely wrong classes of the clean input. A sample
    leaves as soon as it is misclassified within ``threat``, and the rest go on as if it had never been there. "ce"
    ascends the log-odds, on which the same steps are taken as on the cross-entropy but for underflow.
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"steps": 30, "loss": "dlr"},
        {"steps": 20, "loss": "margin", "restarts": 2},
        {"steps": 30, "loss": "dlr", "targets": 3},
        {"steps": 20, "loss": "margin", "targets": 9, "shrink": False},
        {"steps": 20, "loss": "margin", "targets": 3, "shrink": [10, 3]},
    )

    steps: int = 100
    restarts: int = 1
    loss: Literal["ce", "dlr", "margin"] = "ce"
    targets: int = 0
    rho: float = 0.75
    momentum: float = 0.75
    shrink: tuple[float, ...] | bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or self.targets < 0:
            raise ValueError("APGD needs steps >= 1, restarts >= 1 and targets >= 0")
        if not 0 <= self.rho <= 1 or not 0 < self.momentum <= 1:
            raise ValueError("APGD needs rho in [0, 1] and momentum in (0, 1]")
        if not isinstance(self.shrink, bool):
            if not self.shrink or not all(1 < factor <= WIDEST for factor in self.shrink):
                raise ValueError(f"APGD shrinks from multiples of eps above 1 and up to {WIDEST:.0f}, such as [10, 3]")
            if not self._wide(self.shrink):
                raise ValueError(f"APGD cannot begin in {len(self.shrink)} larger balls with {self.steps} steps")
        if self.targets and self.loss not in _losses.TARGETED:
            raise ValueError(f"APGD with targets needs loss 'dlr' or 'margin', not '{self.loss}'")

    def supports(self, threat: ThreatModel) -> bool:
        """Linf, L2 and L1."""
        return threat.norm in (Norm.LINF, Norm.L2, Norm.L1)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return, per input, the first misclassified point met, else the point of largest loss."""
        with torch.no_grad():
            logits = model(x)
        loss, adaptations = self._loss_for(logits.shape[1])
        finds = Finds(x, logits.argmax(1) != y)
        balls = self._balls(threat)
        for run, target in self._runs(logits, y):
            left = finds.left()
            if len(left) == 0:
                break
            point, fresh = rng.take(left).draw(partial(_start, balls[0][0]), x[left], "apgd", *run), True
            for ball, steps in balls:
                climb = begin(ball, left, x[left], y[left], target[left], point, fresh)
                climb = self._ascend(model, loss, climb, ball, steps, finds if ball == threat else None)
                point, fresh = climb.best, False
            finds.offer(climb.rows, climb.best, climb.best_value)
        return AttackResult(threat.hold(x, finds.points), tuple(adaptations))

    def _loss_for(self, classes: int) -> tuple[Loss, list[str]]:
        """Return the loss, and what had to change for a model of ``classes`` classes."""
        if self.targets:
            return _losses.targeted(self.loss, self.targets, classes)
        loss, adaptations = self.loss, []
        if loss == "dlr" and classes < 3:
            loss = "margin"
            adaptations.append(f"margin as loss, as DLR is undefined for {classes} classes")
        untargeted = UNTARGETED[loss]
        return lambda logits, y, _: untargeted(logits, y), adaptations

    def _runs(self, logits: Tensor, y: Tensor) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
        """Yield the purpose of each run's randomness and the class (N,) that it goes for, if any."""
        wrong = logits.scatter(1, y[:, None], -torch.inf).sort(dim=1, descending=True, stable=True).indices
        for rank in range(min(self.targets, logits.shape[1] - 1) or 1):
            for restart in range(self.restarts):
                yield (self.loss, rank, restart), wrong[:, rank]

    def _balls(self, threat: ThreatModel) -> list[tuple[ThreatModel, int]]:
        """Return the balls to climb in, one after the other, with the steps in each; the last is ``threat``."""
        published = (3.0, 2.0) if self.shrink and threat.norm is Norm.L1 else ()
        factors = published if isinstance(self.shrink, bool) else self.shrink
        wide = self._wide(factors)
        larger = [(replace(threat, eps=Fraction(factor) * threat.eps), wide) for factor in factors] if wide else []
        return [*larger, (threat, self.steps - wide * len(larger))]

    def _wide(self, factors: Sequence[float]) -> int:
        """Return how many steps are taken in each larger ball."""
        return 3 * self.steps // (5 * len(factors)) if factors else 0

    def _ascend(
        self, model: nn.Module, loss: Loss, climb: AnyClimb, ball: ThreatModel, steps: int, finds: Finds | None
    ) -> AnyClimb:
        """Take ``steps`` steps; return the climb of the samples left, those that ``finds`` does not get as broken."""
        looks, last = checkpoints(ball.norm, steps), 0
        for step in range(steps + 1):
            wrong = climb.look(model, loss, slope=step < steps)
            if finds is not None and wrong.any():
                finds.breaks(climb.rows[wrong], climb.point[wrong])
                climb = climb.keep(~wrong)
                if len(climb.rows) == 0:
                    break
            if step in looks:
                climb.check(ball, self.rho, step - last)
                last = step
            if step < steps:
                climb.move(ball, self.momentum if step else 1.0)
        return climb


def _start(threat: ThreatModel, x: Tensor, stream: torch.Generator) -> Tensor:
    """Draw a start: uniform in the Linf and L2 balls; in L1 noise, sparse once it is projected."""
    if threat.norm is not Norm.L1:
        return threat.sample(x, stream)
    return x + torch.randn(x.shape, generator=stream, dtype=x.dtype).to(x.device)
