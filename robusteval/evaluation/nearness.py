"""Which samples deserve a dear attack: those that others brought near another class, or could not move at all."""

from __future__ import annotations

STUCK = 0.05
"""Share of its margin that a sample loses at least under any attack whose gradients tell where to go."""


def is_near(clean: float, least: float, near: float) -> bool:
    """Say whether a sample may yet be broken: what is left of its margin is less than ``near`` times what it lost.

    ``clean`` > 0 is its margin, ``least`` the smallest at a candidate so far. That hardly any of it was lost says more
    about the attacks than about the sample, so such a sample counts as near.
    """
    lost = clean - least
    return lost < STUCK * clean or least < near * lost
