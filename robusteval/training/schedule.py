"""Learning rates as pure functions of the fraction of training done, so that nothing needs checkpointing."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from robusteval.settings import Settings

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Schedule(Settings):
    """How the learning rate moves; the fractions are of the whole training.

    multistep: times ``factor`` at each of ``milestones``. cosine: half a cosine from 1 to 0 (Loshchilov & Hutter
    2017, arXiv 1608.03983). onecycle: linear from 0 to 1 at ``peak``, then linear to 0 (Smith & Topin 2017,
    arXiv 1708.07120, as fast adversarial training uses it). ``warmup`` is a linear rise from 0 before the first two.
    """

    name: Literal["multistep", "cosine", "onecycle"] = "multistep"
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    factor: float = Field(default=0.1, gt=0, le=1)
    warmup: Fraction = 0.0
    peak: Fraction = 0.4

    def scale(self, t: float) -> float:
        """Return the factor on the base learning rate at the fraction ``t`` in [0, 1]."""
        if self.name == "onecycle":
            return triangle(t, self.peak)
        if t < self.warmup:
            return t / self.warmup
        if self.name == "cosine":
            return cosine((t - self.warmup) / (1 - self.warmup))
        return self.factor ** sum(t >= milestone for milestone in self.milestones)


def midpoint(step: int, steps: int) -> float:
    """Return the middle of ``step`` (from 0) of ``steps`` as a fraction: never 0, so no step has learning rate 0."""
    return (step + 0.5) / steps


def cosine(t: float) -> float:
    """``(1 + cos(pi t)) / 2``."""
    return 0.5 * (1 + math.cos(math.pi * t))


def triangle(t: float, peak: float) -> float:
    """``t / peak`` up to ``peak``, then ``(1 - t) / (1 - peak)``."""
    return t / peak if t < peak else (1 - t) / (1 - peak)
