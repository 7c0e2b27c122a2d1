"""Our `standard` against pyautoattack itself, and the class counts on which pyautoattack alone crashes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pyautoattack
import pytest
import torch
from conftest import fit, make_model, shared
from torch import Tensor, nn

from robusteval.attacks.autoattack import AutoAttack, square_runs
from robusteval.datasets.base import Split
from robusteval.datasets.open import open_dataset
from robusteval.evaluation.judge import Judgement, judge
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.suite import load_suite
from robusteval.models.base import frozen
from robusteval.models.io import load_model
from robusteval.rng import SampleRng
from robusteval.settings import PluginSpec
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict

ROBUST = {Verdict.UNKNOWN}


def ours(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> list[bool]:
    """Robust flags of suite `standard`, the whole input as one chunk seeded with ``seed``."""
    suite = load_suite("standard", threat)
    ids = torch.arange(len(x))
    with frozen(model):
        rng = SampleRng(seed, tuple(ids.tolist()), batch=seed)
        judged = judge(Probe(model, len(x)), x, y, ids, threat, suite.stages(), rng)
    return [row.verdict in ROBUST for row in judged.rows]


def theirs(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> list[bool]:
    """Robust flags of a bare AutoAttack run with one batch."""
    attack = pyautoattack.AutoAttack(
        model, norm=threat.norm.value, eps=threat.radius, seed=seed, version="standard", device="cpu"
    )
    with torch.random.fork_rng():
        _, y_adv = attack.run_standard_evaluation(x.clone(), y.clone(), batch_size=len(x))
    return (y_adv == y).tolist()


def fashion_mnist_wk() -> nn.Module:
    path = shared("models/fashion_mnist_wk.pth")
    return load_model(str(path), PluginSpec(name="small_cnn"), (1, 28, 28), 10).module


@pytest.mark.slow
def test_digits_net_verdict_for_verdict_and_with_another_seed(digits_net: nn.Module, digits: Split) -> None:
    """Seed 0 against seed 0: every verdict. Seed 0 against seed 1: at most 1 verdict apart."""
    x, y, threat = digits.images(slice(0, 100)), digits.labels[:100], ThreatModel.parse("Linf", "0.1")
    flags = ours(digits_net, x, y, threat, seed=0)
    assert flags == theirs(digits_net, x, y, threat, seed=0)
    assert abs(sum(flags) - sum(theirs(digits_net, x, y, threat, seed=1))) <= 1
    assert 10 < sum(flags) < 90, "the case must be interesting"


@pytest.mark.slow
def test_fashion_mnist_wk_verdict_for_verdict() -> None:
    """A provably trained net of other people, near its published budget, which leaves it partly broken."""
    data = open_dataset("fashion_mnist", str(shared("fashion-mnist"))).load("test")
    x, y, threat = data.images(slice(0, 24)), data.labels[:24], ThreatModel.parse("Linf", "0.1")
    model = fashion_mnist_wk()
    flags = ours(model, x, y, threat, seed=3)
    assert flags == theirs(model, x, y, threat, seed=3)
    assert 5 < sum(flags) < 23


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("L2", "0.6"), ("L1", "1")])
def test_other_norms_verdict_for_verdict(digits_net: nn.Module, digits: Split, norm: str, eps: str) -> None:
    x, y, threat = digits.images(slice(0, 16)), digits.labels[:16], ThreatModel.parse(norm, eps)
    flags = ours(digits_net, x, y, threat, seed=0)
    assert flags == theirs(digits_net, x, y, threat, seed=0)
    assert 1 < sum(flags) < 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "norm"),
    [(2, "Linf"), (3, "Linf"), (4, "Linf"), (9, "Linf"), (2, "L2"), (3, "L2"), (2, "L1"), (3, "L1")],
)
def test_few_classes(digits: Split, classes: int, norm: str) -> None:
    """Every component runs, says what it adapted, and together they break a share of the samples."""
    judged = judge_few_classes(digits, classes, norm, "standard")
    broken = sum(row.verdict is Verdict.BROKEN for row in judged.rows)
    assert broken >= 1
    said = {text for stage in judged.stages for text in stage.adaptations}
    targets = {"Linf": 9, "L2": 9, "L1": 5}[norm]
    entered = {stage.name: stage.entered for stage in judged.stages}
    assert entered["apgd-t"] > 0
    assert (f"apgd-t: {classes - 1} targets instead of {targets}" in said) == (classes - 1 < targets)
    assert any("margin" in text for text in said) == (classes < 4)


def judge_few_classes(digits: Split, classes: int, norm: str, name: str) -> Judgement:
    """Judge 16 digits of ``classes`` kinds by the suite called ``name``."""
    few = digits.take((digits.labels < classes).nonzero().squeeze(1)[:16])
    train = open_dataset("digits").load("train")
    model = make_model(train, classes=classes)
    fit(model, train.take((train.labels < classes).nonzero().squeeze(1)), steps=40, noise=0.1)
    x, y, ids = few.images(slice(None)), few.labels, torch.arange(len(few))
    threat = ThreatModel.parse(norm, {"Linf": "0.15", "L2": "0.8", "L1": "2"}[norm])
    with frozen(model):
        suite, rng = load_suite(name, threat), SampleRng(0, tuple(ids.tolist()), 0)
        return judge(Probe(model, 100), x, y, ids, threat, suite.stages(), rng, repeat=suite.repeat)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ["plus", "rand"])
def test_two_classes_in_the_other_suites(digits: Split, name: str, norm: str) -> None:
    judged = judge_few_classes(digits, 2, norm, name)
    assert any(row.verdict is Verdict.BROKEN for row in judged.rows)
    dlr = next(stage for stage in judged.stages if stage.name == "apgd-dlr")
    assert dlr.entered > 0
    assert any("margin max z_k - z_y" in text for text in dlr.adaptations)


def test_pyautoattack_alone_still_crashes_on_three_classes() -> None:
    """Once this fails, upstream has mended it and our adaptation can go."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    attack = pyautoattack.AutoAttack(model, norm="Linf", eps=1e-6, seed=0, version="standard", device="cpu")
    with torch.random.fork_rng(), pytest.raises(IndexError):
        attack.run_standard_evaluation(x, y)


def test_suite_file_holds_autoattack_standard_and_nothing_else(tmp_path: Path) -> None:
    suite = load_suite("standard", ThreatModel.parse("Linf", "8/255"))
    attack = pyautoattack.AutoAttack(nn.Identity(), version="standard", device="cpu")
    assert [spec.name for spec in suite.specs] == attack.attacks_to_run
    assert [spec.params for spec in suite.specs] == [
        {"component": name, "version": "standard"} for name in attack.attacks_to_run
    ]


SIZES = [(n, n) for n in range(1, 30)] + [(28, 20), (20, 28), (32, 32), (32, 24), (64, 48), (64, 64), (5, 50), (50, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_square_takes_images_of_any_size(norm: str) -> None:
    """pyautoattack's own fails exactly where `square_runs` says so; when it no longer does, the list can go."""
    threat = ThreatModel.parse(norm, "0.001")
    for size in SIZES:
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * math.prod(size), 4)).requires_grad_(False)
        x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        y = model(x).argmax(1)
        attack = pyautoattack.AutoAttack(model, norm=norm, eps=0.001, seed=0, version="standard")
        attack.square.n_queries = 3
        fails = not square_runs(threat.norm, *size)
        with pytest.raises((RuntimeError, ZeroDivisionError)) if fails else nullcontext(), torch.random.fork_rng():
            attack.square.perturb(x, y)
    small = torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4)).requires_grad_(False)
    result = AutoAttack("square")(model, small, model(small).argmax(1), threat, SampleRng(0, (0, 1), 0))
    assert any("our implementation" in text for text in result.adaptations) == (norm != "Linf")
    assert threat.contains(small, result.candidates).all()
