"""From judged chunks to the report."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from robusteval.evaluation.aftermath import abstentions, aftermath
from robusteval.evaluation.chunks import chunk_path, load_chunk, merge_stages
from robusteval.evaluation.compare import compare
from robusteval.evaluation.curve import curve
from robusteval.evaluation.plan import Plan
from robusteval.evaluation.preflight import refuse_unless_allowed
from robusteval.models.io import parameter_count, weights_digest
from robusteval.provenance import deterministic, environment
from robusteval.report import (
    DataFacts,
    Finding,
    Guarantee,
    ModelFacts,
    Report,
    SampleRow,
    StageResult,
    ThreatFacts,
    broken_at,
    count_verdicts,
)
from robusteval.runs import RunDir, write_atomic
from robusteval.threat import BUDGET_TOLERANCE
from robusteval.verdict import Verdict

REPORT, SAMPLES, CALIBRATION = "report.json", "samples.jsonl", "calibration.json"


def pending(plan: Plan, folder: Path) -> list[int]:
    """Return the chunks that have no rows yet."""
    return [index for index in plan.chunks if not chunk_path(folder, index).exists()]


def assemble(plan: Plan, run: RunDir, findings: list[Finding]) -> Report:
    """Put all chunks together: write `samples.jsonl` and `report.json`."""
    chunks = [load_chunk(run.path, index) for index in plan.chunks]
    rows = [row for chunk in chunks for row in chunk.rows]
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    batch_size = min(chunk.batch_size for chunk in chunks)
    report = _report(plan, rows, merge_stages(c.stages for c in chunks), findings, batch_size)
    write_atomic(run.path / SAMPLES, lines.encode())
    write_atomic(run.path / REPORT, (report.model_dump_json(indent=2) + "\n").encode())
    return report


def _report(
    plan: Plan, rows: list[SampleRow], stages: tuple[StageResult, ...], findings: list[Finding], batch_size: int
) -> Report:
    counts = Counter(row.verdict for row in rows)
    results = count_verdicts({verdict: counts[verdict] for verdict in Verdict}, plan.suite.certifying)
    points = curve(rows, plan.budgets, plan.suite.certifying)
    adaptations = [text for stage in stages for text in stage.adaptations]
    broken = broken_at(plan.threat.label, stages, points)
    findings = [
        *findings,
        *aftermath(results, stages, broken, plan.suite, plan.split.info.num_classes, plan.threat.norm),
    ]
    guarantee = Guarantee.of(rows, stages, plan.suite.smoothing) if plan.suite.smoothing else None
    findings += abstentions(guarantee, len(rows)) if guarantee else ()
    refuse_unless_allowed(findings, plan.config.allow)
    model, data = _model_facts(plan), _data_facts(plan)
    with deterministic(threads=1):  # as the chunks were judged
        facts = environment(plan.device)
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["robusteval", *sys.argv[1:]]),
        seed=plan.config.seed,
        chunk_size=plan.config.chunk_size,
        batch_size=batch_size,
        workers=plan.workers,
        queries=plan.config.queries,
        search=plan.config.search,
        seconds=sum(stage.seconds for stage in stages),
        model=model,
        data=data,
        threat=ThreatFacts(
            norm=plan.threat.norm.value, eps=plan.threat.label, radius=plan.threat.radius, tolerance=BUDGET_TOLERANCE
        ),
        suite=plan.suite.facts(adaptations),
        results=results,
        curve=points,
        guarantee=guarantee,
        stages=stages,
        findings=tuple(findings),
        baselines=compare(
            plan.suite.specs, findings, model, data, plan.threat, results, plan.config.queries, plan.config.search
        ),
        environment=facts,
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
