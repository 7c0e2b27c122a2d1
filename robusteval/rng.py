"""Randomness that depends on what it is for, never on what ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Hash ``(seed, *purpose)`` to a seed in [0, 2**31), so that purposes never share a stream."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for ``purpose``; CPU, so that a GPU run draws the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@dataclass(frozen=True)
class SampleRng:
    """The randomness of an attack on some samples: a stream per sample, and one seed for the whole batch.

    A method that draws from the streams treats a sample alike in any company. ``batch`` serves libraries
    that draw for a whole batch at once.
    """

    seed: int
    ids: tuple[int, ...]
    batch: int

    def draw(self, sampler: Callable[[Tensor, torch.Generator], Tensor], x: Tensor, *purpose: str | int) -> Tensor:
        """Apply ``sampler(x[i:i+1], stream of sample i)`` to each sample of ``x`` (N, ...) and stack the results."""
        drawn = [sampler(x[i : i + 1], generator(self.seed, *purpose, sample)) for i, sample in enumerate(self.ids)]
        return torch.cat(drawn)

    def take(self, rows: Tensor) -> SampleRng:
        """Return the randomness of the samples at ``rows``."""
        return replace(self, ids=tuple(self.ids[row] for row in rows.tolist()))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for code that draws from them; afterwards they are as they were found."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
