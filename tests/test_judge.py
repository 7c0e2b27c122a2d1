"""The harness on models whose robustness is known exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from robusteval.attacks.base import AttackResult
from robusteval.attacks.pgd import PGD
from robusteval.errors import RobustevalError, SoundnessContradiction
from robusteval.evaluation.decide import decide
from robusteval.evaluation.judge import DOUBTFUL, SURVIVED, Judgement, judge
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.suite import Stage
from robusteval.report import Repeat
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.verdict import Certificate, Verdict

THREAT = ThreatModel.parse("Linf", "0.02")


class Linear(nn.Module):
    """A random linear classifier on 12 inputs, far from the box so that its exact robustness is closed form."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(classes, 12, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.w.T

    def exactly_robust(self, x: Tensor, y: Tensor) -> Tensor:
        """Linf: ``z_y - z_k > eps * ||w_y - w_k||_1`` for every other class (the box is never reached)."""
        with torch.no_grad():
            logits = self(x).double()
        gap = logits.gather(1, y[:, None]) - logits
        slope = (self.w.detach().double()[y][:, None] - self.w.detach().double()[None]).abs().sum(2)
        ok = gap > THREAT.radius * slope
        return ok.scatter(1, y[:, None], torch.ones_like(ok)).all(1)


class Lie:
    """An attack made of a function on (x, y)."""

    def __init__(self, candidates: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.candidates = candidates

    def supports(self, threat: ThreatModel) -> bool:
        return True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        return AttackResult(self.candidates(x, y))


class Proof:
    """A certifier made of a function on (x, y)."""

    def __init__(self, proved: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.proved = proved

    def supports(self, threat: ThreatModel) -> bool:
        return True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        return [Certificate(bool(ok), "" if ok else "bound too loose") for ok in self.proved(x, y)]


def samples(count: int = 60) -> tuple[Linear, Tensor, Tensor]:
    model = Linear().eval()
    x = 0.3 + 0.4 * torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::7] = (y[::7] + 1) % 4
    return model, x, y


def run(
    model: nn.Module, x: Tensor, y: Tensor, stages: Sequence[Stage], skip: bool = False, batch_size: int = 1000
) -> Judgement:
    ids = torch.arange(100, 100 + len(x))
    rng = SampleRng(0, tuple(ids.tolist()), 0)
    return judge(Probe(model, batch_size), x, y, ids, THREAT, stages, rng, skip)


def attack(candidates: Callable[[Tensor, Tensor], Tensor]) -> Stage:
    return Stage("lie", "attack", Lie(candidates))


def test_verdicts_equal_the_exact_robustness_of_a_linear_model() -> None:
    model, x, y = samples()
    judged = run(model, x, y, [Stage("pgd", "attack", PGD(steps=40))])
    correct = model(x).argmax(1) == y
    robust = model.exactly_robust(x, y)
    assert 5 < int((correct & robust).sum()) < int(correct.sum()) - 5, "the case must be interesting"
    for row, is_correct, is_robust in zip(judged.rows, correct.tolist(), robust.tolist(), strict=True):
        expected = Verdict.UNKNOWN if is_robust else Verdict.BROKEN
        assert row.verdict is (expected if is_correct else Verdict.MISCLASSIFIED)


def test_witnesses_are_inside_and_misclassified_and_described_truly() -> None:
    model, x, y = samples()
    judged = run(model, x, y, [Stage("pgd", "attack", PGD())])
    assert judged.witnesses
    for sample, witness in judged.witnesses.items():
        i = sample - 100
        row = judged.rows[i]
        assert THREAT.contains(x[i : i + 1], witness.x_adv[None]).all()
        logits = model(witness.x_adv[None])[0]
        assert int(logits.argmax()) == witness.prediction == row.adv_prediction != int(y[i])
        assert row.adv_distance == pytest.approx(float((witness.x_adv - x[i]).abs().max()), abs=1e-7)
        assert row.adv_margin is not None
        assert row.adv_margin <= 0


@pytest.mark.parametrize(
    "lie",
    [
        lambda x, y: x + 0.2 * torch.randn_like(x),
        lambda x, y: torch.full_like(x, float("nan")),
        lambda x, y: x.flip(0),
        lambda x, y: x - 10,
        lambda x, y: x,
    ],
    ids=["beyond eps", "nan", "other samples", "outside the box", "clean input"],
)
def test_an_attack_that_lies_breaks_nothing(lie: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x, y = samples()
    judged = run(model, x, y, [attack(lie)])
    assert {row.verdict for row in judged.rows} == {Verdict.UNKNOWN, Verdict.MISCLASSIFIED}
    assert judged.stages[0].closed == 0


def test_rejected_candidates_are_counted() -> None:
    model, x, y = samples()
    stage = run(model, x, y, [attack(lambda x, y: (x + 5.0 * torch.randn_like(x)).clamp(0, 1))]).stages[0]
    assert stage.entered == sum(model(x).argmax(1) == y)
    assert 0 < stage.rejected <= stage.entered


def test_wrong_number_of_candidates_is_an_error() -> None:
    model, x, y = samples()
    with pytest.raises(RobustevalError, match="lie"):
        run(model, x, y, [attack(lambda x, y: x[:1])])


def test_nan_logits_near_a_sample_stop_the_run() -> None:
    class Cliff(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.where(x.flatten(1).max(1).values > 0.69, torch.nan, 0.0)[:, None]

    _, x, y = samples()
    x = x.clamp(max=0.68)
    with pytest.raises(RobustevalError, match="NaN or infinite logits on sample"):
        run(Cliff().eval(), x, y, [attack(lambda x, y: (x + 0.019).clamp(0, 1))])


def test_certificates_close_samples_and_reasons_explain_the_rest() -> None:
    model, x, y = samples()
    stages = [Stage("exact", "certifier", Proof(model.exactly_robust)), Stage("pgd", "attack", PGD(steps=40))]
    judged = run(model, x, y, stages)
    robust = model.exactly_robust(x, y)
    for row, is_robust in zip(judged.rows, robust.tolist(), strict=True):
        if row.verdict is not Verdict.MISCLASSIFIED:
            assert row.verdict is (Verdict.CERTIFIED if is_robust else Verdict.BROKEN)
            assert row.stage == ("exact" if is_robust else "pgd")
    unsure = run(model, x, y, [Stage("weak", "certifier", Proof(lambda x, y: torch.zeros(len(x))))])
    reasons = {row.reason for row in unsure.rows if row.verdict is Verdict.UNKNOWN}
    assert reasons == {"weak: bound too loose"}


def test_a_broken_sample_that_was_certified_fails_the_run() -> None:
    model, x, y = samples()
    wrong = Stage("wrong", "certifier", Proof(lambda x, y: torch.ones(len(x))))
    pgd = Stage("pgd", "attack", PGD(steps=40))
    with pytest.raises(SoundnessContradiction, match=r"sample 1\d\d was certified by 'wrong' and broken by 'pgd'"):
        run(model, x, y, [wrong, pgd])
    trusted = run(model, x, y, [wrong, pgd], skip=True)
    assert trusted.stages[1].entered == 0, "skip_certified spares proved samples the attack"


def test_passes_are_counted_per_image() -> None:
    model, x, y = samples(20)
    x, y = x[y == model(x).argmax(1)], y[y == model(x).argmax(1)]
    stage = run(model, x, y, [Stage("pgd", "attack", PGD(steps=7))]).stages[0]
    assert stage.backward == 7 * len(x)
    assert stage.forward == (7 + 1 + 1) * len(x), "7 steps, the attack's own last look, the harness's check"


@pytest.mark.parametrize("batch_size", [16, 17, 33])
def test_splitting_the_forward_changes_no_bit(batch_size: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)).eval()
    x = torch.rand(50, 3, 2, 2)
    whole, split = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = Probe(net, 1000)(whole), Probe(net, batch_size)(split)
    assert torch.equal(a, b)
    grad_a = torch.autograd.grad(a.logsumexp(1).sum(), whole)[0]
    grad_b = torch.autograd.grad(b.logsumexp(1).sum(), split)[0]
    assert torch.equal(grad_a, grad_b)


class Coin(nn.Module):
    """Right about grey images; errs on brighter ones with probability ``p``."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        errs = (x.flatten(1).mean(1) > 0.505) & (torch.rand(len(x)) < self.p)
        return torch.stack([1.0 - 2.0 * errs, torch.zeros(len(x))], 1)


def tossed(p: float) -> Judgement:
    repeat = Repeat(evaluations=400, confidence=0.999)  # 232 errors are needed, 201 are most
    x, y, ids = torch.full((20, 1, 2, 2), 0.5), torch.zeros(20, dtype=torch.long), torch.arange(20)
    rng = SampleRng(0, tuple(range(20)), 0)
    return judge(Probe(Coin(p), 100), x, y, ids, THREAT, [attack(lambda x, y: x + 0.01)], rng, False, repeat)


def test_the_margin_of_repeated_evaluations_is_exact() -> None:
    """`validate` compares the margin of a sample that errs exactly as often as needed with the count."""
    x, y, ids = torch.full((1, 1, 2, 2), 0.52), torch.zeros(1, dtype=torch.long), torch.arange(1)
    assert (
        decide(Probe(Coin(1.0), 100), x, y, ids, Repeat(evaluations=7, confidence=0.9), 0).margin.dtype is torch.float64
    )


def test_a_candidate_that_errs_often_but_not_beyond_doubt_leaves_its_sample_open_and_says_so() -> None:
    rarely, often, mostly = tossed(0.2), tossed(0.54), tossed(0.95)
    assert {(row.verdict, row.reason) for row in rarely.rows} == {(Verdict.UNKNOWN, SURVIVED)}
    assert {(row.verdict, row.reason) for row in mostly.rows} == {(Verdict.BROKEN, None)}
    doubtful = [row for row in often.rows if row.reason == f"lie: {DOUBTFUL}"]
    assert {row.verdict for row in doubtful} == {Verdict.UNKNOWN}
    assert [judged.stages[0].undecided for judged in (rarely, often, mostly)] == [0, len(doubtful), 0]
    assert len(doubtful) > 10
