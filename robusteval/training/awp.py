"""Adversarial weight perturbation: descend the loss where the weights, too, were made worse.

Wu, Xia & Wang 2020, arXiv 2004.05884, in the per-tensor form of the authors' code: with d the gradient of the loss at
the unperturbed weights on the same adversarial inputs,

    v_l = gamma * ||w_l|| / ||d_l|| * d_l      for every weight tensor of more than one dimension,

and the step's gradient is taken at w + v. BatchNorm parameters and biases are not perturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robusteval.training.objective import Found, InnerAttack, LogitLoss, Start
from robusteval.training.parallel import Team

TINY = 1e-20


def perturbation(model: nn.Module, value: Tensor, gamma: float, team: Team) -> dict[str, Tensor]:
    """Return name -> ``v_l`` for the loss ``value`` (), which is attached to the graph of ``model``."""
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and "weight" in name and weight.requires_grad
    }
    found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    used = {name: grad for name, grad in zip(weights, found, strict=True) if grad is not None}
    gradients = dict(zip(used, team.average(list(used.values())), strict=True))
    return {
        name: gamma * weights[name].detach().norm() / (gradient.norm() + TINY) * gradient
        for name, gradient in gradients.items()
    }


@contextmanager
def shifted(model: nn.Module, by: Mapping[str, Tensor]) -> Iterator[None]:
    """Add ``by`` to the weights of ``model``; afterwards they have the bits they had before.

    The authors step at w + v and then subtract v, so that their weight decay sees w + v; here the step is taken
    from w. The difference is lr * weight_decay * v.
    """
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in by}
    with torch.no_grad():
        for name, delta in by.items():
            parameters[name].add_(delta)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


@dataclass(frozen=True)
class Recording:
    """An inner attack that keeps what it found, so that a second call of the objective gets the same inputs."""

    attack: InnerAttack
    tape: list[Any] = field(default_factory=list)

    def __call__(
        self,
        loss: LogitLoss,
        *,
        start: Start | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        radius: float | None = None,
    ) -> Tensor:
        """Attack; keep the result and the logits that ``loss`` was called with."""
        seen: list[Tensor] = []

        def watched(logits: Tensor) -> Tensor:
            seen.append(logits.detach())
            return loss(logits)

        found = self.attack(watched, start=start, steps=steps, step_size=step_size, radius=radius)
        self.tape.append((found, seen))
        return found

    def logits(self, x: Tensor) -> Tensor:
        """Return and keep the logits of ``x``."""
        return self._kept(self.attack.logits(x))

    def run(self, search: Callable[[nn.Module], Found]) -> Found:
        """Return and keep what ``search`` found."""
        return self._kept(self.attack.run(search))

    def replay(self) -> Replay:
        """Return an attack that answers the same calls in the same order."""
        return Replay(iter(self.tape))

    def _kept(self, result: Found) -> Found:
        self.tape.append(result)
        return result


@dataclass(frozen=True)
class Replay:
    """An inner attack that answers from a `Recording`; ``loss`` still hears of every step's logits."""

    tape: Iterator[Any]

    def __call__(
        self,
        loss: LogitLoss,
        *,
        start: Start | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        radius: float | None = None,
    ) -> Tensor:
        """Return the recorded inputs."""
        found: Tensor
        found, seen = next(self.tape)
        for logits in seen:
            loss(logits)
        return found

    def logits(self, x: Tensor) -> Tensor:
        """Return the recorded logits."""
        return next(self.tape)  # type: ignore[no-any-return]

    def run(self, search: Callable[[nn.Module], Found]) -> Found:
        """Return what was recorded."""
        return next(self.tape)  # type: ignore[no-any-return]
