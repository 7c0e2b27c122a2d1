"""Any Foolbox attack, by the name Foolbox gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import foolbox.attacks
import numpy as np
import torch
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn

from robusteval.attacks.base import AttackResult
from robusteval.errors import UsageError, unknown
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel


@dataclass(frozen=True)
class Foolbox:
    """A Foolbox attack (Rauber et al. 2020, JOSS 5(53) 2607) with its own hyper-parameters.

    ``attack`` is a class of `foolbox.attacks`, e.g. "LinfDeepFoolAttack". Foolbox draws from torch's and numpy's
    global generators, which are seeded for the call and then restored.
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"attack": "LinfPGD"},
        {"attack": "LinfDeepFoolAttack"},
        {"attack": "L2DeepFoolAttack"},
        {"attack": "DDNAttack"},
        {"attack": "SparseL1DescentAttack", "params": {"steps": 50}},
    )

    attack: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self._build()
        except TypeError as error:
            raise UsageError(f"Foolbox attack '{self.attack}' does not take these parameters: {error}.") from error

    def _build(self) -> Any:
        known = [name for name in dir(foolbox.attacks) if isinstance(getattr(foolbox.attacks, name), type)]
        if self.attack not in known:
            raise unknown("Foolbox attack", self.attack, known)
        return getattr(foolbox.attacks, self.attack)(**self.params)

    def supports(self, threat: ThreatModel) -> bool:
        """Say whether the attack minimises this norm; an attack without a fixed norm is not refused."""
        distance = getattr(self._build(), "distance", None)
        order = {"Linf": float("inf"), "L2": 2, "L1": 1}[threat.norm.value]
        return distance is None or getattr(distance, "p", order) == order

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return Foolbox's clipped candidates at eps, float32."""
        gpus = [x.device] if x.device.type == "cuda" else []
        numpy_state = np.random.get_state()
        try:
            with torch.random.fork_rng(devices=gpus):
                torch.manual_seed(rng.batch)
                np.random.seed(rng.batch)
                wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
                _, clipped, _ = self._build()(wrapped, x, y, epsilons=threat.radius)
        finally:
            np.random.set_state(numpy_state)
        return AttackResult(threat.hold(x, clipped.detach().float()))
