"""A model card and evaluation results for the Hugging Face Hub."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from robusteval.errors import UsageError
from robusteval.exports._markdown import block, inline, is_url, linked, plain, table
from robusteval.exports.base import Content, Evaluation, Export
from robusteval.render._text import (
    BRACKET,
    CURVE_HEADER,
    STAGE_HEADER,
    STAGE_LEGEND,
    accuracies,
    curve_rows,
    placement,
    rulings,
    stage_rows,
    subject,
)
from robusteval.report import Report
from robusteval.suites import suite_files

CARD, RESULTS = "README.md", ".eval_results/robusteval.yaml"
TASK = "image-classification"
ORIGINAL = "evaluation"
"""Folder of the repository in which `submit` puts the report itself."""


@dataclass(frozen=True)
class HuggingFace:
    """The Hub's model card with `model-index`, and `.eval_results` for a benchmark's leaderboard there.

    All fields may be left out. ``dataset_id`` is the Hub's name of the data set; together with ``task_id``, a task of
    a benchmark that lives there, it makes `.eval_results`. ``license`` is an identifier of the Hub, as in mit.

    Made by huggingface_hub's own classes (written against 2.4.0); `.eval_results` has the fields of its
    `EvalResultEntry`, of which ``verify_token`` is the Hub's own to give. Values are fractions of 1.
    """

    dataset_id: str | None = None
    task_id: str | None = None
    dataset_revision: str | None = None
    license: str | None = None
    authors: str | None = None
    paper: str | None = None
    source_url: str | None = None

    def __call__(self, run: Evaluation) -> Export:
        """Return `README.md` and, where a benchmark is named, `.eval_results/robusteval.yaml`."""
        report = run.report
        for name in ("paper", "source_url"):
            address = getattr(self, name)
            if address is not None and not is_url(address):
                raise UsageError(f"{name} '{address}' is not an http address.")
        if self.task_id and not self.dataset_id:
            raise UsageError("task_id is a task of a benchmark: give --set dataset_id=USER/NAME, too.")
        if self.task_id:
            reasons = tuple(_not_for_leaderboards(report))
            if reasons:
                return Export(barred=reasons)
        files: dict[str, Content] = {CARD: self._card(report).encode()}
        if not self.task_id:
            needs = "it needs --set dataset_id=USER/NAME --set task_id=TASK of a benchmark on the Hub"
            return Export(files, notes=(f"{RESULTS} is left out: {needs}.",))
        entries = eval_result_entries_to_yaml([self._entry(report)])
        files[RESULTS] = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).encode()
        return Export(files)

    def _entry(self, report: Report) -> EvalResultEntry:
        return EvalResultEntry(
            dataset_id=str(self.dataset_id),
            task_id=str(self.task_id),
            value=report.results.empirical.rate,
            dataset_revision=self.dataset_revision,
            date=report.created,
            source_url=self.source_url,
            source_name="robusteval" if self.source_url else None,
            notes=plain(f"robust accuracy, {_conditions(report)}"),
        )

    def _card(self, report: Report) -> str:
        data = ModelCardData(
            license=self.license,
            pipeline_tag=TASK,
            tags=["adversarial-robustness", "robusteval"],
            datasets=[self.dataset_id] if self.dataset_id else None,
            metrics=["accuracy"],
            model_name=plain(report.model.name),
            eval_results=[*self._results(report)],
        )
        body = "\n\n".join(section for section in self._sections(report) if section)
        # once through the library's own parser: what it reads back is what the Hub will read
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))

    def _results(self, report: Report) -> Iterator[EvalResult]:
        results, conditions = report.results, _conditions(report)
        named = {
            "Clean accuracy": results.clean,
            f"Robust accuracy, upper bound by attack ({conditions})": results.empirical,
            f"Robust accuracy, proved lower bound ({conditions})": results.certified,
        }
        for name, rate in named.items():
            if rate is not None:
                yield EvalResult(
                    task_type=TASK,
                    dataset_type=self.dataset_id or plain(report.data.name.partition(":")[0]),
                    dataset_name=plain(_samples(report)),
                    dataset_split=plain(report.data.part),
                    dataset_revision=self.dataset_revision,
                    metric_type="accuracy",
                    metric_name=plain(name),
                    metric_value=rate.rate,
                    source_url=self.source_url,
                    source_name="robusteval" if self.source_url else None,
                )

    def _sections(self, report: Report) -> Iterator[str]:
        yield f"# {inline(report.model.name)}"
        yield inline(subject(report)) + "."
        by = [f"Authors: {inline(self.authors)}." if self.authors else "", linked(self.paper or "")]
        yield " ".join(text for text in by if text)
        yield table(("", "accuracy", "95 % interval", "samples"), accuracies(report)) + f"\n\n`{BRACKET}`"
        yield "\n\n".join(inline(ruling) for ruling in rulings(report))
        if report.curve:
            yield f"## Robust accuracy against {report.threat.norm} eps\n\n{table(CURVE_HEADER, curve_rows(report))}"
        yield f"## Attacks and proofs\n\n{inline(report.suite.title)}. {inline(report.suite.reference)}"
        yield table(STAGE_HEADER, stage_rows(report)) + f"\n\n{STAGE_LEGEND}."
        yield f"## Findings\n\n{_findings(report)}"
        yield inline(placement(report.baselines))
        yield f"## Reproduce\n\n{_reproduce(report)}"
        yield f"## Verify\n\n{_verify(report)}"
        yield f"## Limits\n\n{_limits(report)}"


def _not_for_leaderboards(report: Report) -> Iterator[str]:
    """Yield why a leaderboard, which shows a number without words, should not have this one."""
    data = report.data
    if data.evaluated < data.total or data.part != "test":
        yield f"Only {data.evaluated} of the {data.total} images of part '{plain(data.part)}' were evaluated."
    for finding in report.findings:
        if finding.severity == "error":
            yield f"The result is doubtful ({plain(finding.name)}: {plain(finding.message)})"


def _samples(report: Report) -> str:
    data = report.data
    part = f"all {data.total}" if data.evaluated == data.total else f"the first {data.evaluated} of {data.total}"
    return f"{data.title}, {part} {data.part} images"


def _conditions(report: Report) -> str:
    smoothing, queries = report.suite.smoothing, report.queries
    said = [f"{report.threat.norm} eps {report.threat.eps}", f"suite {report.suite.name}"]
    said += [f"smoothed with sigma {smoothing.sigma:g}"] if smoothing else []
    said += [f"{queries} queries per image"] if queries else []
    said += [f"attacks searched in {report.search.precision}"] if report.search.precision != "float32" else []
    return ", ".join(said)


def _findings(report: Report) -> str:
    lines = [f"- adapted: {inline(text)}" for text in report.suite.adaptations]
    for finding in report.findings:
        said = inline(f"{finding.message} {finding.advice}".strip())
        lines.append(f"- **{finding.severity}** {inline(finding.name)} ({finding.origin}): {said}")
    return "\n".join(lines) or "None: the model passed every check."


def _reproduce(report: Report) -> str:
    """Give the command, made from the report's facts: what somebody typed may hold anything."""
    name, colon, _ = report.data.name.partition(":")
    smoothing = report.suite.smoothing
    several = [f"curve={json.dumps([point.eps for point in report.curve])}"] if report.curve else []
    changes = (
        [f"smoothing.{key}={json.dumps(value)}" for key, value in smoothing.model_dump().items()] if smoothing else []
    )
    settings: list[tuple[str, Any]] = [
        ("--dataset", f"{name}:PATH" if colon else name),
        ("--norm", report.threat.norm),
        ("--eps", report.threat.eps),
        ("--suite", report.suite.name),
        ("--seed", report.seed),
        *([("--limit", report.data.evaluated)] if report.data.evaluated < report.data.total else []),
        *([("--queries", report.queries)] if report.queries else []),
        *([("--precision", report.search.precision)] if report.search.precision != "float32" else []),
        *([("--set", "compiled=true")] if report.search.compiled else []),
        *(("--set", change) for change in (f"chunk_size={report.chunk_size}", *several, *changes)),
    ]
    typed = " ".join(f"{flag} {shlex.quote(plain(str(value)))}" for flag, value in settings)
    known = suite_files()
    own = "" if report.suite.name in known else " The suite is not one that comes with robusteval as it is."
    versions = ", ".join(f"{package} {version}" for package, version in report.environment.packages.items())
    return "\n\n".join(
        [
            block(f"robusteval evaluate --model MODEL {typed}"),
            f"MODEL has the weights with SHA-256 `{report.model.weights_sha256}`, the samples "
            f"`{report.data.sha256}`, the suite `{report.suite.sha256}`.{own}",
            inline(f"It ran with Python {report.environment.python}, {versions}, on {report.environment.device}."),
        ]
    )


def _verify(report: Report) -> str:
    return (
        f"{block(f'robusteval validate {ORIGINAL}')}\n\nchecks schema, hashes, and that every number follows from the "
        f"rows, if the report lies in `{ORIGINAL}/`. The adversarial inputs that were found are in "
        f"`{ORIGINAL}/witnesses/`; `robusteval evaluate --witnesses {ORIGINAL}` tries them on a model."
    )


def _limits(report: Report) -> str:
    lines = [
        "- Robust accuracy under attack is an upper bound: other attacks may break more samples.",
        "- The numbers hold for this threat model, this data and these weights, and say nothing about other ones.",
    ]
    if report.results.certified is None:
        lines.append("- No proof was attempted, so the lower end of the bracket is open.")
    if report.data.evaluated < report.data.total:
        lines.append(f"- Only {report.data.evaluated} of {report.data.total} images were evaluated; see the interval.")
    if report.suite.smoothing:
        lines.append("- All numbers are about the smoothed classifier, not about the network by itself.")
    return "\n".join(lines)
