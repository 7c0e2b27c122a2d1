"""Learning rates as pure functions of the fraction of training done, so that nothing needs checkpointing."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from robusteval.settings import Settings

Fraction = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Schedule(Settings):
    """How the learning rate moves; the fractions are of the whole training.

    multistep: times ``factor``, or each its own one, at each of ``milestones``. linear: straight lines between
    ``points`` (fraction, scale), level before the first and after the last. cosine: half a cosine from 1 to 0
    (Loshchilov & Hutter 2017, arXiv 1608.03983). onecycle: linear from 0 to 1 at ``peak``, then linear to 0 (Smith &
    Topin 2017, arXiv 1708.07120, as fast adversarial training uses it). ``warmup`` is a linear rise from 0 before any
    of these but onecycle.
    """

    name: Literal["multistep", "linear", "cosine", "onecycle"] = "multistep"
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    factor: Factor | tuple[Factor, ...] = 0.1
    points: tuple[tuple[Annotated[float, Field(ge=0, le=1)], Scale], ...] = ((0.0, 1.0), (1.0, 0.0))
    warmup: Fraction = 0.0
    peak: Fraction = 0.4

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.factor, tuple) and len(self.factor) != len(self.milestones):
            raise ValueError(f"{len(self.factor)} factors for {len(self.milestones)} milestones")
        times = [t for t, _ in self.points]
        if not times or times != sorted(times):
            raise ValueError(f"the points' fractions {times} must rise, and be at least one")
        return self

    def scale(self, t: float) -> float:
        """Return the factor on the base learning rate at the fraction ``t`` in [0, 1]."""
        if self.name == "onecycle":
            return triangle(t, self.peak)
        if t < self.warmup:
            return t / self.warmup
        if self.name == "cosine":
            return cosine((t - self.warmup) / (1 - self.warmup))
        if self.name == "linear":
            times, scales = zip(*self.points, strict=True)
            return float(np.interp(t, times, scales))
        factors = self.factor if isinstance(self.factor, tuple) else (self.factor,) * len(self.milestones)
        return math.prod(factor for factor, at in zip(factors, self.milestones, strict=True) if t >= at)


def midpoint(step: int, steps: int) -> float:
    """Return the middle of ``step`` (from 0) of ``steps`` as a fraction: never 0, so no step has learning rate 0."""
    return (step + 0.5) / steps


def cosine(t: float) -> float:
    """``(1 + cos(pi t)) / 2``."""
    return 0.5 * (1 + math.cos(math.pi * t))


def triangle(t: float, peak: float) -> float:
    """``t / peak`` up to ``peak``, then ``(1 - t) / (1 - peak)``."""
    return t / peak if t < peak else (1 - t) / (1 - peak)
