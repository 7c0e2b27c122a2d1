"""One process's part of a batch, and what the processes of a data-parallel run tell each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Rows ``rank`` of ``size`` nearly equal consecutive parts of a batch of ``total`` samples.

    The first ``total % size`` parts have one sample more. With ``size`` 1 nothing is communicated.
    """

    rank: int = 0
    size: int = 1
    total: int = 0

    def mine(self, whole: Tensor) -> Tensor:
        """Return this process's rows of ``whole`` (total, ...)."""
        return whole if self.size == 1 else whole.tensor_split(self.size)[self.rank]

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of all processes, (total, ...), in batch order; ``values`` are this process's."""
        if self.size == 1:
            return values
        counts = [len(part) for part in torch.arange(self.total).tensor_split(self.size)]
        padded = values.new_zeros(max(counts), *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def draw(self, sampler: Callable[[Tensor, torch.Generator], Tensor], x: Tensor, rng: torch.Generator) -> Tensor:
        """Return this process's rows of ``sampler(whole batch, rng)``; ``x`` (n, ...) are its rows of the batch."""
        if self.size == 1:
            return sampler(x, rng)
        whole = x.new_zeros(self.total, *x.shape[1:])
        self.mine(whole).copy_(x)
        return self.mine(sampler(whole, rng))

    @property
    def weight(self) -> float:
        """What a mean over this process's rows weighs in the mean of the processes' values."""
        if self.size == 1:
            return 1.0
        return len(self.mine(torch.arange(self.total))) * self.size / self.total


ALONE = Share()
