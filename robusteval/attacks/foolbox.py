"""Any Foolbox attack, by the name Foolbox gives it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from robusteval.attacks._foolbox_classes import (
    attack_class,
    build,
    descends,
    draws,
    follows_gradient,
    minimises,
    serves,
    settings,
)
from robusteval.attacks._foolbox_quarantine import Fault, faults_of, refuse, warnings_of
from robusteval.attacks._foolbox_run import NoStartError, Run
from robusteval.attacks.base import AttackResult
from robusteval.errors import RobustevalError, UsageError
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel

Attempt = Callable[[Tensor, Tensor, SampleRng], Tensor]

_NO_SAMPLES_FAULT = (TypeError, AttributeError, NotImplementedError, ImportError)
"""What says that the call itself is wrong, so that no sample could fare better."""


@dataclass(frozen=True)
class Foolbox:
    """A Foolbox attack (Rauber et al. 2020, JOSS 5(53) 2607) with its own hyper-parameters.

    ``attack`` is a class of `foolbox.attacks`, e.g. "LinfDeepFoolAttack". ``loss`` is what gradient descent climbs,
    Foolbox's cross-entropy unless given. A restart sees the samples that the ones before it left, with new random
    numbers. Attacks with known faults are refused or warn (`quarantine.toml`); ``quarantined`` runs the refused ones.

    A sample on which Foolbox fails is returned as it came, and a warning says so. Foolbox draws from torch's and
    numpy's global generators, which are seeded, per sample where the draws matter, and restored.
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"attack": "LinfPGD"},
        {"attack": "LinfPGD", "loss": "margin", "restarts": 2},
        {"attack": "LinfDeepFoolAttack"},
        {"attack": "LInfFMNAttack"},
        {"attack": "L2DeepFoolAttack"},
        {"attack": "DDNAttack"},
        {"attack": "L2BasicIterativeAttack", "loss": "margin"},
        {"attack": "SparseL1DescentAttack", "params": {"steps": 50}},
        {"attack": "L1FMNAttack"},
        {"attack": "L0FMNAttack"},
    )

    attack: str
    params: Mapping[str, Any] = field(default_factory=dict)
    loss: Literal["ce", "margin"] | None = None
    restarts: int = 1
    quarantined: bool = False

    def __post_init__(self) -> None:
        cls = attack_class(self.attack)
        refuse(cls.__name__, self._faults(), self.quarantined)
        build(cls, self.params)
        if self.loss and not descends(cls):
            raise UsageError(f"loss '{self.loss}' is for gradient descent (BIM, PGD, SLIDE), not for {self.attack}.")
        if self.restarts < 1:
            raise UsageError(f"restarts = {self.restarts} is not allowed: at least 1.")
        if self.restarts > 1 and not draws(cls, self.params):
            raise UsageError(f"restarts = {self.restarts} would repeat {self.attack}, which draws no random numbers.")

    def _faults(self) -> list[Fault]:
        cls = attack_class(self.attack)
        return faults_of(cls.__name__, settings(cls, self.params))

    @property
    def gradient_free(self) -> bool:
        """Whether Foolbox's attack takes no gradient."""
        return not follows_gradient(attack_class(self.attack))

    @property
    def minimal(self) -> bool:
        """Whether Foolbox's attack looks for the smallest perturbation."""
        return minimises(attack_class(self.attack))

    def supports(self, threat: ThreatModel) -> bool:
        """Say whether the attack keeps to this norm, minimises it, or takes any."""
        return serves(build(attack_class(self.attack), self.params), threat.norm.value)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return Foolbox's candidates, float32, held within ``threat``."""
        if torch.is_inference_mode_enabled():  # every sample would fail by itself
            raise RobustevalError("Foolbox's attacks cannot run under torch.inference_mode().")
        cls, faults = attack_class(self.attack), self._faults()
        said, alone = warnings_of(cls.__name__, faults), any(fault.action == "alone" for fault in faults)
        found, left = x.clone(), torch.arange(len(x), device=x.device)
        for restart in range(self.restarts):
            run = Run(lambda: build(cls, self.params), model, threat, self.loss == "margin", (cls.__name__, restart))
            x_left, y_left = x[left], y[left]
            ends, problems = self._fenced(run, model, x_left, y_left, rng.take(left), alone)
            found[left] = ends
            said += problems
            if restart + 1 < self.restarts:
                with torch.no_grad():
                    left = left[model(ends).argmax(1) == y_left]
            if len(left) == 0:
                break
        return AttackResult(found, warnings=tuple(dict.fromkeys(said)))

    def _fenced(
        self, run: Attempt, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng, alone: bool
    ) -> tuple[Tensor, list[str]]:
        """Run on the whole batch, or sample by sample if ``alone`` or if the batch fails; return the problems too."""
        if not alone:
            found, problems = self._attempt(run, x, y, rng)
            if found is not None:
                return self._finite(x, found, problems)
            if not _differentiable(model, x):  # rather than report every sample as unbroken
                raise RobustevalError(f"Foolbox's {self.attack} needs the model's gradients; try suite 'decision'.")
        ends, said = [], []
        for i in torch.arange(len(x)):
            found, problems = self._attempt(run, x[i : i + 1], y[i : i + 1], rng.take(i[None]))
            ends.append(x[i : i + 1] if found is None else found)
            said += problems
        return self._finite(x, torch.cat(ends), said)

    def _attempt(self, run: Attempt, x: Tensor, y: Tensor, rng: SampleRng) -> tuple[Tensor | None, list[str]]:
        """Return the candidates, or None and what went wrong."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Foolbox's count samples; ours say what matters
                return run(x, y, rng), []
        except NoStartError:
            problem = "found no misclassified point to start from"
        except (RobustevalError, torch.OutOfMemoryError):
            raise
        except _NO_SAMPLES_FAULT as error:
            raise RobustevalError(f"Foolbox's {self.attack} failed: {type(error).__name__}: {error}") from error
        except Exception as error:
            problem = f"failed with {type(error).__name__}"
        return None, [f"Foolbox's {self.attack} {problem} on some samples, which count as not broken."]

    def _finite(self, x: Tensor, found: Tensor, said: list[str]) -> tuple[Tensor, list[str]]:
        """Put the inputs in place of candidates that are not finite."""
        finite = found.flatten(1).isfinite().all(1)
        if not finite.all():
            said = [*said, f"Foolbox's {self.attack} returned NaN for some samples, which count as not broken."]
        return torch.where(finite.view(-1, 1, 1, 1), found, x), said


def _differentiable(model: nn.Module, x: Tensor) -> bool:
    """Say whether logits have gradients, judged by the first input on which the model runs at all."""
    for i in range(len(x)):
        with suppress(Exception), torch.enable_grad():
            return bool(model(x[i : i + 1].clone().requires_grad_()).requires_grad)
    return True
