"""The engine of certified bounds, against sampled points, dense unrolling, linear programs and exact verification."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from scipy.optimize import Bounds as Range
from scipy.optimize import LinearConstraint, brentq, linprog, milp
from torch import Tensor, fx, nn

from robusteval.bounds.activations import Activation
from robusteval.bounds.backward import Relaxation, pull
from robusteval.bounds.ball import Ball
from robusteval.bounds.first import mixed_margins
from robusteval.bounds.graph import trace
from robusteval.bounds.interval import intervals
from robusteval.bounds.lowering import lower
from robusteval.bounds.margins import MemoryBudgetError, Problem, linear_margins
from robusteval.bounds.nodes import TRACED, Graph, UnsupportedError
from robusteval.bounds.ops import ACTIVATIONS, LINEAR
from robusteval.bounds.pooling import MaxPool
from robusteval.bounds.tighten import tightened, worthwhile
from robusteval.certifiers.crown import linear_bound
from robusteval.certifiers.ibp import interval_bound
from robusteval.threat import Norm

NORMS = (Norm.LINF, Norm.L2, Norm.L1)
aten = torch.ops.aten


def between(low: Tensor, value: Tensor, high: Tensor, rounding: float = 1e-9) -> bool:
    """Whether ``low <= value <= high`` up to ``rounding``, relative to the value; false for NaN."""
    slack = rounding * (1 + value.abs())
    return bool(((low <= value + slack) & (value <= high + slack)).all())


# Random networks


class Wrap(nn.Module):
    """A module made of a function and the modules it calls."""

    def __init__(self, f: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.f, self.parts = f, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, *self.parts)


def conv(rng: random.Random, channels: int) -> nn.Module:
    groups = rng.choice([g for g in (1, 2, 3) if channels % g == 0])
    pair = [(rng.randint(1, top), rng.randint(1, top)) for top in (3, 2, 2)]
    padding = rng.choice([0, (1, 2), 2, (1, 0)])
    return nn.Conv2d(
        channels, groups * rng.randint(1, 3), pair[0], pair[1], padding, pair[2], groups, rng.random() < 0.7
    )


def transposed(rng: random.Random, channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, rng.randint(1, 3), 2, rng.randint(1, 2), rng.randint(0, 1))


def batch_norm(rng: random.Random, channels: int) -> nn.Module:
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for part in (layer.weight, layer.bias, layer.running_mean):
            assert part is not None
            part.normal_()
        assert layer.running_var is not None
        layer.running_var.uniform_(0.3, 3.0)
    return layer


def normalise(rng: random.Random, channels: int) -> nn.Module:
    mean, std = torch.rand(channels, 1, 1).double(), 0.2 + torch.rand(channels, 1, 1).double()
    return Wrap(lambda x: (x - mean.to(x.dtype)) / std.to(x.dtype))


def activation(rng: random.Random, channels: int = 0) -> nn.Module:
    low, in_place = rng.uniform(-1, 0), rng.random() < 0.5
    return rng.choice(
        [
            *(nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(rng.random()), nn.LeakyReLU(0.1, inplace=True)),
            *(nn.SiLU(in_place), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid(), nn.Tanh()),
            *(nn.Hardtanh(low, low + 1, in_place), nn.ReLU6(in_place)),
            *(Wrap(lambda x: x.clamp(low, 0.5)), Wrap(lambda x: x.clamp(max=0.3)), Wrap(lambda x: x.clamp_min(0.1))),
        ]
    )


def same(rng: random.Random, channels: int) -> nn.Module:
    """Return layers that keep the shape; an activation in place would change what is added to them."""
    inside = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), activation(rng))
    return inside if rng.random() < 0.5 else nn.Sequential(*inside, nn.Conv2d(channels, channels, 1))


def max_pool(rng: random.Random, channels: int) -> nn.Module:
    kernel = rng.randint(2, 3)
    return nn.MaxPool2d(
        kernel, rng.randint(1, 3), rng.randint(0, kernel // 2), rng.randint(1, 2), ceil_mode=rng.random() < 0.5
    )


def avg_pool(rng: random.Random, channels: int) -> nn.Module:
    kernel, flags = rng.randint(2, 3), [rng.random() < 0.5 for _ in range(2)]
    return nn.AvgPool2d(kernel, rng.randint(1, 3), rng.randint(0, kernel // 2), *flags)


BLOCKS: dict[str, Callable[[random.Random, int], nn.Module]] = {
    "conv": conv,
    "transposed conv": transposed,
    "batch norm": batch_norm,
    "normalise": normalise,
    "activation": activation,
    "residual": lambda rng, c: Wrap(lambda x, f: x + f(x), same(rng, c)),
    "scaled branches": lambda rng, c: Wrap(lambda x, f, g: 0.5 * f(x) - g(x), same(rng, c), same(rng, c)),
    "concatenation": lambda rng, c: Wrap(lambda x, f: torch.cat([f(x), x], 1), same(rng, c)),
    "max pool": max_pool,
    "average pool": avg_pool,
    "adaptive pool": lambda rng, c: nn.AdaptiveAvgPool2d((rng.randint(1, 4), rng.randint(1, 4))),
    "slice": lambda rng, c: Wrap(lambda x: x[:, :, 1:, ::2]),
    "select": lambda rng, c: Wrap(lambda x: x.select(1, 0).unsqueeze(1)),
    "permute": lambda rng, c: Wrap(lambda x: x.permute(0, 2, 3, 1)),
    "transpose": lambda rng, c: Wrap(lambda x: x.transpose(-1, 2)),
    "pad": lambda rng, c: nn.ConstantPad2d((1, 0, -1, 2), rng.uniform(-1, 1)),
    "mean": lambda rng, c: Wrap(lambda x: x - x.mean((2, 3), keepdim=True)),
    "dropout": lambda rng, c: nn.Dropout(0.5),
}


def grown(rng: random.Random, x: Tensor) -> tuple[list[str], list[nn.Module]]:
    """Return random blocks that fit on images ``x``, among them an activation at least, with their names."""
    names, blocks = [], []
    plan = ["conv", *rng.choices(list(BLOCKS), k=rng.randint(1, 3)), "activation", *rng.choices(list(BLOCKS), k=1)]
    for name in plan:
        block = BLOCKS[name](rng, x.shape[1]).double().eval()
        try:
            out = block(x.clone())
        except RuntimeError:  # a window larger than the image
            continue
        if out[0].numel() in range(1, 200):
            x, names, blocks = out, [*names, name], [*blocks, block]
    return names, blocks


def random_net(seed: int) -> tuple[list[str], nn.Module, Tensor]:
    """Return the names of its blocks, a network of random layers, and three inputs; one has values at 0 and 1."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    x = torch.rand(3, rng.randint(1, 3), rng.randint(3, 6), rng.randint(3, 6), dtype=torch.float64)
    x[1] = (2 * x[1] - 0.5).clamp(0, 1)
    with torch.no_grad():
        names, blocks = grown(rng, x)
        tail: list[nn.Module] = [nn.Flatten()]
        if rng.random() < 0.5:
            tail += [nn.LazyLinear(6), activation(rng)]
        net = nn.Sequential(*blocks, *tail, nn.LazyLinear(rng.randint(2, 4))).double().eval()
        net(x.clone())
    return names, net, x


def random_ball(seed: int, x: Tensor) -> Ball:
    norm, scale = NORMS[seed % 3], (0.03, 0.15, 0.5)[seed // 3 % 3]
    radius = {Norm.LINF: scale, Norm.L2: 3 * scale, Norm.L1: 9 * scale}[norm]
    return Ball.around(x, norm, radius, clip=seed // 9 % 2 == 0)


def inside(ball: Ball, delta: Tensor) -> Tensor:
    """Shrink perturbations (M, N, ...) until they are in the ball, and cut them to its box."""
    if ball.norm is not Norm.LINF:
        order = 2 if ball.norm is Norm.L2 else 1
        length = torch.linalg.vector_norm(delta.flatten(2), ord=order, dim=2).clamp_min(1e-300)
        delta = delta * (ball.radius / length).clamp_max(1.0).view(*length.shape, *[1] * (delta.dim() - 2))
    return torch.maximum(torch.minimum(delta, ball.high), ball.low)


def drawn(ball: Ball, count: int) -> Tensor:
    """Return perturbations (count, N, ...): some far out in all directions, some along few axes, some anywhere."""
    noise = torch.randn(count, *ball.x.shape, dtype=torch.float64)
    sparse = noise * (torch.rand_like(noise) < 3 / ball.x[0].numel())
    spread = torch.where(torch.rand(count, *[1] * ball.x.dim()) < 0.3, sparse, noise)
    far = spread * 10 ** torch.empty(count, *[1] * ball.x.dim()).uniform_(-1, 3)
    return inside(ball, far * ball.radius)


def all_margins(net: Callable[[Tensor], Tensor], points: Tensor, y: Tensor) -> Tensor:
    """Return margins (M, N, K - 1) of points (M, N, ...)."""
    logits = net(points.flatten(0, 1).clone()).view(*points.shape[:2], -1)
    own = y.view(1, -1, 1).expand(len(points), -1, 1)
    rivals = torch.ones_like(logits, dtype=torch.bool).scatter(2, own, False)
    return (logits.gather(2, own) - logits)[rivals].view(*logits.shape[:2], -1)


def descend(net: Callable[[Tensor], Tensor], ball: Ball, y: Tensor, delta: Tensor, steps: int = 12) -> Tensor:
    """Return perturbations (K - 1, N, ...) that lower each margin, from the best of ``delta`` (M, N, ...)."""
    with torch.no_grad():
        best = all_margins(net, ball.x + delta, y).argmin(0).T
    delta = delta[best, torch.arange(len(ball.x))].clone()
    for step in range(steps):
        delta.requires_grad_()
        margins = all_margins(net, ball.x + delta, y)
        (grad,) = torch.autograd.grad(torch.einsum("knk->", margins), delta)
        size = torch.linalg.vector_norm(grad.flatten(2), dim=2).clamp_min(1e-300)
        way = grad.sign() if ball.norm is Norm.LINF else grad / size.view(*size.shape, *[1] * (grad.dim() - 2))
        delta = inside(ball, delta.detach() - ball.radius * 0.5 * 0.75**step * way)
    return delta


def test_random_networks_have_every_kind_of_layer() -> None:
    used = Counter(name for seed in range(220) for name in random_net(seed)[0])
    assert set(used) == set(BLOCKS)
    assert min(used.values()) >= 12, used


@pytest.mark.parametrize("seed", range(220))
def test_bounds_hold_on_random_networks(seed: int) -> None:
    _, net, x = random_net(seed)
    with torch.no_grad():
        y = net(x.clone()).argmax(1)
    ball, graph = random_ball(seed, x), trace(net, x.clone())
    problem = Problem(graph, ball, y, parallel=seed % 2 == 1)
    with torch.no_grad():
        known = [intervals(graph, ball), tightened(problem).bounds]
        cheap, mixed, dear = interval_bound(problem), mixed_margins(problem), linear_bound(problem)
    assert (cheap <= mixed).all()
    assert (mixed <= dear).all()
    delta = drawn(ball, 60)
    points = ball.x + torch.cat([torch.zeros_like(delta[:1]), delta, descend(graph, ball, y, delta).detach()])
    with torch.no_grad():
        reached = all_margins(net, points, y)
        assert between(dear, reached, torch.full_like(dear, math.inf)), (dear - reached).max()
        values = graph.values(points.flatten(0, 1))
    for place, value in enumerate(values):
        seen = value.view(*points.shape[:2], *value.shape[1:])
        assert all(between(low, seen, high) for low, high in (bounds[place] for bounds in known)), place


# Exactness


def relu_net(seed: int, hidden: int = 7) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    first = nn.Conv2d(1, 2, 2, stride=1 + seed % 2, padding=seed % 3 // 2) if seed % 2 else nn.Linear(9, hidden)
    front = [first, nn.Flatten()] if seed % 2 else [nn.Flatten(), first]
    net = nn.Sequential(*front, nn.ReLU(), nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        net(x)
        for parameter in net.parameters():
            parameter.mul_(2.0)
    return net, x


def dense(f: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return W (out, in) and b of an affine map of one sample."""
    size = math.prod(shape)
    b = f(torch.zeros(1, *shape, dtype=torch.float64)).flatten(1)
    return (f(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1) - b).T, b[0]


def affine_parts(net: nn.Sequential, shape: tuple[int, ...]) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """Return the affine maps between the ReLUs of ``net``."""
    parts: list[list[nn.Module]] = [[]]
    for layer in net:
        parts.append([]) if isinstance(layer, nn.ReLU) else parts[-1].append(layer)
    found = []
    for part in parts:
        w, b = dense(nn.Sequential(*part), shape)
        shape = (len(b),)
        found.append((w.detach().numpy(), b.detach().numpy()))
    return found


class Program:
    """A mixed-integer program over a step d (D,), its sizes |d|, and per ReLU its value and a switch."""

    def __init__(self, low: numpy.ndarray, high: numpy.ndarray, relus: int, ball: Ball) -> None:
        self.inputs, self.total, self.at = len(low), 2 * len(low) + 2 * relus, 2 * len(low)
        self.floor, self.ceiling = numpy.zeros(self.total), numpy.full(self.total, numpy.inf)
        self.floor[: self.inputs], self.ceiling[: self.inputs] = low, high
        self.whole = numpy.zeros(self.total)
        step, size = self.pick(0, self.inputs), self.pick(self.inputs, self.inputs)
        self.limits = [LinearConstraint(size + sign * step, 0, numpy.inf) for sign in (1, -1)]
        if ball.norm is Norm.L1:
            self.limits.append(LinearConstraint(size.sum(0)[None], 0, ball.radius))

    def pick(self, first: int, count: int) -> numpy.ndarray:
        """Return the matrix (count, total) that picks variables."""
        return numpy.eye(count, self.total, first)

    def relu(self, w: numpy.ndarray, b: numpy.ndarray, low: numpy.ndarray, high: numpy.ndarray) -> numpy.ndarray:
        """Return the matrix of the values of ``relu(w v + b)``, which lies between ``low`` and ``high``."""
        count, first = len(b), self.at
        value, switch, self.at = self.pick(first, count), self.pick(first + count, count), first + 2 * count
        self.whole[first + count : self.at] = self.ceiling[first + count : self.at] = 1
        top, bottom = numpy.maximum(high, 0)[:, None], numpy.minimum(low, 0)[:, None]
        self.limits.append(LinearConstraint(value - w, b, numpy.inf))
        self.limits.append(LinearConstraint(value - top * switch, -numpy.inf, 0))
        self.limits.append(LinearConstraint(value - w - bottom * switch, -numpy.inf, b - bottom[:, 0]))
        return value

    def least(self, cost: numpy.ndarray) -> float:
        box, whole = Range(self.floor, self.ceiling), self.whole
        solved = milp(cost, constraints=self.limits, integrality=whole, bounds=box, options={"mip_rel_gap": 0.0})
        assert solved.success, solved.message
        return float(solved.fun)


def exact_margins(net: nn.Sequential, ball: Ball, sample: int, y: int) -> list[float]:
    """Return a sample's least margins by mixed-integer programming, with intervals for the large constants."""
    parts = affine_parts(net, tuple(ball.x.shape[1:]))
    x, low, high = (part[sample].flatten().numpy() for part in (ball.x, ball.low, ball.high))
    program = Program(low, high, sum(len(b) for _, b in parts[:-1]), ball)
    w, b, low, high = program.pick(0, len(x)), x, x + low, x + high
    for weight, bias in parts[:-1]:
        centre, reach = weight @ (low + high) / 2 + bias, numpy.abs(weight) @ (high - low) / 2 + 1e-6
        w = program.relu(weight @ w, weight @ b + bias, centre - reach, centre + reach)
        b, low, high = numpy.zeros(len(bias)), numpy.maximum(centre - reach, 0), numpy.maximum(centre + reach, 0)
    weight, bias = parts[-1]
    rows = [(weight[y] - weight[k], bias[y] - bias[k]) for k in range(len(bias)) if k != y]
    return [program.least(row @ w) + float(row @ b + offset) for row, offset in rows]


@pytest.mark.parametrize("seed", range(16))
def test_no_bound_exceeds_the_exact_margin_of_small_relu_networks(seed: int) -> None:
    net, x = relu_net(seed)
    norm, radius = ((Norm.LINF, 0.1), (Norm.L1, 0.5), (Norm.LINF, 0.02), (Norm.L1, 0.1))[seed // 2 % 4]
    ball = Ball.around(x, norm, radius, clip=seed % 3 > 0)
    with torch.no_grad():
        y = net(x).argmax(1)
        problem = Problem(trace(net, x), ball, y)
        bounds = interval_bound(problem), mixed_margins(problem), linear_bound(problem)
    exact = torch.tensor([exact_margins(net, ball, i, int(y[i])) for i in range(len(x))], dtype=torch.float64)
    for bound in bounds:
        assert (bound <= exact + 1e-6 * (1 + exact.abs())).all(), (bound, exact)
    if radius < 0.1 or norm is Norm.L1:
        near = 0.3 + 0.3 * (all_margins(net, x[None], y)[0] - exact)
        assert (bounds[-1] >= exact - near).all(), "CROWN is not that loose where few ReLUs are undecided"


AFFINE_NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 5)),
    "deep": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), batch_norm(random.Random(0), 3), nn.Flatten(), nn.Linear(12, 5)),
    "pooled": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 5, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "branches": lambda: nn.Sequential(
        Wrap(lambda x, f, g: torch.cat([f(x) - x, g(x)], 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 3, padding=1)),
        nn.Flatten(),
        nn.Linear(48, 5),
    ),
}


@pytest.mark.parametrize(("name", "norm", "clip"), product(AFFINE_NETS, NORMS, [True, False]))
def test_bounds_of_affine_networks_are_exact(name: str, norm: Norm, clip: bool) -> None:
    torch.manual_seed(0)
    net, x = AFFINE_NETS[name]().double().eval(), torch.rand(3, 2, 4, 4, dtype=torch.float64)
    ball, y = Ball.around(x, norm, {"Linf": 0.2, "L2": 0.8, "L1": 3.0}[norm], clip), torch.tensor([0, 3, 4])
    with torch.no_grad():
        problem = Problem(trace(net, x), ball, y)
        found = interval_bound(problem), linear_margins(problem, intervals(problem.graph, ball))
        w, _ = dense(net, (2, 4, 4))
        clean = all_margins(net, x[None], y)[0]
    for i, label in enumerate(y.tolist()):
        for j, k in enumerate(k for k in range(5) if k != label):
            exact = float(clean[i, j]) + true_least(ball, i, (w[label] - w[k]).numpy())
            for bound in found:
                assert float(bound[i, j]) == pytest.approx(exact, rel=1e-6, abs=1e-9)


# The input set


def true_least(ball: Ball, sample: int, a: numpy.ndarray) -> float:
    """Return ``min <a, d>`` by a linear program, or for L2 from the optimality conditions."""
    low, high = (part[sample].flatten().numpy() for part in (ball.low, ball.high))
    if ball.norm is not Norm.L2:
        scale = max(1e-300, float(numpy.abs(a).max()))  # the solver's tolerances are absolute
        both = numpy.concatenate([a, -a]) / scale  # d = p - q with p, q >= 0
        budget = {"A_ub": numpy.ones((1, 2 * len(a))), "b_ub": [ball.radius]} if ball.norm is Norm.L1 else {}
        solved = linprog(both, **budget, bounds=[*((0, h) for h in high), *((0, -floor) for floor in low)])
        assert solved.success
        return float(solved.fun) * scale

    def step(t: float) -> numpy.ndarray:
        return numpy.clip(-a * t, low, high)

    far = 1e12 / max(1e-12, float(numpy.abs(a).max()))
    if numpy.linalg.norm(step(far)) <= ball.radius:
        return float(a @ step(far))
    t = math.exp(brentq(lambda s: numpy.linalg.norm(step(math.exp(s))) - ball.radius, -60, math.log(far), xtol=1e-13))
    return float(a @ step(t))


@pytest.mark.parametrize(("norm", "clip", "seed"), product(NORMS, [True, False], range(12)))
def test_the_least_of_a_linear_function_over_a_ball_is_exact(norm: Norm, clip: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 5, generator=rng, dtype=torch.float64)
    x[0] = x[0].round()
    ball = Ball.around(x, norm, {"Linf": 0.3, "L2": 0.9, "L1": 2.5}[norm] * (0.1, 1.0, 4.0)[seed % 3], clip)
    a = torch.randn(8, 2, 5, generator=rng, dtype=torch.float64) * 10.0 ** (seed - 6)
    a[0], a[1, 0], a[2] = 0, 0, a[2].sign()
    owner = torch.arange(8) % 3
    found = ball.least(a, owner) - (a * x[owner]).flatten(1).sum(1)
    point = ball.minimiser(a, owner) - x[owner]
    scale = float(a.abs().max())
    for query in range(8):
        sample, exact = int(owner[query]), true_least(ball, int(owner[query]), a[query].flatten().numpy())
        assert float(found[query]) <= exact + 1e-9 * scale
        assert float(found[query]) == pytest.approx(exact, rel=1e-6, abs=1e-9 * scale)
        assert (ball.low[sample] - 1e-12 <= point[query]).all()
        assert (point[query] <= ball.high[sample] + 1e-12).all()
        order = {"Linf": math.inf, "L2": 2, "L1": 1}[norm]
        assert torch.linalg.vector_norm(point[query].flatten(), ord=order) <= ball.radius * (1 + 1e-12)
        if norm is Norm.LINF:
            assert float((a[query] * point[query]).sum()) == pytest.approx(exact, rel=1e-6, abs=1e-9 * scale)


@pytest.mark.parametrize(("norm", "clip"), product(NORMS, [True, False]))
def test_the_ball_reaches_as_far_as_the_adversary_may_go(norm: Norm, clip: bool) -> None:
    x = torch.tensor([[0.0, 0.05, 0.4, 0.97, 1.0]], dtype=torch.float64)
    ball, room = Ball.around(x, norm, 0.1, clip), [[0.0, 0.05, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.03, 0.0]]
    down, up = torch.tensor(room if clip else [[0.1] * 5] * 2, dtype=torch.float64)
    assert torch.allclose(-ball.low, down[None], atol=1e-15)
    assert torch.allclose(ball.high, up[None], atol=1e-15)
    assert torch.allclose(torch.stack(ball.box), torch.stack([x - down, x + up]), atol=1e-15)


# Affine operations, one by one


class X:
    """Stands for the free argument of a call."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def convolutions(rng: random.Random) -> tuple[Any, ...]:
    groups, transposed_ = rng.choice([1, 2]), rng.random() < 0.3
    kernel, stride, padding, dilation = ([rng.randint(low, 2 + low) for _ in "hw"] for low in (1, 1, 0, 1))
    padding = [rng.randint(0, min(p, k - 1) if transposed_ else p) for p, k in zip(padding, kernel, strict=True)]
    extra = [rng.randint(0, max(s, d) - 1) if transposed_ else 0 for s, d in zip(stride, dilation, strict=True)]
    weight = r(4, 3, *kernel) if transposed_ else r(2 * groups, 4 // groups, *kernel)
    bias = r(weight.shape[1] * groups if transposed_ else len(weight)) if rng.random() < 0.5 else None
    return X(4, 7, 8), weight, bias, stride, padding, dilation, transposed_, extra, groups


def averages(rng: random.Random) -> tuple[Any, ...]:
    kernel = [rng.randint(1, 3), rng.randint(1, 3)]
    padding = [rng.randint(0, size // 2) for size in kernel]
    flags, divisor = [rng.random() < 0.5 for _ in "ab"], rng.choice([None, 5])
    return X(2, 6, 7), kernel, [rng.randint(1, 3), rng.randint(1, 3)], padding, *flags, divisor


STATISTICS = (r(3), r(3), r(3), torch.rand(3, dtype=torch.float64) + 0.1)
Arguments = tuple[Any, ...]
CALLS: dict[Any, Callable[[random.Random], Arguments]] = {
    aten.convolution.default: convolutions,
    aten.addmm.default: lambda rng: (r(4), X(5), r(5, 4)),
    aten.mm.default: lambda rng: (X(5), r(5, 4)),
    aten.linear.default: lambda rng: (X(*rng.choice([(5,), (3, 5)])), r(4, 5), rng.choice([None, r(4)])),
    aten.native_batch_norm.default: lambda rng: (X(3, 2, 2), *STATISTICS, False, 0.1, 1e-3),
    aten._native_batch_norm_legit_no_training.default: lambda rng: (X(3, 2, 2), *STATISTICS, 0.1, 1e-3),
    aten.add.Tensor: lambda rng: rng.choice([(X(3, 4), r(4)), (r(3, 1), X(3, 4)), (X(2), X(2)), (X(3), -2.0)]),
    aten.sub.Tensor: lambda rng: rng.choice([(X(3, 4), r(4)), (r(3, 1), X(3, 4)), (X(2), X(2)), (X(3), X(1))]),
    aten.rsub.Scalar: lambda rng: rng.choice([(X(3), 2.0), (X(3), 2.0, -3.0)]),
    aten.neg.default: lambda rng: (X(3, 2),),
    aten.mul.Tensor: lambda rng: rng.choice([(X(3, 4), r(3, 1)), (r(4), X(3, 1)), (X(3), -2.0)]),
    aten.mul.Scalar: lambda rng: (X(3), -1.5),
    aten.div.Tensor: lambda rng: rng.choice([(X(3, 4), r(3, 1)), (X(3), -2.0)]),
    aten.div.Scalar: lambda rng: (X(3), -1.5),
    aten.view.default: lambda rng: (X(3, 4), rng.choice([[TRACED, 2, 6], [TRACED, -1]])),
    aten._unsafe_view.default: lambda rng: (X(3, 4), [TRACED, 12]),
    aten.reshape.default: lambda rng: (X(3, 4), rng.choice([[TRACED, 4, 3], [-1, 12]])),
    aten.expand.default: lambda rng: (X(3, 1), rng.choice([[TRACED, 3, 4], [-1, -1, 4]])),
    aten.permute.default: lambda rng: (X(2, 3, 4), rng.choice([[0, 2, 3, 1], [0, 3, 2, 1]])),
    aten.transpose.int: lambda rng: (X(2, 3, 4), *rng.choice([(1, 3), (-1, 2)])),
    aten.squeeze.dim: lambda rng: (X(3, 1), -1),
    aten.squeeze.dims: lambda rng: (X(1, 3, 1), [1, 3]),
    aten.unsqueeze.default: lambda rng: (X(3, 2), rng.choice([1, 2, -1])),
    aten.slice.Tensor: lambda rng: (X(7, 5), *rng.choice([(1, 1, 6, 2), (2, -3), (1, 0, 2**63 - 1, 3)])),
    aten.select.int: lambda rng: (X(4, 5), *rng.choice([(1, 2), (-1, -2)])),
    aten.cat.default: lambda rng: ([X(2, 3), X(4, 3), X(1, 3)], 1) if rng.random() < 0.5 else ([X(2, 3), X(2, 1)], -1),
    aten.slice_scatter.default: lambda rng: (X(4, 5), X(2, 5), *rng.choice([(1, 1, 3), (-2, 0, 4, 2)])),
    aten.select_scatter.default: lambda rng: (X(4, 5), X(5), *rng.choice([(1, 2), (-2, 0)])),
    aten.mean.dim: lambda rng: (X(2, 3, 4), *rng.choice([([2, 3],), ([-1], True)])),
    aten.sum.dim_IntList: lambda rng: (X(2, 3, 4), *rng.choice([([2, 3],), ([1], True)])),
    aten.avg_pool2d.default: averages,
    aten._adaptive_avg_pool2d.default: lambda rng: (X(2, 6, 7), [rng.randint(1, 8), rng.randint(1, 4)]),
    aten.constant_pad_nd.default: lambda rng: (
        X(2, 4, 5),
        rng.choice([[1, 2], [1, 0, -1, 2], [1, 1, 1, 1, 0, 2]]),
        0.7,
    ),
}


def calling(op: Any, args: Arguments) -> Graph:
    """Return the graph of one call; each of its free arguments is a slice of the input."""
    graph = fx.Graph()
    listed = [item for arg in args for item in (arg if isinstance(arg, list) else [arg])]
    free = {arg: math.prod(arg.shape) for arg in listed if isinstance(arg, X)}
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(TRACED, sum(free.values()), dtype=torch.float64)
    at, nodes = 0, {}
    for arg, size in free.items():
        part = _step(graph, aten.slice.Tensor, x, 1, at, at + size)
        nodes[arg], at = _step(graph, aten.view.default, part, [TRACED, *arg.shape]), at + size
    filled = [[nodes.get(a, a) for a in arg] if isinstance(arg, list) and arg[0] in nodes else arg for arg in args]
    graph.output(_step(graph, op, *(nodes[arg] if isinstance(arg, X) else arg for arg in filled)))
    return Graph(tuple(lower(SimpleNamespace(graph=graph), torch.float64)))  # type: ignore[arg-type]


def _step(graph: fx.Graph, op: Any, *args: Any) -> fx.Node:
    step = graph.call_function(op, args)
    step.meta["val"] = op(*fx.node.map_arg(args, lambda node: node.meta["val"]))
    return step


def test_every_affine_operation_is_tried() -> None:
    assert set(CALLS) == set(LINEAR) - {aten.cudnn_batch_norm.default}


@pytest.mark.parametrize("op", CALLS, ids=str)
def test_affine_operations_equal_their_dense_matrices(op: Any) -> None:
    for seed in range(24 if op in (aten.convolution.default, aten.avg_pool2d.default) else 8):
        torch.manual_seed(seed)
        graph = calling(op, CALLS[op](random.Random(seed)))
        shape = graph.nodes[0].shape
        w, b = dense(graph, shape)
        radius, centre, a = torch.rand(2, *shape).double(), r(2, *shape), r(3, *graph.nodes[-1].shape)
        low, high = intervals(graph, Ball(centre, Norm.LINF, 1.0, -radius, radius))[-1]
        assert torch.allclose((high - low) / 2, (radius @ w.abs().T).view_as(low), atol=1e-12)
        assert torch.allclose((high + low) / 2, (centre @ w.T + b).view_as(low), atol=1e-12)
        reached, constant = pull(graph, {len(graph.nodes) - 1: a}, torch.zeros(1, dtype=torch.long), Relaxation({}))
        assert torch.allclose(reached[0], a.flatten(1) @ w, atol=1e-12)
        assert torch.allclose(constant, a.flatten(1) @ b, atol=1e-12)


# Activations


def activations(rng: random.Random) -> list[Activation]:
    """Return every activation, those with parameters with random ones."""
    low = rng.uniform(-2, 1)
    given = {
        aten.leaky_relu.default: [(rng.random(),), (0.0,), (1.0,), ()],
        aten.hardtanh.default: [(low, low + rng.random()), ()],
        aten.clamp.default: [(low, low + rng.random()), (None, low), (low,), (0.5, -0.5)],
        aten.clamp_min.default: [(low,)],
        aten.gelu.default: [(), ("tanh",)],
    }
    return [build(*args) for op, build in ACTIVATIONS.items() for args in given.get(op, [()])]


def ends(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return intervals (N,) of all sizes, some of them single points, some that end at or reach across 0."""
    centre = torch.randn(120, generator=rng, dtype=torch.float64) * 10 ** torch.empty(120).uniform_(
        -3, 1.3, generator=rng
    )
    width = torch.rand(120, generator=rng, dtype=torch.float64) * 10 ** torch.empty(120).uniform_(
        -6, 1.5, generator=rng
    )
    special = [
        (0, 0),
        (0, 1),
        (-1, 0),
        (-0.0, 0.0),
        (2, 2),
        (-1.5, -1.5),
        (-1e6, 1e6),
        (-1e6, -1),
        (1, 1e6),
        (-1e-9, 1e6),
    ]
    turning = [(-1.2784645, 0), (-3, -1.2784646), (-0.7517916, 1), (-2, -0.7517915), (-0.8, -0.7), (-0.75246, -0.75245)]
    more = torch.tensor(special + turning, dtype=torch.float64)
    return torch.cat([centre - width, more[:, 0]]), torch.cat([centre + width, more[:, 1]])


@pytest.mark.parametrize("seed", range(3))
def test_planes_and_intervals_enclose_every_activation(seed: int) -> None:
    lower_, upper = ends(torch.Generator().manual_seed(seed))
    share = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
    z = torch.maximum(torch.minimum(lower_ + share * (upper - lower_), upper), lower_)
    for one, parallel in product(activations(random.Random(seed)), [False, True]):
        value, (low, high) = one.f(z), one.interval(lower_, upper)
        assert between(low, value, high, rounding=1e-14), one.name
        planes = one.planes(lower_, upper, parallel)
        assert between(planes.low_slope * z + planes.low, value, planes.high_slope * z + planes.high), one.name


def test_planes_of_kinks_are_exact_where_the_sign_is_known_and_touch_at_both_ends() -> None:
    lower_, upper = ends(torch.Generator().manual_seed(0))
    for leak in (0.0, 0.3, 1.0):
        one = ACTIVATIONS[aten.leaky_relu.default](leak)
        planes = one.planes(lower_, upper)
        for end in (lower_, upper):
            assert torch.allclose(planes.high_slope * end + planes.high, one.f(end), rtol=1e-12, atol=1e-9)
        known = (lower_ >= 0) | (upper <= 0)
        assert torch.equal(planes.low_slope[known], planes.high_slope[known])
        assert not planes.bent[known].any()


@pytest.mark.parametrize(("lower_", "upper"), product([math.nan, -math.inf, -2.0, 0.0, 3.0], [math.nan, math.inf, 4.0]))
def test_nan_and_infinite_bounds_prove_nothing_that_is_wrong(lower_: float, upper: float) -> None:
    """A bound that is NaN stands for no bound: what remains must hold on all that the other one allows."""
    ends_ = torch.tensor([lower_], dtype=torch.float64), torch.tensor([upper], dtype=torch.float64)
    from_, to = (-1e4 if not lower_ > -1e4 else lower_), (1e4 if not upper < 1e4 else upper)
    z = torch.linspace(from_, to, 4001, dtype=torch.float64)
    for one in activations(random.Random(1)):
        planes, value = one.planes(*ends_), one.f(z)
        under, over = planes.low_slope * z + planes.low, planes.high_slope * z + planes.high
        assert ((under <= value + 1e-9 * (1 + value.abs())) | under.isnan()).all(), one.name
        assert ((over >= value - 1e-9 * (1 + value.abs())) | over.isnan()).all(), one.name
        if math.isnan(upper):
            assert over.isnan().all(), one.name


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_network_with_weights_that_are_no_numbers_has_no_bounds(poison: float) -> None:
    net, x = relu_net(0)
    graph, y = trace(net, x), torch.zeros(2, dtype=torch.long)
    ball = Ball.around(x, Norm.LINF, 0.1)
    wide = Ball(ball.x, ball.norm, 0.1, ball.low, torch.where(torch.arange(9).view(1, 3, 3) == 4, poison, ball.high))
    with torch.no_grad():
        for bound in (interval_bound, mixed_margins, linear_bound):
            assert not (bound(Problem(graph, wide, y)) > 0).any()


@pytest.mark.parametrize("seed", range(12))
def test_planes_of_max_pooling_enclose_it(seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.MaxPool2d((2, 3), (1 + seed % 2, 2), (1, seed % 2), (1 + seed // 2 % 2, 2), ceil_mode=seed % 3 == 0)
    lower_ = r(3, 2, 7, 6)
    upper = lower_ + torch.rand_like(lower_) * (0.01, 1.0, 3.0)[seed % 3] * (torch.rand_like(lower_) < 0.8)
    graph = trace(layer, lower_)
    pool = graph.nodes[-1].op
    assert isinstance(pool, MaxPool)
    planes = pool.planes(lower_, upper)
    low, high = pool.interval(lower_, upper)
    for _ in range(20):
        z = lower_ + torch.rand_like(lower_).mul(3).sub(1).clamp(0, 1) * (upper - lower_)
        value, at = layer(z), z.flatten(2).gather(2, planes.best.flatten(2)).view_as(planes.best)
        assert torch.equal(pool.f(z), value)
        assert between(low, value, high)
        assert between(at, value, planes.high_slope * at + planes.high)
    assert planes.high_slope.mean() > 0 or seed % 3 > 0, "windows with a certain winner are exact"


# Tracing and memory


def test_results_do_not_depend_on_the_memory_allowed() -> None:
    _, net, x = random_net(4)
    graph, y = trace(net, x.clone()), torch.zeros(len(x), dtype=torch.long)
    ball = Ball.around(x, Norm.LINF, 0.1)
    largest = max(node.size for node in graph.nodes)
    with torch.no_grad():
        whole = linear_bound(Problem(graph, ball, y))
        for queries in (1, 2, 3, 17):
            few = Problem(graph, ball, y, memory=queries * largest * 64)
            assert few.chunk == queries
            assert torch.allclose(linear_bound(few), whole, rtol=1e-12, atol=1e-12)
        with pytest.raises(MemoryBudgetError, match="memory"):
            linear_bound(Problem(graph, ball, y, memory=largest * 64 - 1))


def test_tracing_leaves_its_inputs_alone() -> None:
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    given, net = x.clone(), nn.Sequential(Wrap(lambda x: x.sub_(0.5)), nn.Flatten(), nn.Linear(4, 2)).double()
    trace(net, given)
    assert torch.equal(given, x)


FLATTENED: dict[str, Callable[[], nn.Module]] = {
    "permuted": lambda: Wrap(lambda x: x.permute(0, 2, 3, 1).flatten(1)),
    "sliced": lambda: Wrap(lambda x: x[:, :, 1:].flatten(1)),
    "channels last": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        nn.Flatten(),
    ),
}


@pytest.mark.parametrize("name", FLATTENED)
def test_whatever_lies_in_memory_in_another_order_is_flattened_all_the_same(name: str) -> None:
    x = torch.rand(3, 2, 3, 4, dtype=torch.float64)
    net = FLATTENED[name]().double().requires_grad_(False)
    assert torch.equal(trace(net, x)(x), net(x))


def test_slices_of_the_batch_are_the_whole_batch_or_refused() -> None:
    """Older torch traces ``x[:, 1:]`` as two slices, and ``x[:, 1:] = y`` as two scatters."""
    x, end = torch.rand(3, 2, 3, 4, dtype=torch.float64), sys.maxsize
    whole = Wrap(lambda x: 2 * aten.slice.Tensor(x, 0, 0, end))
    written = Wrap(lambda x: 2 * aten.slice_scatter.default(x, 3 * x, 0, 0, end))
    for net in (whole, written):
        assert torch.equal(trace(net, x)(x), net(x))
    for start, end in ((0, TRACED), (1, sys.maxsize), (0, -1)):
        for part in (
            Wrap(lambda x, a=start, b=end: 2 * aten.slice.Tensor(x, 0, a, b)),
            Wrap(lambda x, a=start, b=end: 2 * aten.slice_scatter.default(x, 3 * x[a:b], 0, a, b)),
        ):
            with pytest.raises(UnsupportedError):
                trace(part, x)


def test_what_is_worth_a_pass_is_what_costs_the_margins_most() -> None:
    """Bounds of the chosen tenth of values help far more than those of as many others; company does not matter."""
    better = 0
    for seed in range(8):
        torch.manual_seed(seed)
        layers = [nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU()]
        net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(40, 4)).double().eval()
        x = torch.rand(3, 1, 5, 8, dtype=torch.float64)
        with torch.no_grad():
            problem = Problem(trace(net, x), Ball.around(x, Norm.LINF, 0.05), net(x).argmax(1))
            worth = worthwhile(problem, 0.1)
            alone = worthwhile(problem.take(1), 0.1)
            assert all(torch.equal(alone[source], mask[1:2]) for source, mask in worth.items())
            others = {
                source: torch.rand(mask.shape).argsort(1).argsort(1) < mask.sum(1, keepdim=True)
                for source, mask in worth.items()
            }
            none = {source: torch.zeros_like(mask) for source, mask in worth.items()}
            loose, random, chosen, full = (
                float(linear_margins(problem, tightened(problem, worth=masks).bounds).clamp_max(0).sum())
                for masks in (none, others, worth, None)
            )
            assert loose < chosen < full
            better += chosen - loose > 2 * (random - loose)
    assert better >= 6
