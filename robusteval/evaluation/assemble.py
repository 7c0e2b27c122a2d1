"""From judged chunks to the report."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from robusteval.baselines.rank import Baseline, Placement, comparable, place, source
from robusteval.evaluation.chunks import chunk_path, load_chunk, merge_stages
from robusteval.evaluation.plan import Plan
from robusteval.evaluation.preflight import square_check
from robusteval.evaluation.suite import load_suite
from robusteval.models.io import parameter_count, weights_digest
from robusteval.provenance import environment
from robusteval.report import (
    Comparison,
    DataFacts,
    Finding,
    ModelFacts,
    Neighbour,
    Report,
    Results,
    StageResult,
    ThreatFacts,
    count_verdicts,
)
from robusteval.runs import RunDir, write_atomic
from robusteval.threat import BUDGET_TOLERANCE
from robusteval.verdict import Verdict

REPORT, SAMPLES = "report.json", "samples.jsonl"


def pending(plan: Plan, folder: Path) -> list[int]:
    """Return the chunks that have no rows yet."""
    return [index for index in plan.chunks if not chunk_path(folder, index).exists()]


def assemble(plan: Plan, run: RunDir, findings: list[Finding]) -> Report:
    """Put all chunks together: write `samples.jsonl` and `report.json`."""
    chunks = [load_chunk(run.path, index) for index in plan.chunks]
    rows = [row for chunk in chunks for row in chunk.rows]
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    report = _report(plan, Counter(row.verdict for row in rows), merge_stages(c.stages for c in chunks), findings)
    write_atomic(run.path / SAMPLES, lines.encode())
    write_atomic(run.path / REPORT, (report.model_dump_json(indent=2) + "\n").encode())
    return report


def _report(plan: Plan, counts: Counter[Verdict], stages: tuple[StageResult, ...], findings: list[Finding]) -> Report:
    results = count_verdicts({verdict: counts[verdict] for verdict in Verdict}, plan.suite.certifying)
    adaptations = [text for stage in stages for text in stage.adaptations]
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(["robusteval", *sys.argv[1:]]),
        seed=plan.config.seed,
        chunk_size=plan.config.chunk_size,
        batch_size=plan.batch_size,
        workers=plan.workers,
        seconds=sum(stage.seconds for stage in stages),
        model=_model_facts(plan),
        data=_data_facts(plan),
        threat=ThreatFacts(
            norm=plan.threat.norm.value, eps=plan.threat.label, radius=plan.threat.radius, tolerance=BUDGET_TOLERANCE
        ),
        suite=plan.suite.facts(adaptations),
        results=results,
        stages=stages,
        findings=(*findings, *_late_findings(results, stages)),
        baselines=_compare(plan, results),
        environment=environment(plan.device),
    )


def _late_findings(results: Results, stages: tuple[StageResult, ...]) -> Iterator[Finding]:
    yield from square_check(results.clean.count, stages, results.clean.total)
    for stage in stages:
        for text in stage.warnings:
            yield Finding(name=stage.name, severity="warning", origin="autoattack", message=text, advice="")
        if stage.rejected:
            yield Finding(
                name="rejected-candidates",
                severity="warning",
                origin="robusteval",
                message=f"{stage.name} returned {stage.rejected} misclassified inputs outside the threat model.",
                advice="They were not counted as breaks.",
            )


def _model_facts(plan: Plan) -> ModelFacts:
    model, config = plan.model, plan.config
    return ModelFacts(
        name=model.name,
        source=model.source,
        architecture=model.architecture,
        parameters=parameter_count(model.module),
        weights_sha256=weights_digest(model.module),
        extra_data=model.extra_data if config.extra_data is None else config.extra_data,
        training=dict(model.training),
    )


def _data_facts(plan: Plan) -> DataFacts:
    info = plan.split.info
    return DataFacts(
        name=plan.config.dataset or "digits",
        title=info.title,
        part=plan.split.part,
        total=plan.available,
        evaluated=len(plan.split),
        shape=info.shape,
        classes=info.classes,
        benchmark=info.benchmark,
        sha256=plan.split.content_hash,
    )


def _compare(plan: Plan, results: Results) -> Comparison:
    standard = load_suite("standard", plan.threat)
    if not all(spec in plan.suite.specs for spec in standard.specs):
        reason = f"suite '{plan.suite.name}' is not AutoAttack standard, by which RobustBench ranks."
        return _comparison(Placement(reason=reason), [])
    info, robust, extra_data = plan.split.info, results.empirical, _model_facts(plan).extra_data
    placement = place(
        title=info.title,
        benchmark=info.benchmark,
        threat=plan.threat,
        robust=robust.rate,
        interval=(robust.low, robust.high),
        extra_data=extra_data,
        complete=len(plan.split) == plan.available,
    )
    return _comparison(placement, comparable(info.benchmark, plan.threat.norm, plan.threat.eps, extra_data))


def _comparison(placement: Placement, rivals: list[Baseline]) -> Comparison:
    best = (placement.best,) if placement.best else ()
    shown = dict.fromkeys((*best, *placement.above, *placement.below))
    neighbours = [
        Neighbour(
            id=entry.id,
            architecture=entry.architecture,
            clean=entry.clean_acc,
            best_known=entry.best_known,
            extra_data=entry.additional_data,
            rank=1 + sum(rival.best_known > entry.best_known for rival in rivals),
        )
        for entry in shown
    ]
    return Comparison(
        snapshot=source(),
        reason=placement.reason,
        rank=placement.rank,
        rank_best=placement.best_rank,
        rank_worst=placement.worst_rank,
        provisional=placement.provisional,
        entries=placement.entries,
        neighbours=tuple(neighbours),
        notes=placement.notes,
    )
