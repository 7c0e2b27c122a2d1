"""AutoAttack's own checks, as findings (its documentation calls them flags)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from pyautoattack import checks
from torch import Tensor

from robusteval.report import Finding, Rate


@dataclass
class _Messages:
    """Stands in for AutoAttack's logger."""

    seen: list[str] = field(default_factory=list)

    def warning(self, message: str) -> None:
        self.seen.append(message)


_ADVICE = "See AutoAttack's documentation of its flags."


def _theirs(name: str, messages: _Messages) -> list[Finding]:
    return [
        Finding(name=name, severity="warning", origin="autoattack", message=message, advice=_ADVICE)
        for message in messages.seen
    ]


def autoattack_checks(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> list[Finding]:
    """Run AutoAttack's checks on the model's outputs, range and dynamics."""
    found = []
    randomised, proportions, dynamic = _Messages(), _Messages(), _Messages()
    with torch.no_grad():
        checks.check_randomized(model, x, y, bs=len(x), logger=randomised)
        checks.check_range_output(model, x, logger=proportions)
        tracer = sys.gettrace()
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # they count over the whole process, never reset
        try:
            checks.check_dynamic(model, x, logger=dynamic)
        finally:
            sys.settrace(tracer)
    for name, messages in (("randomized", randomised), ("range-output", proportions), ("dynamic", dynamic)):
        found += _theirs(name, messages)
    return found


def square_check(clean: Rate, broke: Iterable[tuple[str, int]]) -> list[Finding]:
    """Run AutoAttack's check that black-box Square found little that gradient attacks did not.

    ``broke`` says, in order, how many samples each attack broke.
    """
    left, accuracy = clean.count, {"clean": clean.rate}
    for name, count in broke:
        left -= count
        accuracy[name] = left / clean.total
    messages = _Messages()
    checks.check_square_sr(accuracy, logger=messages)
    return _theirs("square-success", messages)
