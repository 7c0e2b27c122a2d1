"""Checks of hyper-parameters that objectives share."""

from __future__ import annotations

import math


def require_percentage(m: float) -> None:
    """Raise `ValueError` unless ``m`` is a percentage."""
    if not 0 <= m <= 100:
        raise ValueError(f"m = {m} is not a percentage of the batch; choose one from 0 to 100")


def require_weight(name: str, value: float) -> None:
    """Raise `ValueError` unless ``value`` can weight a loss."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} = {value} cannot weight a loss; choose a finite number of at least 0")


def require_noise(name: str, value: float) -> None:
    """Raise `ValueError` unless ``value`` can be a standard deviation."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} = {value} is no level of noise; choose a finite number of at least 0")


def require_fraction(name: str, value: float) -> None:
    """Raise `ValueError` unless ``value`` is a fraction of a whole."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value} is not a fraction; choose a number from 0 to 1")


def require_finite(name: str, value: float) -> None:
    """Raise `ValueError` unless ``value`` is finite."""
    if not math.isfinite(value):
        raise ValueError(f"{name} = {value} is not finite")


def require_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless ``value`` is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} = {value} must be finite and above 0")


def require_steps(name: str, value: int) -> None:
    """Raise `ValueError` unless ``value`` counts at least one step."""
    if value < 1:
        raise ValueError(f"{name} = {value} is not a number of steps; choose at least 1")
