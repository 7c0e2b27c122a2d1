"""Randomness that depends on what it is for, never on what ran before."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Hash ``(seed, *purpose)`` to a seed in [0, 2**31), so that purposes never share a stream."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for ``purpose``; CPU, so that a GPU run draws the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
