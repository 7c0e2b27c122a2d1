"""What a certifier is: a sound method that proves some samples robust and says why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.verdict import Certificate, Sampling


class Certifier(Protocol):
    """A certifier plug-in: a frozen dataclass of hyper-parameters, under the same rules as an attack.

    Certificates must be sound: `proved` only if no input in the threat model changes the prediction from ``y``. One
    that may end in a counter-example says so by an attribute ``refutes``; the harness checks it as it does an attack's.
    One that gives evidence has a method `recheck` (model, x, y, threat, evidence per input) -> list of bool, which sees
    from it alone, in a fraction of the time, that the proof is right. One that ``searches`` for its proofs gives
    evidence for each: without it nobody would know how long to search again.
    """

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        """Return one certificate per input."""
        ...

    def supports(self, threat: ThreatModel) -> bool:
        """Say whether the method is defined for ``threat``."""
        ...


class SamplingCertifier(Protocol):
    """A certifier of the smoothed classifier, which it says by an attribute ``smoothed``.

    It is sound with the confidence of its suite's ``[smoothing]``, from which its fields of the same names are filled.
    """

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        rng: SampleRng,
        known: Sequence[Sampling | None] = (),
    ) -> list[Certificate]:
        """Return one certificate per input, with the votes; ``known`` are those it returned at a smaller eps."""
        ...

    def supports(self, threat: ThreatModel) -> bool:
        """Say whether the method is defined for ``threat``."""
        ...
