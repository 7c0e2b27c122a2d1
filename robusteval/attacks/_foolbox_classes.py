"""The attack classes of Foolbox: which there are, which norms they are for, and how they are built."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import foolbox.attacks as zoo
import torch
from foolbox.attacks.base import Attack, FlexibleDistanceMinimizationAttack, MinimizationAttack
from foolbox.attacks.gradient_descent_base import BaseGradientDescent
from foolbox.attacks.pointwise import PointwiseAttack
from foolbox.attacks.saltandpepper import SaltAndPepperNoiseAttack

from robusteval.errors import UsageError

DEFAULTS: dict[str, dict[str, Any]] = {
    "L2CarliniWagnerAttack": {"abort_early": False},
    "EADAttack": {"abort_early": False},
}
"""Where we differ from Foolbox's defaults: stopping early looks at the whole batch's loss."""

_WITHOUT_GRADIENT = (
    *("HopSkipJump", "Boundary", "Pointwise", "GenAttack", "Noise", "ContrastReduction", "GaussianBlur", "Inversion"),
    *("Spatial", "Dataset", "Binarization"),
)
"""Parts of the names of attacks that see predictions or scores only."""

_DETERMINISTIC = (
    *("LinfDeepFoolAttack", "L2DeepFoolAttack", "DDNAttack", "L2CarliniWagnerAttack", "EADAttack", "NewtonFoolAttack"),
    *("LInfFMNAttack", "L2FMNAttack", "L1FMNAttack", "L0FMNAttack"),
    *("InversionAttack", "GaussianBlurAttack", "L2ContrastReductionAttack"),
    *("BinarySearchContrastReductionAttack", "LinearSearchContrastReductionAttack", "BinarizationRefinementAttack"),
)

_OBJECTS = ("init_attack", "distance")
_ORDERS = {"Linf": float("inf"), "L2": 2, "L1": 1, "L0": 0}


@cache
def attack_classes() -> dict[str, type[Any]]:
    """Return name -> class of everything in `foolbox.attacks` that can be run, aliases included."""
    members = inspect.getmembers(zoo, inspect.isclass)
    return {name: cls for name, cls in members if issubclass(cls, Attack) and not inspect.isabstract(cls)}


def attack_class(name: str) -> type[Any]:
    """Return the class that Foolbox calls ``name``; raise `UsageError` with the nearest name if there is none."""
    known = attack_classes()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), [each.lower() for each in known], n=1, cutoff=0.5)
        meant = [f" Did you mean '{each}'?" for each in known if each.lower() in close]
        raise UsageError(f"unknown Foolbox attack '{name}'.{''.join(meant)} Known: {', '.join(known)}.")
    return known[name]


def settings(cls: type[Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return every parameter that ``cls`` would be built with, defaults included."""
    signature = inspect.signature(cls).parameters.values()
    own = {each.name: each.default for each in signature if each.default is not inspect.Parameter.empty}
    return {**own, **DEFAULTS.get(cls.__name__, {}), **params}


def build(cls: type[Any], params: Mapping[str, Any]) -> Any:
    """Build the attack; raise `UsageError` for parameters that it does not take."""
    given = [name for name in _OBJECTS if name in params]
    if given:
        raise UsageError(
            f"Foolbox attack '{cls.__name__}': '{given[0]}' is a Python object in Foolbox and cannot be given here; "
            f"starting points are searched per sample and the distance is the threat model's."
        )
    try:
        return cls(**{**DEFAULTS.get(cls.__name__, {}), **params})
    except Exception as error:
        problem = str(error) or type(error).__name__
        raise UsageError(f"Foolbox attack '{cls.__name__}' does not take these parameters: {problem}.") from error


def descends(cls: type[Any]) -> bool:
    """Say whether the attack is projected gradient descent on a loss that can be exchanged."""
    return issubclass(cls, BaseGradientDescent)


def draws(cls: type[Any], params: Mapping[str, Any]) -> bool:
    """Say whether the attack draws random numbers, so that restarts differ."""
    if descends(cls):
        return bool(settings(cls, params)["random_start"])
    return cls.__name__ not in _DETERMINISTIC


def follows_gradient(cls: type[Any]) -> bool:
    """Say whether the attack needs the model's gradient; the others see predictions or scores only."""
    return not any(part in cls.__name__ for part in _WITHOUT_GRADIENT)


def minimises(cls: type[Any]) -> bool:
    """Say whether the attack looks for the smallest perturbation, whatever eps is."""
    return issubclass(cls, MinimizationAttack)


def takes_start(cls: type[Any]) -> bool:
    """Say whether the attack cannot begin without a misclassified starting point; FMN can, though it takes one."""
    run = getattr(cls, "run", None)
    return run is not None and "starting_points" in inspect.signature(run).parameters and "FMN" not in cls.__name__


def serves(attack: Any, norm: str) -> bool:
    """Say whether ``attack`` keeps to, or minimises, the norm of that name.

    Salt-and-pepper noise changes few values and Pointwise undoes as many changes as it can, so both serve L0.
    What else measures a distance of the user's choice (blends, blur, contrast) changes every value.
    """
    if isinstance(attack, PointwiseAttack):
        return True
    if isinstance(attack, FlexibleDistanceMinimizationAttack):
        return norm != "L0"
    if isinstance(attack, SaltAndPepperNoiseAttack) and norm == "L0":
        return True
    distance = getattr(attack, "distance", None)
    return distance is not None and bool(distance.p == _ORDERS[norm])


class Float32(torch.nn.Module):
    """The model with float32 logits, whatever it computes in: DeepFool and FMN pass inputs of their type on."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False  # not `eval()`, which would change the modes inside the model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (N, K)."""
        logits: torch.Tensor = self.model(x)
        return logits.float()
