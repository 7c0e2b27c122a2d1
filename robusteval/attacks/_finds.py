"""What an attack of several runs has found so far."""

from __future__ import annotations

import torch
from torch import Tensor


class Finds:
    """The candidate of each sample: the first misclassified point met, until then the point of largest loss.

    ``x`` (N, ...) are the clean inputs, ``wrong`` (N,) says which are misclassified as they are.
    """

    def __init__(self, x: Tensor, wrong: Tensor) -> None:
        self.points = x.clone()
        self._broken = wrong.clone()
        self._value = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)

    def left(self) -> Tensor:
        """Return the places (n,) of the samples that nothing has broken yet."""
        return (~self._broken).nonzero().squeeze(1)

    def breaks(self, rows: Tensor, points: Tensor) -> None:
        """Take ``points`` as misclassified inputs of the samples at ``rows``."""
        self.points[rows], self._broken[rows] = points, True

    def offer(self, rows: Tensor, points: Tensor, values: Tensor) -> None:
        """Take ``points`` of the samples at ``rows`` where their loss is larger than that of any before."""
        better = values > self._value[rows]
        self.points[rows[better]], self._value[rows[better]] = points[better], values[better]
