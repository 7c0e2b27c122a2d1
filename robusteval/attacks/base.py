"""What an attack is: a pure function from correctly classified inputs to candidates for adversarial inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel


@dataclass(frozen=True)
class AttackResult:
    """Candidates (N, C, H, W), float32, one per input; the harness decides which of them are adversarial.

    ``adaptations`` says where the attack had to depart from its definition, ``warnings`` what it found odd about
    the model; each sentence once.
    """

    candidates: Tensor
    adaptations: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Attack(Protocol):
    """An attack plug-in: a frozen dataclass of hyper-parameters.

    ``x`` is (N, C, H, W) float32 in [0,1], ``y`` (N,) int64; ``model`` maps ``x`` to logits, is in eval mode
    and has frozen parameters. ``rng`` is the only source of randomness: the global generators, the model's
    mode, hooks, gradients and flags are left as found. `robusteval.testing.attacks.check_attack` checks all this.

    An attack that takes no gradient of the model says so by an attribute ``gradient_free``, one that finds the nearest
    adversarial input, so that one run serves every eps, by an attribute ``minimal``.

    One that attacks the smoothed classifier says so by an attribute ``smoothed``; it runs only in suites with a
    ``[smoothing]`` table, from which its fields of the same names (such as ``sigma``) are filled. ``model`` is still
    the network, without noise.

    An attack with parameters that have no default says what the conformance tests are to try in a class attribute
    ``EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]]``; without one they try the defaults.
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return one candidate per input."""
        ...

    def supports(self, threat: ThreatModel) -> bool:
        """Say whether the attack is defined for ``threat``."""
        ...
