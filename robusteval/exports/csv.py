"""A report as tables for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robusteval.exports.base import Evaluation, Export
from robusteval.report import Rate, Report, SampleRow
from robusteval.verdict import Verdict

_ACTING = ("=", "+", "-", "@", "\t", "\r")
"""Begins of a cell that spreadsheets run as a formula."""

RATES = {
    "clean": "clean accuracy",
    "empirical": "robust accuracy under the suite's attacks, an upper bound of the true one",
    "certified": "proved robust accuracy, a lower bound; empty if no certifier ran",
}
RUN_COLUMNS = {
    "model": "name of the model",
    "architecture": "its architecture",
    "parameters": "number of trainable scalars",
    "weights_sha256": "hash of names, types, shapes and bytes of its state",
    "extra_data": "whether it saw data beyond the training set; empty if not known",
    "dataset": "data set",
    "benchmark": "RobustBench's name for exactly these images; empty if none",
    "part": "part of the data set",
    "evaluated": "samples evaluated, the first ones of the part",
    "total": "samples in the part",
    "data_sha256": "hash of ids, labels and pixels of the evaluated samples",
    "norm": "norm of the threat model",
    "eps": "budget as it was written; of several, the headline's",
    "suite": "name of the suite",
    "suite_sha256": "hash of its stages with all parameters",
    "precision": "in which attacks searched; float32 decided",
    "queries": "forward passes that attacks had for a sample; empty if no limit",
    "sigma": "noise of the smoothed classifier that all numbers are about; empty if they are about the network",
    **{
        f"{name}{end}": f"{what}, {meaning}"
        for name, what in RATES.items()
        for end, meaning in (
            ("", "fraction"),
            ("_low", "lower end of its exact 95 % interval"),
            ("_high", "upper end of its exact 95 % interval"),
            ("_count", "number of samples"),
        )
    },
    **{f"samples_{verdict.value}": f"samples with verdict '{verdict.value}'" for verdict in Verdict},
    "rank": "place among comparable RobustBench entries; empty if there is none",
    "rank_entries": "how many these are",
    "findings": "names of the findings with their severities; see report.md",
    "seed": "seed of everything random",
    "chunk_size": "samples that attacks saw at once",
    "batch_size": "images on the device at once",
    "forward": "forward passes of all stages",
    "backward": "backward passes of all stages",
    "seconds": "worker seconds of all stages",
    "device": "device type and name",
    "robusteval": "version of robusteval",
    "torch": "version of torch",
    "git_commit": "commit of robusteval's checkout; empty if it was installed",
    "created": "when the report was written, ISO 8601",
}
SAMPLE_COLUMNS = {
    "id": "position in the part of the data set",
    "label": "true class",
    "prediction": "predicted class of the clean input",
    "margin": "clean margin of the true class; negative or zero where misclassified",
    "verdict": "misclassified, broken, unknown or certified, at the headline's eps",
    "stage": "stage that closed the sample; empty if none did",
    "stages": "the same at every eps of a curve, ascending, separated by |",
    "reason": "why an open sample stayed open",
    "adv_prediction": "predicted class of the stored witness",
    "adv_margin": "its margin for the true class",
    "adv_distance": "its distance from the clean input in the threat's norm",
}


@dataclass(frozen=True)
class Csv:
    """Tables: one row for the run, one row per sample, and what every column means (UTF-8, RFC 4180).

    `run.csv` rows of several runs can be put under one header. Text that a spreadsheet would run as a formula gets an
    apostrophe before it.
    """

    def __call__(self, run: Evaluation) -> Export:
        """Return `run.csv`, `samples.csv` and `columns.csv`."""
        meanings = [
            (name, column, meaning)
            for name, columns in (("run.csv", RUN_COLUMNS), ("samples.csv", SAMPLE_COLUMNS))
            for column, meaning in columns.items()
        ]
        return Export(
            files={
                "run.csv": _table(list(RUN_COLUMNS), [_run(run.report)]),
                "samples.csv": _table(list(SAMPLE_COLUMNS), map(_sample, run.rows)),
                "columns.csv": _table(["file", "column", "meaning"], meanings),
            }
        )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value  # csv writes None as nothing and floats in full
    shown = " ".join(value.split())
    return f"'{shown}" if shown.startswith(_ACTING) else shown


def _run(report: Report) -> list[Any]:
    model, data, suite, ran = report.model, report.data, report.suite, report.environment
    facts: dict[str, Any] = {
        **{name: getattr(model, name) for name in ("architecture", "parameters", "weights_sha256", "extra_data")},
        **{name: getattr(data, name) for name in ("benchmark", "part", "evaluated", "total")},
        **{name: getattr(report, name) for name in ("queries", "seed", "chunk_size", "batch_size", "seconds")},
        **{"model": model.name, "dataset": data.title, "data_sha256": data.sha256, "created": report.created},
        **{"norm": report.threat.norm, "eps": report.threat.eps, "suite": suite.name, "suite_sha256": suite.sha256},
        "precision": report.search.precision,
        "sigma": suite.smoothing.sigma if suite.smoothing else None,
        **_rates(report),
        **{f"samples_{verdict.value}": report.results.verdicts[verdict] for verdict in Verdict},
        **{"rank": report.baselines.rank, "rank_entries": report.baselines.entries},
        "findings": "; ".join(f"{finding.severity} {finding.name}" for finding in report.findings),
        "forward": sum(stage.forward for stage in report.stages),
        "backward": sum(stage.backward for stage in report.stages),
        "device": f"{ran.device} {ran.device_name}".strip(),
        **{name: ran.packages.get(name) for name in ("robusteval", "torch")},
        "git_commit": ran.git_commit,
    }
    return [facts[name] for name in RUN_COLUMNS]


def _rates(report: Report) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name in RATES:
        rate: Rate | None = getattr(report.results, name)
        values = (rate.rate, rate.low, rate.high, rate.count) if rate else (None,) * 4
        cells |= dict(zip((name, f"{name}_low", f"{name}_high", f"{name}_count"), values, strict=True))
    return cells


def _sample(row: SampleRow) -> list[Any]:
    facts: Mapping[str, Any] = row.model_dump(mode="json", exclude={"votes"})
    return [
        "|".join(stage or "" for stage in row.stages) if name == "stages" else facts[name] for name in SAMPLE_COLUMNS
    ]
