"""Replay one chunk of a report: clean inputs, witnesses, proofs and votes against what its rows say."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import scipy
import torch
from torch import Tensor

from robusteval.certifiers.base import Certifier, SamplingCertifier
from robusteval.evaluation.curve import verdict_at
from robusteval.evaluation.decide import Decision, decide
from robusteval.evaluation.plan import Plan
from robusteval.evaluation.polls import poll
from robusteval.evaluation.probe import Probe, failures
from robusteval.report import Repeat, SampleRow, Smoothing
from robusteval.rng import SampleRng
from robusteval.threat import BUDGET_TOLERANCE, ThreatModel
from robusteval.verdict import Evidence, Sampling, Verdict

SAME = 1e-3
"""How far margins and shares of votes may differ from those of another machine, relative to their size."""

BEYOND_DOUBT = 1e-6
"""Chance at most that fresh evaluations of a randomised model contradict an honest report on a sample."""

DRAWN_AGAIN = 0.04
"""Share of samples whose votes are drawn again; those of all others are only recounted."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of a report: model and data on one side, rows and evidence (by sample id) on the other."""

    probe: Probe
    x: Tensor
    y: Tensor
    rows: list[SampleRow]
    witnesses: Mapping[int, Tensor]
    proofs: Mapping[int, Evidence]
    rng: SampleRng


@dataclass(frozen=True)
class Replayed:
    """How many clean inputs, witnesses, stored proofs, certificates without one, and samples' votes; what is wrong."""

    clean: int = 0
    witnesses: int = 0
    proofs: int = 0
    certified_again: int = 0
    votes: int = 0
    problems: tuple[str, ...] = ()

    def joined(self, other: Replayed) -> Replayed:
        """Return the sum of both."""
        mine, theirs = vars(self), vars(other)
        return Replayed(**{name: mine[name] + theirs[name] for name in mine})

    def __str__(self) -> str:
        what = {
            "clean predictions": self.clean,
            "witnesses": self.witnesses,
            "proofs from their evidence": self.proofs,
            "certificates anew": self.certified_again,
            "samples' votes drawn again": self.votes,
        }
        return ", ".join(f"{count} {name}" for name, count in what.items() if count)


def replay(chunk: Chunk, plan: Plan, share: float = DRAWN_AGAIN) -> Replayed:
    """Return what was replayed of ``chunk``, and every sample that is not what its row says.

    ``share`` is that of the samples whose votes are drawn again.
    """
    votes = [] if plan.suite.smoothing is None else _some(chunk.rows, share)
    certified = _certified(chunk, plan.budgets)
    stored = sum(chunk.rows[row].id in chunk.proofs for rows in certified.values() for row in rows)
    again = 0 if plan.suite.smoothing else sum(map(len, certified.values())) - stored
    found = [*_labels(chunk), *_clean(chunk, plan), *_witnesses(chunk, plan), *_proofs(chunk, plan, certified)]
    found += [problem for row in votes for problem in _votes(chunk, plan, row)]
    clean = 0 if plan.suite.smoothing else len(chunk.rows)
    counts = (clean, len(chunk.witnesses), stored, again, len(votes))
    return Replayed(*counts, tuple(found))


def _some(rows: list[SampleRow], share: float) -> list[int]:
    """Choose, as nobody could foresee, samples whose votes are drawn again."""
    return sorted(random.SystemRandom().sample(range(len(rows)), math.ceil(share * len(rows))))


def _labels(chunk: Chunk) -> Iterator[str]:
    for row, label in zip(chunk.rows, chunk.y.tolist(), strict=True):
        if row.label != label:
            yield f"sample {row.id}: is of class {label}, the report says {row.label}"


def _decided(chunk: Chunk, plan: Plan, rows: Tensor, x: Tensor) -> Decision:
    ids = torch.tensor([chunk.rows[row].id for row in rows.tolist()])
    return decide(chunk.probe, x, chunk.y[rows], ids, plan.suite.repeat, random.SystemRandom().getrandbits(31))


def _clean(chunk: Chunk, plan: Plan) -> Iterator[str]:
    if plan.suite.smoothing:
        return
    decided = _decided(chunk, plan, torch.arange(len(chunk.rows)), chunk.x)
    for place, row in enumerate(chunk.rows):
        said = (row.prediction, row.margin)
        yield from _compared(f"sample {row.id}", said, decided, place, plan.suite.repeat)


def _compared(
    where: str, said: tuple[int, float], decided: Decision, place: int, repeat: Repeat | None
) -> Iterator[str]:
    """Yield how an input's decision differs from the class and the margin that a row states."""
    prediction, margin = said
    found, here = float(decided.margin[place]), int(decided.prediction[place])
    if repeat:
        count = repeat.evaluations
        errors, stated = (round((1 - share) / 2 * count) for share in (found, margin))
        if scipy.stats.fisher_exact([[errors, count - errors], [stated, count - stated]]).pvalue < BEYOND_DOUBT:
            yield f"{where}: is wrong in {errors} of {count} evaluations, the report says in {stated}"
    elif abs(found - margin) > SAME * (1 + abs(margin)):
        yield f"{where}: has margin {found:.6g} here, the report says {margin:.6g}"
    elif decided.logits is not None and _behind(decided.logits[place], prediction):
        yield f"{where}: is classified as {here} here, the report says {prediction}"


def _behind(logits: Tensor, label: int) -> bool:
    """Say whether another of the ``logits`` (K,) leads that of ``label`` by more than machines differ."""
    return bool(logits.max() - logits[label] > SAME * (1 + logits.max().abs()))


def _witnesses(chunk: Chunk, plan: Plan) -> Iterator[str]:
    if not chunk.witnesses:
        return
    places = {row.id: place for place, row in enumerate(chunk.rows)}
    if odd := set(chunk.witnesses) - set(places):
        yield f"sample {min(odd)}: has a witness, but is in another chunk"
        return
    rows = torch.tensor([places[sample] for sample in chunk.witnesses])
    x, x_adv = chunk.x[rows], torch.stack(list(chunk.witnesses.values())).to(chunk.x.device)
    reach, distance = plan.budgets[-1].contains(x, x_adv), plan.threat.distance(x, x_adv)
    decided = None if plan.suite.smoothing else _decided(chunk, plan, rows, x_adv)
    for place, row in enumerate(chunk.rows[index] for index in rows.tolist()):
        where, found = f"sample {row.id}, witness", float(distance[place])
        if row.adv_distance is None or row.adv_prediction is None or row.adv_margin is None:
            yield f"{where}: is not described in the row"
            continue
        if not reach[place]:
            yield f"{where}: is outside [0, 1], or {found:.6g} away, farther than {plan.budgets[-1].label}"
        elif abs(found - row.adv_distance) > 1e-3 * BUDGET_TOLERANCE:
            yield f"{where}: is {found:.9g} away, the report says {row.adv_distance:.9g}"
        if decided:
            said = (row.adv_prediction, row.adv_margin)
            yield from _compared(where, said, decided, place, plan.suite.repeat)


def _certified(chunk: Chunk, budgets: tuple[ThreatModel, ...]) -> dict[tuple[str, int], list[int]]:
    """Return the rows by what certified them at the largest eps at which they are: the turn, and the level."""
    found = defaultdict(list)
    for place, row in enumerate(chunk.rows):
        closers = list(enumerate(row.stages or (row.stage,)))
        for level, closer in reversed(closers):
            verdict = verdict_at(row, closer, budgets[level].radius) if row.stages else row.verdict
            if verdict is Verdict.CERTIFIED and closer:
                found[closer, level].append(place)
                break
    return found


def _proofs(chunk: Chunk, plan: Plan, certified: Mapping[tuple[str, int], list[int]]) -> Iterator[str]:
    """See proofs again from their evidence; where a certifier leaves none, certify again."""
    stages = {stage.name: stage.run for stage in plan.suite.stages() if stage.kind == "certifier"}
    proved = {chunk.rows[place].id for places in certified.values() for place in places}
    for sample in sorted(chunk.proofs.keys() - proved):
        yield f"sample {sample}: has a proof, but is not certified"
    if plan.suite.smoothing:
        return
    for (closer, level), places in certified.items():
        threat = plan.budgets[level]
        plugin: Any = stages[closer.removesuffix(f"@{threat.label}")]
        stored = [place for place in places if chunk.rows[place].id in chunk.proofs]
        fresh = [place for place in places if place not in stored]
        with failures(f"stage '{closer}'"):
            if stored:
                evidence = [chunk.proofs[chunk.rows[place].id] for place in stored]
                seen = plugin.recheck(chunk.probe.model, chunk.x[stored], chunk.y[stored], threat, evidence)
                yield from _refused(chunk, stored, seen, f"its proof by '{closer}' does not show that it is robust")
            if fresh and getattr(plugin, "searches", False):
                yield from _refused(chunk, fresh, [False] * len(fresh), f"its proof by '{closer}' is missing")
            elif fresh:
                rng = chunk.rng.take(torch.tensor(fresh))
                found = cast(Certifier, plugin)(chunk.probe.model, chunk.x[fresh], chunk.y[fresh], threat, rng)
                seen = [certificate.proved for certificate in found]
                yield from _refused(chunk, fresh, seen, f"'{closer}' does not certify it here")


def _refused(chunk: Chunk, places: list[int], seen: list[bool], why: str) -> Iterator[str]:
    for place, good in zip(places, seen, strict=True):
        if not good:
            yield f"sample {chunk.rows[place].id}: {why}"


def _votes(chunk: Chunk, plan: Plan, place: int) -> Iterator[str]:
    """Draw the votes of one sample again: its noise is that of its own stream, so they are the same."""
    row, smoothing = chunk.rows[place], cast(Smoothing, plan.suite.smoothing)
    one = torch.tensor([place])
    x, y, rng = chunk.x[one], chunk.y[one], chunk.rng.take(one)
    if row.votes is None:
        return
    clean = poll(chunk.probe, x, y, rng, smoothing, "decide").polls[0]
    drawn: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    drawn.append(("clean input", _numbers(clean), _numbers(row.votes.clean)))
    if row.votes.counts:
        plugin = next(stage.run for stage in plan.suite.stages() if stage.kind == "certifier")
        sampling: Sampling | None = None
        for threat in plan.budgets[: max(1, len(row.stages))]:
            known = [sampling]
            (found,) = cast(SamplingCertifier, plugin)(chunk.probe, x, y, threat, rng, known)
            sampling = found.sampling
            if not found.proved:
                break
        counts = sampling.counts if sampling else ()
        drawn.append(("certificate", counts, row.votes.counts))
    for what, here, stated in drawn:
        if len(here) != len(stated) or any(abs(a - b) > max(2, SAME * a) for a, b in zip(here, stated, strict=False)):
            yield f"sample {row.id}: its votes for the {what} are {here} here, the report says {stated}"


def _numbers(one: Any) -> tuple[int, ...]:
    return (one.label_votes, one.other_votes, one.rival_votes)
