"""What attacks that look for the smallest perturbation share: the record of what they found, slopes and projections.

One search serves every eps: it returns, per sample, the nearest adversarial point and its distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional

from robusteval.attacks._l1 import shrink_l1
from robusteval.attacks._losses import margin_loss
from robusteval.attacks.base import AttackResult
from robusteval.threat import Norm, ThreatModel, per_sample

HALVINGS = 25
"""Bisections of the L2 projection's factor: float32 has no more digits to offer."""

LEAD = 3e-5
"""By how much, relative to the logits, another class must lead. The nearest points lie on the decision boundary, where
rounding, which differs between batch sizes, would decide whether the harness confirms them."""


@dataclass(frozen=True)
class Nearest:
    """The adversarial ``points`` (N, C, H, W) nearest to ``x`` and their ``distances`` (N,), inf where none is."""

    x: Tensor
    norm: Norm
    points: Tensor
    distances: Tensor

    @classmethod
    def unknown(cls, x: Tensor, norm: Norm) -> Nearest:
        """Return the record of a search that has not begun: every point is ``x``, every distance inf."""
        return cls(x, norm, x.clone(), torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device))

    def measure(self, points: Tensor) -> Tensor:
        """Return the distances (N,) of ``points`` from ``x``, float64."""
        return ThreatModel(self.norm, Fraction(1), "1").distance(self.x, points)

    def note(self, points: Tensor, adversarial: Tensor) -> Nearest:
        """Return the record with those ``adversarial`` points that are nearer than what it has."""
        distances = self.measure(points)
        nearer = adversarial & (distances < self.distances)
        return replace(
            self,
            points=torch.where(per_sample(nearer, points), points, self.points),
            distances=torch.where(nearer, distances, self.distances),
        )

    def try_out(self, model: nn.Module, points: Tensor, y: Tensor) -> Nearest:
        """Return the record after asking ``model`` whether ``points`` are adversarial."""
        with torch.no_grad():
            return self.note(points, misclassified(model(points), y))

    def within(self, threat: ThreatModel) -> AttackResult:
        """Return the points that obey ``threat``, and ``x`` for the other samples."""
        obeys = threat.contains(self.x, self.points)
        return AttackResult(threat.hold(self.x, torch.where(per_sample(obeys, self.x), self.points, self.x)))


@dataclass(frozen=True)
class Slope:
    """A margin ``z_y - z_k`` (N,), its gradient with respect to the point, and which points are `misclassified`."""

    margin: Tensor
    grad: Tensor
    adversarial: Tensor


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Return the value at ``step`` of ``steps`` of a cosine decay from ``start`` to ``end``."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def noise(x: Tensor, rng: torch.Generator) -> Tensor:
    """Draw normal noise like ``x``: the direction to leave a point in whose gradient is zero."""
    return torch.randn(x.shape, generator=rng, device=rng.device, dtype=x.dtype).to(x.device)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Return whether a class other than ``y`` leads by more than rounding explains (N,); never for NaN logits."""
    lead, own = margin_loss(logits, y), logits.gather(1, y[:, None]).squeeze(1)
    return lead > LEAD * own.abs().maximum((own + lead).abs())


def runner_up(model: nn.Module, point: Tensor, y: Tensor) -> Slope:
    """Return the slope of the margin over the strongest other class, ``z_y - max_{k != y} z_k``."""
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        margin = -margin_loss(logits, y)
        (grad,) = torch.autograd.grad(margin.sum(), point)
    return Slope(margin.detach(), grad, misclassified(logits.detach(), y))


def nearest_rival(model: nn.Module, point: Tensor, y: Tensor, norm: Norm, classes: int) -> Slope:
    """Return the slope towards that of the ``classes`` strongest other classes whose boundary looks nearest.

    Nearest on the linearised model: the class that minimises `reach`, which need not be the runner-up.
    """
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        margins = logits.gather(1, y[:, None]) - logits
    others = margins.detach().scatter(1, y[:, None], torch.inf)
    rivals = others.topk(min(classes, logits.shape[1] - 1), dim=1, largest=False).indices
    best = torch.full_like(others[:, 0], torch.inf)
    margin, grad = others.gather(1, rivals)[:, 0], torch.zeros_like(point)
    for rival in rivals.unbind(1):
        chosen = functional.one_hot(rival, margins.shape[1]).to(margins.dtype)
        (slope,) = torch.autograd.grad(margins, point, chosen, retain_graph=True)
        value = others.gather(1, rival[:, None]).squeeze(1)
        distance = reach(value, inward(slope, point.detach()), point.detach(), norm)
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        margin = torch.where(nearer, value, margin)
        grad = torch.where(per_sample(nearer, slope), slope, grad)
    return Slope(margin, grad, misclassified(logits.detach(), y))


def inward(grad: Tensor, point: Tensor) -> Tensor:
    """Return ``grad`` without what is not finite and without what, descended, would leave the box [0,1]."""
    stuck = ((point <= 0) & (grad > 0)) | ((point >= 1) & (grad < 0))
    return grad.nan_to_num(0.0, 0.0, 0.0).masked_fill(stuck, 0.0)


def unit(grad: Tensor, spare: Tensor) -> Tensor:
    """Return the rows of ``grad`` at L2 length 1; those of ``spare`` where the gradient is zero."""
    flat = torch.where(per_sample(grad.flatten(1).any(1), grad), grad, spare).flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True)
    scaled: Tensor = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return scaled.view_as(grad)


def reach(margin: Tensor, grad: Tensor, point: Tensor, norm: Norm) -> Tensor:
    """Return the distance (N,) at which a margin that falls along ``grad`` is 0, inf or huge where it hardly falls.

    ``margin / ||grad||_q`` with the dual norm q; for L0, how many values must go to their end of the box.
    """
    margin, flat = margin.clamp_min(0), grad.flatten(1)
    if norm is Norm.L0:
        room = torch.where(grad > 0, point, 1 - point).flatten(1)
        gains = (flat.abs() * room).sort(dim=1, descending=True).values.cumsum(1)
        return (gains < margin[:, None]).sum(1).add(1).clamp_max(flat.shape[1]).to(margin.dtype)
    dual = {Norm.LINF: 1.0, Norm.L2: 2.0, Norm.L1: math.inf}[norm]
    slope: Tensor = torch.linalg.vector_norm(flat, ord=dual, dim=1)
    return margin / slope.clamp_min(torch.finfo(slope.dtype).tiny)


def project(delta: Tensor, eps: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """Return the perturbations nearest to ``delta`` with ``||delta||_p <= eps`` (N,) and ``x + delta`` in [0,1].

    The exact projection on ball and box: clipping after the ball would waste what the box takes away.
    """
    size = eps.to(delta.dtype)[:, None]
    if norm is Norm.L1:
        return shrink_l1(delta, x, size)
    flat, low, high = delta.flatten(1), -x.flatten(1), 1 - x.flatten(1)
    boxed = flat.clamp(low, high)
    if norm is Norm.LINF:
        kept = torch.minimum(torch.maximum(boxed, -size), size)
    elif norm is Norm.L0:
        gain = boxed * (2 * flat - boxed)
        rank = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = boxed.masked_fill(rank >= size, 0.0)
    else:
        kept = _scaled(flat, size, low, high)
    return kept.view_as(delta)


def _scaled(flat: Tensor, size: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scale the rows by at most 1 and clip them; bisect for the factor that gives L2 norm ``size`` (N, 1)."""

    def outside(factor: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm((flat * factor).clamp(low, high), dim=1, keepdim=True)
        return length > size

    least, most = torch.zeros_like(size), torch.ones_like(size)
    inside = ~outside(most)
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        above = outside(middle)
        least, most = torch.where(above, least, middle), torch.where(above, middle, most)
    return (flat * torch.where(inside, 1.0, least)).clamp(low, high)


def prune(model: nn.Module, nearest: Nearest, y: Tensor) -> Nearest:
    """Undo changed values while that leaves the points adversarial; then with the others at their end of the box."""
    nearest = _undo(model, nearest, nearest.points, y)
    change = nearest.points - nearest.x
    return _undo(model, nearest, torch.where(change == 0, nearest.x, (change > 0).to(change.dtype)), y)


def _undo(model: nn.Module, nearest: Nearest, points: Tensor, y: Tensor) -> Nearest:
    """Undo the changes of ``points`` that matter least, as many as leave them adversarial, found by bisection.

    A change matters by what it takes off the margin linearised at the point.
    """
    change = points - nearest.x
    slope = runner_up(model, points, y).grad.nan_to_num(0.0, 0.0, 0.0)
    worth = (-slope * change).masked_fill(change == 0, -torch.inf).flatten(1)
    rank = worth.argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(change)
    enough = (change != 0).flatten(1).sum(1)
    few = torch.zeros_like(enough)
    while bool((enough - few > 1).any()):
        middle = (few + enough) // 2
        before = nearest.distances
        nearest = nearest.try_out(model, torch.where(rank < per_sample(middle, rank), points, nearest.x), y)
        works = nearest.distances < before
        few, enough = torch.where(works, few, middle), torch.where(works, middle, enough)
    return nearest
