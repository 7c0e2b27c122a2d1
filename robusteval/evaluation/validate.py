"""Check a report folder: schema, hashes, and that the numbers follow from the rows.

What is checked here needs neither the model nor the data, so it cannot tell a report of other samples, or of another
model, from the one it claims to be.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import torch
from pydantic import ValidationError

from robusteval.catalog import first_problem, resource_folder
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.assemble import REPORT, SAMPLES
from robusteval.evaluation.chunks import CHUNKS
from robusteval.evaluation.compare import compare
from robusteval.evaluation.judge import SURVIVED
from robusteval.evaluation.suite import load_suite, suite_digest
from robusteval.report import Manifest, Rate, Report, SampleRow, StageResult, count_verdicts
from robusteval.runs import LOCK, file_digest, read_json, write_json
from robusteval.suites import suite_files
from robusteval.threat import BUDGET_TOLERANCE, ThreatModel
from robusteval.verdict import Verdict
from robusteval.witnesses import WITNESSES, load_witnesses, witness_files

MANIFEST = "manifest.json"
_UNSEALED = {MANIFEST, "events.jsonl", "config.json"}
"""Files of a run folder that are not part of the report."""


def seal(folder: Path) -> Manifest:
    """Write `manifest.json`, the hash of every file of the report; then drop the chunk files it replaces."""
    everything = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != CHUNKS)
    files = sorted(path for path in everything if path.name not in _UNSEALED)
    for path in folder.rglob(".*"):
        if path.is_file() and path.name != LOCK:
            path.unlink()  # what a killed process was still writing
    facts = [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in files
        if not path.name.startswith(".")
    ]
    manifest = Manifest.model_validate({"files": facts})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    shutil.rmtree(folder / CHUNKS, ignore_errors=True)
    return manifest


def read_report(folder: Path) -> Report:
    """Read `report.json`; raise `RobustevalError` when it is missing, damaged or of another version."""
    try:
        return Report.model_validate(read_json(folder / REPORT))
    except ValidationError as error:
        raise RobustevalError(f"'{folder / REPORT}' is not a report: {first_problem(error)}") from error


def validate(folder: Path) -> list[str]:
    """Return every problem found in the report in ``folder``, most basic first; an empty list means valid."""
    if not (folder / REPORT).is_file():
        raise UsageError(f"'{folder}' holds no finished report: there is no {REPORT} in it.")
    problems = [*_survive(_check_schemas(folder))]
    if problems:
        return problems
    try:
        report = Report.model_validate(read_json(folder / REPORT))
        rows = [SampleRow.model_validate_json(line) for line in _lines(folder)]
    except ValidationError as error:
        return [first_problem(error)]
    checks = (
        _check_manifest(folder),
        _check_rows(report, rows),
        _check_results(report, rows),
        _check_stages(report, rows),
        _check_witnesses(folder, report, rows),
    )
    return [problem for check in checks for problem in _survive(check)]


def _survive(check: Iterator[str]) -> Iterator[str]:
    """Turn a check that cannot go on, say on a damaged or hostile file, into one more problem."""
    try:
        yield from check
    except RobustevalError as error:
        yield str(error)
    except (ValueError, TypeError, ArithmeticError, OSError, RecursionError) as error:
        yield f"cannot be checked: {type(error).__name__}: {str(error)[:200]}"


def _lines(folder: Path) -> list[str]:
    try:
        return (folder / SAMPLES).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RobustevalError(f"cannot read '{folder / SAMPLES}': {error}.") from error


def _schema(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = read_json(resource_folder("schemas") / "v1" / f"{name}.schema.json")
    return schema


def _check_schemas(folder: Path) -> Iterator[str]:
    sample = jsonschema.Draft202012Validator(_schema("sample"))
    for name, path in (("report", folder / REPORT), ("manifest", folder / MANIFEST)):
        validator = jsonschema.Draft202012Validator(_schema(name))
        yield from (_say(path.name, error) for error in validator.iter_errors(read_json(path)))
    for number, line in enumerate(_lines(folder), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            yield f"{SAMPLES} line {number}: not JSON: {error}"
            continue
        yield from (_say(f"{SAMPLES} line {number}", error) for error in sample.iter_errors(row))


def _say(where: str, error: jsonschema.ValidationError) -> str:
    path = "/".join(str(part) for part in error.absolute_path) or "top level"
    return f"{where}: {path}: {error.message[:200]}"


def _check_manifest(folder: Path) -> Iterator[str]:
    manifest = Manifest.model_validate(read_json(folder / MANIFEST))
    listed = {fact.path for fact in manifest.files}
    for name in (REPORT, SAMPLES):
        if name not in listed:
            yield f"{MANIFEST} does not list {name}"
    for fact in manifest.files:
        path = folder / fact.path
        if not path.resolve().is_relative_to(folder.resolve()):
            yield f"{MANIFEST} names '{fact.path}', outside the report folder"
        elif not path.is_file():
            yield f"'{fact.path}' is listed in {MANIFEST} but missing"
        elif (path.stat().st_size, file_digest(path)) != (fact.bytes, fact.sha256):
            yield f"'{fact.path}' is not the file that {MANIFEST} hashes"
    for path in (folder / WITNESSES).glob("[!.]*"):
        if f"{WITNESSES}/{path.name}" not in listed:
            yield f"'{WITNESSES}/{path.name}' is not listed in {MANIFEST}"


def _check_rows(report: Report, rows: list[SampleRow]) -> Iterator[str]:
    if len(rows) != report.data.evaluated:
        yield f"{SAMPLES} has {len(rows)} rows, the report says {report.data.evaluated}"
    if report.data.evaluated > report.data.total:
        yield f"{report.data.evaluated} samples evaluated of only {report.data.total}"
    for position, row in enumerate(rows):
        if row.id != position:
            yield f"{SAMPLES} line {position + 1} is sample {row.id}; the first samples in order are expected"
            break
    stages = {stage.name: stage.kind for stage in report.stages}
    for row in rows:
        yield from (f"sample {row.id}: {problem}" for problem in _check_row(row, report, stages))


def _check_row(row: SampleRow, report: Report, stages: dict[str, Any]) -> Iterator[str]:
    classes, correct = len(report.data.classes), row.prediction == row.label
    if max(row.label, row.prediction, row.adv_prediction or 0) >= classes:
        yield f"names a class beyond the {classes} of the data"
    if correct == (row.verdict is Verdict.MISCLASSIFIED):
        yield f"is {row.verdict} with label {row.label} and prediction {row.prediction}"
    if (correct and row.margin < 0) or (not correct and row.margin > 0):
        yield f"has margin {row.margin} with label {row.label} and prediction {row.prediction}"
    closer = {Verdict.BROKEN: "attack", Verdict.CERTIFIED: "certifier"}.get(row.verdict)
    if stages.get(row.stage or "") != closer:
        yield f"is {row.verdict} by stage '{row.stage}'"
    undecided = {f"{name}: " for name, kind in stages.items() if kind == "certifier"}
    explained = row.reason == SURVIVED or (row.reason or "").startswith(tuple(undecided))
    if explained != (row.verdict is Verdict.UNKNOWN):
        yield f"is {row.verdict} for the reason '{row.reason}'"
    yield from _check_witness_facts(row, report)


def _check_witness_facts(row: SampleRow, report: Report) -> Iterator[str]:
    facts = (row.adv_prediction, row.adv_margin, row.adv_distance)
    if row.verdict is not Verdict.BROKEN:
        if any(fact is not None for fact in facts):
            yield f"is {row.verdict} but describes a witness"
        return
    if row.adv_prediction is None or row.adv_margin is None or row.adv_distance is None:
        yield "is broken without a description of its witness"
        return
    repeat = report.suite.repeat
    most = 1 - 2 * repeat.needed / repeat.evaluations + 1e-9 if repeat else 0.0
    if row.adv_prediction == row.label or row.adv_margin > most:
        yield f"is broken, but its witness is predicted {row.adv_prediction} with margin {row.adv_margin}"
    if not 0 <= row.adv_distance <= report.threat.radius + BUDGET_TOLERANCE:
        yield f"has a witness at distance {row.adv_distance}, beyond eps {report.threat.eps}"


def _check_results(report: Report, rows: list[SampleRow]) -> Iterator[str]:
    threat = ThreatModel.parse(report.threat.norm, report.threat.eps)
    if (threat.radius, BUDGET_TOLERANCE) != (report.threat.radius, report.threat.tolerance):
        yield f"radius {report.threat.radius} (tolerance {report.threat.tolerance}) is not eps {report.threat.eps}"
    certifying = any(stage.kind == "certifier" for stage in report.suite.stages)
    counts = Counter(row.verdict for row in rows)
    expected = count_verdicts({verdict: counts[verdict] for verdict in Verdict}, certifying)
    for name in ("clean", "empirical", "certified"):
        stated, counted = getattr(report.results, name), getattr(expected, name)
        if not _same_rate(stated, counted):
            yield f"{name} accuracy is stated as {_show(stated)}, the rows give {_show(counted)}"
    if dict(report.results.verdicts) != dict(expected.verdicts):
        yield "the counts of verdicts do not follow from the rows"
    if suite_digest(report.suite.stages, report.suite.skip_certified, report.suite.repeat) != report.suite.sha256:
        yield "the suite's hash does not match its stages"
    if report.suite.name in suite_files() and load_suite(report.suite.name, threat).sha256 != report.suite.sha256:
        yield f"the suite is called '{report.suite.name}' but is not the suite of that name"
    stated = (report.suite.stages, report.findings, report.model, report.data, threat, report.results)
    if compare(*stated) != report.baselines:
        yield "the comparison with RobustBench does not follow from the results"


def _same_rate(a: Rate | None, b: Rate | None) -> bool:
    if a is None or b is None:
        return a is b
    exact = (a.count, a.total, a.rate) == (b.count, b.total, b.rate)
    return exact and max(abs(a.low - b.low), abs(a.high - b.high)) < 1e-9


def _show(rate: Rate | None) -> str:
    return "none" if rate is None else f"{rate.count}/{rate.total} [{rate.low:.6f}, {rate.high:.6f}]"


def _check_stages(report: Report, rows: list[SampleRow]) -> Iterator[str]:
    if [stage.name for stage in report.stages] != [spec.name for spec in report.suite.stages]:
        yield "the stages that ran are not those of the suite"
    order = {stage.name: position for position, stage in enumerate(report.stages)}
    closed = Counter(row.stage for row in rows if row.stage)
    for stage in report.stages:
        entered = sum(_enters(row, stage, order, report.suite.skip_certified) for row in rows)
        if (stage.closed, stage.entered) != (closed[stage.name], entered):
            yield (
                f"stage '{stage.name}' closed {stage.closed} of {stage.entered}; "
                f"the rows give {closed[stage.name]} of {entered}"
            )
        if stage.kind == "attack" and stage.forward < stage.entered:
            yield f"stage '{stage.name}' looked at {stage.entered} samples in {stage.forward} forward passes"


def _enters(row: SampleRow, stage: StageResult, order: Mapping[str, int], skip_certified: bool) -> bool:
    """Whether a stage was given a sample: the sample was open, or certified and the suite attacks those, too."""
    if row.verdict is Verdict.MISCLASSIFIED:
        return False
    was_open = row.stage is None or order.get(row.stage, -1) >= order[stage.name]
    return was_open or (row.verdict is Verdict.CERTIFIED and stage.kind == "attack" and not skip_certified)


def _check_witnesses(folder: Path, report: Report, rows: list[SampleRow]) -> Iterator[str]:
    broken = {row.id for row in rows if row.verdict is Verdict.BROKEN}
    stored: Counter[int] = Counter()
    for path in witness_files(folder):
        ids, x_adv = load_witnesses(path)
        stored.update(ids)
        if tuple(x_adv.shape) != (len(ids), *report.data.shape) or x_adv.dtype != torch.float32:
            yield f"'{path.name}' holds {tuple(x_adv.shape)} {x_adv.dtype} for {len(ids)} samples"
        elif not bool(((x_adv >= 0) & (x_adv <= 1)).all()):
            yield f"'{path.name}' has a witness with pixels outside [0, 1]"
    if set(stored) != broken or any(count > 1 for count in stored.values()):
        odd = sorted(set(stored) ^ broken)
        yield f"stored witnesses and broken samples differ, first in sample {odd[0] if odd else 'stored twice'}"
