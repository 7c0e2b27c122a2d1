"""Branch and bound: sound on every part of a ball, complete on small networks, and believed by nobody."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from test_bounds import affine_parts, all_margins, between, drawn, exact_margins, random_ball, random_net, relu_net
from test_certifiers import DISTANCE, at_distance, centre, planted
from test_judge import THREAT, samples
from torch import Tensor, nn

from robusteval.attacks.pgd import PGD
from robusteval.bounds.activations import RELU
from robusteval.bounds.ball import Ball
from robusteval.bounds.domains import Domains
from robusteval.bounds.graph import trace
from robusteval.bounds.leaf import settled
from robusteval.bounds.margins import Problem
from robusteval.bounds.tighten import tightened
from robusteval.bounds.tree import Tree
from robusteval.certifiers.alpha_crown import AlphaCrown
from robusteval.certifiers.bab import BaB
from robusteval.evaluation.judge import judge
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.suite import Stage
from robusteval.rng import SampleRng
from robusteval.threat import Norm, ThreatModel
from robusteval.verdict import Certificate, Verdict

RNG = SampleRng(0, tuple(range(100)), 0)


def tree_of(net: nn.Module, ball: Ball, y: Tensor) -> Tree:
    """Return the tree of a ball around one sample."""
    problem = Problem(trace(net, ball.x.clone()), ball, y)
    with torch.no_grad():
        return Tree.of(problem, tightened(problem).bounds)


def around(tree: Tree, point: Tensor, shares: Tensor) -> Domains:
    """Return domains that hold ``point`` (*shape), for the first rival: each fixes one of ``shares`` (D,) of the signs.

    Slopes and multipliers are drawn.
    """
    values = tree.problem.graph.values(point[None])
    sides = torch.cat([values[kinks.source].flatten()[kinks.values].sign() for kinks in tree.kinks])
    drawn_ = torch.rand(len(shares), tree.size, dtype=torch.float64)
    sign = torch.where(drawn_ < shares[:, None], sides, 0.0).to(torch.int8)
    low = torch.tensor([kinks.leak for kinks in tree.kinks for _ in kinks.values], dtype=torch.float64)
    slope = low + (1 - low) * torch.rand_like(drawn_)
    push = torch.rand_like(drawn_) * 10 ** torch.empty(len(shares), 1).uniform_(-3, 1)
    rival = torch.zeros(len(shares), dtype=torch.long)
    return Domains(rival, sign, slope, push, torch.full((len(shares),), -math.inf, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(60))
def test_bounds_hold_on_every_part_of_a_ball(seed: int) -> None:
    """Whatever the slopes and multipliers, before and after they are improved."""
    _, net, x = random_net(seed)
    with torch.no_grad():
        y = net(x.clone()).argmax(1)[:1]
    tree = tree_of(net, random_ball(seed, x).take(torch.tensor([0])), y)
    if not tree.size:
        return
    shares, points = torch.tensor([0.0, 0.3, 0.7, 1.0]), tree.problem.ball.x[0] + drawn(tree.problem.ball, 6)[:, 0]
    for point in points:
        domains = around(tree, point, shares)
        with torch.no_grad():
            margin = all_margins(tree.problem.graph, point[None, None], y)[0, 0, 0]
            first, better = tree.low(domains), tree.bounded(domains, math.inf, steps=4).low
            last = settled(tree, domains.take(slice(3, 4)), 1e-6)[0].low
        for low in (first, better, last):
            assert between(low, margin.expand_as(low), torch.full_like(low, math.inf)), (low - margin).max()
        assert (better >= first).all()


def test_sixty_random_networks_have_kinks_to_split() -> None:
    nets = (random_net(seed) for seed in range(60))
    assert sum(any("ReLU" in type(part).__name__ for part in net.modules()) for _, net, _ in nets) > 30


def test_halves_differ_in_one_sign_and_keep_the_rest() -> None:
    net, x = relu_net(0)
    tree = tree_of(net, Ball.around(x[:1], Norm.LINF, 0.3), torch.zeros(1, dtype=torch.long))
    parents = tree.roots(torch.tensor([0, 1]), torch.zeros(2, dtype=torch.float64))
    halves = parents.split(torch.tensor([0, 2]))
    assert halves.rival.tolist() == [0, 1, 0, 1]
    assert halves.sign[:, [0, 2]].tolist() == [[1, 0], [0, 1], [-1, 0], [0, -1]]
    assert halves.sign.abs().sum() == 4


def verdict_of(certificate: Certificate, net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> str:
    """Return what a certificate says; a counter-example must hold."""
    if certificate.counterexample is None:
        return "proved" if certificate.proved else "open"
    x_adv = certificate.counterexample[None]
    assert x_adv.dtype is torch.float32
    assert threat.contains(x, x_adv).all()
    with torch.no_grad():
        assert net(x_adv).argmax(1).tolist() != y.tolist()
    return "refuted"


def small(seed: int) -> tuple[nn.Module, Tensor, Tensor, ThreatModel]:
    """Return a network, two inputs, their predictions and a ball in which one in five is not robust."""
    net, x = relu_net(seed)
    net, x = net.float(), x.float()
    with torch.no_grad():
        y = net(x).argmax(1)
    return (
        net,
        x,
        y,
        ThreatModel.parse(*(("Linf", "0.2"), ("L1", "1.5"), ("Linf", "0.3"), ("L1", "2"))[seed // 2 % 4]),
    )


@pytest.mark.parametrize("seed", range(24))
def test_small_networks_are_decided_as_exact_verification_says(seed: int) -> None:
    net, x, y, threat = small(seed)
    found = BaB(tries=1 + seed % 3, batch=1 + seed % 5)(net, x, y, threat, RNG)
    said = [verdict_of(one, net, x[i : i + 1], y[i : i + 1], threat) for i, one in enumerate(found)]
    ball, exact = Ball.around(x.double(), threat.norm, threat.radius), net.double()
    least = [min(exact_margins(exact, ball, i, int(y[i]))) for i in range(len(x))]
    assert said == ["proved" if margin > 0 else "refuted" for margin in least], least


def test_the_exact_cases_are_of_both_kinds_and_need_splits() -> None:
    proved, split = [], 0
    for seed in range(24):
        *problem, threat = small(seed)
        proved += [one.proved for one in BaB()(*problem, threat, RNG)]
        split += sum("subproblems" in one.reason for one in BaB(domains=1)(*problem, threat, RNG))
    assert proved.count(False) >= 8
    assert split >= 8


@pytest.mark.parametrize(("norm", "factor"), product(DISTANCE, [0.999, 1.0001, 1.01, 1.2, 2.0]))
def test_the_planted_counter_example_is_found(norm: str, factor: float) -> None:
    (x, y), net, threat = centre(), planted(), at_distance(norm, factor)
    (certificate,) = BaB()(net, x, y, threat, RNG)
    assert verdict_of(certificate, net, x, y, threat) == ("proved" if factor < 1 else "refuted")
    stages = [Stage("pgd", "attack", PGD(steps=50, restarts=5)), Stage("bab", "certifier", BaB())]
    judged = judge(Probe(net, 100), x, y, torch.arange(1), threat, stages, SampleRng(0, (0,), 0))
    (row,) = judged.rows
    assert (row.stage, row.verdict) == ("bab", Verdict.CERTIFIED if factor < 1 else Verdict.BROKEN)
    assert (judged.stages[1].closed, judged.stages[1].broken) == (1, int(factor > 1))
    assert bool(judged.witnesses) is (factor > 1)


def test_limits_are_reasons() -> None:
    (x, y), net, threat = centre(), planted(), at_distance("Linf", 1.2)
    for limit, reason in (({"domains": 1}, "out of subproblems"), ({"seconds": 1e-9}, "out of seconds")):
        (certificate,) = BaB(**limit)(net, x, y, threat, RNG)
        assert not certificate.proved
        assert certificate.counterexample is None
        assert certificate.reason.startswith(reason)


class Claim:
    """A certifier that claims counter-examples."""

    refutes = True

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def supports(self, threat: ThreatModel) -> bool:
        return True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        moved = (x + self.shift).clamp(0, 1)
        return [Certificate(False, "claimed", counterexample=one if i % 2 else None) for i, one in enumerate(moved)]


@pytest.mark.parametrize("shift", [0.0, 0.9, math.nan])
def test_counter_examples_that_do_not_hold_are_not_believed(shift: float) -> None:
    model, x, y = samples()
    rng = SampleRng(0, tuple(range(len(x))), 0)
    stage = Stage("claim", "certifier", Claim(shift))
    judged = judge(Probe(model, 100), x, y, torch.arange(len(x)), THREAT, [stage], rng)
    assert not judged.witnesses
    reasons = {row.reason for row in judged.rows if row.verdict is Verdict.UNKNOWN}
    assert reasons == {"claim: claimed"}
    assert judged.stages[0].broken == 0
    assert (judged.stages[0].rejected + judged.stages[0].non_finite > 0) is (shift != 0)


def test_each_of_several_rivals_is_decided() -> None:
    """A proof of all margins but one is none."""
    net, x = relu_net(2)
    tree = tree_of(net, Ball.around(x[:1], Norm.LINF, 0.3), net(x[:1]).argmax(1))
    low = tree.roots(torch.tensor([0, 1]), torch.tensor([-1.0, -1.0], dtype=torch.float64))
    again = replace(low, rival=torch.tensor([1, 0]))
    first, second = tree.bounded(low, math.inf).low, tree.bounded(again, math.inf).low
    assert torch.allclose(first, second.flip(0), atol=1e-9)
    assert not torch.allclose(first[0], first[1], atol=1e-3)


def equation(empty: Any, terms: list[tuple[float, int]], scalar: float) -> Any:
    for factor, variable in terms:
        empty.addAddend(factor, variable)
    empty.setScalar(scalar)
    return empty


def marabou_says(net: nn.Sequential, ball: Ball, y: int) -> list[str]:
    """Ask Marabou (Wu et al. 2024, arXiv 2401.14461), per rival, whether its logit can reach that of ``y``."""
    core = pytest.importorskip("maraboupy.MarabouCore", reason="maraboupy is not installed")
    said = []
    parts = affine_parts(net, tuple(ball.x.shape[1:]))
    for rival in (k for k in range(len(parts[-1][1])) if k != y):
        query, last = core.InputQuery(), list(range(ball.x[0].numel()))
        query.setNumberOfVariables(len(last) + sum(2 * len(bias) for _, bias in parts[:-1]) + len(parts[-1][1]))
        for variable, low, high in zip(last, *(bound.flatten().tolist() for bound in ball.box), strict=True):
            query.setLowerBound(variable, low)
            query.setUpperBound(variable, high)
            query.markInputVariable(variable, variable)
        free = len(last)
        for number, (weight, bias) in enumerate(parts):
            values = list(range(free, free + len(bias)))
            for row, value in enumerate(values):
                terms = [*zip(weight[row].tolist(), last, strict=True), (-1.0, value)]
                query.addEquation(equation(core.Equation(), terms, -float(bias[row])))
            free, last = free + len(bias), values
            if number < len(parts) - 1:
                last = list(range(free, free + len(bias)))
                for value, positive in zip(values, last, strict=True):
                    core.addReluConstraint(query, value, positive)
                free += len(bias)
        wins = core.Equation(core.Equation.EquationType.GE)
        query.addEquation(equation(wins, [(1.0, last[rival]), (-1.0, last[y])], 0.0))
        options = core.Options()
        options._verbosity = 0
        said.append(core.solve(query, options, "")[0])
    return said


@pytest.mark.parametrize("seed", [seed for seed in range(24) if seed % 4 < 2])
def test_marabou_agrees(seed: int) -> None:
    """Linf alone: Marabou knows boxes."""
    net, x, y, threat = small(seed)
    found = BaB()(net, x, y, threat, RNG)
    ball = Ball.around(x.double(), threat.norm, threat.radius)
    for i, certificate in enumerate(found):
        said = marabou_says(net.double(), ball.take(torch.tensor([i])), int(y[i]))
        assert set(said) <= {"sat", "unsat"}
        assert certificate.proved is (set(said) == {"unsat"})


class TwoKinks(nn.Module):
    """ReLU and LeakyReLU of the same values, so that a lower slope for one is none for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(16, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x.flatten(1))
        return self.last(torch.relu(self.second(torch.cat([torch.relu(z), nn.functional.leaky_relu(z, 0.8)], 1))))


def touching() -> nn.Module:
    """Return a network whose first kinks have a lower bound of 0 up to rounding where pixels are black."""
    front = nn.Conv2d(1, 1, 1).double()  # in float32 the two would not cancel
    with torch.no_grad():
        front.weight.fill_(0.3081)
        front.bias.fill_(0.4914)
    tail = [nn.ReLU(), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]
    return nn.Sequential(Shifted(), front, *tail)


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.4914) / 0.3081


@pytest.mark.parametrize(("make", "value"), [(TwoKinks, 0.5), (touching, 0.0)])
def test_no_slope_is_chosen_where_none_is_free(make: Any, value: float) -> None:
    """What is found after the ascent never exceeds the margin at a point of the ball."""
    for seed in range(30):
        torch.manual_seed(seed)
        net, x = make().double().eval(), torch.full((1, 1, 2, 4), value, dtype=torch.float64)
        ball = Ball.around(x, Norm.LINF, 0.5)
        with torch.no_grad():
            y = net(x).argmax(1)
            tree = tree_of(net, ball, y)
            roots = tree.roots(torch.tensor([0]), torch.tensor([-math.inf], dtype=torch.float64))
            low = tree.bounded(roots, math.inf, steps=30).low
            points = ball.x + torch.cat([drawn(ball, 300), ball.low[None], ball.high[None]])
            least = all_margins(tree.problem.graph, points, y).amin(0)[:, 0]
        assert between(low, least, torch.full_like(low, math.inf)), (seed, low - least)


def test_bounds_that_cross_make_planes_of_no_use() -> None:
    planes = RELU.planes(torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -3.0]))
    assert planes.high.isnan().all()
    assert planes.high_slope.isnan().all()


@pytest.mark.parametrize("norm", [Norm.LINF, Norm.L2, Norm.L1])
def test_networks_without_kinks_are_decided_where_planes_are_exact(norm: Norm) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 1, 3, 3)
    for net in (nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), nn.Sequential(nn.Flatten(), nn.Linear(9, 3), nn.Tanh())):
        with torch.no_grad():
            y = net(x).argmax(1)
        found = BaB()(net.eval(), x, y, ThreatModel(norm, Fraction(1, 2), "0.5"), RNG)
        assert all(one.proved or one.counterexample is not None or one.reason for one in found)
        if len(net) == 2:
            assert all(one.proved is (one.counterexample is None) for one in found)


def test_a_search_without_memory_keeps_the_proofs_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y, threat = small(10)
    before = [one.proved for one in AlphaCrown()(net, x, y, threat, RNG)]
    assert sorted(before) == [False, True]
    monkeypatch.setattr("robusteval.bounds.tree.COPIES", 10**12)
    after = BaB()(net, x, y, threat, RNG)
    assert [one.proved for one in after] == before
    assert next(one.reason for one in after if not one.proved).startswith("memory")
