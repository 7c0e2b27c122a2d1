"""A budget of queries per sample, on models that are functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli, one_sentence
from torch import Tensor, nn

from robusteval.attacks.base import AttackResult
from robusteval.attacks.square import Square
from robusteval.evaluation.judge import Judgement, judge
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.suite import Stage
from robusteval.evaluation.validate import read_report, validate
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict

THREAT = ThreatModel.parse("Linf", "0.2")
BLACK_BOX = """
import numpy as np

SEEN = []

def predict(images):
    "Bright or dark, and which half is brighter; notes how many images it is shown."
    with open({log!r}, "a") as log:
        log.write(f"{{len(images)}}\\n")
    flat = images.reshape(len(images), -1)
    half = flat.shape[1] // 2
    left, right = flat[:, :half].mean(1), flat[:, half:].mean(1)
    return np.stack([left, right, *([left - 9] * 8)], axis=1)
"""


class Counted(nn.Module):
    """Which half is brighter; counts how often each of ``watched`` images was asked about, by its label pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        flat = x.flatten(1)
        return torch.stack([flat[:, :32].mean(1), flat[:, 32:].mean(1)], 1)


def samples(count: int = 6) -> tuple[Tensor, Tensor]:
    x = 0.4 + 0.2 * torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[::2, :, :4] += 0.15  # some far from the boundary, some near
    return x, Counted()(x).argmax(1)


def judged(stages: list[Stage], queries: int | None) -> Judgement:
    x, y = samples()
    rng = SampleRng(0, tuple(range(len(x))), 0)
    probe = Probe(Counted().eval(), 100)
    return judge(probe, x, y, torch.arange(len(x)), THREAT, stages, rng, queries=queries)


def asked(judgement: Judgement, entered: list[int]) -> list[int]:
    """Forward passes of each stage without the confirmation of its candidates."""
    return [stage.forward - count for stage, count in zip(judgement.stages, entered, strict=True)]


class Greedy:
    """An attack that never gives up and does not remember what it found."""

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def supports(self, threat: ThreatModel) -> bool:
        return True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        while True:
            model(threat.sample(x.expand(self.size, *x.shape[1:]), torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("size", "spent"), [(1, 20), (7, 14), (21, 0)])
def test_no_sample_is_asked_about_more_often_than_allowed(size: int, spent: int) -> None:
    judgement = judged([Stage("greedy", "attack", Greedy(size)), Stage("again", "attack", Greedy())], queries=20)
    left = [stage.entered for stage in judgement.stages]
    first, second = asked(judgement, left)
    assert first == 6 * spent
    assert second == left[1] * (20 - spent), "the budget is that of all attacks together"
    assert judgement.stages[0].adaptations == ("greedy: its query budget ended it on some samples",)


class Certain(Greedy):
    """Asks about the farthest point there is, then about others until it is cut off."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        halves = torch.ones_like(x)
        halves[:, :, :4] = -1
        towards = torch.where(y.view(-1, 1, 1, 1) == 0, halves, -halves)
        model(threat.project(x, x + towards))
        return super().__call__(model, x, y, threat, rng)


def test_what_an_attack_found_before_it_was_cut_off_counts() -> None:
    judgement = judged([Stage("certain", "attack", Certain())], queries=5)
    assert all(row.verdict is Verdict.BROKEN for row in judgement.rows)
    for row in judgement.rows:
        assert row.adv_distance is not None
        assert row.adv_distance <= THREAT.radius + 1e-6


def test_more_queries_break_no_fewer_and_no_budget_breaks_all() -> None:
    broken = []
    for queries in (1, 30, 1000, None):
        rows = judged([Stage("square", "attack", Square(queries=500))], queries).rows
        broken.append({row.id for row in rows if row.verdict is Verdict.BROKEN})
    assert broken[0] <= broken[1] <= broken[2] == broken[3]
    assert len(broken[0]) < len(broken[3]) == 6


def test_a_function_is_asked_no_more_than_the_budget_end_to_end(cli: Cli, tmp_path: Path) -> None:
    log = tmp_path / "asked.log"
    (tmp_path / "mine.py").write_text(BLACK_BOX.format(log=str(log)))
    (tmp_path / "suite.toml").write_text('title = "score"\n[[stages]]\nname = "square"\nattack = "square"\n')
    common = ("--model", "mine:predict", "--suite", "suite.toml", "--limit", "30", "--workers", "1")
    done = cli("evaluate", *common, "--eps", "0.05", "--queries", "40", "--out", "run")
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "run")
    assert report.queries == 40
    assert validate(tmp_path / "run") == []
    shown = sum(map(int, log.read_text().split()))
    clean = report.results.clean.count
    checks = 500  # preflight looks at the first samples, the same whatever the budget
    assert 0 < sum(stage.forward for stage in report.stages) <= 42 * clean
    assert shown <= 30 + 42 * clean + checks
    assert "40 queries" in done.stdout
    text = (tmp_path / "run" / "report.json").read_text()
    (tmp_path / "run" / "report.json").write_text(json.dumps({**json.loads(text), "queries": 1}))
    assert any("queries" in problem for problem in validate(tmp_path / "run"))


def test_each_eps_has_the_budget_to_itself(cli: Cli, tmp_path: Path) -> None:
    """So that the largest, which the report is about, is attacked as hard as if it were the only one."""
    (tmp_path / "mine.py").write_text(BLACK_BOX.format(log=str(tmp_path / "asked.log")))
    common = ("--model", "mine:predict", "--suite", "score", "--limit", "30", "--workers", "1", "--queries", "60")
    for eps, out in (("0.02,0.05", "both"), ("0.05", "alone")):
        done = cli("evaluate", *common, "--eps", eps, "--out", out)
        assert done.returncode == 0, done.stderr
    both, alone = (read_report(tmp_path / out).results for out in ("both", "alone"))
    assert both.empirical.count <= alone.empirical.count < alone.clean.count
    assert validate(tmp_path / "both") == []


CLASSES_ONLY = "def predict(images):\n    return (images.reshape(len(images), -1)[:, :32].mean(1) > 0.3).astype(int)\n"


def test_a_function_that_tells_classes_only_is_attacked_without_further_ado(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CLASSES_ONLY)
    (tmp_path / "suite.toml").write_text(
        'title = "noise"\n[[stages]]\nname = "noise"\nattack = "foolbox"\n'
        'params = { attack = "LinfAdditiveUniformNoiseAttack" }\n'
    )
    done = cli("evaluate", "--model", "mine:predict", "--suite", "suite.toml", "--limit", "20", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert {f.name: f.severity for f in read_report(tmp_path / "run").findings}["probabilities"] == "info"


def test_a_budget_of_nothing_is_refused(cli: Cli, model_folder: Path) -> None:
    done = cli("evaluate", "--model", model_folder, "--queries", "0")
    assert (done.returncode, one_sentence(done.stderr)) == (2, True), done.stderr
