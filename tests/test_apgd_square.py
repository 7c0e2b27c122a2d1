"""APGD and Square against closed forms, against pyautoattack, and alone against in company."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.attacks import _losses
from robusteval.attacks._apgd_steps import checkpoints
from robusteval.attacks._l1 import project_l1_box
from robusteval.attacks._square_steps import share
from robusteval.attacks.apgd import APGD
from robusteval.attacks.autoattack import AutoAttack
from robusteval.attacks.base import Attack, AttackResult
from robusteval.attacks.pgd import PGD
from robusteval.attacks.square import Square
from robusteval.catalog import Catalog
from robusteval.errors import UsageError
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel

THREATS = tuple(ThreatModel.parse(norm, eps) for norm, eps in (("Linf", "0.03"), ("L2", "0.3"), ("L1", "0.3")))
DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
every_norm = pytest.mark.parametrize("threat", THREATS, ids=str)


class Rows(nn.Module):
    """A classifier that treats a row alike in any batch: float64 within, so that kernels cannot be told apart."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.weights, self.scale, self.seen = [weight.double() for weight in weights], 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        out = x.double().flatten(1) - 0.5
        for number, weight in enumerate(self.weights):
            out = (out.relu() if number else out) @ weight.T
        return (out * self.scale).float()


@dataclass
class Case:
    """Inputs around grey, classified as ``y``, whose distance to a linear boundary is ``factors`` times eps."""

    model: Rows
    x: Tensor
    y: Tensor
    threat: ThreatModel

    def run(self, attack: Attack, rows: Sequence[int] | None = None) -> AttackResult:
        rows = list(range(len(self.x)) if rows is None else rows)
        rng = SampleRng(5, tuple(1000 + row for row in rows), 0)
        return attack(self.model, self.x[rows], self.y[rows], self.threat, rng)

    def broken(self, found: Tensor) -> list[bool]:
        with torch.no_grad():
            wrong = self.model(found).argmax(1) != self.y
        assert self.threat.contains(self.x, found).all()
        return wrong.tolist()


def linear(
    threat: ThreatModel, classes: int, factors: Sequence[float], shape: tuple[int, ...] = (3, 8, 8), seed: int = 0
) -> Case:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, math.prod(shape), generator=rng, dtype=torch.float64)
    y = torch.arange(len(factors)) % classes
    ray = weight[y] - weight.mean(0) + 0.1 * torch.randn(len(y), weight.shape[1], generator=rng, dtype=torch.float64)
    logits = ray @ weight.T
    slope = torch.linalg.vector_norm(weight[y][:, None] - weight[None], ord=DUAL[threat.norm.value], dim=2)
    unit = ((logits.gather(1, y[:, None]) - logits) / slope).scatter(1, y[:, None], torch.inf).min(1).values
    assert (unit > 0).all()
    length = torch.tensor(factors, dtype=torch.float64) * threat.radius / unit
    x = (0.5 + ray * length[:, None]).float().view(-1, *shape)
    assert x.min() > threat.radius
    assert x.max() < 1 - threat.radius, "the box must be out of reach"
    return Case(Rows(weight), x, y, threat)


def relu_net(norm: str, count: int) -> Case:
    """A random net, and a budget with which some of its inputs fall."""
    rng = torch.Generator().manual_seed(0)
    model = Rows(torch.randn(24, 192, generator=rng), torch.randn(6, 24, generator=rng))
    x = torch.rand(count, 3, 8, 8, generator=rng)
    threat = ThreatModel.parse(norm, {"Linf": "0.015", "L2": "0.2", "L1": "1.5"}[norm])
    return Case(model, x, model(x).argmax(1), threat)


# APGD against the distance of a linear model.

ON_BOTH_SIDES = (0.97, 1.02, 0.5, 1.3, 0.9, 1.05, 0.8, 0.95)


@every_norm
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize(
    ("classes", "params"),
    [
        (2, {"loss": "ce"}),
        (2, {"loss": "margin"}),
        (3, {"loss": "margin", "targets": 9}),
        (5, {"loss": "dlr", "targets": 9}),
    ],
    ids=str,
)
def test_breaks_exactly_what_is_nearer_than_eps(
    threat: ThreatModel, count: int, classes: int, params: dict[str, Any]
) -> None:
    factors = ON_BOTH_SIDES[:count]
    case = linear(threat, classes, factors, seed=count)
    found = case.run(APGD(steps=60, **params)).candidates
    assert case.broken(found) == [factor < 1 for factor in factors]


@every_norm
def test_survivors_reach_the_largest_loss_there_is(threat: ThreatModel) -> None:
    """On a linear model the best margin within the ball is known, and the candidate of a survivor comes close to it."""
    case = linear(threat, 2, (1.5, 2.0, 3.0))
    found = case.run(APGD(loss="margin")).candidates
    start, end = (-_losses.margin_loss(case.model(at), case.y) for at in (case.x, found))
    share_left = end / start
    assert torch.allclose(share_left, torch.tensor([0.5, 1.0, 2.0]) / torch.tensor([1.5, 2.0, 3.0]), atol=0.02)


# Company, cost.

ATTACKS: tuple[Attack, ...] = (
    *(APGD(steps=20), APGD(steps=8, loss="dlr", targets=2, restarts=2)),
    APGD(steps=10, loss="margin", targets=2, shrink=(10.0, 3.0)),
    *(Square(queries=100), Square(queries=200, at_once=8)),
)


@every_norm
@pytest.mark.parametrize("attack", ATTACKS, ids=["apgd", "targeted", "larger balls", "square", "at once"])
def test_outcome_and_cost_do_not_depend_on_company(attack: Attack, threat: ThreatModel) -> None:
    case = relu_net(threat.norm.value, 8)
    case.model.seen = 0
    together = case.run(attack).candidates
    cost, case.model.seen = case.model.seen, 0
    alone = torch.cat([case.run(attack, [row]).candidates for row in range(8)])
    assert case.model.seen == cost
    order = [3, 7, 0, 5, 1, 2, 6, 4]
    shuffled = case.run(attack, order).candidates
    assert torch.allclose(together, alone, atol=1e-6, rtol=0)
    assert torch.allclose(together[order], shuffled, atol=1e-6, rtol=0)
    verdicts = case.broken(together)
    assert verdicts == case.broken(alone)
    assert 0 < sum(verdicts) < 8, "the case must be interesting"


@every_norm
def test_passes_are_counted_and_fall_with_the_broken(threat: ThreatModel) -> None:
    steps, queries = 40, 300
    several = Square(queries=queries, at_once=8)  # the start, and 37 times 8 after it
    square = ((Square(queries=queries), queries), (several, 1 + 37 * 8))
    for attack, passes in ((APGD(steps=steps, shrink=False), steps + 2), *square):
        robust, weak = linear(threat, 3, (1.5,) * 4), linear(threat, 3, (0.1,) * 4)
        assert not any(robust.broken(robust.run(attack).candidates))
        assert robust.model.seen == 4 * passes + 4
        assert all(weak.broken(weak.run(attack).candidates))
        assert weak.model.seen < robust.model.seen / 2


class Recorded(nn.Module):
    """Remembers what it was asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, []  # type: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        out: Tensor = self.model(x)
        return out


@every_norm
@pytest.mark.parametrize(("shrink", "wide"), [((3.0,), 12), ((10.0, 3.0), 6), ((5.0, 4.0, 3.0, 2.0), 3)])
def test_sixty_percent_of_the_steps_are_in_larger_balls(
    threat: ThreatModel, shrink: tuple[float, ...], wide: int
) -> None:
    case = linear(threat, 3, (1.5,) * 4)
    seen = Recorded(case.model)
    found = APGD(steps=20, loss="margin", shrink=shrink)(
        seen, case.x, case.y, threat, SampleRng(0, (0, 1, 2, 3), 0)
    ).candidates
    assert not any(case.broken(found))
    farthest = [float(threat.distance(case.x, asked).max()) / threat.radius for asked in seen.asked[1:]]
    for factor in shrink:  # as many looks as steps, and one at the end
        ball, farthest = farthest[: wide + 1], farthest[wide + 1 :]
        assert 0.99 * factor < max(ball) <= factor + 1e-4
    assert len(farthest) == 20 - wide * len(shrink) + 1
    assert max(farthest) <= 1 + 1e-4


def test_the_next_ball_begins_at_the_best_point_of_the_last() -> None:
    """On a linear model in Linf that is a corner, which no random start comes near."""
    threat = THREATS[0]
    case = linear(threat, 2, (1.5,) * 4)
    seen = Recorded(case.model)
    APGD(steps=20, loss="margin", shrink=(10.0, 3.0))(seen, case.x, case.y, threat, SampleRng(0, (0, 1, 2, 3), 0))
    slope = case.model.weights[0][1 - case.y] - case.model.weights[0][case.y]
    corner = slope.sign().view_as(case.x).float()
    for first, factor in ((8, 3.0), (15, 1.0)):
        assert torch.allclose(seen.asked[first], (case.x + factor * threat.radius * corner).clamp(0, 1), atol=1e-6)


class Bump(nn.Module):
    """One pixel at 0.5, eps 0.05: the margin rises until 0.9 eps above it and falls below 0 at 0.98 eps."""

    def forward(self, x: Tensor) -> Tensor:
        up = (x.flatten(1) - 0.5) / 0.05
        margin = 1 + 0.5 * up.clamp_min(-1.0) - 20 * (up - 0.9).relu()
        return torch.cat([margin, torch.zeros_like(margin)], dim=1)


def test_larger_balls_first_find_what_gradients_at_the_input_lead_away_from() -> None:
    x, y, rng = torch.full((64, 1, 1, 1), 0.5), torch.zeros(64, dtype=torch.long), SampleRng(0, tuple(range(64)), 0)
    broken = {}
    for shrink in (True, False, (10.0, 3.0)):
        found = APGD(steps=20, loss="margin", shrink=shrink)(
            Bump(), x, y, ThreatModel.parse("Linf", "0.05"), rng
        ).candidates
        assert (found - x).abs().max() <= 0.05 + 1e-6
        broken[shrink] = int((Bump()(found).argmax(1) != y).sum())
    assert broken[True] == broken[False] < 10 < 20 < broken[10.0, 3.0]


@pytest.mark.parametrize("factor", [1.0, 0.5, 1e39, math.inf, math.nan])
def test_balls_to_shrink_from_must_be_larger(factor: float) -> None:
    with pytest.raises(ValueError, match="above 1 and up to"):
        APGD(shrink=(factor,))


def test_balls_that_would_get_no_step_are_refused() -> None:
    with pytest.raises(ValueError, match="13 larger balls with 20 steps"):
        APGD(steps=20, shrink=(2.0,) * 13)
    with pytest.raises(ValueError, match="such as"):
        APGD(shrink=())


def test_restarts_and_targets_are_spent_on_survivors_only() -> None:
    case = linear(THREATS[0], 4, (0.5, 1.5))
    case.run(APGD(steps=10, loss="margin", targets=3, restarts=2))
    assert 2 + 6 * 11 < case.model.seen < 2 + 6 * 11 + 11


# Few classes, odd logits, no gradients.


@pytest.mark.parametrize(
    ("classes", "targets", "said"),
    [
        (2, 0, ["margin as loss, as DLR is undefined for 2 classes"]),
        (3, 0, []),
        (2, 9, ["margin as loss, as targeted DLR is undefined for 2 classes", "1 targets instead of 9"]),
        (3, 2, ["margin as loss, as targeted DLR is undefined for 3 classes"]),
        (4, 9, ["3 targets instead of 9"]),
        (5, 4, []),
    ],
)
def test_few_classes(classes: int, targets: int, said: list[str]) -> None:
    case = linear(THREATS[0], classes, (0.7, 0.8, 1.2))
    result = case.run(APGD(loss="dlr", targets=targets))
    assert case.broken(result.candidates) == [True, True, False]
    assert list(result.adaptations) == said


@every_norm
@pytest.mark.parametrize("version", ["plus", "rand"])
def test_pyautoattacks_apgd_on_dlr_takes_the_margin_with_two_classes(threat: ThreatModel, version: Any) -> None:
    case = linear(threat, 2, (0.7, 0.8, 1.2))
    result = case.run(AutoAttack("apgd-dlr", version))
    assert case.broken(result.candidates) == [True, True, False]
    assert result.adaptations[-1] == "apgd-dlr: margin max z_k - z_y as loss, as DLR is undefined for 2 classes"
    case = linear(threat, 3, (0.7, 1.2))
    assert not any("margin" in text for text in case.run(AutoAttack("apgd-dlr", version)).adaptations)


@every_norm
@pytest.mark.parametrize("scale", [2.0**13, 2.0**-23])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_scale_of_the_logits_does_not_matter(threat: ThreatModel, loss: str, scale: float) -> None:
    case = linear(threat, 2 if loss == "ce" else 3, (0.8, 0.9, 1.1))
    plain = case.run(Square(queries=60)).candidates
    case.model.scale = scale
    assert torch.equal(case.run(Square(queries=60)).candidates, plain)
    x = case.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(case.model(x), case.y), x)
    assert (grad == 0).all() == (scale > 1), "float32 cross-entropy has no gradient where logits are huge"
    attack = APGD(steps=50, loss=loss, targets=0 if loss == "ce" else 2)  # type: ignore[arg-type]
    assert case.broken(case.run(attack).candidates) == [True, True, False]


@pytest.mark.parametrize("threat", THREATS[:2], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**13])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_pgd_on_either_loss_goes_through_huge_logits(threat: ThreatModel, loss: Any, scale: float) -> None:
    case = linear(threat, 2, (0.8, 0.9, 1.1))
    case.model.scale = scale
    assert case.broken(case.run(PGD(steps=50, loss=loss)).candidates) == [True, True, False]


@every_norm
def test_no_gradient_at_all_gives_a_finite_candidate(threat: ThreatModel) -> None:
    case = linear(threat, 3, (0.8,))
    case.model.scale = 0.0
    case.y = torch.zeros(1, dtype=torch.long)
    for loss in ("ce", "dlr", "margin"):
        assert case.broken(case.run(APGD(loss=loss, steps=30)).candidates) == [False]


class Blind(nn.Module):
    """A model that nobody can differentiate, and that notices who tries."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        assert not x.requires_grad
        with torch.no_grad():
            logits: Tensor = self.model((x * 255).round() / 255)
        return logits


@every_norm
def test_square_needs_no_gradient(threat: ThreatModel) -> None:
    case = linear(threat, 3, (0.2,) * 4)
    case.model = Blind(case.model)  # type: ignore[assignment]
    assert sum(case.broken(case.run(Square(queries=1500)).candidates)) >= 3


# Square on every shape.

SHAPES = [(1, 1, 1), (1, 5, 7), (3, 8, 8), (1, 12, 12), (2, 14, 9), (3, 3, 20)]


@every_norm
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_square_on_images_of_any_shape(shape: tuple[int, int, int], threat: ThreatModel) -> None:
    """Near samples fall, most of them in small images; far ones never do, and their candidates use the budget."""
    threat = ThreatModel.parse(threat.norm.value, "0.03")
    case = linear(threat, 2, (0.15,) * 6 + (1.05,) * 2, shape)
    found = case.run(Square(queries=400)).candidates
    verdicts = case.broken(found)
    assert sum(verdicts[:6]) >= 5
    assert verdicts[6:] == [False, False]
    assert (threat.distance(case.x, found)[6:] > 0.9 * threat.radius).all()


def test_square_in_linf_tries_no_point_twice_in_a_row() -> None:
    case, tried = linear(THREATS[0], 2, (1.2,), (1, 6, 6)), []
    case.model.register_forward_pre_hook(lambda _, inputs: tried.append(inputs[0].clone()))
    case.run(Square(queries=200))
    best = max(range(200), key=lambda query: float(_losses.margin_loss(case.model(tried[query]), case.y)))
    assert not any(torch.equal(tried[best], point) for point in tried[best + 1 : 200])


@pytest.mark.parametrize(("query", "halvings"), [(0, 0), (1, 1), (5, 2), (20, 3), (90, 5), (490, 9)])
def test_square_schedule_follows_the_budget(query: int, halvings: int) -> None:
    assert share(0.8, query, 500) == pytest.approx(0.8 / 2**halvings)


# Parts.


@pytest.mark.parametrize("radius", [0.1, 1.0, 6.0, 100.0])
def test_projection_on_l1_ball_and_box_is_the_nearest_point(radius: float) -> None:
    """Optimality: no feasible point lies further along the residual, the best of them found greedily."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(20, 48, generator=rng).mul(1.4).sub(0.2).clamp(0, 1)
    aim = x + torch.randn(x.shape, generator=rng)
    point = project_l1_box(x, aim, radius)
    assert point.min() >= 0
    assert point.max() <= 1
    assert ((point - x).abs().sum(1) <= radius + 1e-5).all()
    residual = aim - point
    order = residual.abs().argsort(1, descending=True)
    room = torch.where(residual > 0, 1 - x, x).gather(1, order)
    spent = torch.minimum((radius - (room.cumsum(1) - room)).clamp_min(0), room)
    most = (residual.abs().gather(1, order) * spent).sum(1)
    assert torch.allclose((residual * (point - x)).sum(1), most, atol=1e-4)


def test_losses_by_hand() -> None:
    logits, y, target = torch.tensor([[4.0, 1.0, 3.0, 0.0]]).double(), torch.tensor([0]), torch.tensor([1])
    assert _losses.dlr_loss(logits, y).item() == pytest.approx(-1 / 3)
    assert _losses.targeted_dlr_loss(logits, y, target).item() == pytest.approx(-3 / 3.5)
    assert _losses.targeted_margin_loss(logits, y, target).item() == -3
    ce = F.cross_entropy(logits, y).item()
    assert _losses.log_odds(logits, y).item() == pytest.approx(math.log(math.expm1(ce)))


def test_checkpoints_are_the_papers() -> None:
    assert checkpoints(THREATS[0].norm, 100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(THREATS[2].norm, 100)[:3] == [4, 8, 12]
    assert checkpoints(THREATS[1].norm, 1) == []


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("apgd", {"steps": 0}),
        ("apgd", {"loss": "ce", "targets": 3}),
        ("apgd", {"rho": 1.5}),
        ("apgd", {"momentum": 0}),
        ("square", {"queries": 0}),
        ("square", {"p_init": 0}),
    ],
)
def test_hyper_parameters_are_checked(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=name):
        Catalog("attack", "attacks").build(name, params)


# Against pyautoattack.


def conv_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(128, 10)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("norm", "eps", "component", "params"),
    [
        ("Linf", "0.02", "apgd-ce", {}),
        ("L2", "0.2", "apgd-ce", {}),
        ("L1", "1.5", "apgd-ce", {"restarts": 5}),
        ("Linf", "0.02", "apgd-t", {"loss": "dlr", "targets": 9}),
    ],
)
def test_breaks_as_many_as_pyautoattack(norm: str, eps: str, component: Any, params: dict[str, Any]) -> None:
    threat, model = ThreatModel.parse(norm, eps), conv_net()
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    y = model(x).argmax(1)
    counts = []
    for attack in (APGD(**params), AutoAttack(component)):
        found = attack(model, x, y, threat, SampleRng(0, tuple(range(64)), 0)).candidates
        assert threat.contains(x, found).all()
        counts.append(int((model(found).argmax(1) != y).sum()))
    assert 8 < counts[1] < 56, "the case must be interesting"
    assert abs(counts[0] - counts[1]) <= 2


class Crowded(nn.Module):
    """Many classes; the log-odds of a query may be larger than those of one that is misclassified."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(40, 48, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * (x.flatten(1) - 0.5) @ self.w.T


def test_no_break_among_queries_at_once_is_passed_over() -> None:
    net, x = Crowded(), 0.3 + 0.4 * torch.rand(120, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    y, seen = net(x).argmax(1), torch.zeros(120, dtype=torch.bool)

    class Watched(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = net(images)
            seen[row] |= bool((logits.argmax(1) != y[row]).any())
            return logits

    threat = ThreatModel.parse("Linf", "0.03")
    for row in range(120):
        rng = SampleRng(0, (row,), 0)
        found = Square(queries=64, at_once=16, loss="ce")(Watched(), x[row : row + 1], y[row : row + 1], threat, rng)
        assert bool(net(found.candidates).argmax(1) != y[row]) == bool(seen[row])
    assert 0 < seen.sum() < 120
