"""Randomised smoothing on models whose smoothed classifier is known exactly, and its statistics."""

from __future__ import annotations

import math
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest
from torch import Tensor, nn

from robusteval.attacks.smoothadv import SmoothAdv, mean_log_odds
from robusteval.certifiers.smoothing import Smoothing as Certify
from robusteval.errors import RobustevalError
from robusteval.evaluation.judge import LEADING, UNDECIDED, Judgement, judge
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.suite import Stage
from robusteval.models.base import Classifier
from robusteval.report import Poll, Repeat, Smoothing
from robusteval.rng import SampleRng
from robusteval.smoothing import LookPlan, beats, lower, upper, votes
from robusteval.threat import ThreatModel
from robusteval.verdict import Sampling, Verdict

SIGMA = 0.25
TRACK = Smoothing(sigma=SIGMA, n0=50, n=400, alpha=0.001, looks=(100, 400, 2000))
CERTIFY = Certify(SIGMA, TRACK.n0, TRACK.looks, TRACK.alpha)
STAGES = [Stage("smoothing", "certifier", CERTIFY), Stage("smoothadv", "attack", SmoothAdv(SIGMA, samples=4))]
EPS = ThreatModel.parse("L2", "0.2")
NORMAL = NormalDist()


def streams(count: int, first: int = 0) -> SampleRng:
    return SampleRng(3, tuple(range(first, first + count)), 0)


@pytest.mark.parametrize(("count", "total"), [(0, 40), (1, 40), (33, 40), (40, 40), (9950, 10_000)])
def test_bounds_are_the_exact_ones_of_scipy(count: int, total: int) -> None:
    exact = binomtest(count, total).proportion_ci(confidence_level=0.998, method="exact")
    assert (lower(count, total, 0.001), upper(count, total, 0.001)) == pytest.approx((exact.low, exact.high), abs=1e-12)
    if count:
        assert binom.sf(count - 1, total, lower(count, total, 0.001)) == pytest.approx(0.001)


@pytest.mark.parametrize(("reach", "draws"), [(1, 40), (2, 301), (3, 5114), (4, 218_105)])
def test_the_fewest_draws_that_can_prove_a_radius(reach: int, draws: int) -> None:
    """``p_low = alpha^(1 / n)`` where all agree, so ``n`` is the logarithm of alpha to the base ``Phi(R / sigma)``."""
    assert draws == math.ceil(math.log(0.001) / math.log(NORMAL.cdf(reach)))
    assert LookPlan(1.0, (draws,), 0.001).ceiling(()) >= reach > LookPlan(1.0, (draws - 1,), 0.001).ceiling(())


def test_radii_are_rounded_down_and_abstention_is_none() -> None:
    plan = LookPlan(SIGMA, (100, 1000), 0.002)
    exact = SIGMA * NORMAL.inv_cdf(lower(990, 1000, 0.001))
    assert 0 <= exact - plan.radius((99, 990)) < 1e-6
    assert plan.radius((50, 510)) == 0
    assert "abstains" in plan.reason((50, 510), 0.1)
    assert plan.radius((100, 700)) == plan.radius((100,)), "every look counts"


def walk(plan: LookPlan, p: float, reach: float, rng: np.random.Generator) -> tuple[bool, int]:
    """Draw from a coin until the plan stops; return whether it proved ``reach``, and the draws."""
    counts: list[int] = []
    while len(counts) < len(plan.looks) and not plan.stops(counts, reach):
        taken = plan.looks[len(counts) - 1] if counts else 0
        counts.append((counts[-1] if counts else 0) + int(rng.binomial(plan.looks[len(counts)] - taken, p)))
    return plan.radius(counts) > reach, plan.looks[len(counts) - 1] if counts else 0


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_looks_by_plan_keep_the_error_that_peeking_does_not(p: float) -> None:
    """The true probability is the worst there is: at the boundary, where each certificate would be false."""
    looks, alpha, reach = (20, 40, 80, 160, 320, 640), 0.08, SIGMA * NORMAL.inv_cdf(p) + 1e-9
    rng = np.random.default_rng(5)
    plan, peeking = LookPlan(SIGMA, looks, alpha), LookPlan(SIGMA, looks, alpha * len(looks) * (1 - 1e-9))
    assert peeking.share == pytest.approx(alpha)
    rates = [sum(walk(one, p, reach, rng)[0] for _ in range(2000)) / 2000 for one in (plan, peeking)]
    assert rates[0] <= alpha < rates[1]


def test_the_plan_stops_early_in_both_directions_and_never_looks_in_vain() -> None:
    plan, rng = LookPlan(SIGMA, (100, 1000, 10_000), 0.001), np.random.default_rng(0)
    assert walk(plan, 0.9999, 0.25, rng) == (True, 100)
    assert walk(plan, 0.6, 0.25, rng) == (False, 100)
    assert walk(plan, 1.0, 1.0, rng) == (False, 0), "not even agreement could prove it"
    assert plan.stops((90,), 0.77), "what is lost cannot be made up for"


class Halves(nn.Module):
    """Two classes on either side of a plane: g is f, robust up to the distance from it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(48, generator=torch.Generator().manual_seed(1)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        side = x.flatten(1) @ self.w
        return torch.stack([side, -side], 1)


STD = 0.1


def halves(factors: list[float]) -> tuple[Classifier, Tensor, Tensor, Tensor]:
    """Return a normalising model, inputs (N, 3, 4, 4) and labels, and their distances in pixel units.

    The distances are ``factors`` times eps; negative ones lie on the wrong side.
    """
    model = Classifier(Halves(), (0.5,) * 3, (STD,) * 3).eval()
    unit = model.backbone.w / model.backbone.w.norm()
    distance = torch.tensor(factors) * EPS.radius
    x = (0.5 + distance[:, None] * unit).view(-1, 3, 4, 4)
    return model, x, torch.zeros(len(factors), dtype=torch.long), distance


def judged(
    model: nn.Module, x: Tensor, y: Tensor, stages: list[Stage], batch_size: int = 1000, track: Smoothing = TRACK
) -> Judgement:
    ids = torch.arange(len(x))
    return judge(Probe(model, batch_size), x, y, ids, EPS, stages, streams(len(x)), True, track)


def test_noise_is_in_pixel_units_and_added_before_the_model_normalises() -> None:
    model, x, _, distance = halves([0.3, 0.7, 1.2])
    share = votes(model, x, SIGMA, 20_000, streams(3), "test").double()[:, 0] / 20_000
    expected = [NORMAL.cdf(each / SIGMA) for each in distance.tolist()]
    assert share.tolist() == pytest.approx(expected, abs=0.015)


def test_certificates_and_attacks_meet_at_the_exact_radius() -> None:
    factors = [*np.linspace(0.05, 0.98, 12).tolist(), *np.linspace(1.02, 3.0, 12).tolist()]
    model, x, y, distance = halves(factors)
    judgement = judged(model, x, y, STAGES)
    for row, each in zip(judgement.rows, distance.tolist(), strict=True):
        assert row.votes is not None
        assert row.votes.radius <= each
        assert row.verdict is not (Verdict.CERTIFIED if each < EPS.radius else Verdict.BROKEN)
        if each < 0.75 * EPS.radius:
            assert row.verdict is Verdict.BROKEN, "at eps the rival has 58 % of the votes or more"
        if each > 1.5 * EPS.radius:
            assert row.verdict is Verdict.CERTIFIED
    for sample, witness in judgement.witnesses.items():
        poll = judgement.rows[sample].votes
        assert poll is not None
        assert poll.adversarial is not None
        assert poll.adversarial.margin == witness.margin < 0
    assert {row.verdict for row in judgement.rows} == {Verdict.CERTIFIED, Verdict.BROKEN, Verdict.UNKNOWN}


def test_an_input_on_the_wrong_side_is_misclassified_and_one_on_the_boundary_abstains() -> None:
    model, x, y, _ = halves([-1.0, -0.001, 0.001])
    rows = judged(model, x, y, [Stage("smoothing", "certifier", CERTIFY)]).rows
    assert [row.verdict for row in rows] == [Verdict.MISCLASSIFIED, Verdict.UNKNOWN, Verdict.UNKNOWN]
    assert [row.reason for row in rows] == [None, UNDECIDED, UNDECIDED]
    assert all((row.prediction == row.label) == (row.margin >= 0) for row in rows)


class Bands(nn.Module):
    """Says class 0 in the middle 40 % of the noise on the first value, 1 below it and 2 above."""

    def forward(self, x: Tensor) -> Tensor:
        z, edge = (x.flatten(1)[:, 0] - 0.5) / SIGMA, NORMAL.inv_cdf(0.7)
        return torch.stack([edge - z.abs(), -z - edge, z - edge], 1).sign()


def test_the_prediction_is_by_plurality_not_by_majority() -> None:
    """With 40, 30 and 30 % class 0 is right, though most evaluations err, and a certificate abstains."""
    x = torch.full((3, 1, 4, 4), 0.5)
    y = torch.arange(3)
    track = TRACK.model_copy(update={"n0": 1000, "n": 4000})
    certify = Certify(SIGMA, 1000, TRACK.looks, TRACK.alpha)
    rows = judged(Bands(), x, y, [Stage("smoothing", "certifier", certify)], track=track).rows
    assert [row.verdict for row in rows] == [Verdict.UNKNOWN, Verdict.MISCLASSIFIED, Verdict.MISCLASSIFIED]
    assert rows[0].votes is not None
    assert rows[0].votes.clean.right(track.alpha)
    assert rows[0].margin == pytest.approx(0.1, abs=0.03)
    assert "abstains" in str(rows[0].reason)
    assert rows[0].reason != UNDECIDED, "it is the certificate that abstains, not the prediction"


def test_the_rival_is_chosen_by_other_copies_than_those_that_judge_it() -> None:
    x, y = torch.full((16, 1, 4, 4), 0.5), torch.zeros(16, dtype=torch.long)
    polls = [row.votes.clean for row in judged(Bands(), x, y, []).rows if row.votes]
    assert 2 < sum(poll.rival != poll.other for poll in polls) < 14, "classes 1 and 2 are equally probable"


def test_a_leading_class_is_no_break_before_it_leads_beyond_doubt() -> None:
    model, x, y, _ = halves([0.02])
    nudge = SmoothAdv(SIGMA, steps=1, samples=64, step_size=0.15)
    (row,) = judged(model, x, y, [Stage("nudge", "attack", nudge)]).rows
    assert row.votes is not None
    assert row.votes.adversarial is None
    assert row.verdict is Verdict.UNKNOWN
    assert row.reason in (UNDECIDED, f"nudge: {LEADING}")


def test_the_rival_is_tested_on_other_votes_than_those_that_chose_it() -> None:
    """Of ten equal classes the luckiest would beat the label far too often; an independent test does not."""
    rng, alpha, wrong, naive = np.random.default_rng(1), 0.05, 0, 0
    for _ in range(3000):
        first, said = (rng.multinomial(n, [0.1] * 10) for n in (100, 400))
        rival, other = 1 + int(first[1:].argmax()), 1 + int(said[1:].argmax())
        counts = {"other_votes": int(said[other]), "rival_votes": int(said[rival])}
        poll = Poll(n=400, label_votes=int(said[0]), other=other, rival=rival, **counts)
        wrong, naive = wrong + poll.wrong(alpha), naive + beats(poll.other_votes, poll.label_votes, alpha)
    assert wrong / 3000 <= alpha < naive / 3000


def test_the_smoothed_classifier_has_another_verdict_than_a_randomised_model() -> None:
    """The same votes, 40 % right: a model that is itself random errs mostly, g does not."""
    poll = Poll(n=1000, label_votes=400, other=1, other_votes=300, rival=1, rival_votes=300)
    assert poll.right(0.001)
    assert not poll.wrong(0.001)
    assert Repeat(evaluations=1000, confidence=0.999).needed <= 600


@pytest.mark.parametrize("batch_size", [16, 100])
def test_verdicts_and_votes_do_not_depend_on_the_batch_or_the_company(batch_size: int) -> None:
    model, x, y, _ = halves([0.3, 0.8, 0.95, 1.1, 1.3, 2.5])
    whole = judged(model, x, y, STAGES)
    assert judged(model, x, y, STAGES, batch_size).rows == whole.rows
    order = torch.tensor([4, 1, 3])
    rng = streams(6).take(order)
    some = judge(Probe(model, batch_size), x[order], y[order], order, EPS, STAGES, rng, True, TRACK)
    assert some.rows == tuple(whole.rows[i] for i in order.tolist())


def test_what_a_smaller_eps_has_drawn_is_not_drawn_again_and_changes_nothing() -> None:
    model, x, y, _ = halves([1.5, 2.0, 3.0, 4.0])
    wide, probe = ThreatModel.parse("L2", "0.35"), Probe(model, 1000)
    near = CERTIFY(probe, x, y, EPS, streams(4))
    assert all(one.proved for one in near)
    before = probe.passes.forward
    resumed = CERTIFY(probe, x, y, wide, streams(4), [one.sampling for one in near])
    drawn, before = probe.passes.forward - before, probe.passes.forward
    fresh = CERTIFY(probe, x, y, wide, streams(4))
    assert [one.proved for one in resumed] == [one.proved for one in fresh]
    again = probe.passes.forward - before
    spent = [TRACK.looks[len(one.sampling.counts) - 1] for one in near if one.sampling]
    assert again - drawn == 4 * TRACK.n0 + sum(spent)


def test_passes_of_a_certificate_are_counted() -> None:
    model, x, y, _ = halves([0.2, 3.0])
    judgement = judged(model, x, y, [Stage("smoothing", "certifier", CERTIFY)])
    counts = [row.votes.counts for row in judgement.rows if row.votes]
    assert judgement.stages[0].forward == sum(TRACK.n0 + TRACK.looks[len(each) - 1] for each in counts)


def test_another_class_or_another_norm_is_not_certified() -> None:
    model, x, y, _ = halves([2.0])
    (answer,) = CERTIFY(model, x, 1 - y, EPS, streams(1))
    assert (answer.proved, answer.sampling) == (False, Sampling(0, ()))
    assert "choose class 0" in answer.reason
    assert not any(CERTIFY.supports(ThreatModel.parse(norm, "0.1")) for norm in ("Linf", "L1"))


def test_the_budget_tolerance_must_be_proved_as_well() -> None:
    """Radii are rounded down to 1e-6, and a radius of eps alone would not cover what the harness accepts."""
    plan = LookPlan(1.0, (1000,), 0.001)
    radius = plan.radius((1000,))
    model, x, y, _ = halves([50.0])
    certify, proved = Certify(1.0, 10, (1000,), 0.001), []
    for slack in (0.0, 5e-7, 2.1e-6):
        threat = ThreatModel.parse("L2", f"{radius - slack:.7f}")
        proved.append(certify(model, x, y, threat, streams(1))[0].proved)
    assert proved == [False, False, True]


class Root(nn.Module):
    """Is fine on images and undefined on noisy ones."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2].sqrt()


def test_a_model_that_fails_on_noise_is_named() -> None:
    with pytest.raises(RobustevalError, match="noisy copy of sample 1"):
        votes(Root(), torch.tensor([50.0, 0.1]).view(2, 1, 1, 1).expand(2, 1, 2, 2), SIGMA, 50, streams(2), "test")


def test_smoothadv_ascends_the_log_odds_of_the_mean_softmax_and_does_not_underflow() -> None:
    logits = torch.randn(5, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 0])
    p = logits.softmax(2).mean(1).gather(1, y[:, None]).squeeze(1)
    assert torch.allclose(mean_log_odds(logits, y), ((1 - p) / p).log())
    sure = torch.tensor([[[400.0, 0.0, 1.0]]]).requires_grad_()
    (grad,) = torch.autograd.grad(mean_log_odds(sure, torch.tensor([0])).sum(), sure)
    assert grad.abs().max() > 0.5


def test_votes_are_those_of_each_samples_own_stream() -> None:
    model, x, _, _ = halves([0.3] * 5)
    said = votes(model, x, SIGMA, 600, streams(5), "test")
    assert len(Counter(said[:, 0].tolist())) > 1, "equal inputs have their own noise"
    assert torch.equal(votes(model, x[2:], SIGMA, 600, streams(3, 2), "test"), said[2:])
    assert not torch.equal(votes(model, x, SIGMA, 600, streams(5), "other"), said)
