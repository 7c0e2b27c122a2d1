"""Which samples deserve more of an attack: those that came near another class, or could not be moved at all."""

from __future__ import annotations

from torch import Tensor

STUCK = 0.05
"""Share of its margin that a sample loses at least under any attack whose gradients tell where to go."""


def is_near(clean: Tensor, least: Tensor, near: float) -> Tensor:
    """Say whether samples (N,) may yet be broken: if what is left of a margin is less than ``near`` times what it lost.

    ``clean`` > 0 are the margins, ``least`` the smallest met so far. That hardly any of it was lost says more about the
    attacks than about the sample, so such a sample counts as near.
    """
    lost = clean - least
    return (lost < STUCK * clean) | (least < near * lost)
