"""One chunk of samples in, one verdict per sample out: the heart of the evaluator.

The harness believes no attack. A candidate breaks its sample only if it is finite, in [0,1], within eps of
the clean input (tolerance `threat.BUDGET_TOLERANCE`) and misclassified in float32, all checked here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from robusteval.attacks.base import Attack
from robusteval.certifiers.base import Certifier
from robusteval.errors import RobustevalError, SoundnessContradiction
from robusteval.evaluation.decide import decide
from robusteval.evaluation.probe import Probe, failures
from robusteval.evaluation.suite import Stage
from robusteval.report import Repeat, SampleRow, StageResult
from robusteval.rng import SampleRng, derive_seed
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict, Witness

SURVIVED = "survived every attack"

Told = Callable[[str], None]


@dataclass(frozen=True)
class Judgement:
    """Rows of one chunk in order, the witnesses of its broken samples by id, and what each stage cost."""

    rows: tuple[SampleRow, ...]
    witnesses: dict[int, Witness]
    stages: tuple[StageResult, ...]


@dataclass
class _Chunk:
    """The state while stages run. ``verdicts``, ``closer`` and ``why`` have one entry per sample.

    ``repeat`` says how its samples are decided.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    repeat: Repeat | None
    verdicts: list[Verdict]
    closer: list[str | None]
    why: list[str | None]
    witnesses: dict[int, Witness]

    def rows(self, *verdicts: Verdict) -> Tensor:
        return torch.tensor([i for i, v in enumerate(self.verdicts) if v in verdicts], dtype=torch.long)

    def close(self, row: int, verdict: Verdict, stage: str) -> None:
        self.verdicts[row], self.closer[row], self.why[row] = verdict, stage, None

    def break_(self, row: int, witness: Witness, stage: str) -> None:
        sample = int(self.ids[row])
        if self.verdicts[row] is Verdict.CERTIFIED:
            raise SoundnessContradiction(
                f"sample {sample} was certified by '{self.closer[row]}' and broken by '{stage}' at distance "
                f"{witness.distance:.6g}; one of them is wrong, so no number of this run can be trusted."
            )
        self.close(row, Verdict.BROKEN, stage)
        self.witnesses[sample] = witness


def judge(
    probe: Probe,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    threat: ThreatModel,
    stages: Sequence[Stage],
    rng: SampleRng,
    skip_certified: bool = False,
    repeat: Repeat | None = None,
    told: Told = lambda stage: None,
) -> Judgement:
    """Run ``stages`` in order on the samples still open and return every sample's verdict.

    ``x`` (N, C, H, W) float32 in [0,1] and ``y``, ``ids`` (N,) int64 are one chunk. Raises `RobustevalError` on
    non-finite logits and `SoundnessContradiction` when a proved sample is broken.
    """
    _check_inputs(x, ids)
    clean = decide(probe, x, y, ids, repeat, derive_seed(rng.batch, "decide"))
    start = [Verdict.UNKNOWN if correct else Verdict.MISCLASSIFIED for correct in (clean.prediction == y).tolist()]
    chunk = _Chunk(x, y, ids, repeat, start, [None] * len(x), [None] * len(x), {})
    attackable = [Verdict.UNKNOWN] if skip_certified else [Verdict.UNKNOWN, Verdict.CERTIFIED]
    results = []
    for stage in stages:
        told(stage.name)
        wanted = attackable if stage.kind == "attack" else [Verdict.UNKNOWN]
        results.append(_run_stage(stage, probe, chunk, chunk.rows(*wanted), threat, rng))
    return Judgement(_rows(chunk, clean.prediction, clean.margin), chunk.witnesses, tuple(results))


def _run_stage(
    stage: Stage, probe: Probe, chunk: _Chunk, rows: Tensor, threat: ThreatModel, rng: SampleRng
) -> StageResult:
    began, before = time.perf_counter(), replace(probe.passes)
    outcome = _Outcome()
    if len(rows):
        act = _attack if stage.kind == "attack" else _certify
        outcome = act(stage, probe, chunk, rows, threat, rng.take(rows))
    return StageResult(
        name=stage.name,
        kind=stage.kind,
        entered=len(rows),
        closed=outcome.closed,
        rejected=outcome.rejected,
        non_finite=outcome.non_finite,
        forward=probe.passes.forward - before.forward,
        backward=probe.passes.backward - before.backward,
        zero_gradients=probe.passes.zero - before.zero,
        non_finite_gradients=probe.passes.non_finite - before.non_finite,
        seconds=time.perf_counter() - began,
        adaptations=outcome.adaptations,
        warnings=outcome.warnings,
    )


@dataclass(frozen=True)
class _Outcome:
    closed: int = 0
    rejected: int = 0
    non_finite: int = 0
    adaptations: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _attack(stage: Stage, probe: Probe, chunk: _Chunk, rows: Tensor, threat: ThreatModel, rng: SampleRng) -> _Outcome:
    x, y, ids = chunk.x[rows], chunk.y[rows], chunk.ids[rows]
    with failures(f"stage '{stage.name}'"):
        result = cast(Attack, stage.run)(probe, x, y, threat, rng)
    candidates = result.candidates.detach().float()
    if candidates.shape != x.shape:
        raise RobustevalError(f"stage '{stage.name}' returned {tuple(candidates.shape)} for {tuple(x.shape)} inputs.")
    allowed, distance = threat.contains(x, candidates), threat.distance(x, candidates)
    checked = torch.where(allowed.view(-1, 1, 1, 1), candidates, x)  # what is out of bounds counts as no attempt
    decided = decide(probe, checked, y, ids, chunk.repeat, derive_seed(rng.batch, "decide", stage.name))
    with torch.no_grad():
        claimed = 0 if allowed.all() else int(((probe(candidates.nan_to_num()).argmax(1) != y) & ~allowed).sum())
    broken = (decided.wrong & allowed).nonzero().squeeze(1).tolist()
    for i in broken:
        prediction, margin = int(decided.prediction[i]), float(decided.margin[i])
        witness = Witness(candidates[i].cpu(), prediction, float(distance[i]), margin)
        chunk.break_(int(rows[i]), witness, stage.name)
    non_finite = int((~candidates.flatten(1).isfinite().all(1)).sum())
    return _Outcome(len(broken), claimed, non_finite, result.adaptations, result.warnings)


def _certify(stage: Stage, probe: Probe, chunk: _Chunk, rows: Tensor, threat: ThreatModel, rng: SampleRng) -> _Outcome:
    with failures(f"stage '{stage.name}'"):
        certificates = cast(Certifier, stage.run)(probe, chunk.x[rows], chunk.y[rows], threat, rng)
    if len(certificates) != len(rows):
        raise RobustevalError(f"stage '{stage.name}' returned {len(certificates)} certificates for {len(rows)} inputs.")
    for row, certificate in zip(rows.tolist(), certificates, strict=True):
        if certificate.proved:
            chunk.close(row, Verdict.CERTIFIED, stage.name)
        else:
            chunk.why[row] = f"{stage.name}: {certificate.reason}"
    return _Outcome(closed=sum(certificate.proved for certificate in certificates))


def _check_inputs(x: Tensor, ids: Tensor) -> None:
    flat = x.flatten(1)
    bad = ~((flat >= 0) & (flat <= 1)).all(1).cpu()
    if bad.any():
        raise RobustevalError(
            f"sample {int(ids[bad][0])} has pixels outside [0, 1], so no perturbation could stay in it."
        )


def _rows(chunk: _Chunk, prediction: Tensor, margin: Tensor) -> tuple[SampleRow, ...]:
    rows = []
    for i, sample in enumerate(chunk.ids.tolist()):
        witness, verdict = chunk.witnesses.get(sample), chunk.verdicts[i]
        survived = SURVIVED if verdict is Verdict.UNKNOWN else None
        rows.append(
            SampleRow(
                id=sample,
                label=int(chunk.y[i]),
                prediction=int(prediction[i]),
                margin=float(margin[i]),
                verdict=verdict,
                stage=chunk.closer[i],
                reason=chunk.why[i] or survived,
                adv_prediction=witness.prediction if witness else None,
                adv_margin=witness.margin if witness else None,
                adv_distance=witness.distance if witness else None,
            )
        )
    return tuple(rows)
