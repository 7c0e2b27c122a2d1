"""The inner maximisation of adversarial training, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from robusteval.attacks._steps import ascend
from robusteval.errors import UsageError
from robusteval.models.base import frozen
from robusteval.settings import Budget, Settings
from robusteval.threat import ThreatModel, parse_eps
from robusteval.training.objective import Found, LogitLoss, Start
from robusteval.training.share import ALONE, Share

GAUSSIAN_STD = 0.001
"""Standard deviation of the Gaussian start of TRADES, in pixel units."""


class Adversary(Settings):
    """Projected gradient ascent (Madry et al. 2018, arXiv 1706.06083) with the settings that papers differ in.

    ``step_size`` is in pixel units, as in ``"2/255"``; None is eps / 4. ``start`` is uniform in the ball, the clean
    input plus N(0, 0.001^2), or the clean input. ``bn_mode`` "eval" (the default) attacks with the model in eval
    mode; "train" leaves every module in the mode it was in, so BatchNorm uses and updates batch statistics.
    """

    steps: int = Field(default=10, ge=1)
    step_size: Budget | None = None
    start: Start = "uniform"
    bn_mode: Literal["eval", "train"] = "eval"

    @field_validator("step_size")
    @classmethod
    def _positive(cls, text: str | None) -> str | None:
        try:
            parse_eps(text or "1")
        except UsageError as error:
            raise ValueError(f"it is read like an eps, and {error}") from error
        return text

    def size(self, threat: ThreatModel) -> float:
        """Return the length of one step in pixel units."""
        return threat.radius / 4 if self.step_size is None else float(parse_eps(self.step_size))

    def bind(
        self, model: nn.Module, x: Tensor, threat: ThreatModel, rng: torch.Generator, share: Share = ALONE
    ) -> BoundAdversary:
        """Return the attack on ``model`` around ``x`` (N, C, H, W), this process's ``share`` of a batch."""
        return BoundAdversary(self, model, x, threat, rng, share)


@contextmanager
def attacked(model: nn.Module, bn_mode: Literal["eval", "train"]) -> Iterator[None]:
    """Freeze the parameters, and put ``model`` in eval mode if ``bn_mode`` says so; restore each module's flags."""
    modes = {part: part.training for part in model.modules()}
    with frozen(model):
        if bn_mode == "train":
            for part, mode in modes.items():
                part.training = mode
        yield


@dataclass(frozen=True)
class BoundAdversary:
    """An `Adversary` on one batch: an `InnerAttack`."""

    settings: Adversary
    model: nn.Module
    x: Tensor
    threat: ThreatModel
    rng: torch.Generator
    share: Share = ALONE

    def __call__(
        self,
        loss: LogitLoss,
        *,
        start: Start | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        radius: float | None = None,
    ) -> Tensor:
        """Return inputs in the ball and the box that ascend ``loss``; no parameter gradient is filled."""
        threat = self.threat if radius is None else self.threat.resized(radius)
        begin = self._start(start or self.settings.start, threat)
        steps = self.settings.steps if steps is None else steps
        usual = self.settings.size(self.threat) * (threat.radius / self.threat.radius)
        size = usual if step_size is None else step_size
        with attacked(self.model, self.settings.bn_mode):
            end = ascend(lambda point: loss(self.model(point)), self.x, begin, threat, steps, size)
        return end.detach()

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (N, K) of ``x`` without a graph, in the attack's mode."""
        with torch.no_grad(), attacked(self.model, self.settings.bn_mode):
            logits: Tensor = self.model(x)
        return logits

    def run(self, search: Callable[[nn.Module], Found]) -> Found:
        """Return ``search(model)``, called with the parameters frozen and the model in the attack's mode."""
        with attacked(self.model, self.settings.bn_mode):
            return search(self.model)

    def _start(self, start: Start, threat: ThreatModel) -> Tensor:
        if start == "none":
            return self.x
        sampler = threat.sample if start == "uniform" else partial(_gaussian, threat)
        return self.share.draw(sampler, self.x, self.rng)


def _gaussian(threat: ThreatModel, x: Tensor, rng: torch.Generator) -> Tensor:
    noise = torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)
    return threat.project(x, x + GAUSSIAN_STD * noise)
