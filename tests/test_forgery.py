"""Forged reports whose hashes and arithmetic fit: what evidence can tell, `verify` tells."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Cli
from test_verify import edited, run
from torch import Tensor, nn

from robusteval.attacks.pgd import PGD
from robusteval.bounds.ball import Ball
from robusteval.bounds.domains import LARGEST, undecided
from robusteval.bounds.graph import trace
from robusteval.bounds.interval import intervals
from robusteval.bounds.margins import Problem
from robusteval.bounds.proof import unpacked
from robusteval.bounds.tighten import tightened
from robusteval.certifiers.bab import BaB
from robusteval.datasets.base import Split
from robusteval.errors import UsageError
from robusteval.evaluation.audit import with_attacks_of
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.verify import Source, subject, verify
from robusteval.models.base import Classifier, LoadedModel
from robusteval.rng import SampleRng
from robusteval.runs import read_json, write_json
from robusteval.threat import ThreatModel

LINF = ThreatModel.parse("Linf", "0.1")
FEW = Source(votes=1.0)


def problems(folder: Path, source: Source = FEW) -> str:
    return "\n".join(verify(folder, source).problems)


# Evidence


def impossible_halves(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor] | None:
    """Two halves at a kink that in truth has one side, the other with a multiplier that would prove anything.

    In int8 ``-(-128)`` is -128, so its sign would be wrong.
    """
    problem = Problem(trace(net, x.double()), Ball.around(x.double(), LINF.norm, LINF.radius), y, 2**30)
    with torch.no_grad():
        loose, tight = intervals(problem.graph, problem.ball), tightened(problem).bounds
    for source, values in undecided(problem.graph, loose).items():
        negative = values[tight[source][1].flatten()[values] < -1e-3]
        if len(negative):
            count = problem.graph.nodes[-1].size - 1
            sides = torch.tensor([1, -128], dtype=torch.int8).repeat_interleave(count)[:, None]
            return {
                "rivals": torch.zeros(0, dtype=torch.int32),
                f"kinks.{source}": negative[:1].int(),
                "leaves.rival": torch.arange(count, dtype=torch.int32).repeat(2),
                "leaves.sign": sides,
                "leaves.value": torch.full(sides.shape, LARGEST, dtype=torch.float16),
            }
    return None


def test_sides_that_no_search_takes_prove_nothing(
    digits_net: Classifier, digits: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = digits.images(slice(0, 12)), digits.labels[:12]
    attacked = PGD()(digits_net, x, y, LINF, SampleRng(0, tuple(range(12)), 0)).candidates
    forged = {row: impossible_halves(digits_net, x[row : row + 1], y[row : row + 1]) for row in range(12)}
    broken = [row for row in (digits_net(attacked).argmax(1) != y).nonzero()[:, 0].tolist() if forged[row]]
    assert len(broken) > 2

    def seen(row: int) -> list[bool]:
        return BaB().recheck(digits_net, x[row : row + 1], y[row : row + 1], LINF, [forged[row] or {}])

    assert [seen(row) for row in broken] == [[False]] * len(broken)
    monkeypatch.setattr("robusteval.bounds.proof._check", lambda name, value: None)
    assert any(seen(row) == [True] for row in broken), "the check is what refuses it"


@pytest.mark.parametrize(
    "odd",
    [
        {"leaves.sign": torch.tensor([[2]], dtype=torch.int8)},
        {"leaves.sign": torch.tensor([[1]], dtype=torch.int32)},
        {"leaves.value": torch.tensor([[1e300]], dtype=torch.float64)},
        {"leaves.value": torch.tensor([[-1.0]], dtype=torch.float16)},
        {"leaves.value": torch.tensor([[float("inf")]], dtype=torch.float16)},
        {"leaves.value": torch.tensor([[float("nan")]], dtype=torch.float16)},
        {"leaves.rival": torch.tensor([-1], dtype=torch.int32)},
        {"kinks.1": torch.tensor([3, 3], dtype=torch.int32)},
        {"kinks.1": torch.tensor([-3], dtype=torch.int32)},
        {"kinks.01": torch.tensor([3], dtype=torch.int32)},
        {"chosen.columns.2": torch.tensor([4, 4], dtype=torch.int32)},
        {"chosen.slopes.2": torch.tensor([[1.5]], dtype=torch.float16)},
        {"round.0.1": torch.tensor([4], dtype=torch.uint8)},
        {"round.0.1.1.slopes.2": torch.tensor([[2.0]], dtype=torch.float16)},
        {"surprise": torch.zeros(1)},
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_what_no_search_writes_is_refused(odd: dict[str, Tensor]) -> None:
    good = {
        "rivals": torch.tensor([0], dtype=torch.int32),
        "kinks.1": torch.tensor([3], dtype=torch.int32),
        "leaves.rival": torch.tensor([0], dtype=torch.int32),
        "leaves.sign": torch.tensor([[1]], dtype=torch.int8),
        "leaves.value": torch.tensor([[0.5]], dtype=torch.float16),
        "chosen.columns.2": torch.tensor([4], dtype=torch.int32),
        "chosen.slopes.2": torch.tensor([[0.5]], dtype=torch.float16),
        "round.0.1": torch.tensor([3], dtype=torch.uint8),
        "round.0.1.1.columns.2": torch.tensor([4], dtype=torch.int32),
        "round.0.1.1.slopes.2": torch.tensor([[0.5]], dtype=torch.float16),
    }
    assert len(unpacked(good).rounds) == 1
    with pytest.raises(ValueError, match="not as in a proof"):
        unpacked({**good, **odd})


def test_a_proof_that_takes_a_search_must_be_there(model_folder: Path, tmp_path: Path) -> None:
    text = 'title = "x"\n[[stages]]\nname = "bab"\ncertifier = "bab"\nparams = { seconds = 0.0, domains = 100 }\n'
    (tmp_path / "bab.toml").write_text(text)
    folder = run(model_folder, tmp_path / "run", suite=str(tmp_path / "bab.toml"), eps="0.01", limit=8)
    assert problems(folder) == ""
    (path,) = (folder / "proofs").iterdir()
    kept = safetensors.torch.load_file(path)
    gone = next(iter(kept)).split(".")[0]
    safetensors.torch.save_file({name: v for name, v in kept.items() if name.split(".")[0] != gone}, path)
    edited(folder, lambda rows, report: None)
    assert problems(folder) == f"sample {gone}: its proof by 'bab' is missing"


# Facts


@pytest.fixture(scope="module")
def quick(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(model_folder, tmp_path_factory.mktemp("forged") / "run", suite="quick", eps="0.05", limit=24)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report["model"].update(parameters=7), "7 parameters"),
        (lambda report: report["model"].update(architecture="vit_giant"), "another architecture"),
        (lambda report: report["model"].update(extra_data=True), "another extra_data"),
        (lambda report: report["model"].update(training={"objective": "magic"}), "another training"),
        (lambda report: report["data"].update(title="CIFAR-10"), "describes other data"),
        (lambda report: report["data"].update(part="train"), "describes other data"),
        (lambda report: report["data"].update(classes=[f"c{k}" for k in range(10)]), "describes other data"),
        (lambda report: report["suite"].update(title="AutoAttack standard"), "calls suite 'quick'"),
    ],
)
def test_facts_that_the_model_the_data_or_the_suite_contradict_are_named(
    quick: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    folder = Path(shutil.copytree(quick, tmp_path / "run"))
    edited(folder, lambda rows, report: change(report))
    assert said in problems(folder)


def test_a_run_with_witnesses_of_another_is_checked_without_that_one(model_folder: Path, tmp_path: Path) -> None:
    first = run(model_folder, tmp_path / "first", suite="quick", eps="0.05", limit=16)
    second = run(model_folder, tmp_path / "second", suite="quick", eps="0.05", limit=16, witnesses=str(first))
    shutil.rmtree(first)
    assert problems(second) == ""


def test_nothing_of_a_report_reaches_the_terminal_as_a_command(quick: Path, tmp_path: Path, cli: Cli) -> None:
    folder = Path(shutil.copytree(quick, tmp_path / "run"))
    edited(folder, lambda rows, report: None)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "model": "\x1b[2J\x07/nowhere"})
    edited(folder, lambda rows, report: None)
    done = cli("verify", folder)
    assert done.returncode == 2
    assert "/nowhere" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout


# Votes


def test_votes_on_a_smoothed_classifier_are_drawn_again(model_folder: Path, tmp_path: Path) -> None:
    track = {"sigma": 0.2, "n0": 20, "n": 40, "alpha": 0.05, "looks": (40, 160)}
    given = {"suite": "smoothing", "norm": "L2", "eps": "0.05,0.1,0.3", "limit": 12, "smoothing": track}
    folder = run(model_folder, tmp_path / "run", **given)
    found = verify(folder, FEW)
    assert found.problems == ()
    assert (found.replayed.votes, found.replayed.clean) == (12, 0)
    assert verify(folder, Source()).replayed.votes == 2, "4 % of each chunk of 8, at least one"

    def fewer(rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
        row = next(row for row in rows if row["votes"]["clean"]["label_votes"] == 40)
        row["votes"]["clean"] |= {"label_votes": 36, "other_votes": 4}
        row["margin"] = 0.8

    edited(folder, fewer)
    assert "its votes for the clean input" in problems(folder), problems(folder)
    with pytest.raises(UsageError, match="about the network itself"):
        with_attacks_of(subject(folder, FEW), "standard")


class Loud(nn.Module):
    """A network with noise on its logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + 0.5 * torch.randn_like(logits)


def test_how_often_a_randomised_model_errs_is_asked_again(
    digits_net: Classifier, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = LoadedModel(Loud(digits_net), "loud", "memory", "loud")
    monkeypatch.setattr(
        "robusteval.evaluation.verify.prepare", lambda config, suite: prepare(config, model=loud, suite=suite)
    )
    monkeypatch.setattr("robusteval.evaluation.plan.load_model", lambda *asked, **more: loud)
    text = 'title = "x"\n[repeat]\nevaluations = 100\nconfidence = 0.99\n[[stages]]\nname = "pgd"\nattack = "pgd"\n'
    (tmp_path / "repeat.toml").write_text(text)
    folder = run(model_folder, tmp_path / "run", suite=str(tmp_path / "repeat.toml"), eps="0.05", limit=16)
    assert problems(folder) == ""

    def less_sure(rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
        row = max(rows, key=lambda row: float(row["margin"]))
        assert row["margin"] > 0.9
        row["margin"] = 0.1

    edited(folder, less_sure)
    assert "evaluations, the report says in" in problems(folder), problems(folder)
