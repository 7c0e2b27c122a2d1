"""The conformance suite of attacks."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from robusteval.attacks.base import Attack
from robusteval.errors import UsageError
from robusteval.testing._problems import THREATS, Problem, corner, linear
from robusteval.testing._purity import bits, disturb, guarded, require, untouched
from robusteval.threat import ThreatModel

NEAR, CLAMP, BEYOND = 0.3, 0.6, (1.05, 2.0)
"""Distances from the decision boundary, in eps: where every attack must succeed, where it must although the input is
black and white (one that differentiates through a clamp reaches half), and where none can."""

CHEAP = 2000
"""Forward passes up to which an attack is tried beyond its reach for every norm, not for the first alone."""


def check_attack(attack: Attack) -> None:
    """Raise `AssertionError` unless ``attack`` keeps the contract of `robusteval.attacks.base.Attack`.

    For every norm that it supports: what it returns, that it leaves everything as found, that it repeats bit by bit,
    that its adversarial inputs obey the threat model, and that it breaks what is easily broken. It may refuse fewer
    than four classes with a `UsageError`.
    """
    supported = [threat for threat in THREATS if attack.supports(threat)]
    require(supported, f"{attack} supports none of the norms {', '.join(threat.norm for threat in THREATS)}")
    _check_sizes(attack, supported[0])
    cheap = True
    for threat in supported:
        _check_repeats(attack, linear(threat, 4, (NEAR,) * 3))
        _check_strength(attack, corner(threat, CLAMP), 8)
        factors = (*(NEAR,) * 6, *(BEYOND if cheap else (NEAR, NEAR)))
        cheap = _check_strength(attack, linear(threat, 4, factors), 6) <= CHEAP and cheap


def _check_sizes(attack: Attack, threat: ThreatModel) -> None:
    _run(attack, linear(threat, 4, (NEAR,)))
    for classes in (2, 3):
        with suppress(UsageError):
            _run(attack, linear(threat, classes, (NEAR,) * 3))


def _check_repeats(attack: Attack, problem: Problem) -> None:
    first, _ = _run(attack, problem)
    disturb()
    second, _ = _run(attack, problem)
    require(bits(first) == bits(second), f"{attack} ({problem.threat}) differs when called again with the same rng")


def _check_strength(attack: Attack, problem: Problem, near: int) -> int:
    """Require that all but at most one of the first ``near`` samples are broken within the threat model.

    Returns the number of forward passes taken.
    """
    found, passes = _run(attack, problem)
    wrong = problem.predict(found) != problem.y
    outside = wrong & ~problem.threat.contains(problem.x, found)
    distances = problem.threat.distance(problem.x, found)[outside].tolist()
    require(not distances, f"{attack} leaves {problem.threat} or the box [0,1] to misclassify, distances {distances}")
    broken, place = int(wrong[:near].sum()), "black-and-white inputs" if problem.x.max() == 1 else "inputs"
    require(broken >= near - 1, f"{attack} breaks {broken} of {near} {place} that {problem.threat} easily breaks")
    return passes


def _run(attack: Attack, problem: Problem) -> tuple[Tensor, int]:
    """Return the attack's candidates, looked at from all sides, and the forward passes it took."""
    model, x, y, threat = guarded(problem.model), problem.x.clone(), problem.y.clone(), problem.threat
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    with untouched(f"{attack} ({threat})", model, x, y):
        found = attack(model, x, y, threat, problem.rng).candidates
    require(found.shape == x.shape, f"{attack} returns shape {tuple(found.shape)} for inputs {tuple(x.shape)}")
    require(found.dtype == torch.float32, f"{attack} returns {found.dtype}, not float32")
    require(found.device == x.device, f"{attack} returns candidates on {found.device}, not on {x.device}")
    require(found.isfinite().all(), f"{attack} returns NaN or infinite candidates ({threat})")
    return found.detach(), len(passes)
