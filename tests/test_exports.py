"""Exports: RobustBench's format and rules, the Hub's cards, CSV; hostile reports; the command."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Cli, one_sentence, shared
from huggingface_hub import ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt
from torch import Tensor, nn

import robusteval.evaluation.plan as planning
from robusteval.baselines.rank import load
from robusteval.datasets.base import Split, TensorPixels
from robusteval.datasets.cifar10 import INFO
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import Plan, prepare
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.validate import seal, validate
from robusteval.exports import _robustbench_rules, robustbench
from robusteval.exports._adversarial import adversarial_images
from robusteval.exports._markdown import block, inline, linked, table
from robusteval.exports._robustbench_rules import barred, unreliable
from robusteval.exports.base import EXPORTERS, Evaluation, Export, write_files
from robusteval.models.base import LoadedModel
from robusteval.render.eps_curve import write_curve
from robusteval.render.markdown import render
from robusteval.report import Finding, Repeat, Report, Smoothing
from robusteval.runs import RunDir
from robusteval.testing import examples
from robusteval.testing.exporters import check_exporter
from robusteval.verdict import Verdict

SIZE, RIGHT = 80, 6
"""Images of the stand-in for CIFAR-10, and how many of them the stand-in model gets right."""


def finished(plan: Plan, folder: Path) -> Evaluation:
    """Run an evaluation as the command does."""
    report = evaluate(plan, RunDir(folder))
    (folder / "report.md").write_text(render(report), encoding="utf-8")
    if report.curve:
        write_curve(report, folder)
    seal(folder)
    assert validate(folder) == []
    return Evaluation.read(folder)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.line = nn.Linear(48, 10)
        with torch.no_grad():
            self.line.weight.copy_(torch.randn(10, 48, generator=rng))
            self.line.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.line(x.flatten(1) - 0.5)
        return logits


class Small:
    """A data set of the name and classes of CIFAR-10, but of few and tiny images."""

    def __init__(self) -> None:
        data = torch.randint(0, 256, (SIZE, 3, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        with torch.no_grad():
            logits = Linear()(data.float() / 255)
        top = logits.topk(2).values
        easy = (top[:, 0] - top[:, 1]).argsort()[:RIGHT]  # small margins: all broken by the first attacks
        labels = (logits.argmax(1) + 1) % 10
        labels[easy] = logits.argmax(1)[easy]
        info = replace(INFO, shape=(3, 4, 4))
        self.split = Split(info, "test", TensorPixels(data), labels, torch.arange(SIZE))

    def load(self, part: str) -> Split:
        return self.split


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """A run of the suite `standard` at RobustBench's eps, on a whole, if small, test set."""
    loaded = LoadedModel(Linear().eval(), name="toy", source="memory", architecture="toy")
    settings = {"model": "memory", "dataset": "cifar10", "norm": "Linf", "eps": "8/255", "workers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "open_dataset", lambda *place: Small())
        plan = prepare(EvalConfig(**settings, extra_data=False), loaded)
    return finished(plan, tmp_path_factory.mktemp("board") / "run")


@pytest.fixture
def small_test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-in pass for the test set of CIFAR-10."""
    monkeypatch.setitem(_robustbench_rules.TEST_SETS, "cifar10", SIZE)
    monkeypatch.setattr(robustbench, "open_dataset", lambda *place: Small())


@pytest.fixture(scope="module")
def curve(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """A run on part of digits for two eps, of which the smaller is the headline."""
    settings = {"model": str(model_folder), "dataset": "digits", "norm": "Linf", "suite": "quick", "workers": 1}
    config = EvalConfig(**settings, eps="0.05", curve=("0.05", "0.1"), limit=40)
    return finished(prepare(config), tmp_path_factory.mktemp("curve") / "run")


ANSWERS: dict[str, Any] = {
    "model_id": "Doe2026Toy",
    "title": "Toy: a <b>model</b> of [nothing](http://evil.example) @octocat #1",
    "url": "https://arxiv.org/abs/2601.00001",
    "authors": "Jane Doe, Max Muster",
    "venue": "arXiv, Jan 2026",
    "checkpoint": "https://example.org/toy.pt and by e-mail",
    "license": "MIT",
    "zoo": True,
    "new_architecture": False,
    "forward_passes": 1,
    "evaluators": "Jane Doe",
}


def made(name: str, run: Evaluation, **options: Any) -> Export:
    export: Export = EXPORTERS.build(name, options)(run)
    return export


def text(export: Export, name: str) -> str:
    content = export.files[name]
    assert isinstance(content, bytes)
    return content.decode()


def entry(board: Evaluation, **changes: Any) -> dict[str, Any]:
    export = made("robustbench", board, **{**ANSWERS, **changes})
    found: dict[str, Any] = json.loads(text(export, "model_info/cifar10/Linf/Doe2026Toy.json"))
    return found


@pytest.mark.usefixtures("small_test_set")
def test_the_entry_has_the_fields_and_types_of_all_published_ones(board: Evaluation) -> None:
    published = json.loads(shared("robustbench/model_info.json").read_text())
    alike = [facts for name, facts in published.items() if "/corruptions/" not in name]
    assert len(alike) == 188
    always = set.intersection(*(set(facts) for facts in alike))
    types: dict[str, set[type]] = {}
    for facts in alike:
        for name, value in facts.items():
            types.setdefault(name, set()).add(type(value))
    for ours in (entry(board), entry(board, footnote="Trained twice.", reported="12.30")):
        assert always <= set(ours) <= set(types)
        for name, value in ours.items():
            assert type(value) in types[name], name
    assert "external" not in ours  # only where an outside evaluation exists


@pytest.mark.usefixtures("small_test_set")
def test_the_figures_are_strings_in_percent(board: Evaluation) -> None:
    ours, results = entry(board), board.report.results
    assert (ours["clean_acc"], ours["autoattack_acc"]) == ("7.50", "0.00")
    assert results.clean.rate == RIGHT / SIZE
    assert ours["eps"] in {known.eps for known in load() if (known.dataset, known.threat) == ("cifar10", "Linf")}
    assert ours["dataset"] in {known.dataset for known in load()}
    assert set(ours) == {
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture",
        "eps", "clean_acc", "reported", "autoattack_acc", "unreliable",
    }  # fmt: skip
    assert (ours["additional_data"], ours["number_forward_passes"], ours["reported"]) == (False, 1, "")


FORM = (
    "Paper Title", "Paper URL", "Paper authors", "Architecture", "Dataset", "Threat Model", "eps", "Clean accuracy",
    "Robust accuracy", "Additional data", "Evaluation method", "Checkpoint and code",
)  # fmt: skip


@pytest.mark.usefixtures("small_test_set")
def test_the_issue_has_every_field_of_the_form(board: Evaluation) -> None:
    export = made("robustbench", board, **ANSWERS)
    issue, evaluation = text(export, "model-issue.md"), text(export, "evaluation-issue.md")
    for field in FORM:
        (line,) = [line for line in issue.splitlines() if line.startswith(f"- **{field}**:")]
        assert line.partition(":")[2].strip(), field
    assert "- **eps**: 8/255" in issue
    assert [line[2:5] for line in issue.splitlines() if line.startswith("- [")] == ["[x]", "[ ]", "[x]", "[ ]"]
    for field in ("Model identifier(s)", "Leaderboard(s)", "Link to adversarial images", "Robust accuracy"):
        assert f"+ **{field}:** " in evaluation
    assert "upload adversarial.pt" in evaluation
    custom = text(made("robustbench", board, **{**ANSWERS, "license": "https://example.org/l"}), "model-issue.md")
    assert "- [ ] I agree" in custom
    assert "<https://example.org/l>" in custom
    assert sum("issues/new?template=" in note for note in export.notes) == 2


@pytest.mark.usefixtures("small_test_set")
def test_the_tensor_is_the_test_set_as_the_attack_left_it(board: Evaluation, tmp_path: Path) -> None:
    export = made("robustbench", board, **ANSWERS)
    written, again = write_files(export.files, tmp_path / "a"), write_files(export.files, tmp_path / "b")
    assert all(path.read_bytes() == again[name].read_bytes() for name, path in written.items())
    images, split, net = torch.load(written["adversarial.pt"], weights_only=True), Small().split, Linear()
    clean = split.images(slice(None))
    broken = torch.tensor([row.verdict is Verdict.BROKEN for row in board.rows])
    assert broken.sum() == RIGHT
    assert images.shape == (SIZE, 3, 4, 4)
    assert torch.equal(images[~broken], clean[~broken])
    assert bool((net(images).argmax(1) != split.labels).all())  # robust accuracy 0 %, as the entry says
    assert 0 < float((images - clean)[broken].abs().amax()) <= 8 / 255 + 1e-6


def test_of_several_eps_only_the_headlines_witnesses_are_used(curve: Evaluation, digits: Split) -> None:
    split = digits.take(slice(0, 40))
    images, clean = adversarial_images(curve, split), split.images(slice(None))
    moved = (images != clean).flatten(1).any(1)
    kept = [row.id for row in curve.rows if row.adv_distance is not None]
    broken = [row.id for row in curve.rows if row.verdict is Verdict.BROKEN]
    assert moved.nonzero().flatten().tolist() == broken
    assert len(broken) < len(kept)
    assert float((images - clean).abs().max()) <= 0.05 + 1e-6


def test_the_tensor_is_refused_for_other_images_and_without_a_witness(
    curve: Evaluation, digits: Split, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="not the samples of the report"):
        adversarial_images(curve, digits.take(slice(0, 39)))
    with pytest.raises(RobustevalError, match="no witness of it is stored"):
        adversarial_images(replace(curve, folder=tmp_path), digits.take(slice(0, 40)))
    wider = replace(
        curve, rows=tuple(row.model_copy(update={"verdict": Verdict.BROKEN}) for row in curve.rows if row.adv_distance)
    )
    with pytest.raises(RobustevalError, match=r"not within Linf 0\.05"):
        adversarial_images(wider, digits.take(slice(0, 40)))


def finding(name: str, severity: str = "warning", origin: str = "robusteval") -> Finding:
    facts = {"name": name, "severity": severity, "origin": origin, "message": "Odd.", "advice": ""}
    return Finding.model_validate(facts)


def with_finding(*what: str) -> Callable[[Report], Report]:
    return lambda report: report.model_copy(update={"findings": (*report.findings, finding(*what))})


def changed(part: str, /, **changes: Any) -> Callable[[Report], Report]:
    return lambda report: report.model_copy(update={part: getattr(report, part).model_copy(update=changes)})


SMOOTHED = Smoothing(sigma=0.25, n0=100, n=1000, alpha=0.001, looks=(100, 1000))
REFUSED: dict[str, tuple[Callable[[Report], Report], str]] = {
    "another data set": (changed("data", benchmark=None, title="Digits"), "not a RobustBench dataset"),
    "JPEG": (changed("data", benchmark=None, title="CIFAR-10 (JPEG)"), "re-encoded CIFAR-10"),
    "norm": (changed("threat", norm="L1", eps="12", radius=12.0), "no L1 entries"),
    "norm without AutoAttack": (changed("threat", norm="L0", eps="24", radius=24.0), "no L0 entries"),
    "eps": (changed("threat", eps="4/255", radius=4 / 255), "no CIFAR-10 entry at Linf 4/255"),
    "nearly their eps": (changed("threat", eps="0.031", radius=0.031), "is for eps 8/255, not 0.031"),
    "subset": (changed("data", evaluated=SIZE - 1), f"Only {SIZE - 1} of the {SIZE} test images"),
    "another test set": (changed("data", total=SIZE - 1, evaluated=SIZE - 1), f"RobustBench's has {SIZE}"),
    "training images": (changed("data", part="train"), "part 'train'"),
    "smoothed": (changed("suite", smoothing=SMOOTHED), "smoothed classifier"),
    "repeated": (changed("suite", repeat=Repeat(evaluations=100, confidence=0.999)), "repeated evaluations"),
    "suite by another hash": (changed("suite", sha256="0" * 64), "not exactly `standard`"),
    "adapted": (changed("suite", adaptations=("fewer targets",)), "adapted: fewer targets"),
    "queries": (lambda report: report.model_copy(update={"queries": 100}), "only 100 queries"),
    "randomised": (with_finding("randomised", "error"), "The model is randomised"),
    "randomised, by AutoAttack": (with_finding("randomized", "warning", "autoattack"), "The model is randomised"),
    "no gradient": (with_finding("no-gradient", "error"), "input gradients are zero (no-gradient"),
    "zero gradients": (with_finding("zero-gradients"), "input gradients are zero (zero-gradients"),
    "optimisation": (with_finding("dynamic", "warning", "autoattack"), "no optimisation at test time"),
    "doubtful": (with_finding("probabilities", "error"), "doubtful (probabilities"),
}


def fewer_stages(report: Report) -> Report:
    return changed("suite", stages=report.suite.stages[:2])(report)


def more_stages(report: Report) -> Report:
    stage = report.suite.stages[0].model_copy(update={"name": "more"})
    return changed("suite", stages=(*report.suite.stages, stage))(report)


REFUSED["part of the suite"] = (fewer_stages, "not exactly `standard`")
REFUSED["more than the suite"] = (more_stages, "not exactly `standard`")


@pytest.mark.usefixtures("small_test_set")
@pytest.mark.parametrize("name", REFUSED)
def test_what_robustbenchs_rules_bar_is_refused_with_the_reason(board: Evaluation, name: str) -> None:
    change, said = REFUSED[name]
    export = made("robustbench", replace(board, report=change(board.report)), **ANSWERS)
    assert export.files == {}
    assert [reason for reason in export.barred if said in reason], export.barred


@pytest.mark.usefixtures("small_test_set")
def test_every_reason_is_given_and_an_admissible_report_has_none(board: Evaluation) -> None:
    assert barred(board.report) == ()
    both = REFUSED["queries"][0](REFUSED["adapted"][0](board.report))
    assert len(barred(both)) == 2
    assert len(barred(changed("threat", eps="16/510")(board.report))) == 0  # the same number
    assert barred(both.model_copy(update={"findings": (finding("odd"), finding("masked-gradients"))})) == barred(both)


def test_the_headline_of_a_curve_decides(board: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_robustbench_rules.TEST_SETS, "cifar10", SIZE)
    point = {"results": board.report.results, "closed": {}, "broken": {}}
    several = board.report.model_copy(update={"curve": ({**point, "eps": "8/255"}, {**point, "eps": "0.031"})})
    assert barred(several) == ()
    (reason,) = barred(changed("threat", eps="0.031", radius=0.031)(several))
    assert "the headline of this run for several eps" in reason


def test_autoattacks_flags_and_masked_gradients_are_unreliable(board: Evaluation) -> None:
    sure = board.report.model_copy(update={"findings": (finding("near-chance"),)})
    assert not unreliable(sure)
    assert unreliable(with_finding("square-success", "warning", "autoattack")(sure))
    assert unreliable(with_finding("masked-gradients")(sure))


@pytest.mark.usefixtures("small_test_set")
def test_what_no_report_knows_is_asked_for_by_name(board: Evaluation) -> None:
    with pytest.raises(UsageError) as all_missing:
        made("robustbench", board)
    for name in ANSWERS:
        assert f"--set {name}=" in str(all_missing.value)
    made("robustbench", board, model_id="Doe2026Toy", evaluators="Me", forms="evaluation", images=False)
    unknown = replace(board, report=changed("model", extra_data=None)(board.report))
    with pytest.raises(UsageError, match="does not say additional_data: "):
        made("robustbench", unknown, **ANSWERS)
    assert entry(unknown, additional_data=True)["additional_data"] is True
    wrong = {"additional_data": True, "model_id": "../evil", "url": "javascript:alert(1)", "forward_passes": 0}
    for name, value in wrong.items():
        with pytest.raises(UsageError, match=name):
            made("robustbench", board, **{**ANSWERS, name: value})


def test_without_the_data_set_the_way_out_is_named(
    board: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_robustbench_rules.TEST_SETS, "cifar10", SIZE)
    with pytest.raises(UsageError, match=r"needs the data set: .*--set images=false"):
        made("robustbench", board, **ANSWERS, data_dir=str(tmp_path))
    assert "adversarial.pt" not in made("robustbench", board, **ANSWERS, images=False).files


HOSTILE = (
    "</b><script>alert(1)</script> | ![x](http://evil.example/x.png) [a](javascript:b) @octocat #1 www.evil.example "
    "https://evil.example `code` **bold** ~~no~~ &lt; \u202eturned\n---\nlicense: evil\n# Title\x1b[31m"
)


def hostile(report: Report) -> Report:
    suite = {"name": HOSTILE, "title": HOSTILE, "reference": HOSTILE, "adaptations": (HOSTILE,)}
    bad = Finding(name=HOSTILE, severity="warning", origin="robusteval", message=HOSTILE, advice=HOSTILE)
    changes = {
        "findings": (bad,),
        "command": HOSTILE,
        "baselines": report.baselines.model_copy(update={"reason": HOSTILE}),
    }
    named = changed("model", name=HOSTILE, architecture=HOSTILE, source=HOSTILE)(report).model_copy(update=changes)
    return changed("data", name=HOSTILE, title=HOSTILE, part="test")(changed("suite", **suite)(named))


def html(markdown: str) -> str:
    """Render with raw HTML and automatic links allowed, as hosts do."""
    rendered: str = MarkdownIt("gfm-like", {"html": True}).render(markdown)
    return rendered


def test_a_hostile_report_cannot_act_on_a_model_card(curve: Evaluation) -> None:
    card = ModelCard(text(made("huggingface", replace(curve, report=hostile(curve.report))), "README.md"))
    assert card.data.license is None
    assert card.data.model_name.startswith("</b>")
    assert "\x1b" not in str(card)
    assert "\u202e" not in str(card)
    shown = html(card.text)
    for tag in ("<script", "<img", "<a ", "<strong>bold", "<s>", "<h1>Title"):
        assert tag not in shown, tag
    assert len(re.findall("<h1>", shown)) == 1
    assert not re.search(r"@octocat|#1\b", re.sub("(?s)<pre>.*?</pre>", "", shown))


@pytest.mark.usefixtures("small_test_set")
def test_a_hostile_report_cannot_act_in_an_issue(board: Evaluation) -> None:
    run = replace(board, report=changed("model", architecture=HOSTILE)(board.report))
    issue = text(made("robustbench", run, **ANSWERS), "model-issue.md")
    shown = html(issue)
    assert "evil.example" in shown
    assert not re.search(r"<script|<img|<b>|href=\"[^\"]*evil", shown)
    assert not re.search(r"@octocat|#1\b", shown)
    assert len(issue.splitlines()) == len(text(made("robustbench", board, **ANSWERS), "model-issue.md").splitlines())


def test_markdown_helpers_show_what_they_are_given() -> None:
    assert html(inline("a|b*c_d")) == "<p>a|b*c_d</p>\n"
    assert "<https://example.org/a_b>" not in linked("https://example.org/a_b")  # would be markup
    assert linked("see https://example.org/a now") == "see <https://example.org/a> now"
    assert html(block("a\n```\n# b")).count("<pre>") == 1
    assert html(table(("a",), [("x | y\nz",)])).count("<td>") == 1


def test_the_card_says_what_the_report_says(curve: Evaluation) -> None:
    export = made("huggingface", curve, license="mit", authors="A & B", paper="https://example.org/p")
    card = ModelCard(text(export, "README.md"))
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    results = curve.report.results
    assert list(values.values()) == [results.clean.rate, results.empirical.rate]
    assert "Linf eps 0.05, suite quick" in list(values)[1]
    assert card.data.license == "mit"
    for fact in ("first 40 of 360", "not attempted", curve.report.model.weights_sha256, "Only 40 of 360"):
        assert fact in card.text
    assert "needs --set dataset_id" in export.notes[0]
    again = made("huggingface", curve, license="mit", authors="A & B", paper="https://example.org/p")
    assert again.files == export.files


def test_the_cards_command_reproduces_the_run(
    curve: Evaluation, inside: Cli, model_folder: Path, tmp_path: Path
) -> None:
    card = text(made("huggingface", curve), "README.md")
    (typed,) = [line for line in card.splitlines() if line.startswith("robusteval evaluate --model MODEL")]
    program, *arguments = shlex.split(typed.replace("MODEL", str(model_folder)))
    assert program == "robusteval"
    done = inside(*arguments, "--workers", "1", "--out", "again")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "samples.jsonl").read_bytes() == (curve.folder / "samples.jsonl").read_bytes()


def test_eval_results_are_what_the_library_reads_back(board: Evaluation) -> None:
    options = {"dataset_id": "someone/robust", "task_id": "linf", "source_url": "https://example.org/r"}
    export = made("huggingface", board, **options)
    (read,) = parse_eval_result_entries(yaml.safe_load(text(export, ".eval_results/robusteval.yaml")))
    assert (read.dataset_id, read.task_id, read.value) == ("someone/robust", "linf", 0.0)
    assert (read.source_url, read.date) == ("https://example.org/r", board.report.created)
    assert "8/255" in (read.notes or "")
    card = ModelCard(text(export, "README.md"))
    assert card.data.datasets == ["someone/robust"]


def test_a_benchmark_on_the_hub_gets_no_partial_and_no_doubtful_result(board: Evaluation, curve: Evaluation) -> None:
    export = made("huggingface", curve, dataset_id="someone/robust", task_id="linf")
    assert export.files == {}
    assert "Only 40 of the 360" in export.barred[0]
    doubtful = replace(board, report=with_finding("probabilities", "error")(board.report))
    assert "doubtful" in made("huggingface", doubtful, dataset_id="someone/robust", task_id="linf").barred[0]
    with pytest.raises(UsageError, match="dataset_id"):
        made("huggingface", board, task_id="linf")
    with pytest.raises(UsageError, match="paper 'javascript:x'"):
        made("huggingface", board, paper="javascript:x")


def rows_of(export: Export, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text(export, name))))


def test_csv_has_the_run_the_samples_and_every_column_explained(curve: Evaluation) -> None:
    export = made("csv", curve)
    (run,) = rows_of(export, "run.csv")
    samples = rows_of(export, "samples.csv")
    results = curve.report.results
    assert float(run["empirical"]) == results.empirical.rate
    assert (run["certified"], run["rank"]) == ("", "")
    assert int(run["samples_broken"]) == results.verdicts[Verdict.BROKEN]
    assert [int(row["id"]) for row in samples] == [row.id for row in curve.rows]
    assert [float(row["margin"]) for row in samples] == [row.margin for row in curve.rows]
    assert [row["verdict"] for row in samples] == [row.verdict.value for row in curve.rows]
    explained = [(row["file"], row["column"]) for row in rows_of(export, "columns.csv")]
    assert explained == [*(("run.csv", name) for name in run), *(("samples.csv", name) for name in samples[0])]
    assert all(row["meaning"] for row in rows_of(export, "columns.csv"))


@pytest.mark.parametrize("begin", ["=", "+", "-", "@"])
def test_csv_cells_are_no_formulas(curve: Evaluation, begin: str) -> None:
    evil = f'{begin}HYPERLINK("http://evil.example","x")\n,"'
    (run,) = rows_of(made("csv", replace(curve, report=changed("model", name=evil)(curve.report))), "run.csv")
    assert run["model"] == "'" + " ".join(evil.split())


def test_the_command_refuses_an_invalid_report_and_names_every_reason(
    cli: Cli, inside: Cli, curve: Evaluation, tmp_path: Path
) -> None:
    shutil.copytree(curve.folder, tmp_path / "run")
    refused = cli("export", "run", "--to", "robustbench")
    assert (refused.returncode, one_sentence(refused.stderr)) == (3, True), refused.stderr
    assert refused.stderr.count("barred: ") == len(barred(curve.report)) == 3
    assert not (tmp_path / "run-robustbench").exists()
    assert inside("export", "run", "--to", "csv").returncode == 0
    assert (tmp_path / "run-csv" / "columns.csv").is_file()
    (tmp_path / "options.toml").write_text('license = "mit"\n')
    card = inside("export", "run", "--to", "huggingface", "--out", "there", "--config", "options.toml")
    assert card.returncode == 0, card.stderr
    assert "license: mit" in (tmp_path / "there" / "README.md").read_text()
    report = tmp_path / "run" / "report.json"
    report.write_text(report.read_text().replace('"Digits"', '"CIFAR-10"'))
    broken = inside("export", "run", "--to", "csv")
    assert (broken.returncode, "wrong: " in broken.stderr) == (3, True)
    for arguments, said in (
        (("export", "run", "--to", "robustbenhc"), "Did you mean 'robustbench'?"),
        (("export", "run", "--to", "huggingface", "--set", "licence=mit"), "Did you mean 'license'?"),
        (("export", "nowhere", "--to", "csv"), "nowhere"),
    ):
        done = inside(*arguments)
        assert (done.returncode, one_sentence(done.stderr)) == (2, True), done.stderr
        assert said in done.stderr


@pytest.mark.usefixtures("small_test_set")
def test_submitting_to_robustbench_names_the_texts_and_the_forms(
    inside: Cli, board: Evaluation, tmp_path: Path
) -> None:
    options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in ANSWERS.items())
    (tmp_path / "options.toml").write_text(options)
    asked = ("submit", board.folder, "--to", "robustbench", "--config", "options.toml", "--out", "there")
    done = inside(*asked, "--set", "venue=NeurIPS 2026")
    assert done.returncode == 0, done.stderr
    for name in ("model-issue.md", "evaluation-issue.md", "adversarial.pt"):
        assert f"wrote there/{name}" in done.stdout
    assert "https://github.com/RobustBench/robustbench/issues/new?template=new-model.md&title=" in done.stdout
    stored = json.loads((tmp_path / "there" / "model_info" / "cifar10" / "Linf" / "Doe2026Toy.json").read_text())
    assert (stored["venue"], stored["authors"]) == ("NeurIPS 2026", "Jane Doe, Max Muster")
    assert "nothing; these files" in inside(*asked, "--dry-run").stdout


@pytest.mark.usefixtures("small_test_set")
@pytest.mark.parametrize("name", EXPORTERS.names())
def test_every_exporter_keeps_the_contract(name: str, board: Evaluation, curve: Evaluation) -> None:
    for params in examples(EXPORTERS, name):
        for run in (board, curve, replace(curve, report=hostile(curve.report))):
            check_exporter(EXPORTERS.build(name, params), run)


WRONG: dict[str, tuple[Callable[[Evaluation], Export], str]] = {
    "chance": (lambda run: Export({"a": os.urandom(8)}), "different results"),
    "outside": (lambda run: Export({"../a": b""}), "outside its folder"),
    "nothing": (lambda run: Export(), "neither files nor reasons"),
    "both": (lambda run: Export({"a": b""}, ("No.",)), "neither files nor reasons"),
    "no sentence": (lambda run: Export(barred=("a\nb",)), "no sentence"),
    "text": (lambda run: Export({"a": "text"}), "of a str"),  # type: ignore[dict-item]
    "writes": (lambda run: (run.folder / "new").write_text("x") and Export({"a": b""}), "changes the run"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_exporter_is_caught(name: str, curve: Evaluation, tmp_path: Path) -> None:
    made_by, said = WRONG[name]

    @dataclass(frozen=True)
    class Wrong:
        def __call__(self, run: Evaluation) -> Export:
            return made_by(run)

    with pytest.raises(AssertionError, match=said):
        check_exporter(Wrong(), replace(curve, folder=tmp_path))


def test_exporters_are_listed(inside: Cli) -> None:
    done = inside("list", "exports", "--json")
    assert set(json.loads(done.stdout)["exports"]) == {"csv", "huggingface", "robustbench"}
