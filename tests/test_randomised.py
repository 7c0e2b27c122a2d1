"""Randomised models: a lucky forward is neither an attack nor robustness. And models of other precisions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from robusteval.attacks.autoattack import AutoAttack
from robusteval.errors import UsageError
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.decide import decide
from robusteval.evaluation.judge import judge
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.suite import load_suite
from robusteval.evaluation.validate import seal, validate
from robusteval.models.base import LoadedModel, frozen
from robusteval.report import Repeat
from robusteval.rng import SampleRng
from robusteval.runs import RunDir
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict

LINF = ThreatModel.parse("Linf", "0.0000001")
"""A budget in which no attack on a linear model can succeed."""


class Coin(nn.Module):
    """Says class 0 for a share ``x[0]`` of the calls and classes 1 and 2 equally often otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        draw = torch.rand(len(x))
        other = torch.where(torch.rand(len(x)) < 0.5, 1, 2)
        answer = torch.where(draw < x.flatten(1)[:, 0], 0, other)
        return nn.functional.one_hot(answer, 3).float() + 0 * x.sum()


class Noisy(nn.Module):
    """A linear classifier of three classes with noise on its logits."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layer = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return logits + 0.3 * torch.randn_like(logits)


@pytest.fixture
def noisy() -> tuple[Noisy, Tensor, Tensor]:
    model = Noisy()
    x = torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model, x, model.layer(x.flatten(1)).argmax(1)


@pytest.mark.parametrize(("evaluations", "confidence"), [(20, 0.95), (100, 0.999), (1001, 0.6)])
def test_the_count_needed_is_where_the_exact_interval_leaves_one_half(evaluations: int, confidence: float) -> None:
    """One-sided Clopper-Pearson bounds by scipy's beta quantiles, another way than the binomial tail in use."""
    needed = Repeat(evaluations=evaluations, confidence=confidence).needed
    low = [float(betaincinv(k, evaluations - k + 1, 1 - confidence)) for k in (needed - 1, needed)]
    assert low[0] < 0.5 <= low[1]


def test_shares_of_votes_decide() -> None:
    shares = torch.tensor([1.0, 0.75, 0.49, 0.2, 0.0])
    x, y = shares.view(-1, 1, 1, 1), torch.zeros(5, dtype=torch.long)
    repeat = Repeat(evaluations=400, confidence=0.999)
    before = torch.get_rng_state()
    decided = decide(Probe(Coin(), 64), x, y, torch.arange(5), repeat, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert decided.wrong.tolist() == [False, False, False, True, True]
    assert (decided.prediction == 0).tolist() == [True, True, decided.margin[2] > 0, False, False]
    assert decided.margin.tolist() == pytest.approx((2 * shares - 1).tolist(), abs=0.15)
    again = decide(Probe(Coin(), 64), x, y, torch.arange(5), repeat, seed=3)
    assert torch.equal(again.margin, decided.margin)
    other = decide(Probe(Coin(), 64), x, y, torch.arange(5), repeat, seed=4)
    assert not torch.equal(other.margin, decided.margin)


def test_where_one_evaluation_decides_a_lucky_draw_breaks_and_in_rand_it_does_not(
    noisy: tuple[Noisy, Tensor, Tensor],
) -> None:
    """No attack is possible at this eps, yet AutoAttack's own `rand` reports far less than the clean accuracy."""
    model, x, y = noisy
    theirs = pyautoattack.AutoAttack(model, norm="Linf", eps=LINF.radius, seed=0, version="rand")
    with frozen(model):
        torch.manual_seed(0)
        _, y_adv = theirs.run_standard_evaluation(x, y, batch_size=40)
        suite = load_suite("rand", LINF)
        rng = SampleRng(0, tuple(range(40)), 5)
        judged = judge(Probe(model, 64), x, y, torch.arange(40), LINF, suite.stages(), rng, False, suite.repeat)
    verdicts = Counter(row.verdict for row in judged.rows)
    clean = 40 - verdicts[Verdict.MISCLASSIFIED]
    assert clean >= 25
    assert verdicts[Verdict.BROKEN] == 0
    assert int((y_adv == y).sum()) < clean - 8


@pytest.mark.parametrize("component", ["apgd-ce", "apgd-dlr"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_in_rand_no_sample_is_passed_over_for_a_lucky_draw(
    noisy: tuple[Noisy, Tensor, Tensor], component: Any, norm: str
) -> None:
    """AutoAttack returns bit by bit the input of what one draw has wrong, and of what it does not break."""
    model, x, y = noisy
    with frozen(model):
        attack, rng = AutoAttack(component, "rand"), SampleRng(0, tuple(range(40)), 5)
        result = attack(model, x, y, threat := ThreatModel.parse(norm, "0.05"), rng)
    assert (result.candidates != x).flatten(1).any(1).all()
    assert threat.contains(x, result.candidates).all()
    assert any("attacks every sample" in text for text in result.adaptations)


@pytest.mark.parametrize("component", ["apgd-t", "fab", "fab-t", "square"])
def test_rand_has_no_other_component(component: Any) -> None:
    with pytest.raises(ValueError, match="apgd-ce and apgd-dlr"):
        AutoAttack(component, "rand")


def test_what_noise_cannot_save_is_broken(noisy: tuple[Noisy, Tensor, Tensor]) -> None:
    """The largest lead another class can be given is known; the noise on it has a standard deviation of 0.42."""
    model, x, y = noisy
    threat = ThreatModel.parse("Linf", "0.25")
    with torch.no_grad():
        model.layer.weight *= 2
        model.layer.bias *= 2
    lead = torch.stack([_largest_lead(model.layer, x, y, rival, threat.radius) for rival in range(3)])
    lead = lead.scatter(0, y[None], -torch.inf).max(0).values
    with frozen(model):
        suite, rng = load_suite("rand", threat), SampleRng(0, tuple(range(40)), 5)
        judged = judge(Probe(model, 64), x, y, torch.arange(40), threat, suite.stages(), rng, False, suite.repeat)
    verdicts = Counter(row.verdict for row, doomed in zip(judged.rows, lead > 0.4, strict=True) if doomed)
    assert verdicts[Verdict.UNKNOWN] == 0
    assert verdicts[Verdict.BROKEN] > 12


def _largest_lead(layer: nn.Linear, x: Tensor, y: Tensor, rival: int, eps: float) -> Tensor:
    """Return max ``z_rival - z_y`` (N,) over the Linf ball and the box, without noise."""
    slope = (layer.weight[rival] - layer.weight[y]).detach()
    flat = x.flatten(1)
    end = torch.where(slope > 0, flat + eps, flat - eps).clamp(0, 1)
    return (slope * end).sum(1) + (layer.bias[rival] - layer.bias[y]).detach()


def test_a_randomised_model_is_evaluated_reproducibly_and_says_how(
    noisy: tuple[Noisy, Tensor, Tensor], tmp_path: Path
) -> None:
    class Digits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.layer = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = 4 * self.layer(x.flatten(1) - 0.5)
            return logits + 0.05 * torch.randn_like(logits)

    (tmp_path / "twice.toml").write_text(
        'title = "PGD, repeated"\n[repeat]\nevaluations = 30\nconfidence = 0.99\n'
        '[[stages]]\nname = "pgd"\nattack = "pgd"\nparams = { steps = 3 }\n'
    )
    settings = {"dataset": "digits", "eps": "0.3", "suite": str(tmp_path / "twice.toml"), "limit": 30}
    files = []
    for name in ("a", "b"):
        loaded = LoadedModel(Digits(), name="noise", source="memory", architecture="toy")
        plan = prepare(EvalConfig.model_validate({"model": "memory", "workers": 1, **settings}), loaded)
        report = evaluate(plan, RunDir(tmp_path / name))
        (tmp_path / name / "report.md").write_text("# report")
        seal(tmp_path / name)
        assert validate(tmp_path / name) == []
        assert {f.name: f.severity for f in report.findings}["randomised"] == "info"
        assert report.suite.repeat == Repeat(evaluations=30, confidence=0.99)
        files.append((tmp_path / name / "samples.jsonl").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[repeat]\nevaluations = 5\nconfidence = 0.999\n", "5 evaluations cannot give confidence 0.999"),
        ("[repeat]\nevaluations = 1\nconfidence = 0.9\n", "greater than 1"),
        ("[repeat]\nevaluation = 10\nconfidence = 0.9\n", "evaluation"),
    ],
)
def test_what_cannot_be_decided_is_refused(tmp_path: Path, text: str, message: str) -> None:
    stage = '[[stages]]\nname = "pgd"\nattack = "pgd"\n'
    (tmp_path / "odd.toml").write_text(f'title = "odd"\n{text}{stage}')
    with pytest.raises(UsageError, match=message):
        load_suite(str(tmp_path / "odd.toml"), LINF)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["quick", "standard"])
def test_models_of_other_precisions_are_attacked_like_any(dtype: torch.dtype, name: str) -> None:
    """A linear model whose weights and inputs get rounded; the answer is that of the rounded weights."""
    threat = ThreatModel.parse("Linf", "0.1")
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(4, 16, generator=rng) / 2)
        model[1].bias.zero_()
    model.to(dtype)
    x = torch.rand(24, 1, 4, 4, generator=rng) / 2 + 0.25
    with frozen(model) as network:
        y = network(x).argmax(1)
        assert network(x).dtype == torch.float32
        suite = load_suite(name, threat)
        rows = judge(
            Probe(network, 64), x, y, torch.arange(24), threat, suite.stages()[:2], SampleRng(0, tuple(range(24)), 1)
        ).rows
    weight = model[1].weight.double()
    logits = x.flatten(1).double() @ weight.T
    gap = logits.gather(1, y[:, None]) - logits
    reach = 0.1 * (weight[y][:, None] - weight[None]).abs().sum(2)
    ratio = (gap / reach).scatter(1, y[:, None], torch.inf).min(1).values
    broken = torch.tensor([row.verdict is Verdict.BROKEN for row in rows])
    assert broken[ratio < 0.9].all()
    assert not broken[ratio > 1.1].any()
    assert 4 < int(broken.sum()) < 24
