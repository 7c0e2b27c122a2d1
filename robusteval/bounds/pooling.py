"""Max pooling, of any kernel, stride, padding and dilation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[int, int]


@dataclass(frozen=True)
class PoolPlanes:
    """Bounds of each window's maximum: below by the value at ``best``, above by that or by a constant.

    ``best`` (N, C, H', W') int64 is a place in the flattened (H, W) of its channel, ``high_slope`` is 1 where the
    window's maximum is there for certain, else 0 and the constant ``high`` holds.
    """

    best: Tensor
    high_slope: Tensor
    high: Tensor


@dataclass(frozen=True)
class MaxPool:
    """``max`` over windows of (N, C, H, W): ``table`` (kernel, H' W') has their places in (H, W), H W for padding."""

    table: Tensor
    out: Pair

    @classmethod
    def over(cls, size: Pair, out: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> MaxPool:
        """Return the pooling of images of ``size`` (H, W) to ``out`` (H', W')."""
        reach = [dilation[i] * (kernel[i] - 1) + 1 + stride[i] * (out[i] - 1) for i in (0, 1)]
        after = [reach[i] - padding[i] - size[i] for i in (0, 1)]  # negative where the last rows are in no window
        numbers = torch.arange(1, size[0] * size[1] + 1, dtype=torch.float64).view(1, 1, *size)
        padded = functional.pad(numbers, (padding[1], after[1], padding[0], after[0]))
        windows = functional.unfold(padded, kernel, dilation, 0, stride)[0].long()
        return cls(torch.where(windows > 0, windows - 1, size[0] * size[1]), out)

    def f(self, z: Tensor) -> Tensor:
        """Return the maxima."""
        return self._windows(z).amax(2).view(*z.shape[:2], *self.out)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bounds of the maxima."""
        return self.f(lower), self.f(upper)

    def planes(self, lower: Tensor, upper: Tensor) -> PoolPlanes:
        """Choose the input of largest lower bound; it is the maximum if no other upper bound exceeds that."""
        low, high = self._windows(lower), self._windows(upper)
        best = low.argmax(2, keepdim=True)
        others = high.scatter(2, best, -torch.inf).amax(2)
        certain = low.gather(2, best).squeeze(2) >= others
        constant = torch.where(certain, torch.zeros_like(others), high.amax(2))
        table = self.table.to(best.device)[None, None].expand(*best.shape[:2], *self.table.shape)
        places = table.gather(2, best).squeeze(2)
        slope = certain.to(lower.dtype)
        return PoolPlanes(*(part.view(*lower.shape[:2], *self.out) for part in (places, slope, constant)))

    def _windows(self, z: Tensor) -> Tensor:
        """Return the values (N, C, kernel, H' W') in each window."""
        padded = functional.pad(z.flatten(2), (0, 1), value=-torch.inf)
        return padded[:, :, self.table.to(z.device)]


def put(values: Tensor, places: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return (N, *size) = (N, C, H, W): ``values`` (N, C, H', W') added up at their ``places``."""
    empty = values.new_zeros(len(values), size[0], size[1] * size[2])
    return empty.scatter_add(2, places.flatten(2), values.flatten(2)).view(len(values), *size)
