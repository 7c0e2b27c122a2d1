"""The adversarial inputs that another run found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from robusteval.attacks.base import AttackResult
from robusteval.errors import UsageError
from robusteval.rng import SampleRng
from robusteval.runs import digest, file_digest
from robusteval.threat import ThreatModel
from robusteval.witnesses import load_witnesses, witness_files


@dataclass(frozen=True)
class Transfer:
    """Transfer: tries the witnesses of another run, of this model or another, on the same samples.

    ``run`` is the folder of that evaluation, ``sha256`` of its witness files, which it must still have; empty: any.
    A witness is pulled into the ball where its own run allowed more, and the harness decides as ever. It follows no
    gradient of the model, so what it breaks and gradient attacks do not betrays masking (Papernot et al. 2016,
    arXiv 1605.07277).
    """

    EXAMPLES: ClassVar[None] = None  # it needs a run
    gradient_free: ClassVar[bool] = True

    run: str
    sha256: str = ""

    def check(self) -> None:
        """Raise `UsageError` unless the run is there with the witnesses that are meant."""
        found = witnesses_digest(self.run)
        if self.sha256 and found != self.sha256:
            raise UsageError(f"the witnesses in '{self.run}' are not those that this suite was made with.")

    def supports(self, threat: ThreatModel) -> bool:
        """Any: a witness of another norm is pulled into this one's ball."""
        return True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        """Return each sample's witness, held within ``threat``, or the sample itself where there is none."""
        stored = _load(self)
        found = x.clone()
        rows = [row for row, sample in enumerate(rng.ids) if sample in stored]
        if rows:
            witnesses = torch.stack([stored[rng.ids[row]] for row in rows]).to(x.device)
            if witnesses.shape[1:] != x.shape[1:]:
                shapes = f"{tuple(witnesses.shape[1:])}, the data {tuple(x.shape[1:])}"
                raise UsageError(f"the witnesses in '{self.run}' have shape {shapes}.")
            found[rows] = threat.hold(x[rows], witnesses)
        return AttackResult(found)


def witnesses_digest(run: str) -> str:
    """Return the SHA-256 of all witness files of a run; raise `UsageError` if it has none."""
    files = witness_files(Path(run))
    if not files:
        raise UsageError(f"'{run}' has no witnesses; name the folder of an evaluation that broke samples.")
    return digest([file_digest(path) for path in files])


@lru_cache(maxsize=1)
def _load(attack: Transfer) -> dict[int, Tensor]:
    """Return sample id -> witness, once checked; kept from chunk to chunk."""
    attack.check()
    return {
        sample: x_adv.float().nan_to_num()
        for path in witness_files(Path(attack.run))
        for sample, x_adv in zip(*load_witnesses(path), strict=True)
    }
