"""The budgets of a run: one eps, or several whose evidence is shared."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

from robusteval.threat import Norm, ThreatModel, parse_eps

FACTORS = ("0.25", "0.5", "1", "2", "4")
"""The multiples of eps that a curve shows unless told otherwise; the largest should leave next to nothing robust."""


def budgets(threat: ThreatModel, curve: bool | tuple[str, ...]) -> tuple[ThreatModel, ...]:
    """Return the threat models of a run, each eps once, ascending: ``threat`` and the other budgets of its ``curve``.

    ``curve`` is False for ``threat`` alone, True for the multiples `FACTORS`, or lists the budgets.
    Raises `UsageError` for a budget that is none.
    """
    if curve is False:
        return (threat,)
    labels = _multiples(threat) if curve is True else curve
    found = {one.eps: one for one in (*(ThreatModel.parse(threat.norm.value, label) for label in labels), threat)}
    return tuple(found[eps] for eps in sorted(found))


def largest(labels: tuple[str, ...]) -> str:
    """Return the largest of some budgets as it was written; raise `UsageError` where one is none."""
    return max(labels, key=parse_eps)


def _multiples(threat: ThreatModel) -> tuple[str, ...]:
    scaled = [(factor, threat.eps * Fraction(factor)) for factor in FACTORS]
    if threat.norm is Norm.L0:
        return tuple(str(math.ceil(eps)) for _, eps in scaled)
    fits = [factor for factor, eps in scaled if threat.norm is not Norm.LINF or eps <= 1]
    return tuple(_times(threat.label, factor) for factor in fits)


def _times(label: str, factor: str) -> str:
    """Multiply a budget and spell the product as the budget was: "8/255" by 0.5 is "4/255", "0.1" by 2 is "0.2"."""
    if "/" not in label:
        return format(Decimal(label) * Decimal(factor), "f")
    below = int(label.split("/")[1])
    above = parse_eps(label) * below * Fraction(factor)
    return f"{above.numerator}/{below * above.denominator}"
