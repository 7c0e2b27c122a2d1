"""Objectives on bounds and on noise: gradients, limits, schedules, and what the bounds are bounds of."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robusteval.bounds.ball import Ball
from robusteval.bounds.graph import trace
from robusteval.bounds.interval import intervals
from robusteval.bounds.margins import Problem, interval_margins, linear_margins
from robusteval.errors import UsageError
from robusteval.models.io import ARCHITECTURES
from robusteval.rng import generator
from robusteval.runs import RunDir
from robusteval.settings import resolve
from robusteval.threat import Norm, ThreatModel
from robusteval.training.adversary import Adversary
from robusteval.training.awp import Recording
from robusteval.training.checkpoint import best_row
from robusteval.training.config import TrainConfig
from robusteval.training.initialise import ibp_init
from robusteval.training.loop import begin, train
from robusteval.training.objective import OBJECTIVES, Loss, StepContext
from robusteval.training.plan import Plan, prepare
from robusteval.training.share import Share
from robusteval.training.step import train_step

IBP = OBJECTIVES.get("ibp")  # makes the package of the trainers importable
RAMPED = importlib.import_module("robusteval.trainers._ramped")
THREAT = ThreatModel.parse("Linf", "0.05")
ON_BOUNDS = ("ibp", "crown_ibp", "sabr", "mtl_ibp")
ON_NOISE = ("gaussian", "smoothadv", "consistency")


class Residual(nn.Module):
    """``relu(bn(x)) + conv(relu(bn(x)))``, and a maximum over windows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.pool = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, 1, 1, groups=3), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.norm(x))
        return self.pool(active + self.conv(active))


def made(*layers: Callable[[], nn.Module], seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(*[layer() for layer in layers]).double()
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return net.train()


def normed() -> nn.Sequential:
    """A net with a BatchNorm of either kind in training mode, and one that is frozen in eval mode."""
    first, last = partial(nn.Conv2d, 1, 3, 3, 2, 1), partial(nn.Linear, 12, 3)
    net = made(first, Residual, nn.Flatten, partial(nn.BatchNorm1d, 12),
               partial(nn.LeakyReLU, 0.1), partial(nn.Linear, 12, 12), partial(nn.BatchNorm1d, 12, affine=False),
               nn.SiLU, last)  # fmt: skip
    net[6].eval()
    return net


def plain() -> nn.Sequential:
    layers = (partial(nn.Conv2d, 1, 4, 3, 2), nn.ReLU, nn.Flatten, partial(nn.Linear, 36, 16), nn.ReLU)
    return made(*layers, partial(nn.Linear, 16, 3))


class Scaled(nn.Module):
    """The plain net, its logits times a parameter of each class."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = plain(), nn.Parameter(torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 8, 8, generator=generator(0, "images"), dtype=torch.float64)
    return x, torch.arange(count) % 3


def context(model: nn.Module, count: int = 6, dtype: torch.dtype = torch.float64, **changes: Any) -> StepContext:
    x, y = images(count)
    x = x.to(dtype)
    attack = Adversary(steps=3).bind(model, x, THREAT, generator(0, "attack"))
    ctx = StepContext(model, x, y, torch.arange(count), THREAT, attack, generator(0, "own"), 0.9, 100)
    return replace(ctx, **changes)


# The bounds.


@pytest.mark.parametrize("by", ["by_intervals", "by_planes"])
@pytest.mark.parametrize("make", [normed, plain, Scaled])
def test_gradients_of_bounds_agree_with_finite_differences_for_every_parameter(make: Any, by: str) -> None:
    model, step = make(), 1e-6
    ctx = context(model)

    def value() -> Tensor:
        return (getattr(ctx.bounds(0.05), by) * torch.tensor([1.0, -2.0, 0.7])).sin().sum()

    parameters = dict(model.named_parameters())
    found = dict(zip(parameters, torch.autograd.grad(value(), list(parameters.values())), strict=True))
    for name, parameter in parameters.items():
        way = torch.randn(parameter.shape, generator=generator(0, name), dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * way)
                ends.append(float(value()))
                parameter.sub_(sign * step * way)
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float((found[name] * way).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_statistics_of_the_clean_batch_carry_gradient() -> None:
    """A shift before BatchNorm changes nothing but by way of the statistics, so its gradient must vanish."""
    model = made(partial(nn.Conv2d, 1, 3, 3, 2, 1), partial(nn.BatchNorm2d, 3), nn.ReLU, nn.Flatten,
                 partial(nn.Linear, 48, 3))  # fmt: skip
    bias, weight = torch.autograd.grad(context(model).bounds(0.05).by_intervals.sum(), [model[0].bias, model[0].weight])
    assert bias.abs().max() < 1e-12
    assert weight.abs().max() > 1e-3


SMALL = {
    "cnn7": {"width": 2, "hidden": 8},
    "small_cnn": {"width": 2, "hidden": 8},
    "preact_resnet18": {"width": 2},
    "wide_resnet": {"depth": 10, "width": 1},
}


@pytest.mark.parametrize(
    ("name", "norm"),
    [("cnn7", "Linf"), ("small_cnn", "Linf"), ("small_cnn", "L2"), ("preact_resnet18", "Linf"), ("wide_resnet", "L1")],
)
def test_in_eval_mode_they_are_the_bounds_that_evaluation_finds(name: str, norm: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ARCHITECTURES.build(name, SMALL[name]).build((1, 8, 8), 3).double().eval()
    ctx = context(model, threat=ThreatModel.parse(norm, "0.05"))
    region = ctx.bounds(0.05)
    problem = Problem(trace(model, ctx.x), Ball.around(ctx.x, Norm.parse(norm), 0.05), ctx.y)
    with torch.no_grad():
        bounds = intervals(problem.graph, problem.ball)
        expected = interval_margins(problem, bounds), linear_margins(problem, bounds)
    for worst, margins in zip((region.by_intervals, region.by_planes), expected, strict=True):
        rivals = torch.arange(3) != ctx.y[:, None]
        torch.testing.assert_close(-worst[rivals].view(margins.shape), margins, rtol=1e-9, atol=1e-11)
        assert not worst[~rivals].any()


def test_in_training_mode_they_are_about_what_the_clean_batch_is_normalised_to() -> None:
    model = normed()
    ctx = context(model)
    logits = copy.deepcopy(model)(ctx.x)
    point = ctx.bounds(0.0).by_intervals
    torch.testing.assert_close(point, logits - logits.gather(1, ctx.y[:, None]))
    assert not torch.allclose(point, context(copy.deepcopy(model).eval()).bounds(0.0).by_intervals)


@pytest.mark.parametrize("by", ["by_intervals", "by_planes"])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_cross_entropy_on_worst_logits_is_an_upper_bound_over_the_ball(by: str, norm: str) -> None:
    threat = ThreatModel.parse(norm, "0.1")
    ctx = context(normed(), threat=threat)
    region = ctx.bounds(threat.radius)
    bound = ctx.fit(getattr(region, by)).detach()
    rng, most = generator(0, "points"), torch.zeros_like(bound)
    for _ in range(200):
        point = threat.project(ctx.x, ctx.x + torch.randn(ctx.x.shape, generator=rng, dtype=ctx.x.dtype))
        most = torch.maximum(most, ctx.cross_entropy(region.problem.graph(point).detach()))
    assert (most <= bound + 1e-12).all()
    assert (most > ctx.cross_entropy(region.problem.graph(ctx.x).detach()) + 1e-3).all()


def test_asking_for_bounds_leaves_the_network_as_it_was_and_traces_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = importlib.import_module("robusteval.training.bounds")
    calls: list[nn.Module] = []
    original = bounds.trace_live
    monkeypatch.setattr(bounds, "trace_live", lambda model, x: calls.append(model) or original(model, x))
    model = nn.Sequential(normed(), nn.Dropout(0.5)).train()
    before = (copy.deepcopy(model.state_dict()), [part.training for part in model.modules()], torch.get_rng_state())
    ctx = context(model)
    first = ctx.bounds(0.05).by_intervals
    assert torch.equal(replace(ctx, progress=0.95).bounds(0.05).by_intervals, first)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert calls == [model]
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    assert not torch.equal(ctx.bounds(0.05).by_intervals, first)
    assert calls == [model]


class Foreign(nn.Module):
    """A network whose weights are moved from outside, as a wrapper would."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.call = partial(torch.func.functional_call, inner, {k: 1.1 * v for k, v in inner.named_parameters()})

    def forward(self, x: Tensor) -> Tensor:
        return self.call((x,))


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1), self.last.weight.detach(), self.last.bias)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.relu(self.norm(x))).flatten(1))


def own_statistics() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Foreign(plain()), "cannot be trained on bounds: unsupported"),
        (Detached, "gradient of a bound would not reach"),
        (Twice, "'norm' is used twice"),
        (own_statistics, "cannot be trained on bounds: unsupported"),
        (lambda: nn.Sequential(nn.SyncBatchNorm(1), nn.Flatten(), nn.Linear(64, 3)), "synchronised BatchNorm"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1)), "cannot be trained on bounds: unsup"),
    ],
)
def test_networks_whose_bounds_would_mislead_are_refused(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        context(make().double().train()).bounds(0.05)


# The objectives on bounds.


def outcome(name: str, params: dict[str, Any], **changes: Any) -> tuple[Loss, list[Tensor]]:
    model = normed()
    loss = OBJECTIVES.build(name, params)(context(model, **changes))
    return loss, list(torch.autograd.grad(loss.value, list(model.parameters()), allow_unused=True))


def same(ours: tuple[Loss, list[Tensor]], theirs: tuple[Loss, list[Tensor]]) -> None:
    torch.testing.assert_close(ours[0].value, theirs[0].value, rtol=1e-12, atol=1e-14)
    for one, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


PURE = {"kappa_start": 0.0, "kappa_end": 0.0}


@pytest.mark.parametrize("progress", [0.3, 0.9])
@pytest.mark.parametrize(
    ("ours", "limit"),
    [
        (("crown_ibp", {"beta_start": 0, **PURE}), ("ibp", PURE)),
        (("sabr", {"lam": 1}), ("ibp", PURE)),
        (("mtl_ibp", {"alpha": 1}), ("ibp", PURE)),
    ],
)
def test_limits_are_interval_training(ours: Any, limit: Any, progress: float) -> None:
    same(outcome(*ours, progress=progress), outcome(*limit, progress=progress))


def test_mtl_ibp_without_bounds_is_adversarial_training() -> None:
    loss, gradients = outcome("mtl_ibp", {"alpha": 0})
    other, others = outcome("at", {})
    torch.testing.assert_close(loss.value, other.value)
    for ours, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ON_BOUNDS)
def test_before_the_ramp_it_is_standard_training(name: str) -> None:
    ours, theirs = outcome(name, {"warmup": 0.2}, progress=0.19), outcome("standard", {}, progress=0.19)
    same(ours, theirs)
    assert ours[0].metrics == {"reached": 0.0}


def test_kappa_and_beta_move_with_the_ball() -> None:
    for progress in (0.2, 0.9):
        ctx = context(normed(), progress=progress)
        reached = RAMPED.smooth(progress, 0.01, 0.5)
        region = ctx.bounds(reached * THREAT.radius)
        clean, tight, loose = ctx.model(ctx.x), region.by_planes, region.by_intervals
        kappa, beta = 1 - 0.5 * reached, 1 - reached
        expected = kappa * ctx.fit(clean) + (1 - kappa) * ctx.fit(beta * tight + (1 - beta) * loose)
        loss = outcome("crown_ibp", {}, progress=progress)[0]
        torch.testing.assert_close(loss.value, expected.mean())
        assert loss.metrics["reached"] == pytest.approx(reached)
        expected = kappa * ctx.fit(clean) + (1 - kappa) * ctx.fit(loose)
        torch.testing.assert_close(outcome("ibp", {}, progress=progress)[0].value, expected.mean())


def test_the_ramp_is_smooth_and_reaches_its_end() -> None:
    smooth = RAMPED.smooth
    values = [smooth(0.1 + 0.4 * i / 1000, 0.1, 0.5) for i in range(1001)]
    slopes = [1000 * (b - a) for a, b in pairwise(values)]
    assert values[0] == 0
    assert values[-1] == 1
    assert smooth(0.0, 0.1, 0.5) == 0
    assert smooth(0.99, 0.1, 0.5) == 1
    assert slopes[0] < 1e-6
    assert all(b >= a - 1e-9 for a, b in pairwise(slopes))
    assert max(b - a for a, b in pairwise(slopes)) < 0.02  # no jump where the line begins
    assert slopes[-1] == pytest.approx(16 / 13)  # 4 / (4 - 3 / 4)
    assert [smooth(t, 0.0, 0.0) for t in (0.0, 0.5)] == [1, 1]


@pytest.mark.parametrize("lam", [0.1, 0.7])
def test_small_boxes_lie_within_the_ball(lam: float) -> None:
    for progress in (0.3, 0.9):
        ctx = context(normed(), progress=progress)
        recording = Recording(ctx.attack)
        OBJECTIVES.build("sabr", {"lam": lam})(replace(ctx, attack=recording))
        ((centre, _),) = recording.tape
        radius = RAMPED.smooth(progress, 0.01, 0.5) * THREAT.radius
        away = (centre - ctx.x).abs().amax()
        assert 0.5 * (1 - lam) * radius < away <= (1 - lam) * radius + 1e-12
        box = Ball.around(centre, Norm.LINF, lam * radius).box
        for side in box:
            assert (side - ctx.x).abs().amax() <= radius + 1e-12
            assert side.amin() >= 0
            assert side.amax() <= 1


def test_the_attack_of_a_growing_ball_is_the_attack_of_that_threat_model() -> None:
    model = normed()
    usual = Adversary(steps=3, step_size="0.02").bind(model, images()[0], THREAT, generator(0, "a"))
    ctx = context(model, attack=usual)
    small = replace(THREAT, eps=THREAT.eps / 4)
    other = Adversary(steps=3, step_size="0.005").bind(model, ctx.x, small, generator(0, "a"))
    torch.testing.assert_close(ctx.attack(ctx.cross_entropy, radius=0.0125), other(ctx.cross_entropy))


def test_penalties_by_hand() -> None:
    model = plain()
    with torch.no_grad():
        model[0].weight.mul_(4)  # loose bounds
        model[3].bias.add_(0.3)  # and more active values than inactive ones
    ctx = context(model, progress=0.3)
    reached = RAMPED.smooth(0.3, 0.01, 0.5)
    base = IBP()(ctx).value
    size = sum(float(model[i].weight.detach().abs().sum()) for i in (0, 3, 5))
    assert float((IBP(l1=0.01)(ctx).value - base).detach()) == pytest.approx(0.01 * size)
    region, total = ctx.bounds(reached * THREAT.radius), 0.0
    low, high = region.problem.ball.box
    width = float(((high - low) / 2).mean())
    for place in (place for place, node in enumerate(region.problem.graph.nodes) if node.nonlinear):
        low, high = (side.detach() for side in region.bounds[region.problem.graph.nodes[place].inputs[0]])
        centre, active, inactive = (low + high) / 2, low > 0, high < 0
        assert active.any()
        assert inactive.any()
        mean = centre.mean()
        alpha = float(centre[active].sum() / -centre[inactive].sum())
        beta = float((centre[active] - mean).square().sum() / (centre[inactive] - mean).square().sum())
        ratios = [width / float(((high - low) / 2).mean()), min(alpha, 1 / alpha), min(beta, 1 / beta)]
        total += sum(max(0.0, 0.5 - ratio) / 0.5 for ratio in ratios)
    expected = 0.5 * (1 - reached) * total / 2
    assert expected > 0.01
    assert float((IBP(regularisation=0.5)(ctx).value - base).detach()) == pytest.approx(expected, rel=1e-6)
    late = replace(ctx, progress=0.6)
    assert torch.equal(IBP(regularisation=0.5)(late).value, IBP()(late).value)


def test_penalties_are_finite_while_the_ball_is_a_point() -> None:
    model = plain().float()
    for progress in (0.001, 0.0101, 0.02):
        ctx = context(model, dtype=torch.float32, progress=progress)
        loss = IBP(regularisation=0.5)(ctx)
        gradients = torch.autograd.grad(loss.value, list(model.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("ibp", {"warmup": 0.6}, "warmup = 0.6 is after the end of the ramp"),
        ("ibp", {"kappa_end": 2}, "kappa_end = 2.0 is not a fraction"),
        ("crown_ibp", {"beta_end": -1}, "beta_end = -1.0 is not a fraction"),
        ("sabr", {"lam": 0}, "lam = 0.0 must be finite and above 0"),
        ("mtl_ibp", {"alpha": 2}, "alpha = 2.0 is not a fraction"),
        ("gaussian", {"sigma": -1}, "sigma = -1.0 is no level of noise"),
        ("consistency", {"samples": 0}, "samples = 0 is not a number of steps"),
    ],
)
def test_impossible_parameters_are_refused(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        OBJECTIVES.build(name, params)


def test_penalties_over_the_batch_are_refused_in_several_processes() -> None:
    with pytest.raises(UsageError, match="train in one process"):
        IBP(regularisation=0.5)(context(plain(), progress=0.3, share=Share(0, 2, 6)))


# The objectives on noise.


@pytest.mark.parametrize("name", ["gaussian", "consistency"])
def test_without_noise_it_is_standard_training(name: str) -> None:
    params = {"sigma": 0, "samples": 1, **({"eta": 0} if name == "consistency" else {})}
    same(outcome(name, params), outcome("standard", {}))


def test_smoothadv_without_noise_is_adversarial_training() -> None:
    model, threat = plain(), ThreatModel.parse("L2", "0.5")
    ctx = context(model, threat=threat)
    attack = Adversary(steps=4, start="none", step_size="0.25").bind(model, ctx.x, threat, generator(0, "none"))
    ctx = replace(ctx, attack=attack)
    smoothed = OBJECTIVES.build("smoothadv", {"sigma": 0, "samples": 1, "steps": 4})(ctx)
    torch.testing.assert_close(smoothed.value, OBJECTIVES.build("at")(ctx).value)
    early = OBJECTIVES.build("smoothadv", {"sigma": 0, "samples": 1, "steps": 4, "warmup": 1.0})
    assert early(replace(ctx, progress=0.25)).metrics == {"reached": 0.25}
    assert early(replace(ctx, progress=0.25)).value < smoothed.value


class Told(nn.Module):
    """A network that keeps what it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return self.inner(x)


@pytest.mark.parametrize("name", ON_NOISE)
def test_noise_is_gaussian_in_pixel_units_and_not_clipped(name: str) -> None:
    model = Told(plain()).train()
    ctx = context(model, 200)
    OBJECTIVES.build(name, {"sigma": 0.5, "samples": 3})(ctx)
    noise = model.seen[-1].view(3, *ctx.x.shape) - (ctx.x if name != "smoothadv" else 0)
    if name == "smoothadv":
        assert len(model.seen) == 3 * 10 + 1
        noise = noise - noise.mean(0)  # what is added to the three copies of x' differs by the noise alone
        assert float(noise.std()) == pytest.approx(0.5 * math.sqrt(2 / 3), rel=0.02)
        return
    flat = noise.flatten()
    count = len(flat)
    assert float(flat.mean()) == pytest.approx(0, abs=4 * 0.5 / math.sqrt(count))
    assert float(flat.std()) == pytest.approx(0.5, rel=4 / math.sqrt(2 * count))
    kurtosis = float((flat / flat.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3, abs=4 * math.sqrt(96 / count))
    assert float((noise[0] * noise[1]).mean()) == pytest.approx(0, abs=4 * 0.25 / math.sqrt(count / 3))
    assert model.seen[-1].min() < -0.5


def test_consistency_by_hand() -> None:
    model = Told(plain()).train()
    ctx = context(model)
    loss = OBJECTIVES.build("consistency", {"samples": 3, "lam": 7, "eta": 0.3})(ctx)
    logits = model.inner(model.seen[-1]).detach().view(3, 6, 3)
    p, total = logits.softmax(2), 0.0
    q = p.mean(0)
    for i in range(6):
        total += sum(float(-p[j, i, ctx.y[i]].log()) for j in range(3)) / 3
        total += 7 * sum(float((q[i] * (q[i] / p[j, i]).log()).sum()) for j in range(3)) / 3
        total += 0.3 * float(-(q[i] * q[i].log()).sum())
    assert float(loss.value.detach()) == pytest.approx(total / 6, rel=1e-10)


def test_smoothadv_raises_the_loss_of_the_smoothed_network() -> None:
    """The same noise at ``x`` and at ``x'``: mean probabilities of the label must fall, within the ball."""
    model = Told(plain()).train()
    ctx = context(model, threat=ThreatModel.parse("L2", "0.5"))
    OBJECTIVES.build("smoothadv", {"samples": 4, "sigma": 0.2})(ctx)
    first, last = torch.cat(model.seen[:4]), model.seen[-1]  # the attack's first step is at x
    chances = [model.inner(part).softmax(1).view(4, 6, 3).mean(0).gather(1, ctx.y[:, None]) for part in (first, last)]
    assert (chances[1] < chances[0]).all()
    moved = (last - first).view(4, 6, -1)
    assert torch.allclose(moved[0], moved[3])
    assert moved.norm(dim=2).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("name", ON_NOISE)
def test_gradients_reach_every_parameter(name: str) -> None:
    gradients = outcome(name, {})[1]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) >= len(gradients) - 2  # biases before BatchNorm are 0


# In a training run.

RUN = ("epochs=2", "batch_size=32", "train_limit=64", "validation.size=30", "adversary.steps=2", "validation.steps=2",
       "device=cpu", "threads=1", "eps=0.05", "model.name=cnn7", "model.params.width=2",
       "model.params.hidden=8", "objective.params.ramp=0.2")  # fmt: skip


def plan_of(name: str, *assignments: str) -> Plan:
    return prepare(resolve(TrainConfig, None, (*RUN, *assignments), {"objective.name": name}))


def stepped(plan: Plan) -> dict[str, Tensor]:
    state = begin(plan)
    state.history.append({})  # the second epoch, where the ball has its size
    state.model.train()
    train_step(plan, state, 0, torch.arange(32))
    assert len(state.traces.kept) == (2 if plan.config.awp.gamma else 1)
    return state.model.state_dict()


def test_precision_layout_and_compilation_leave_the_bounds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kappa 0 the loss is the bound alone, so that a step is the same to rounding in float32."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced; needs no C++ compiler
    pure = ("objective.params.kappa_start=0", "objective.params.kappa_end=0", "optimizer.lr=0.01")
    expected = stepped(plan_of("ibp", *pure))
    for setting in ("precision=bfloat16", "channels_last=true", "compile=true"):
        for key, value in stepped(plan_of("ibp", *pure, setting)).items():
            if "running" not in key:
                torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=f"{setting} {key}")


def test_weight_perturbation_bounds_the_perturbed_weights() -> None:
    changed, usual = (stepped(plan_of("ibp", *more)) for more in (("awp.gamma=0.1",), ()))
    weights = [key for key in usual if key.endswith("weight")]
    assert not any(torch.equal(changed[key], usual[key]) for key in weights)


@pytest.mark.parametrize("name", ["mtl_ibp", "smoothadv"])
def test_a_run_resumes_exactly(name: str, tmp_path: Path) -> None:
    ramp = () if name in ON_BOUNDS else ("objective.params={}",)
    plan = plan_of(name, *ramp, "optimizer.name=adam", "optimizer.lr=0.002", "init=ibp")
    whole = train(plan, RunDir(tmp_path / "whole"))
    train(plan, RunDir(tmp_path / "halves"), stop_after=1)
    train(plan, RunDir(tmp_path / "halves"))
    saved = [(tmp_path / run / "last/model.safetensors").read_bytes() for run in ("whole", "halves")]
    assert saved[0] == saved[1]
    assert math.isfinite(whole.history[-1]["train_loss"])


def test_the_best_epoch_is_one_against_the_full_ball() -> None:
    rows = [{"val_pgd": 0.9, "val_clean": 0.9, "train_reached": 0.3}]
    rows += [{"val_pgd": pgd, "val_clean": 0.8, "train_reached": 1.0} for pgd in (0.5, 0.6, 0.55)]
    assert best_row(rows) is rows[2]
    assert best_row(rows[:1]) is rows[0]


def test_ibp_initialisation_keeps_the_width_of_bounds() -> None:
    hidden = [layer for _ in range(4) for layer in (partial(nn.Linear, 400, 400), nn.ReLU)]
    net = made(*hidden, partial(nn.Linear, 400, 3))
    before = copy.deepcopy(net)
    ibp_init(net, generator(0, "weights"))
    assert float(net[0].weight.detach().std()) == pytest.approx(math.sqrt(2 * math.pi) / 400, rel=0.02)
    assert torch.equal(net[-1].weight, before[-1].weight)
    assert torch.equal(net[0].bias, before[0].bias)
    x = torch.rand(4, 1, 20, 20, dtype=torch.float64)
    widths = []
    for each in (net, before):
        graph = trace(nn.Sequential(nn.Flatten(), each).eval(), x)
        with torch.no_grad():
            bounds = intervals(graph, Ball.around(x, Norm.LINF, 0.01, clip=False))
        widths.append([float((high - low).mean()) for low, high in bounds])
    assert 0.3 < widths[0][-2] / widths[0][0] < 3
    assert widths[1][-2] / widths[1][0] > 100
    again = copy.deepcopy(before)
    ibp_init(again, generator(0, "weights"))
    assert all(map(torch.equal, net.state_dict().values(), again.state_dict().values()))
