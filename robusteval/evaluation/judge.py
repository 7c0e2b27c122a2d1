"""One chunk of samples in, one verdict per sample out: the heart of the evaluator.

The harness believes no attack. A candidate breaks its sample only if it is finite, in [0,1], within eps of
the clean input (tolerance `threat.BUDGET_TOLERANCE`) and misclassified in float32, all checked here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from robusteval.attacks._nearness import is_near
from robusteval.attacks.base import Attack, AttackResult
from robusteval.certifiers.base import Certifier, SamplingCertifier
from robusteval.errors import RobustevalError, SoundnessContradiction
from robusteval.evaluation.decide import Decision, decide
from robusteval.evaluation.polls import poll
from robusteval.evaluation.probe import Probe, failures
from robusteval.evaluation.queries import rationed
from robusteval.evaluation.schedule import Turn, schedule
from robusteval.evaluation.suite import Stage, is_minimal, is_smoothed, refutes
from robusteval.report import Poll, Repeat, SampleRow, Smoothing, StageResult, Votes
from robusteval.rng import SampleRng, derive_seed
from robusteval.smoothing import ABSTAINS
from robusteval.threat import BUDGET_TOLERANCE, ThreatModel
from robusteval.verdict import Evidence, Sampling, Verdict, Witness

SURVIVED = "survived every attack"
DOUBTFUL = "a candidate errs in most evaluations, but not beyond doubt"
LEADING = "another class leads at a candidate, but not beyond doubt"
UNDECIDED = f"{ABSTAINS} on the clean input"

CHANCE = " Both are statistical and each is wrong with a small probability: if another --seed agrees, it is no chance."

Told = Callable[[str], None]


@dataclass(frozen=True)
class Judgement:
    """Rows of one chunk in order, what each stage cost, and by id the witnesses of breaks and evidence for proofs."""

    rows: tuple[SampleRow, ...]
    witnesses: dict[int, Witness]
    stages: tuple[StageResult, ...]
    proofs: dict[int, Evidence] = field(default_factory=dict)


@dataclass
class _Level:
    """What is known at one eps: each sample's verdict, the turn that closed it, its least margin at a candidate."""

    threat: ThreatModel
    verdicts: list[Verdict]
    closers: list[str | None]
    least: list[float] = field(default_factory=list)

    def has(self, row: int, *verdicts: Verdict) -> bool:
        return self.verdicts[row] in verdicts

    def close(self, row: int, verdict: Verdict, turn: Turn) -> None:
        self.verdicts[row], self.closers[row] = verdict, turn.name


@dataclass
class _Chunk:
    """The state while stages run. ``levels`` are the budgets, ascending, ``asked`` the place of the report's own.

    ``why`` says, per sample, why it is open there. ``repeat`` says how samples are decided, ``queries`` how many each
    has left at each level, None without such a budget. ``polls`` and ``sampled`` are, by row, the votes at the witness
    and for the class to be certified. ``proofs`` is evidence by id, at the largest eps that was proved. ``margins`` are
    those of the clean inputs.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    repeat: Repeat | Smoothing | None
    levels: tuple[_Level, ...]
    asked: int
    why: list[str | None]
    witnesses: dict[int, Witness]
    queries: list[list[int]] | None
    polls: dict[int, Poll] = field(default_factory=dict)
    sampled: dict[int, Sampling] = field(default_factory=dict)
    proofs: dict[int, Evidence] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)

    def decide(self, probe: Probe, x: Tensor, y: Tensor, ids: Tensor, rng: SampleRng, *purpose: str) -> Decision:
        """Return what the model under test says of ``x``, some of the samples or candidates for them."""
        if isinstance(self.repeat, Smoothing):
            return poll(probe, x, y, rng, self.repeat, "decide", *purpose)
        return decide(probe, x, y, ids, self.repeat, derive_seed(rng.batch, "decide", *purpose))

    def given(self, turn: Turn, skip_certified: bool) -> Tensor:
        """Return the rows that a turn looks at: an attack that serves every eps, those open at any.

        Proving goes on at an eps where it got through at the one before.
        """
        level, before = self.levels[turn.level], self.levels[: turn.level][-1:]
        attackable = [Verdict.UNKNOWN] if skip_certified else [Verdict.UNKNOWN, Verdict.CERTIFIED]
        if turn.stage.kind == "attack":
            served = self.levels if is_minimal(turn.stage) else (level,)
            wanted = [self.near(one, turn.stage.near, *attackable) for one in served]
            rows = [row for row in range(len(self.x)) if any(row in one for one in wanted)]
        else:
            provable = (row for row in range(len(self.x)) if level.has(row, Verdict.UNKNOWN))
            rows = [row for row in provable if all(smaller.has(row, Verdict.CERTIFIED) for smaller in before)]
        return torch.tensor(rows, dtype=torch.long)

    def near(self, level: _Level, near: float | None, *verdicts: Verdict) -> set[int]:
        """Return the rows with one of ``verdicts`` that a stage with ``near`` is given; one without is given all."""
        rows = [row for row in range(len(self.x)) if level.has(row, *verdicts)]
        if near is None:
            return set(rows)
        clean, least = (torch.tensor([margins[row] for row in rows]) for margins in (self.margins, level.least))
        return {row for row, one in zip(rows, is_near(clean, least, near).tolist(), strict=True) if one}

    def saw(self, row: int, margin: float, distance: float) -> None:
        """Remember the margin of a candidate at every eps that reaches as far."""
        for level in self.levels:
            if distance <= level.threat.radius + BUDGET_TOLERANCE:
                level.least[row] = min(level.least[row], margin)

    def certify(self, row: int, evidence: Evidence | None, turn: Turn) -> None:
        """Close a sample at the eps of ``turn``; proofs come in ascending order of eps."""
        self.levels[turn.level].close(row, Verdict.CERTIFIED, turn)
        self.proofs.pop(int(self.ids[row]), None)
        if evidence is not None:
            self.proofs[int(self.ids[row])] = evidence

    def break_(self, row: int, witness: Witness, turn: Turn, votes: Poll | None) -> None:
        """Close a sample at every eps that reaches as far as ``witness``, and keep the nearest witness."""
        sample = int(self.ids[row])
        for level in self.levels:
            if witness.distance > level.threat.radius + BUDGET_TOLERANCE:
                continue
            if level.has(row, Verdict.CERTIFIED):
                raise SoundnessContradiction(
                    f"sample {sample} was certified by '{level.closers[row]}' and broken by '{turn.name}' at distance "
                    f"{witness.distance:.6g}; one of them is wrong, so no number of this run can be trusted."
                    f"{CHANCE if votes else ''}"
                )
            if level.has(row, Verdict.UNKNOWN):
                level.close(row, Verdict.BROKEN, turn)
        if sample not in self.witnesses or witness.distance < self.witnesses[sample].distance:
            self.witnesses[sample] = witness
            if votes:
                self.polls[row] = votes


def judge(
    probe: Probe,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    threat: ThreatModel,
    stages: Sequence[Stage],
    rng: SampleRng,
    skip_certified: bool = False,
    repeat: Repeat | Smoothing | None = None,
    told: Told = lambda turn: None,
    budgets: Sequence[ThreatModel] = (),
    queries: int | None = None,
) -> Judgement:
    """Run ``stages`` in order on the samples still open and return every sample's verdict.

    ``x`` (N, C, H, W) float32 in [0,1] and ``y``, ``ids`` (N,) int64 are one chunk. ``budgets``, ascending and with
    ``threat`` among them, are what else is asked (`schedule`). ``queries`` is how often, at each budget, all attacks
    together may ask the model about a sample, clean prediction and confirmation not counted. ``repeat`` is how samples
    are decided; if it is a `Smoothing`, all is about the smoothed model. Raises `RobustevalError` on non-finite logits
    and `SoundnessContradiction` when a proved sample is broken.
    """
    _check_inputs(x, ids)
    asked = tuple(budgets) or (threat,)
    levels = tuple(_Level(budget, [Verdict.UNKNOWN] * len(x), [None] * len(x)) for budget in asked)
    left = None if queries is None else [[queries] * len(x) for _ in asked]
    chunk = _Chunk(x, y, ids, repeat, levels, asked.index(threat), [None] * len(x), {}, left)
    clean = chunk.decide(probe, x, y, ids, rng)
    chunk.margins = clean.margin.tolist()
    for level in levels:
        level.least = list(chunk.margins)
    for row in (clean.wrong if clean.polls else clean.prediction != y).nonzero().squeeze(1).tolist():
        for level in levels:
            level.verdicts[row] = Verdict.MISCLASSIFIED
    results = []
    for turn in schedule(stages, asked):
        told(turn.name)
        results.append(_take_turn(turn, probe, chunk, chunk.given(turn, skip_certified), rng))
    return Judgement(_rows(chunk, clean), chunk.witnesses, tuple(results), chunk.proofs)


def _take_turn(turn: Turn, probe: Probe, chunk: _Chunk, rows: Tensor, rng: SampleRng) -> StageResult:
    began, before = time.perf_counter(), probe.passes
    outcome = _Outcome()
    if len(rows):
        act = _attack if turn.stage.kind == "attack" else _certify
        outcome = act(turn, probe, chunk, rows, rng.take(rows))
    level, after = chunk.levels[turn.level], probe.passes
    return StageResult(
        name=turn.name,
        kind=turn.stage.kind,
        eps=level.threat.label if len(chunk.levels) > 1 else None,
        entered=len(rows),
        closed=level.closers.count(turn.name),
        broken=sum(level.closers[row] == turn.name and level.has(row, Verdict.BROKEN) for row in range(len(chunk.x))),
        rejected=outcome.rejected,
        non_finite=outcome.non_finite,
        undecided=outcome.undecided,
        forward=after.forward - before.forward,
        backward=after.backward - before.backward,
        zero_gradients=after.zero - before.zero,
        non_finite_gradients=after.non_finite - before.non_finite,
        seconds=time.perf_counter() - began,
        adaptations=outcome.adaptations,
        warnings=outcome.warnings,
    )


@dataclass(frozen=True)
class _Outcome:
    rejected: int = 0
    non_finite: int = 0
    undecided: int = 0
    adaptations: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __add__(self, more: _Outcome) -> _Outcome:
        """Return the counts of both, and what either said."""
        return _Outcome(
            rejected=self.rejected + more.rejected,
            non_finite=self.non_finite + more.non_finite,
            undecided=self.undecided + more.undecided,
            adaptations=tuple(dict.fromkeys(self.adaptations + more.adaptations)),
            warnings=tuple(dict.fromkeys(self.warnings + more.warnings)),
        )


def _attack(turn: Turn, probe: Probe, chunk: _Chunk, rows: Tensor, rng: SampleRng) -> _Outcome:
    """Attack the samples at ``rows``, and those of which only a lower precision says they are broken once more."""
    with failures(f"stage '{turn.name}'"), probe.searching():
        result = _candidates(turn, probe, chunk, rows, rng)
    outcome = _confirm(turn, probe, chunk, rows, result.candidates, rng)
    outcome = replace(outcome, adaptations=result.adaptations, warnings=result.warnings)
    with failures(f"stage '{turn.name}'"):
        again = _mistaken(probe, result.candidates, chunk.y[rows])
        if len(again) == 0:
            return outcome
        result = _candidates(turn, probe, chunk, rows[again], rng.take(again))
    more = _confirm(turn, probe, chunk, rows[again], result.candidates, rng.take(again))
    return outcome + replace(more, adaptations=result.adaptations, warnings=result.warnings)


def _mistaken(probe: Probe, candidates: Tensor, y: Tensor) -> Tensor:
    """Return the places of the ``candidates`` (N, C, H, W) that are misclassified only as attacks see the model."""
    if probe.exact:
        return torch.tensor([], dtype=torch.long)
    candidates = candidates.detach().float().nan_to_num()
    with torch.no_grad():
        mistaken: Tensor = probe(candidates).argmax(1) == y
        with probe.searching():
            mistaken &= probe(candidates).argmax(1) != y
    return mistaken.nonzero().squeeze(1).cpu()


def _confirm(turn: Turn, probe: Probe, chunk: _Chunk, rows: Tensor, candidates: Tensor, rng: SampleRng) -> _Outcome:
    """Break the samples at ``rows`` whose candidates hold what is claimed of them, and count the others."""
    x, y, ids, threat = chunk.x[rows], chunk.y[rows], chunk.ids[rows], turn.threat
    candidates = candidates.detach().float()
    if candidates.shape != x.shape:
        raise RobustevalError(f"stage '{turn.name}' returned {tuple(candidates.shape)} for {tuple(x.shape)} inputs.")
    allowed, distance = threat.contains(x, candidates), threat.distance(x, candidates)
    checked = torch.where(allowed.view(-1, 1, 1, 1), candidates, x)  # what is out of bounds counts as no attempt
    decided = chunk.decide(probe, checked, y, ids, rng, turn.name)
    with torch.no_grad():
        claimed = 0 if allowed.all() else int(((probe(candidates.nan_to_num()).argmax(1) != y) & ~allowed).sum())
    doubtful = (decided.prediction != y) & ~decided.wrong & allowed
    concerned = distance <= chunk.levels[chunk.asked].threat.radius + BUDGET_TOLERANCE
    for i in rows[(doubtful & concerned).cpu()].tolist():
        chunk.why[i] = f"{turn.name}: {LEADING if decided.polls else DOUBTFUL}"
    for i in allowed.nonzero().squeeze(1).tolist():
        chunk.saw(int(rows[i]), float(decided.margin[i]), float(distance[i]))
    for i in (decided.wrong & allowed).nonzero().squeeze(1).tolist():
        prediction, margin = int(decided.prediction[i]), float(decided.margin[i])
        witness = Witness(candidates[i].cpu(), prediction, float(distance[i]), margin)
        chunk.break_(int(rows[i]), witness, turn, decided.polls[i] if decided.polls else None)
    non_finite = int((~candidates.flatten(1).isfinite().all(1)).sum())
    return _Outcome(claimed, non_finite, int(doubtful.sum()))


def _candidates(turn: Turn, probe: Probe, chunk: _Chunk, rows: Tensor, rng: SampleRng) -> AttackResult:
    """Run an attack, within what is left of each sample's queries at its eps."""
    attack, x, y = cast(Attack, turn.stage.run), chunk.x[rows], chunk.y[rows]
    if chunk.queries is None:
        return attack(probe, x, y, turn.threat, rng)
    left, steady = chunk.queries[turn.level], chunk.repeat is not None
    allowed = [left[row] for row in rows.tolist()]
    result, remaining = rationed(attack, probe, x, y, turn.threat, rng, allowed, steady)
    for row, count in zip(rows.tolist(), remaining, strict=True):
        left[row] = count
    return replace(result, adaptations=tuple(f"{turn.name}: {text}" for text in result.adaptations))


def _certify(turn: Turn, probe: Probe, chunk: _Chunk, rows: Tensor, rng: SampleRng) -> _Outcome:
    given = (chunk.x[rows], chunk.y[rows], turn.threat, rng)
    with failures(f"stage '{turn.name}'"):
        if is_smoothed(turn.stage.run):  # it samples, so its passes are counted; it does not trace
            known = [chunk.sampled.get(row) for row in rows.tolist()]
            certificates = cast(SamplingCertifier, turn.stage.run)(probe, *given, known)
        else:
            certificates = cast(Certifier, turn.stage.run)(probe.model, *given)
    if len(certificates) != len(rows):
        raise RobustevalError(f"stage '{turn.name}' returned {len(certificates)} certificates for {len(rows)} inputs.")
    for row, certificate in zip(rows.tolist(), certificates, strict=True):
        if certificate.sampling:
            chunk.sampled[row] = certificate.sampling
        if certificate.proved:
            chunk.certify(row, certificate.evidence, turn)
        elif turn.level <= chunk.asked:
            chunk.why[row] = f"{turn.name}: {certificate.reason}"
    refuted = [i for i, certificate in enumerate(certificates) if certificate.counterexample is not None]
    if not refuted:
        return _Outcome()
    found = [cast(Tensor, certificates[i].counterexample) for i in refuted]
    if not refutes(turn.stage.run):
        raise RobustevalError(f"stage '{turn.name}' returned a counter-example, but does not say that it `refutes`.")
    if any(one.shape != chunk.x.shape[1:] for one in found):
        raise RobustevalError(f"stage '{turn.name}' returned a counter-example of another shape than its input.")
    candidates = torch.stack(found).to(chunk.x.device)
    return _confirm(turn, probe, chunk, rows[refuted], candidates, rng.take(torch.tensor(refuted)))


def _check_inputs(x: Tensor, ids: Tensor) -> None:
    flat = x.flatten(1)
    bad = ~((flat >= 0) & (flat <= 1)).all(1).cpu()
    if bad.any():
        raise RobustevalError(
            f"sample {int(ids[bad][0])} has pixels outside [0, 1], so no perturbation could stay in it."
        )


def _rows(chunk: _Chunk, clean: Decision) -> tuple[SampleRow, ...]:
    level, several, rows = chunk.levels[chunk.asked], len(chunk.levels) > 1, []
    for i, sample in enumerate(chunk.ids.tolist()):
        witness, verdict = chunk.witnesses.get(sample), level.verdicts[i]
        rows.append(
            SampleRow(
                id=sample,
                label=int(chunk.y[i]),
                prediction=int(clean.prediction[i]),
                margin=float(clean.margin[i]),
                verdict=verdict,
                stage=level.closers[i],
                stages=tuple(each.closers[i] for each in chunk.levels) if several else (),
                reason=_reason(chunk, clean, i) if verdict is Verdict.UNKNOWN else None,
                adv_prediction=witness.prediction if witness else None,
                adv_margin=witness.margin if witness else None,
                adv_distance=witness.distance if witness else None,
                votes=_votes(chunk, clean, i),
            )
        )
    return tuple(rows)


def _reason(chunk: _Chunk, clean: Decision, row: int) -> str:
    smoothing = chunk.repeat
    if isinstance(smoothing, Smoothing) and clean.polls[row].abstains(smoothing.alpha):
        return UNDECIDED
    return chunk.why[row] or SURVIVED


def _votes(chunk: _Chunk, clean: Decision, row: int) -> Votes | None:
    """Return what a verdict on the smoothed classifier rests on."""
    if not isinstance(chunk.repeat, Smoothing):
        return None
    sampling = chunk.sampled.get(row)
    counts = sampling.counts if sampling else ()
    return Votes(
        clean=clean.polls[row],
        adversarial=chunk.polls.get(row),
        chosen=sampling.chosen if sampling else None,
        counts=counts,
        radius=chunk.repeat.plan.radius(counts),
    )
