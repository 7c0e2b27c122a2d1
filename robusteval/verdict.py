"""The four-valued verdict on one sample, the only result state there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor


class Verdict(StrEnum):
    """What is known about one sample under one threat model.

    MISCLASSIFIED: the clean input is already wrong. BROKEN: an adversarial input was found and re-checked.
    CERTIFIED: a sound method proved that none exists. UNKNOWN: neither.
    """

    MISCLASSIFIED = "misclassified"
    BROKEN = "broken"
    UNKNOWN = "unknown"
    CERTIFIED = "certified"


ROBUST = (Verdict.UNKNOWN, Verdict.CERTIFIED)
"""The verdicts on samples that nothing broke, which empirical robust accuracy counts."""

Evidence = Mapping[str, Tensor]
"""Tensors by name, as they are stored."""


@dataclass(frozen=True)
class Sampling:
    """What a certificate by sampling rests on: the class chosen, and how many votes it had at each look."""

    chosen: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Certificate:
    """A certifier's answer for one sample: a proof, or why there is none, and the votes if it asked for some.

    ``evidence`` is what its `recheck` needs to see a proof again without searching for it. A search for a proof may
    end in an adversarial input instead: ``counterexample``, float32 (C, H, W).
    """

    proved: bool
    reason: str
    sampling: Sampling | None = None
    evidence: Evidence | None = field(default=None, compare=False)
    counterexample: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Witness:
    """An adversarial input, re-checked by the harness.

    ``x_adv`` is float32 (C, H, W) in [0,1]; ``margin`` is ``z_y - max_{k != y} z_k`` there, negative or zero.
    """

    x_adv: Tensor
    prediction: int
    distance: float
    margin: float
