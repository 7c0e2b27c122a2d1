"""Check a report folder: schema, hashes, and that the numbers follow from the rows.

What is checked here needs neither the model nor the data, so it cannot tell a report of other samples, or of another
model, from the one it claims to be.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import jsonschema
import torch
from pydantic import ValidationError

from robusteval.catalog import first_problem, resource_folder
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.assemble import CALIBRATION, REPORT, SAMPLES
from robusteval.evaluation.chunks import CHUNKS
from robusteval.evaluation.consistency import CHECKS
from robusteval.evaluation.proofs import PROOFS
from robusteval.mcnemar import mcnemar
from robusteval.report import Calibration, FileFact, Manifest, Report, SampleRow
from robusteval.runs import LAUNCH, LOCK, file_digest, read_json, write_json
from robusteval.verdict import Verdict
from robusteval.witnesses import WITNESSES, load_witnesses, witness_files

MANIFEST = "manifest.json"
_UNSEALED = {MANIFEST, LAUNCH}
"""Files of a run folder that are not part of the report: `launch.json` says where the data lay on that machine."""


def seal(folder: Path) -> Manifest:
    """Write `manifest.json`, the hash of every file of the report; then drop the chunk files it replaces."""
    everything = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != CHUNKS)
    files = sorted(path for path in everything if path.name not in _UNSEALED)
    for path in folder.rglob(".*"):
        if path.is_file() and path.name != LOCK:
            path.unlink()  # what a killed process was still writing
    facts = [_fact(folder, path) for path in files if not path.name.startswith(".")]
    manifest = Manifest(files=tuple(facts))
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    shutil.rmtree(folder / CHUNKS, ignore_errors=True)
    return manifest


def reseal(folder: Path, *names: str) -> None:
    """Put the files ``names``, made again, into `manifest.json`; what it says of every other file stays as it was."""
    manifest = Manifest.model_validate(read_json(folder / MANIFEST))
    others = [fact for fact in manifest.files if fact.path not in names]
    facts = sorted([*others, *(_fact(folder, folder / name) for name in names)], key=lambda fact: Path(fact.path))
    write_json(folder / MANIFEST, Manifest(files=tuple(facts)).model_dump(mode="json"))


def _fact(folder: Path, path: Path) -> FileFact:
    return FileFact(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=file_digest(path))


def read_report(folder: Path) -> Report:
    """Read `report.json`; raise `RobustevalError` when it is missing, damaged or of another version."""
    try:
        return Report.model_validate(read_json(folder / REPORT))
    except ValidationError as error:
        raise RobustevalError(f"'{folder / REPORT}' is not a report: {first_problem(error)}") from error


def read_rows(folder: Path) -> list[SampleRow]:
    """Read `samples.jsonl`; raise `RobustevalError` when it is missing or damaged."""
    try:
        return [SampleRow.model_validate_json(line) for line in _lines(folder)]
    except ValidationError as error:
        raise RobustevalError(f"'{folder / SAMPLES}' has a line that is no sample: {first_problem(error)}") from error


def validate(folder: Path, but: Collection[str] = ()) -> list[str]:
    """Return every problem found in the report in ``folder``, most basic first; an empty list means valid.

    Files named in ``but`` are about to be made again, so their hashes do not count.
    """
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
        _check_manifest(folder, but),
        *(check(report, rows) for check in CHECKS),
        _check_witnesses(folder, report, rows),
        _check_calibration(folder, report, rows),
    )
    return [problem for check in checks for problem in _survive(check)]


def _survive(check: Iterator[str]) -> Iterator[str]:
    """Turn a check that cannot go on, say on a damaged or hostile file, into one more problem."""
    try:
        yield from check
    except RobustevalError as error:
        yield str(error)
    except (ValueError, TypeError, ArithmeticError, LookupError, OSError, RecursionError) as error:
        yield f"cannot be checked: {type(error).__name__}: {str(error)[:200]}"


def _lines(folder: Path) -> list[str]:
    try:
        return (folder / SAMPLES).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RobustevalError(f"cannot read '{folder / SAMPLES}': {error}.") from error


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    """Return what checks JSON against the schema called ``name``, one of `SCHEMAS`."""
    return jsonschema.Draft202012Validator(read_json(resource_folder("schemas") / "v1" / f"{name}.schema.json"))


def _check_schemas(folder: Path) -> Iterator[str]:
    sample = validator("sample")
    for name, path in (("report", folder / REPORT), ("manifest", folder / MANIFEST)):
        yield from (_say(path.name, error) for error in validator(name).iter_errors(read_json(path)))
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


def _check_manifest(folder: Path, but: Collection[str]) -> Iterator[str]:
    manifest = Manifest.model_validate(read_json(folder / MANIFEST))
    listed = {fact.path for fact in manifest.files}
    for name in (REPORT, SAMPLES, CALIBRATION):
        if name not in listed and (name != CALIBRATION or (folder / name).is_file()):
            yield f"{MANIFEST} does not list {name}"
    for fact in manifest.files:
        if fact.path in but:
            continue
        path = folder / fact.path
        if not path.resolve().is_relative_to(folder.resolve()):
            yield f"{MANIFEST} names '{fact.path}', outside the report folder"
        elif not path.is_file():
            yield f"'{fact.path}' is listed in {MANIFEST} but missing"
        elif (path.stat().st_size, file_digest(path)) != (fact.bytes, fact.sha256):
            yield f"'{fact.path}' is not the file that {MANIFEST} hashes"
    for path in (path for part in (WITNESSES, PROOFS) for path in (folder / part).glob("[!.]*")):
        if (name := path.relative_to(folder).as_posix()) not in listed:
            yield f"'{name}' is not listed in {MANIFEST}"


def _check_calibration(folder: Path, report: Report, rows: list[SampleRow]) -> Iterator[str]:
    """Check that a calibration is about this report, and that its figures follow from its counts."""
    if not (folder / CALIBRATION).is_file():
        return
    record = read_json(folder / CALIBRATION)
    yield from (_say(CALIBRATION, error) for error in validator("calibration").iter_errors(record))
    found, known = Calibration.model_validate(record), {row.id: row.verdict for row in rows}
    if found.report_sha256 != file_digest(folder / REPORT):
        yield f"{CALIBRATION} is about another report"
    if (found.suite.name, found.suite.sha256) != (report.suite.name, report.suite.sha256):
        yield f"{CALIBRATION} is about another suite"
    ours, theirs, samples = set(found.only_suite_breaks), set(found.only_against_breaks), set(found.samples)
    right = {sample for sample in samples if known.get(sample) is not Verdict.MISCLASSIFIED}
    both = found.suite.robust - len(theirs)  # robust to the two of them
    distinct = [len(kind) for kind in (found.samples, found.only_suite_breaks, found.only_against_breaks)]
    if not samples <= set(known) or not ours | theirs <= right or ours & theirs:
        yield f"{CALIBRATION} names samples that it cannot be about"
    elif distinct != [len(samples), len(ours), len(theirs)] or found.clean != len(right):
        yield f"{CALIBRATION} has counts that do not follow from its samples"
    elif both < 0 or both + len(ours | theirs) > found.clean:
        yield f"{CALIBRATION} has more robust samples than there are, or fewer than it names"
    elif found.suite.robust - found.against.robust != len(theirs) - len(ours):
        yield f"{CALIBRATION} has robust samples that do not follow from those only one suite breaks"
    else:
        paired = mcnemar(len(ours), len(theirs), len(samples))
        stated, counted = (found.difference, found.low, found.high), (paired.difference, paired.low, paired.high)
        if any(abs(a - b) > 1e-6 for a, b in zip(stated, counted, strict=True)):
            yield f"{CALIBRATION} has a difference that does not follow from its counts"


def _check_witnesses(folder: Path, report: Report, rows: list[SampleRow]) -> Iterator[str]:
    broken = {row.id for row in rows if row.adv_distance is not None}
    stored: Counter[int] = Counter()
    for path in witness_files(folder):
        ids, x_adv = load_witnesses(path)
        stored.update(ids)
        if tuple(x_adv.shape) != (len(ids), *report.data.shape) or x_adv.dtype != torch.float32:
            yield f"'{path.name}' holds {tuple(x_adv.shape)} {x_adv.dtype} for {len(ids)} samples"
            continue
        for sample, boxed in zip(ids, ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1).tolist(), strict=True):
            if not boxed:
                yield f"sample {sample}: has a witness with pixels outside [0, 1], in '{path.name}'"
    if set(stored) != broken or any(count > 1 for count in stored.values()):
        odd = sorted(set(stored) ^ broken)
        yield f"stored witnesses and broken samples differ, first in sample {odd[0] if odd else 'stored twice'}"
