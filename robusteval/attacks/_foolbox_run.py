"""One run of a Foolbox attack on some samples, fenced: seeded, restored, its mended faults, its exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import eagerpy
import numpy as np
import torch
from eagerpy.astensor import astensor
from foolbox.attacks.base import FixedEpsilonAttack
from foolbox.attacks.fast_minimum_norm import FMNAttackLp
from foolbox.attacks.sparse_l1_descent_attack import SparseL1DescentAttack
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn

from robusteval.attacks._foolbox_classes import Float32, descends, takes_start
from robusteval.attacks._foolbox_starts import starting_point
from robusteval.attacks._losses import margin_loss
from robusteval.attacks._minimal import misclassified
from robusteval.rng import SampleRng, derive_seed, generator, seeded
from robusteval.threat import Norm, ThreatModel

BEYOND = 1.005
"""How far a smallest perturbation that is on the boundary is stretched, within eps, as rounding might decide there."""

OVERSHOOT = 1.0001
"""How far FMN steps in terms of its distance from the boundary; less than its steps back, which end at 0.1 %."""


class NoStartError(Exception):
    """No misclassified point was found to start from."""


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, from which Foolbox draws too; give it back as it was."""
    numpy_state = np.random.get_state()
    try:
        np.random.seed(seed)
        yield
    finally:
        np.random.set_state(numpy_state)


@dataclass(frozen=True)
class Run:
    """An attack and what it needs to know; a call attacks samples as one batch."""

    build: Callable[[], Any]
    model: nn.Module
    threat: ThreatModel
    margin: bool
    purpose: tuple[str | int, ...]

    def __call__(self, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """Return candidates within the threat model (N, C, H, W) for inputs ``x``; may raise whatever Foolbox raises.

        Attacks of fixed size get eps. The others are asked for their smallest perturbation, which is kept as found
        within eps, but for a step `BEYOND`, and pulled onto the ball else: Foolbox's own clipping knows no L0.
        """
        attack, alone = self.build(), len(x) == 1
        seeds = [derive_seed(rng.seed, *self.purpose, sample) for sample in rng.ids]
        _adapt(attack, self.threat, self.margin, seeds)
        wrapped = PyTorchModel(Float32(self.model), bounds=(0, 1), device=x.device)
        extra = {"starting_points": self._starts(attack, x, y, rng)} if takes_start(type(attack)) else {}
        seed = seeds[0] if alone else derive_seed(rng.batch, *self.purpose)
        with seeded(seed, x.device), _numpy_seeded(seed), torch.enable_grad():
            fixed = isinstance(attack, FixedEpsilonAttack)
            _, found, _ = attack(wrapped, x.clone(), y, epsilons=self.threat.radius if fixed else None, **extra)
        held = _held(x, found.detach().float(), self.threat)
        return held if fixed else self._beyond(x, y, held)

    def _beyond(self, x: Tensor, y: Tensor, found: Tensor) -> Tensor:
        """Move the candidates on, away from the input, where rounding may decide and unless that makes them right.

        The others stay where they are: at a smaller eps of a curve their own distance decides.
        """
        further = _held(x, (x + BEYOND * (found - x)).clamp(0.0, 1.0), self.threat)
        usable = further.flatten(1).isfinite().all(1)
        with torch.no_grad():
            near = found.flatten(1).isfinite().all(1)
            usable &= ~misclassified(self.model(torch.where(near.view(-1, 1, 1, 1), found, x)), y)
            if usable.any():
                usable &= self.model(torch.where(usable.view(-1, 1, 1, 1), further, x)).argmax(1) != y
        return torch.where(usable.view(-1, 1, 1, 1), further, found)

    def _starts(self, attack: Any, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        sparse = self.threat.norm is Norm.L0 or type(attack).__name__ in ("PointwiseAttack", "L0BrendelBethgeAttack")
        starts = []
        for i, sample in enumerate(rng.ids):
            stream = generator(rng.seed, *self.purpose, "start", sample)
            start = starting_point(self.model, x[i : i + 1], y[i : i + 1], stream, sparse)
            if start is None:
                raise NoStartError
            starts.append(start)
        return torch.cat(starts)


def _held(x: Tensor, found: Tensor, threat: ThreatModel) -> Tensor:
    """Pull the finite candidates that are outside into the ball and the box; leave every bit of the others."""
    finite = found.flatten(1).isfinite().all(1)
    outside = finite & ~threat.contains(x, found)
    held = found.clone()
    held[outside] = threat.hold(x[outside], threat.project(x[outside], found[outside]))
    return held


def _adapt(attack: Any, threat: ThreatModel, margin: bool, seeds: list[int]) -> None:
    """Put right on the instance what `quarantine.toml` calls mended, and give gradient descent our loss."""
    kind = type(attack)
    if descends(kind):
        attack.get_random_start = _start_each(attack.get_random_start, seeds)
    if margin:
        attack.get_loss_fn = _margin_of
    if issubclass(kind, SparseL1DescentAttack):
        attack.project = lambda x, x0, epsilon: astensor(threat.project(x0.raw, x.raw))
    if issubclass(kind, FMNAttackLp) and attack.p != 0:
        onto = attack.project
        attack.project = lambda x, x0, epsilon: onto(x=x, x0=x0, epsilon=epsilon * OVERSHOOT)


def _start_each(own_start: Callable[[Any, float], Any], seeds: list[int]) -> Callable[[Any, float], Any]:
    """Draw the random start of each sample from its own seed."""

    def start(x0: Any, epsilon: float) -> Any:
        points = []
        for i, seed in enumerate(seeds):
            with seeded(seed, x0.raw.device):
                points.append(own_start(x0[i : i + 1], epsilon))
        return eagerpy.concatenate(points, axis=0)

    return start


def _margin_of(model: Any, labels: Any) -> Callable[[Any], Any]:
    """Return the loss ``sum_i max_k z_k - z_y`` on eagerpy tensors."""
    return lambda inputs: astensor(margin_loss(model(inputs).raw, labels.raw).sum())
