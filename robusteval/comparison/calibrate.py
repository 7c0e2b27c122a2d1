"""Two suites on the same random samples: where they disagree, and what each takes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from robusteval.bounds.graph import trace
from robusteval.errors import SoundnessContradiction, UsageError
from robusteval.evaluation.assemble import REPORT
from robusteval.evaluation.plan import Plan, judge_samples
from robusteval.evaluation.probe import Probe, failures
from robusteval.evaluation.suite import load_suite
from robusteval.mcnemar import mcnemar
from robusteval.models.base import frozen
from robusteval.provenance import environment
from robusteval.report import Calibration, Search, SuiteCost
from robusteval.rng import SampleRng, derive_seed, seeded
from robusteval.runs import file_digest
from robusteval.verdict import ROBUST, Verdict

Told = Callable[[int, str], None]
"""Hears how many samples a suite has done, and its name."""


@dataclass
class Side:
    """What one suite said so far: verdicts by sample, and what it took. ``seconds`` has an entry per part."""

    plan: Plan
    verdicts: dict[int, Verdict]
    seconds: list[float]
    forward: int = 0
    backward: int = 0

    @property
    def robust(self) -> set[int]:
        """The samples that it did not break."""
        return {sample for sample, verdict in self.verdicts.items() if verdict in ROBUST}

    def judge(self, places: Sequence[int], part: int) -> None:
        """Judge the samples at ``places`` of the split."""
        seed, ids = self.plan.config.seed, self.plan.split.ids[list(places)]
        rng = SampleRng(seed, tuple(ids.tolist()), derive_seed(seed, "calibrate", part))
        halved = -1
        while halved != self.plan.halvings.count:  # what ran out of memory on the way is none of the suite's seconds
            halved, began = self.plan.halvings.count, time.perf_counter()
            done = judge_samples(self.plan, torch.tensor(places), rng)
        self.seconds.append(time.perf_counter() - began)
        self.verdicts |= {row.id: row.verdict for row in done.rows}
        self.forward += sum(stage.forward for stage in done.stages)
        self.backward += sum(stage.backward for stage in done.stages)

    def cost(self) -> SuiteCost:
        """Return what goes into the record."""
        return SuiteCost(
            name=self.plan.suite.name,
            sha256=self.plan.suite.sha256,
            robust=len(self.robust),
            forward=self.forward,
            backward=self.backward,
            seconds=sum(self.seconds),
        )


def side_by_side(
    plan: Plan, other: Plan, places: Sequence[int], size: int, told: Told = lambda done, name: None, begin: int = 0
) -> tuple[Side, Side]:
    """Judge the samples at ``places`` with both plans, ``size`` at a time, in one process and in turns.

    Which of the two begins alternates, so that neither has the warmer machine. Parts are numbered from ``begin`` on,
    and their randomness follows from the number. Raises `SoundnessContradiction` where one proves what the other
    breaks.
    """
    _warm_up(plan)
    sides = (Side(plan, {}, []), Side(other, {}, []))
    for part, first in enumerate(range(0, len(places), size), start=begin):
        some = places[first : first + size]
        for side in sides if part % 2 == 0 else sides[::-1]:
            side.judge(some, part)
            told(len(some), side.plan.suite.name)
        _refuse_contradictions(*sides)
    return sides


def _warm_up(plan: Plan) -> None:
    """Do what only the first use of torch's tracer and of the device costs, so that no suite's seconds hold it."""
    trace(nn.Flatten(), torch.zeros(1, 1, 2, 2))
    with torch.no_grad(), seeded(0, plan.device), frozen(plan.model.module) as module, failures("the model"):
        Probe(module, plan.batch_size)(plan.split.images(slice(0, 1)).to(plan.device))


def _refuse_contradictions(one: Side, other: Side) -> None:
    """Raise `SoundnessContradiction` where one suite proved what the other broke."""
    for proving, breaking in ((one, other), (other, one)):
        for sample, verdict in proving.verdicts.items():
            if verdict is Verdict.CERTIFIED and breaking.verdicts[sample] is Verdict.BROKEN:
                names = f"suite '{proving.plan.suite.name}' and broken by suite '{breaking.plan.suite.name}'"
                raise SoundnessContradiction(f"sample {sample} was certified by {names}; one of them is wrong.")


def reference(plan: Plan, name: str) -> Plan:
    """Return ``plan`` with the suite called ``name``, at the report's own eps and as that suite runs by itself.

    Raises `UsageError` where it would not be about the same question.
    """
    suite = load_suite(name, plan.threat)
    if (suite.smoothing, suite.repeat) != (plan.suite.smoothing, plan.suite.repeat):
        raise UsageError(f"suite '{name}' decides samples in another way than '{plan.suite.name}'; name another.")
    exact = plan.config.model_copy(update={**Search().model_dump(), "queries": None})
    return replace(plan, config=exact, suite=suite, budgets=(plan.threat,))


def calibrate(plan: Plan, folder: Path, against: str, count: int, seed: int, told: Told) -> Calibration:
    """Run the suite of the report in ``folder`` and another on ``count`` random samples of it.

    ``seed`` chooses the samples. What the suites draw is the run's own, as is ``plan``.
    """
    other = reference(plan, against)
    chosen = random.Random(derive_seed(seed, "calibrate")).sample(range(len(plan.split)), min(count, len(plan.split)))
    places, size = sorted(chosen), min(plan.config.chunk_size, -(-len(chosen) // 2))
    ours, theirs = side_by_side(replace(plan, budgets=(plan.threat,)), other, places, size, told)
    only = sorted(theirs.robust - ours.robust), sorted(ours.robust - theirs.robust)
    paired = mcnemar(len(only[0]), len(only[1]), len(chosen))
    return Calibration(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        report_sha256=file_digest(folder / REPORT),
        seed=seed,
        samples=tuple(sorted(ours.verdicts)),
        clean=sum(verdict is not Verdict.MISCLASSIFIED for verdict in ours.verdicts.values()),
        suite=ours.cost(),
        against=theirs.cost(),
        only_suite_breaks=tuple(only[0]),
        only_against_breaks=tuple(only[1]),
        difference=paired.difference,
        low=paired.low,
        high=paired.high,
        environment=environment(plan.device),
    )
