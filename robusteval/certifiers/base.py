"""What a certifier is: a sound method that proves some samples robust and says why not the others."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.verdict import Certificate


class Certifier(Protocol):
    """A certifier plug-in: a frozen dataclass of hyper-parameters, under the same rules as an attack.

    Certificates must be sound: `proved` only if no input in the threat model changes the prediction from ``y``. A
    counter-example is a claim that the harness checks, as it does an attack's.
    """

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        """Return one certificate per input."""
        ...

    def supports(self, threat: ThreatModel) -> bool:
        """Say whether the method is defined for ``threat``."""
        ...
