"""Activations: their values on an interval, and planes that bound them there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

SLACK = 1e-9
"""By how much, relative to their size, bounds found in different ways may cross by rounding."""


@dataclass(frozen=True)
class Planes:
    """``low_slope z + low <= f(z) <= high_slope z + high`` for every ``z`` in the interval; all (N, *shape)."""

    low_slope: Tensor
    low: Tensor
    high_slope: Tensor
    high: Tensor

    @cached_property
    def bent(self) -> Tensor:
        """Where (N, *shape) the planes are not both the same line through 0."""
        return (self.low_slope != self.high_slope) | (self.low != 0) | (self.high != 0)


@dataclass(frozen=True)
class Activation:
    """A function of single values.

    ``interval`` maps bounds of the argument to bounds of the value, ``planes`` to `Planes`. For piecewise linear ones
    with a kink at 0, ``leak`` is the slope below it (at most 1) and the slope above is 1; others have None.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    interval: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    leak: float | None = None

    def planes(self, lower: Tensor, upper: Tensor, parallel: bool = False) -> Planes:
        """Return planes: for ReLU those of CROWN (Zhang et al. 2018, arXiv 1811.00866), for others constant ones.

        ReLU's lower slope is that of the smaller area, or with ``parallel`` that of the upper plane (Fast-Lin,
        Weng et al. 2018, arXiv 1804.09699).
        """
        if self.leak is None:
            low, high = self.interval(lower, upper)
            flat = torch.zeros_like(low)
            return Planes(flat, low, flat, high)
        return _kinked(lower, upper, self.leak, parallel)


def _kinked(lower: Tensor, upper: Tensor, leak: float, parallel: bool) -> Planes:
    """Bound ``max(leak z, z)``: by itself where its sign is known, else by the chord and a line through 0."""
    sane = lower <= upper + SLACK * (1 + upper.abs())
    lower, upper = torch.where(sane, lower, torch.nan), torch.where(sane, upper, torch.nan)  # which prove nothing
    unstable = ~((lower >= 0) | (upper <= 0))
    width = torch.where(unstable, upper - lower, 1.0)
    chord = (upper - leak * lower) / width
    known = torch.where(lower >= 0, torch.ones_like(lower), torch.full_like(lower, leak))
    high_slope = torch.where(unstable, chord, known)
    high = torch.where(unstable, upper * (1 - chord), torch.zeros_like(upper))
    adaptive = torch.where(upper > -lower, torch.ones_like(upper), torch.full_like(upper, leak))
    low_slope = torch.where(unstable, chord if parallel else adaptive, known)
    return Planes(low_slope, torch.zeros_like(low_slope), high_slope, high)


def monotone(name: str, f: Callable[[Tensor], Tensor]) -> Activation:
    """Return a non-decreasing activation."""
    return Activation(name, f, lambda lower, upper: (f(lower), f(upper)))


def kinked(name: str, leak: float) -> Activation:
    """Return ``max(leak z, z)`` for a ``leak`` of at most 1."""

    def f(z: Tensor) -> Tensor:
        return functional.relu(z) - leak * functional.relu(-z)

    return Activation(name, f, lambda lower, upper: (f(lower), f(upper)), leak)


def dipping(name: str, f: Callable[[Tensor], Tensor], at: float, least: float) -> Activation:
    """Return an activation that falls up to ``at`` and rises beyond; ``least``, rounded down, is its minimum."""

    def interval(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        ends = f(lower), f(upper)
        dips = (lower < at + 1e-6) & (upper > at - 1e-6)
        low = torch.where(dips, torch.full_like(lower, least), torch.minimum(*ends))
        return low, torch.maximum(*ends)

    return Activation(name, f, interval)


RELU = kinked("relu", 0.0)
SIGMOID = monotone("sigmoid", torch.sigmoid)
TANH = monotone("tanh", torch.tanh)
SILU = dipping("silu", functional.silu, -1.278464561437454, -0.2784645427610739)
GELU = dipping("gelu", functional.gelu, -0.7517915280268221, -0.16997120748)
GELU_TANH = dipping("gelu, tanh", lambda z: functional.gelu(z, approximate="tanh"), -0.7524614146126076, -0.170040788)
