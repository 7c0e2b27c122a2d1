"""How cross-entropy and one-vs-the-rest move a logit margin: exact curves for the simple problem.

Gradient flow on free logits, ``dz/dt = -grad_z loss`` from ``z(0) = 0`` with K classes. All wrong classes stay
equal, and the margin ``m = z_y - z_k`` obeys (derived here; the problem is Kanai et al.'s, ICML 2023, arXiv
2207.10283, as far as its abstract tells)::

    w * CE       dm/dt = w K / (e^m + K - 1)         e^m + (K - 1) m = 1 + w K t       m ~   log t
    lam * OVR    dm/dt = 2 lam / (1 + e^(m/2))       e^(m/2) + m/2   = 1 + lam t       m ~ 2 log t

So the ratio of the margins tends to 2 whatever K, w and lam are, but only as ``t -> inf``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import wrightomega

Curve = NDArray[np.float64]


def ce_margin(t: ArrayLike, classes: int, weight: float = 1.0) -> Curve:
    """Return the margin that ``weight`` times cross-entropy reaches at times ``t`` >= 0.

    ``m = a - W(e^a / (K-1))`` with ``a = (1 + w K t) / (K - 1)``. As the Wright function is ``omega(b) = W(e^b)`` and
    ``omega + log omega = b``, this is ``log((K-1) omega(a - log(K-1)))``: no overflow and no cancellation.
    """
    others = classes - 1
    a = (1 + weight * classes * np.asarray(t, dtype=np.float64)) / others
    return np.asarray(np.log(others * wrightomega(a - math.log(others))))


def ovr_margin(t: ArrayLike, lam: float = 1.0) -> Curve:
    """Return the margin that ``lam`` times one-vs-the-rest reaches at times ``t`` >= 0, whatever the classes.

    ``m = 2 (1 + lam t - W(e^(1 + lam t)))``, computed as ``2 log omega(1 + lam t)``.
    """
    return np.asarray(2 * np.log(wrightomega(1 + lam * np.asarray(t, dtype=np.float64))))


def ce_time(margin: float, classes: int, weight: float = 1.0) -> float:
    """Return when weighted cross-entropy reaches ``margin``."""
    return (math.expm1(margin) + (classes - 1) * margin) / (weight * classes)


def ovr_time(margin: float, lam: float = 1.0) -> float:
    """Return when weighted one-vs-the-rest reaches ``margin``."""
    return (math.expm1(margin / 2) + margin / 2) / lam


def overtaking(classes: int, weight: float = 1.0, lam: float = 1.0) -> tuple[float, float]:
    """Return (t, margin) from which on OVR is ahead of CE for good; (0, 0) where it is never behind.

    OVR's lead in time at margin m has the slope ``(u^2 + K - 1) / (w K) - (u + 1) / (2 lam)`` in ``u = e^(m/2)``, a
    quadratic: after its larger root the lead only grows, so the last crossing is there or nowhere.
    """

    def lead(margin: float) -> float:
        return ce_time(margin, classes, weight) - ovr_time(margin, lam)

    half = weight * classes / (4 * lam)
    square = half**2 - (classes - 1) + 2 * half
    root = half + math.sqrt(square) if square > 0 else 0.0
    lowest = 2 * math.log(root) if root > 1 else 0.0
    if lead(lowest) >= 0:
        return 0.0, 0.0
    above = lowest + 1
    while lead(above) <= 0:
        above *= 2
    margin = float(brentq(lead, lowest, above, xtol=1e-12))
    return ovr_time(margin, lam), margin
