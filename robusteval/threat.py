"""Threat models: which inputs an adversary may present in place of ``x``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import torch
from torch import Tensor

from robusteval.errors import UsageError, unknown

BUDGET_TOLERANCE = 1e-6
"""Slack, in pixel units of [0, 1], that float32 rounding of ``x + delta`` is allowed."""

MAX_EPS_LENGTH = 40
_DECIMAL = re.compile(r"\d+(\.\d*)?|\.\d+")
_RATIO = re.compile(r"(\d+)/(\d+)")


class Norm(StrEnum):
    """The norm that bounds a perturbation; values are spelled as AutoAttack and RobustBench do.

    L0, not a norm in the strict sense, counts changed values: a pixel of three channels has three.
    """

    LINF = "Linf"
    L2 = "L2"
    L1 = "L1"
    L0 = "L0"

    @classmethod
    def parse(cls, text: str) -> Norm:
        """Return the norm called ``text``, whatever its case; raise `UsageError` otherwise."""
        for norm in cls:
            if norm.value.lower() == text.strip().lower():
                return norm
        raise unknown("norm", text, [norm.value for norm in cls])


def parse_eps(text: str) -> Fraction:
    """Parse ``"8/255"`` or ``"0.5"`` exactly; raise `UsageError` unless it is positive and finite."""
    cleaned = text.strip()
    if len(cleaned) > MAX_EPS_LENGTH:
        raise UsageError(f"eps '{cleaned[:20]}...' has {len(cleaned)} characters; at most {MAX_EPS_LENGTH} are read.")
    if cleaned.startswith("-"):
        raise UsageError(f"eps '{text}' is negative; give a positive eps such as 8/255.")
    ratio = _RATIO.fullmatch(cleaned)
    if ratio and int(ratio[2]) == 0:
        raise UsageError(f"eps '{text}' divides by zero; write a positive fraction such as 8/255.")
    if not ratio and not _DECIMAL.fullmatch(cleaned):
        raise UsageError(f"eps '{text}' is not a number; write a fraction such as 8/255 or a decimal such as 0.5.")
    eps = Fraction(int(ratio[1]), int(ratio[2])) if ratio else Fraction(cleaned)
    if eps == 0:
        raise UsageError(f"eps '{text}' is zero: clean accuracy needs no attack; give a positive eps such as 8/255.")
    return eps


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View (N,) as (N, 1, ...), to be broadcast over ``like`` (N, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class ThreatModel:
    """The ball ``{x' in [0,1]^d : ||x' - x||_p <= eps}`` around every input ``x``.

    ``label`` keeps the spelling the user gave, so that "0.031" and "8/255" stay visibly different.
    """

    norm: Norm
    eps: Fraction
    label: str

    @classmethod
    def parse(cls, norm: str, eps: str) -> ThreatModel:
        """Build a threat model from two strings; raise `UsageError` for anything that is not one."""
        parsed_norm, parsed_eps = Norm.parse(norm), parse_eps(eps)
        if parsed_norm is Norm.LINF and parsed_eps > 1:
            raise UsageError(f"eps '{eps}' is above 1, the whole input range [0, 1] in Linf; did you mean {eps}/255?")
        if parsed_norm is Norm.L0 and parsed_eps.denominator != 1:
            raise UsageError(f"eps '{eps}' is no whole number; in L0 it is how many values may change, such as 24.")
        return cls(parsed_norm, parsed_eps, eps.strip())

    @property
    def radius(self) -> float:
        """``eps`` as a float64."""
        return float(self.eps)

    @property
    def convex(self) -> bool:
        """Whether the ball is convex, which projected gradients and bounds rely on; an L0 ball is not."""
        return self.norm is not Norm.L0

    def __str__(self) -> str:
        return f"{self.norm.value} {self.label}"

    def resized(self, radius: float) -> ThreatModel:
        """Return the threat model of another ``radius``, in pixel units; its label is that number."""
        return ThreatModel(self.norm, Fraction(radius), f"{radius:g}")

    def distance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Return ``||x_adv - x||_p`` per sample, computed in float64. Shapes (N, ...) -> (N,)."""
        delta = _flat(x_adv.double() - x.double())
        if self.norm is Norm.L0:
            return (delta != 0).sum(1).double()
        order = {Norm.LINF: math.inf, Norm.L2: 2.0, Norm.L1: 1.0}[self.norm]
        size: Tensor = torch.linalg.vector_norm(delta, ord=order, dim=1)
        return size

    def contains(self, x: Tensor, x_adv: Tensor, tolerance: float = BUDGET_TOLERANCE) -> Tensor:
        """Return, per sample, whether ``x_adv`` is finite, in [0,1] and within ``eps + tolerance`` of ``x``."""
        flat = _flat(x_adv)
        boxed = (flat >= 0).all(1) & (flat <= 1).all(1)
        return boxed & (self.distance(x, x_adv) <= self.radius + tolerance)

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Move ``x_adv`` into the ball and the box. Never differentiate through it.

        For L2 and L1 the point is projected on the ball, then clipped; as ``x`` lies in the box, clipping
        only shortens the perturbation, so the result satisfies both, up to float32 rounding (see `hold`).
        For L0 the point is clipped, then all but the ``eps`` largest changes are undone.
        """
        return self.projector(x)(x_adv)

    def projector(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return `project` around a fixed ``x``; what depends on ``x`` alone is computed once."""
        if self.norm is Norm.LINF:
            low, high = ((x + reach).clamp(0.0, 1.0) for reach in (-self.radius, self.radius))
            return lambda x_adv: torch.clamp(x_adv, low, high)
        if self.norm is Norm.L0:
            return lambda x_adv: _largest_changes(x, x_adv.clamp(0.0, 1.0), int(self.eps))
        onto_ball = _project_l2 if self.norm is Norm.L2 else _project_l1
        return lambda x_adv: (x + onto_ball(x_adv - x, self.radius)).clamp(0.0, 1.0)

    def hold(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Shrink the candidates that are outside until they are inside; the others keep every bit.

        A budget kept in float32, as in `project`, is exceeded by more than `BUDGET_TOLERANCE` in large L2 and L1
        balls. Here it is kept in float64 and coordinates are rounded towards ``x``, so that rounding cannot exceed it.
        """
        if self.norm is Norm.L0:
            return self.project(x, x_adv)  # moves nothing that is inside already, and rounds nothing
        origin, scale = x.double(), (self.radius / self.distance(x, x_adv)).clamp_max(1.0)
        target = (origin + (x_adv.double() - origin) * per_sample(scale, x)).clamp(0.0, 1.0)
        point = target.to(x.dtype)
        beyond = (point.double() - origin).abs() > (target - origin).abs()
        point = torch.where(beyond, torch.nextafter(point, x), point)
        return torch.where(per_sample(self.contains(x, x_adv), x), x_adv, point)

    def sample(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Draw one point per sample: uniform in the Linf and L2 balls, on random L1 rays, ``eps`` random values for L0.

        Clipped to [0,1].
        """
        if self.norm is Norm.LINF:
            noise = torch.rand(x.shape, generator=rng, device=rng.device, dtype=x.dtype).to(x.device)
            return self.project(x, x + self.radius * (2 * noise - 1))
        if self.norm is Norm.L0:
            places, values = torch.rand(2, *x.shape, generator=rng, device=rng.device, dtype=x.dtype).to(x.device)
            chosen = _top(places, int(self.eps))
            return torch.where(chosen, values, x)
        noise = torch.randn(x.shape, generator=rng, device=rng.device, dtype=x.dtype).to(x.device)
        order = 2 if self.norm is Norm.L2 else 1
        noise = noise / per_sample(torch.linalg.vector_norm(_flat(noise), ord=order, dim=1), noise)
        length = torch.rand(len(x), generator=rng, device=rng.device, dtype=x.dtype).to(x.device)
        if self.norm is Norm.L2:
            length = length ** (1 / _flat(x).shape[1])
        return self.project(x, x + self.radius * noise * per_sample(length, noise))


def _top(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest values of each sample, or all where there are fewer."""
    flat = _flat(values)
    best = flat.topk(min(count, flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, best, True).view_as(values)


def _largest_changes(x: Tensor, x_adv: Tensor, count: int) -> Tensor:
    return torch.where(_top((x_adv - x).abs(), count), x_adv, x)


def _project_l2(delta: Tensor, radius: float) -> Tensor:
    size = torch.linalg.vector_norm(_flat(delta), dim=1).clamp_min(1e-12)
    return delta * per_sample((radius / size).clamp_max(1.0), delta)


def _project_l1(delta: Tensor, radius: float) -> Tensor:
    """Project each row on the L1 ball (Duchi et al. 2008, ICML): soft-threshold at the exact level."""
    flat = _flat(delta)
    magnitude, _ = flat.abs().sort(dim=1, descending=True)
    rank = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    level = (magnitude.cumsum(1) - radius) / rank
    active = (magnitude > level).sum(1, keepdim=True).clamp_min(1)
    threshold = level.gather(1, active - 1).clamp_min(0)
    return (flat.sign() * (flat.abs() - threshold).clamp_min(0)).view_as(delta)
