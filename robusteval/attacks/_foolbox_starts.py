"""Misclassified points from which decision-based attacks walk towards the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PER_PASS = 25
"""Images that are classified at once: a constant, so that a search does not depend on the batch size."""

ROUNDS = 8
COARSENESS = (1, 2, 4, 8)


def starting_point(model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, sparse: bool) -> Tensor | None:
    """Return a misclassified point near one input (1, C, H, W) of class ``y`` (1,), or None where none is found.

    Uniform noise is drawn, at several resolutions as fine noise tends to be one class for a network; the first noise
    that is misclassified is blended with the input. With ``sparse`` the blend replaces more and more values by
    black and white noise, instead of moving all values at once, so that few values differ.
    """
    with torch.no_grad():
        for noise in _noises(x, rng):
            target = noise.round() if sparse else noise
            wrong = (model(target).argmax(1) != y).nonzero().flatten()
            if len(wrong):
                return _first_wrong(model, _path(x, target[wrong[:1]], rng, sparse), y)
    return None


def _noises(x: Tensor, rng: torch.Generator) -> Iterator[Tensor]:
    """Draw `PER_PASS` images at a time; of a coarseness of k, squares of k by k pixels are of one colour."""
    _, channels, height, width = x.shape
    for _ in range(ROUNDS):
        for k in COARSENESS:
            small = torch.rand(PER_PASS, channels, -(-height // k), -(-width // k), generator=rng)
            large = F.interpolate(small, scale_factor=k)[:, :, :height, :width]
            yield large.to(x.device, x.dtype)


def _path(x: Tensor, target: Tensor, rng: torch.Generator, sparse: bool) -> Callable[[Tensor], Tensor]:
    """Return shares (n, 1, 1, 1) -> points (n, C, H, W), from ``x`` at 0 to ``target`` at 1."""
    if not sparse:
        return lambda share: torch.lerp(x, target, share)
    order = torch.rand(x.shape, generator=rng).to(x.device, x.dtype)
    return lambda share: torch.where(order < share, target, x)


def _first_wrong(model: nn.Module, path: Callable[[Tensor], Tensor], y: Tensor) -> Tensor | None:
    """Return the misclassified point that comes first among `PER_PASS` along the path."""
    share = torch.linspace(0, 1, PER_PASS + 1, device=y.device)[1:].view(-1, 1, 1, 1)
    points = path(share)
    wrong = (model(points).argmax(1) != y).nonzero().flatten()
    return points[wrong[:1]] if len(wrong) else None
