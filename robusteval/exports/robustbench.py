"""What a submission to RobustBench consists of: it has no upload, only issue forms that people fill in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from urllib.parse import urlencode

from robusteval.datasets.base import Split, in_order
from robusteval.datasets.open import open_dataset
from robusteval.errors import RobustevalError, UsageError
from robusteval.exports._adversarial import adversarial_images
from robusteval.exports._markdown import inline, is_url, linked
from robusteval.exports._robustbench_rules import barred, board_eps, unreliable
from robusteval.exports.base import Content, Evaluation, Export, ask_for
from robusteval.render._text import interval
from robusteval.report import Report

NEW_ISSUE = "https://github.com/RobustBench/robustbench/issues/new"
MODEL_ISSUE, EVALUATION_ISSUE, IMAGES = "model-issue.md", "evaluation-issue.md", "adversarial.pt"
_ID = re.compile(r"[A-Za-z][A-Za-z-]*\d{4}[A-Za-z0-9][A-Za-z0-9_.+-]*")
_FOR_MODEL = ("title", "url", "authors", "venue", "checkpoint", "license", "zoo", "new_architecture", "forward_passes")
_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}


@dataclass(frozen=True)
class RobustBench:
    """RobustBench's entry file, its issue forms filled in, and the adversarial images.

    ``model_id`` is first author, year, first word of the title, as in Wong2020Fast. ``checkpoint`` says where
    checkpoint and code are, or that they come by e-mail; ``license`` is MIT or the address of another; ``zoo`` and
    ``new_architecture`` are the form's boxes. ``forward_passes`` are those of one prediction. ``evaluators`` and
    ``images_url`` are for the form for external evaluations. ``forms`` chooses: a new model, an evaluation of one that
    is there already, or both.

    ``adversarial.pt`` has the size of the test set, each sample not broken as its clean image, so it needs the data
    set (``data_dir``); ``images = false`` leaves it out. Formats of snapshot 2025-03-31, commit 78fcc9e.
    """

    model_id: str | None = None
    title: str | None = None
    url: str | None = None
    authors: str | None = None
    venue: str | None = None
    checkpoint: str | None = None
    license: str | None = None
    zoo: bool | None = None
    new_architecture: bool | None = None
    forward_passes: int | None = None
    architecture: str | None = None
    additional_data: bool | None = None
    reported: str = ""
    footnote: str | None = None
    evaluators: str | None = None
    images_url: str | None = None
    forms: Literal["model", "evaluation", "both"] = "both"
    images: bool = True
    data_dir: str | None = None

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"forms": "evaluation", "model_id": "Doe2026Toy", "evaluators": "Jane Doe", "images": False},
    )

    def __call__(self, run: Evaluation) -> Export:
        """Return `model_info/DATASET/NORM/ID.json`, the texts of the issues and the tensor, or why they are barred."""
        report = run.report
        reasons = barred(report)
        if reasons:
            return Export(barred=reasons)
        self._check(report)
        files: dict[str, Content] = {}
        notes = ["RobustBench has no upload: open a form, paste the text, and add what it asks for."]
        if self.forms != "evaluation":
            entry = json.dumps(self._entry(report), indent=2) + "\n"
            files[f"model_info/{report.data.benchmark}/{report.threat.norm}/{self.model_id}.json"] = entry.encode()
            files[MODEL_ISSUE] = self._model_issue(report).encode()
            notes.append(f"{MODEL_ISSUE}: {_form('new-model.md', f'[New Model] {self.model_id}')}")
        if self.forms != "model":
            files[EVALUATION_ISSUE] = self._evaluation_issue(report).encode()
            form = _form("new-external-evaluations.md", f"[New evaluation] {self.model_id}")
            notes.append(f"{EVALUATION_ISSUE}: {form}")
        if self.images:
            files[IMAGES] = adversarial_images(run, self._test_set(report))
        return Export(files, notes=tuple(notes))

    def _test_set(self, report: Report) -> Split:
        try:
            return in_order(open_dataset(str(report.data.benchmark), self.data_dir).load("test"))
        except RobustevalError as error:
            way = "Give --set data_dir=FOLDER, or --set images=false to leave it out."
            raise UsageError(f"{IMAGES} needs the data set: {error} {way}") from error

    def _check(self, report: Report) -> None:
        """Ask for what is missing; raise `UsageError` for what cannot be."""
        unknown = ("additional_data",) if report.model.extra_data is None else ()
        wanted = (*_FOR_MODEL, *unknown) if self.forms != "evaluation" else ()
        ask_for(self, ("model_id", *wanted, *(("evaluators",) if self.forms != "model" else ())))
        if not _ID.fullmatch(self.model_id or ""):
            raise UsageError(f"model_id '{self.model_id}' is not like Wong2020Fast: first author, year, word of title.")
        if self.url is not None and not is_url(self.url):
            raise UsageError(f"url '{self.url}' is not an http address.")
        if self.forward_passes is not None and self.forward_passes < 1:
            raise UsageError(f"forward_passes {self.forward_passes} is less than 1.")
        known = report.model.extra_data
        if None not in (known, self.additional_data) and known != self.additional_data:
            raise UsageError(f"additional_data = {self.additional_data} contradicts the report, which says {known}.")

    def _extra(self, report: Report) -> bool:
        return bool(self.additional_data if report.model.extra_data is None else report.model.extra_data)

    def _entry(self, report: Report) -> dict[str, Any]:
        """Return the entry as RobustBench stores it: every number a string, in percent with two decimals."""
        entry = {
            "link": self.url,
            "name": self.title,
            "authors": self.authors,
            "additional_data": self._extra(report),
            "number_forward_passes": self.forward_passes,
            "dataset": report.data.benchmark,
            "venue": self.venue,
            "architecture": self.architecture or report.model.architecture,
            "eps": board_eps(str(report.data.benchmark), report.threat.norm),
            "clean_acc": _percent(report.results.clean.rate),
            "reported": self.reported,
            "autoattack_acc": _percent(report.results.empirical.rate),
            "unreliable": unreliable(report),
        }
        return entry | ({"footnote": self.footnote} if self.footnote else {})

    def _model_issue(self, report: Report) -> str:
        """Fill in the form "New Model(s)"; it has no field for the data set, which submitters add by hand."""
        mit = (self.license or "").strip().upper() == "MIT"
        custom = "(custom license URL here)" if mit else linked(self.license or "")
        return _lines(
            "# Paper Information",
            "",
            f"- **Paper Title**: {inline(self.title or '')}",
            f"- **Paper URL**: {linked(self.url or '')}",
            f"- **Paper authors**: {inline(self.authors or '')}",
            "",
            "# Leaderboard Claim(s)",
            "",
            "## Model 1",
            "",
            f"- **Architecture**: {inline(self.architecture or report.model.architecture)}",
            f"- **Dataset**: {_title(report)}",
            f"- **Threat Model**: {report.threat.norm}",
            f"- **eps**: {board_eps(str(report.data.benchmark), report.threat.norm)}",
            f"- **Clean accuracy**: {_percent(report.results.clean.rate)}",
            f"- **Robust accuracy**: {_percent(report.results.empirical.rate)}",
            f"- **Additional data**: {str(self._extra(report)).lower()}",
            f"- **Evaluation method**: {_method(report)}",
            f"- **Checkpoint and code**: {linked(self.checkpoint or '')}",
            "",
            "# Model Zoo:",
            "",
            f"- {_box(self.zoo)} I want to add my models to the Model Zoo (check if true)",
            f"- {_box(self.new_architecture)} I use an architecture that is **not** included among those "
            "[here](https://github.com/RobustBench/robustbench/tree/master/robustbench/model_zoo/architectures) "
            "(check if true).",
            f"- {_box(mit)} I agree to release my model(s) under MIT license (check if true) **OR**",
            f"- {_box(not mit)} I want my models to be released under a custom license, located here: {custom}",
        )

    def _evaluation_issue(self, report: Report) -> str:
        """Fill in the form "New external evaluation(s)"."""
        upload = f"(upload {IMAGES} and put its address here)"
        return _lines(
            "## Target model",
            f"+ **Model identifier(s):** {self.model_id}",
            f"+ **Leaderboard(s):** {_title(report)}, {report.threat.norm}",
            "",
            "## New evaluation",
            f"+ **Link to adversarial images:** {linked(self.images_url) if self.images_url else upload}",
            f"+ **Robust accuracy:** {_percent(report.results.empirical.rate)}",
            f"+ **Author(s):** {inline(self.evaluators or '')}",
            f"+ **Description of the method used:** {_method(report)}",
        )


def _form(template: str, title: str) -> str:
    return f"{NEW_ISSUE}?{urlencode({'template': template, 'title': title})}"


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}"


def _box(checked: bool | None) -> str:
    return "[x]" if checked else "[ ]"


def _title(report: Report) -> str:
    return _TITLES[str(report.data.benchmark)]


def _method(report: Report) -> str:
    """Say how the figures came about, and what was found that speaks against them."""
    versions = report.environment.packages
    robust = report.results.empirical
    doubts = sorted({finding.name for finding in report.findings if finding.severity != "info"})
    said = (
        f"AutoAttack standard, pyautoattack {versions.get('pyautoattack', 'of unknown version')}, run by robusteval "
        f"{versions.get('robusteval', 'of unknown version')}, which checked every adversarial input again in float32. "
        f"{robust.count} of {robust.total} test images are classified correctly under attack, 95 % interval "
        f"{interval(robust)}. Seed {report.seed}. SHA-256 of the weights: {report.model.weights_sha256}."
    )
    return inline(said + (f" Findings: {', '.join(doubts)}." if doubts else " No findings."))
