"""In which order the stages of a suite run, when one run answers for several eps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robusteval.evaluation.suite import Stage, is_minimal
from robusteval.threat import ThreatModel


@dataclass(frozen=True)
class Turn:
    """One run of a stage.

    ``level`` is the place of the budget whose open samples it is given, ``threat`` what the plug-in is asked for.
    """

    name: str
    stage: Stage
    level: int
    threat: ThreatModel


def schedule(stages: Sequence[Stage], budgets: Sequence[ThreatModel]) -> list[Turn]:
    """Return all turns: for each budget, ascending, every stage in order.

    A break within a small budget is one within every larger, so each turn only sees what is left. An attack that looks
    for the nearest adversarial input has one turn, first and for the largest budget: its finds serve every eps.
    """
    places = [(stage, level) for level in range(len(budgets)) for stage in stages]
    return [_turn(stage, level, budgets) for stage, level in places if level == 0 or not is_minimal(stage)]


def _turn(stage: Stage, level: int, budgets: Sequence[ThreatModel]) -> Turn:
    if is_minimal(stage) or len(budgets) == 1:
        return Turn(stage.name, stage, level, budgets[-1])
    return Turn(f"{stage.name}@{budgets[level].label}", stage, level, budgets[level])
