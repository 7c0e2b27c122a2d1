"""The smoothing track end to end: suites, settings, reports that a stranger can recount, and forged ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, one_sentence
from test_curve import _forge
from torch import Tensor, nn

from robusteval.datasets.base import Split
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.config import EvalConfig, SmoothingChanges
from robusteval.evaluation.judge import judge
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.suite import load_suite
from robusteval.evaluation.validate import read_report, seal, validate
from robusteval.models.base import Classifier, LoadedModel, frozen
from robusteval.render.markdown import render
from robusteval.report import Guarantee, Report, SampleRow, Smoothing
from robusteval.rng import SampleRng
from robusteval.runs import RunDir
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict

L2 = ThreatModel.parse("L2", "0.25")
EPS = ("0.05", "0.1", "0.3")
TRACK = Smoothing(sigma=0.2, n0=20, n=40, alpha=0.05, looks=(40, 160))


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("track") / "run"
    settings = {"model": str(model_folder), "suite": "smoothing", "norm": "L2", "eps": EPS, "limit": 24, "workers": 1}
    plan = prepare(EvalConfig.model_validate({**settings, "smoothing": TRACK.model_dump()}))
    report = evaluate(plan, RunDir(folder))
    (folder / "report.md").write_text(render(report))
    seal(folder)
    return folder


def rows_of(folder: Path) -> list[SampleRow]:
    return [SampleRow.model_validate_json(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_every_number_of_a_report_on_the_track_can_be_recounted(run: Path) -> None:
    assert validate(run) == []
    report, rows = read_report(run), rows_of(run)
    assert report.suite.smoothing == TRACK
    assert {"randomised", "masked-gradients"}.isdisjoint(finding.name for finding in report.findings)
    bracket = [point.results for point in report.curve]
    assert [one.certified is not None for one in bracket] == [True] * 3
    assert all(one.certified.count <= one.empirical.count <= one.clean.count for one in bracket if one.certified)
    assert bracket[0].certified is not None
    assert bracket[0].certified.count > 5
    assert any(row.verdict is Verdict.BROKEN for row in rows)
    for row in rows:
        assert row.votes is not None
        for point, closer in zip(report.curve, row.stages, strict=True):
            if closer and closer.startswith("smoothing"):
                assert TRACK.plan.radius(row.votes.counts) > point.radius
    markdown = (run / "report.md").read_text()
    for text in ("smoothed with sigma 0.2", "not about the network f itself", "alpha 0.05", "Bonferroni", "g abstains"):
        assert text in markdown


@pytest.mark.slow
def test_the_command_gives_the_same_verdicts_in_several_workers_and_batches(
    cli: Cli, run: Path, model_folder: Path, tmp_path: Path
) -> None:
    changes = {"sigma": "0.2", "n0": "20", "n": "40", "alpha": "0.05", "looks": "[40, 160]"}
    settings = [part for key, value in changes.items() for part in ("--set", f"smoothing.{key}={value}")]
    how = ("--limit", "24", "--workers", "2", "--batch-size", "16", "--set", "chunk_size=12", "--out", "other")
    asked = ("--suite", "smoothing", "--norm", "L2", "--eps", ",".join(EPS))
    done = cli("evaluate", "--model", model_folder, *asked, *settings, *how)
    assert done.returncode == 0, done.stderr
    assert "not about the network f itself" in " ".join(done.stdout.split())
    assert (run / "samples.jsonl").read_bytes() == (tmp_path / "other" / "samples.jsonl").read_bytes()


Rows = list[dict[str, Any]]
Change = Callable[[dict[str, Any], Rows], None]


def certified(rows: Rows) -> dict[str, Any]:
    return next(row for row in rows if str(row["stages"][0]).startswith("smoothing"))


def broken(rows: Rows) -> dict[str, Any]:
    return next(row for row in rows if row["votes"]["adversarial"])


def vote(rows: Rows, key: str, value: Any) -> None:
    certified(rows)["votes"][key] = value


def lucky(report: Any, rows: Rows) -> None:
    certified(rows)["votes"]["counts"][-1] -= 9


def unlikely(report: Any, rows: Rows) -> None:
    certified(rows)["votes"]["counts"][-1] += 1000


def more_looks(report: Any, rows: Rows) -> None:
    row = next(row for row in rows if len(row["votes"]["counts"]) == 1)
    row["votes"]["counts"].append(row["votes"]["counts"][0] + 120)


def wider(report: Any, rows: Rows) -> None:
    certified(rows)["votes"]["radius"] += 0.01


def other_class(report: Any, rows: Rows) -> None:
    vote(rows, "chosen", (certified(rows)["label"] + 1) % 10)


def never_tried(report: Any, rows: Rows) -> None:
    certified(rows)["votes"].update(chosen=None, counts=[], radius=0.0)


def weak_break(report: Any, rows: Rows) -> None:
    row = broken(rows)
    poll = {**row["votes"]["adversarial"], "label_votes": 19, "other_votes": 20, "rival_votes": 20}
    poll["rival"] = poll["other"]
    row["votes"]["adversarial"], row["adv_margin"] = poll, -1 / 40


def own_rival(report: Any, rows: Rows) -> None:
    broken(rows)["votes"]["adversarial"]["rival"] = broken(rows)["label"]


def other_poll(report: Any, rows: Rows) -> None:
    rows[0]["votes"]["clean"]["label_votes"] += 1


def too_many(report: Any, rows: Rows) -> None:
    rows[0]["votes"]["clean"]["n"] = 41


def no_votes(report: Any, rows: Rows) -> None:
    rows[0]["votes"] = None


def surer(report: Any, rows: Rows) -> None:
    report["guarantee"]["false_most"] = 0


def other_alpha(report: Any, rows: Rows) -> None:
    report["suite"]["smoothing"]["alpha"] = 0.04


def no_track(report: Any, rows: Rows) -> None:
    report["suite"]["smoothing"] = None


FORGERIES = (
    lucky, unlikely, more_looks, wider, other_class, never_tried, weak_break, own_rival, other_poll, too_many, no_votes,
    surer, other_alpha, no_track,
)  # fmt: skip


def test_forged_votes_are_found(run: Path, tmp_path: Path) -> None:
    assert _forge(run, tmp_path / "same", lambda report, rows: None) == []
    for change in FORGERIES:
        assert _forge(run, tmp_path / change.__name__, change) != [], change.__name__


SUITE = """
title = "mine"
skip_certified = true
[smoothing]
sigma = 0.25
n0 = 100
n = 1000
alpha = 0.001
looks = [100, 1000]
[[stages]]
name = "one"
certifier = "smoothing"
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("skip_certified = true", ""), "skip_certified"),
        (('certifier = "smoothing"', 'attack = "pgd"'), "about the network itself; the suite has a"),
        (('certifier = "smoothing"', 'certifier = "ibp"'), "about the network itself"),
        (('certifier = "smoothing"', 'certifier = "smoothing"\nparams = { sigma = 0.5 }'), "sets 'sigma'"),
        (("looks = [100, 1000]", "looks = [1000, 100]"), "ascending"),
        (("looks = [100, 1000]", "looks = []"), "ascending"),
        (("looks = [100, 1000]", "looks = [3, 8]"), "8 draws can prove nothing"),
        (("n = 1000", "n = 8"), "8 draws can decide nothing"),
        (("sigma = 0.25", "sigma = 0"), "greater than 0"),
        (("alpha = 0.001", "alpha = 0.7"), "less than 0.5"),
        (("[smoothing]", "[repeat]\nevaluations = 100\nconfidence = 0.99\n[smoothing]"), "take"),
    ],
)
def test_what_makes_no_track_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SUITE)
    assert load_suite(str(path), L2).certifying
    path.write_text(SUITE.replace(*change))
    with pytest.raises(UsageError, match=message):
        load_suite(str(path), L2)


def test_settings_reach_every_stage_and_the_hash(tmp_path: Path) -> None:
    plain, changed = load_suite("smoothing", L2), load_suite("smoothing", L2, SmoothingChanges(sigma=0.5, looks=(100,)))
    assert plain.sha256 != changed.sha256
    certify, attack = (spec.params for spec in changed.specs)
    assert (certify["sigma"], certify["looks"], certify["alpha"], attack["sigma"]) == (0.5, [100], 0.001, 0.5)
    with pytest.raises(UsageError, match="different ways"):
        load_suite("standard+smoothing", L2)
    with pytest.raises(UsageError, match=r"no \[smoothing\]"):
        load_suite("standard", L2, SmoothingChanges(sigma=0.5))
    (tmp_path / "bare.toml").write_text('title = "b"\n[[stages]]\nname = "a"\nattack = "smoothadv"\n')
    with pytest.raises(UsageError, match=r"a smoothed classifier; the suite has no \[smoothing\]"):
        load_suite(str(tmp_path / "bare.toml"), L2)
    with pytest.raises(UsageError, match="no stage for Linf"):
        load_suite("smoothing", ThreatModel.parse("Linf", "0.1"))


def test_wrong_settings_are_refused_in_one_sentence(cli: Cli, model_folder: Path) -> None:
    asked = ("--suite", "smoothing", "--norm", "L2", "--eps", "0.1")
    for setting, said in (("smoothing.sgima=1", "sigma"), ("smoothing.n=3", "can decide nothing")):
        done = cli("evaluate", "--model", model_folder, *asked, "--set", setting)
        assert (done.returncode, one_sentence(done.stderr)) == (2, True), done.stderr
        assert said in done.stderr


class Noisy(nn.Module):
    """A network that is itself random."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + 0.3 * torch.randn_like(logits)


def test_a_network_that_is_itself_random_is_named(digits_net: Classifier, tmp_path: Path) -> None:
    config = EvalConfig.model_validate(
        {"dataset": "digits", "norm": "L2", "eps": "0.1", "suite": "smoothing", "limit": 16}
    )
    plan = prepare(config, LoadedModel(Noisy(digits_net), "noisy", "memory", "toy"))
    with pytest.raises(RobustevalError, match="--allow randomised"):
        evaluate(plan, RunDir(tmp_path / "run"))


def test_smoothadv_finds_what_a_random_direction_does_not(digits_net: Classifier, digits: Split) -> None:
    suite = load_suite("smoothing", L2, SmoothingChanges(sigma=0.1, n=200))
    x, y, wide = digits.images(slice(0, 24)), digits.labels[:24], ThreatModel.parse("L2", "0.8")
    with frozen(digits_net) as model:
        probe, rng = Probe(model, 250), SampleRng(0, tuple(range(24)), 0)
        rows = judge(probe, x, y, torch.arange(24), wide, suite.stages()[1:], rng, True, suite.smoothing).rows
        with torch.no_grad():
            wrong = int((model(rng.draw(wide.sample, x, "start")).argmax(1) != y).sum())
    verdicts = Counter(row.verdict for row in rows)
    assert verdicts[Verdict.BROKEN] >= 12
    assert wrong <= 6


def test_the_guarantee_counts_what_was_tried_not_what_was_given(run: Path) -> None:
    report, rows = read_report(run), rows_of(run)
    assert report.guarantee is not None
    assert report.suite.smoothing is not None
    tried = sum(bool(row.votes and row.votes.counts) for row in rows)
    assert report.guarantee.tried == tried > sum(bool(row.votes and row.votes.radius > 0.05) for row in rows)
    assert report.guarantee.false_expected == pytest.approx(0.05 * tried)
    assert report.guarantee.false_most > report.guarantee.false_expected
    attacked = sum(stage.entered for stage in report.stages if stage.kind == "attack")
    assert report.guarantee.decisions == len(rows) + attacked
    assert Guarantee.of([], report.stages, report.suite.smoothing).false_most == 0
    again = Report.model_validate(json.loads((run / "report.json").read_text()))
    assert again == report
    assert validate(run) == []
