"""What a certifier is: a sound method that proves some samples robust and says why not the others."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.verdict import Certificate


class Certifier(Protocol):
    """A certifier plug-in: a frozen dataclass of hyper-parameters, under the same rules as an attack.

    Certificates must be sound: `proved` only if no input in the threat model changes the prediction from ``y``. One
    about the smoothed classifier says so by an attribute ``smoothed``: it is sound with the confidence of its suite's
    ``[smoothing]``, from which its fields of the same names are filled, and samples a ``model`` that counts.
    """

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        """Return one certificate per input."""
        ...

    def supports(self, threat: ThreatModel) -> bool:
        """Say whether the method is defined for ``threat``."""
        ...
