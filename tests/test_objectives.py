"""Objectives against closed forms, an independent reference, and the contract every one of them signs."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from robusteval.errors import UsageError
from robusteval.threat import ThreatModel
from robusteval.training.adversary import Adversary
from robusteval.training.objective import OBJECTIVES, Loss, StepContext

THREAT = ThreatModel.parse("Linf", "0.1")


class FreeLogits(nn.Module):
    """A model whose logits are its parameters, one row per sample, and do not change with the input."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)] + 0 * x.flatten(1).sum(1, keepdim=True)


@dataclass(frozen=True)
class Identity:
    """An inner attack of one step that leaves the inputs alone."""

    model: nn.Module
    x: Tensor

    def __call__(self, loss: Any, **_: Any) -> Tensor:
        loss(self.logits(self.x))
        return self.x

    def run(self, search: Any) -> Any:
        return search(self.model)

    def logits(self, x: Tensor) -> Tensor:
        return self.model(x).detach()


def context(model: nn.Module, x: Tensor, y: Tensor, **changes: Any) -> StepContext:
    rng = torch.Generator().manual_seed(1)
    attack = Adversary(steps=3).bind(model, x, THREAT, torch.Generator().manual_seed(2))
    ids = torch.arange(len(y))
    return replace(StepContext(model, x, y, ids, THREAT, attack, rng, 0.5, 1000), **changes)


def on_logits(objective: Any, logits: Tensor, y: Tensor, ids: Tensor | None = None) -> tuple[float, Tensor]:
    """The objective's value and gradient as a function of the logits alone."""
    model, x = FreeLogits(logits.clone()), torch.zeros(len(y), 1, 1, 1)
    changes = {} if ids is None else {"ids": ids}
    loss = objective(context(model, x, y, attack=Identity(model, x), **changes))
    (gradient,) = torch.autograd.grad(loss.value, model.logits)
    return float(loss.value.detach()), gradient


def sovr_by_hand(logits: list[list[float]], y: list[int], ids: list[int], m: float, lam: float):
    """SOVR and its gradient, one sample and one class at a time, in plain Python floats."""
    count, classes = len(y), len(logits[0])
    margins = [
        max(z for k, z in enumerate(row) if k != label) - row[label] for row, label in zip(logits, y, strict=True)
    ]
    ranked = sorted(range(count), key=lambda i: (-margins[i], ids[i]))
    hard = set(ranked[: int(m / 100 * count + 1e-9)])
    total, gradient = 0.0, [[0.0] * classes for _ in range(count)]
    for i, (row, label) in enumerate(zip(logits, y, strict=True)):
        partition = sum(math.exp(z) for z in row)
        total += (
            sum(math.log1p(math.exp(-z if k == label else z)) for k, z in enumerate(row)) * lam
            if i in hard
            else (math.log(partition) - row[label])
        )
        for k, z in enumerate(row):
            own = k == label
            one_vs_rest = lam * (-1 / (1 + math.exp(z)) if own else 1 / (1 + math.exp(-z)))
            gradient[i][k] = (one_vs_rest if i in hard else math.exp(z) / partition - own) / count
    return total / count, gradient


@pytest.mark.parametrize("count", [1, 7, 10, 80])
@pytest.mark.parametrize(("m", "lam"), [(40, 0.4), (0, 1), (100, 2), (33.3, 0), (50, 1)])
def test_sovr_agrees_with_a_loop_written_reference(count: int, m: float, lam: float):
    rng = torch.Generator().manual_seed(count)
    logits = 4 * torch.randn(count, 5, generator=rng, dtype=torch.float64)
    logits[-1] = logits[0]  # a tie in the margin whenever the labels agree too
    y = torch.randint(0, 5, (count,), generator=rng)
    y[-1] = y[0]
    ids = torch.randperm(500, generator=rng)[:count]
    value, gradient = on_logits(OBJECTIVES.build("sovr", {"m": m, "lam": lam}), logits, y, ids)
    expected, expected_gradient = sovr_by_hand(logits.tolist(), y.tolist(), ids.tolist(), m, lam)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(expected_gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def batch(count: int = 13) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return 3 * torch.randn(count, 6, generator=rng), torch.randint(0, 6, (count,), generator=rng)


def test_sovr_without_hard_samples_is_adversarial_training_bit_for_bit():
    logits, y = batch()
    value, gradient = on_logits(OBJECTIVES.build("sovr", {"m": 0, "lam": 7}), logits, y)
    at_value, at_gradient = on_logits(OBJECTIVES.build("at"), logits, y)
    assert value == at_value
    assert torch.equal(gradient, at_gradient)


def test_sovr_with_only_hard_samples_is_one_versus_the_rest():
    logits, y = batch()
    value, gradient = on_logits(OBJECTIVES.build("sovr", {"m": 100, "lam": 1}), logits, y)
    free = logits.clone().requires_grad_()
    target = nn.functional.one_hot(y, 6).float()
    expected = nn.functional.binary_cross_entropy_with_logits(free, target, reduction="sum") / len(y)
    torch.testing.assert_close(value, float(expected.detach()))
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, free)[0])


def test_sovr_ranks_the_smallest_margins_as_hard():
    # Margins 5, -1, 2: one third of the batch is the sample that is misclassified.
    logits, y = torch.tensor([[5.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 0, 0])
    value, _ = on_logits(OBJECTIVES.build("sovr", {"m": 34, "lam": 1}), logits, y)
    softplus = lambda a: math.log1p(math.exp(a))  # noqa: E731
    by_hand = softplus(-5) + (softplus(0) + softplus(1)) + softplus(-2)
    assert value == pytest.approx(by_hand / 3, rel=1e-6)


def test_sovr_does_not_depend_on_the_order_of_the_batch_even_with_ties():
    y = torch.zeros(12, dtype=torch.int64)
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64).repeat(12, 1)
    logits[:6] += torch.arange(6)[:, None]  # equal margins; equal CE but different OVR, so the choice matters
    logits[6:9, 0], logits[9:, 0] = 0.0, 5.0  # three harder and three easier ones
    ids = torch.tensor([90, 4, 7, 55, 31, 12, 8, 9, 10, 11, 1, 2])
    objective = OBJECTIVES.build("sovr", {"m": 50, "lam": 0.4})
    value, gradient = on_logits(objective, logits, y, ids)
    for seed in range(5):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        shuffled, shuffled_gradient = on_logits(objective, logits[order], y[order], ids[order])
        assert shuffled == pytest.approx(value, rel=1e-13)
        torch.testing.assert_close(shuffled_gradient, gradient[order])
    other, _ = on_logits(objective, logits, y, 100 - ids)
    assert abs(other - value) > 1e-3


NOT_ON_LOGITS = {"consistency", "crown_ibp", "ibp", "mtl_ibp", "sabr", "smoothadv"}
"""Objectives that want more of a network than a row of logits for each sample: bounds, or several inputs at once. The
conformance suite tries them on huge logits of a network that has an input."""


@pytest.mark.parametrize("name", [name for name in OBJECTIVES.names() if name not in NOT_ON_LOGITS])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_loss_and_gradient_stay_finite_at_huge_logits(name: str, scale: float):
    logits, y = scale * nn.functional.one_hot(torch.arange(6), 6).float(), torch.arange(6).roll(1)
    for labels in (y, torch.arange(6)):
        value, gradient = on_logits(OBJECTIVES.build(name), logits, labels)
        assert math.isfinite(value)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"m": 101}, "m = 101.0 is not a percentage of the batch; choose one from 0 to 100"),
        ({"m": -1}, "m = -1.0 is not a percentage"),
        ({"m": math.nan}, "m = nan is not a percentage"),
        ({"lam": -0.1}, "lam = -0.1 cannot weight a loss"),
        ({"lam": math.inf}, "lam = inf cannot weight a loss"),
        ({"lambda": 1}, "no parameter 'lambda'. Did you mean 'lam'?"),
    ],
)
def test_sovr_refuses_impossible_parameters(params: dict[str, float], said: str):
    with pytest.raises(UsageError, match=said.replace("?", r"\?").replace(".", r"\.")):
        OBJECTIVES.build("sovr", params)


def test_a_sample_that_comes_twice_counts_twice():
    # Extra data may repeat a sample in a batch; one of three is in L all the same.
    logits, y = torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 0])
    value, _ = on_logits(OBJECTIVES.build("sovr", {"m": 34, "lam": 0}), logits, y, torch.tensor([5, 7, 5]))
    by_hand = math.log1p(math.exp(-3)) + math.log1p(math.e)
    assert value == pytest.approx(by_hand / 3, rel=1e-6)


# The contract, for every objective there is.


def small_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3)
        )
    model.train()
    model[4].eval()  # a user may freeze one BatchNorm on purpose
    model[0].bias.requires_grad_(False)
    return model


def images(count: int = 24) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    x = torch.rand(count, 1, 8, 8, generator=rng)
    return x, (x.flatten(1)[:, :30].mean(1) * 3).long().clamp(0, 2)


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_objective_leaves_everything_as_found(name: str):
    model, (x, y) = small_model(), images()
    objective, untouched = OBJECTIVES.build(name), x.clone()
    before = (
        [part.training for part in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(part._forward_hooks) for part in model.modules()],
        torch.is_grad_enabled(),
    )
    weights = copy.deepcopy(dict(model.named_parameters()))
    global_rng = torch.get_rng_state()
    loss = objective(context(model, x, y))
    after = (
        [part.training for part in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(part._forward_hooks) for part in model.modules()],
        torch.is_grad_enabled(),
    )
    assert after == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, weights[key]) for key, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), global_rng)
    assert torch.equal(x, untouched)
    assert loss.value.shape == ()
    assert loss.logits.shape == (24, 3)
    assert all(isinstance(value, float) for value in loss.metrics.values())


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_objective_is_a_function_of_its_context(name: str):
    x, y = images()
    values = []
    for _ in range(2):
        torch.rand(7)  # the global generator must not matter
        values.append(OBJECTIVES.build(name)(context(small_model(), x, y)).value)
    assert torch.equal(*values)


@pytest.mark.parametrize("name", OBJECTIVES.names())
@pytest.mark.parametrize("count", [24, 2])
def test_objective_decreases_when_descended_on_one_batch(name: str, count: int):
    model, (x, y) = small_model(), images(count)
    objective = OBJECTIVES.build(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    values = []
    for _ in range(30):
        loss = objective(context(model, x, y))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        values.append(float(loss.value.detach()))
    assert values[-1] < 0.8 * values[0]


def test_every_objective_describes_itself_in_one_line():
    for name, line in OBJECTIVES.describe().items():
        assert len(line) > 20, name


# What the frame promises to objectives that are yet to be written.


def test_inner_attack_calls_the_loss_once_per_step_before_the_step():
    model, (x, y) = small_model(), images()
    ctx, seen = context(model, x, y), []

    def watch(logits: Tensor) -> Tensor:
        seen.append(logits.detach())
        return ctx.cross_entropy(logits)

    ctx.attack(watch, start="none", steps=4)
    assert len(seen) == 4
    torch.testing.assert_close(seen[0], ctx.attack.logits(x))
    assert not torch.equal(seen[1], seen[0])


def test_inner_attack_ascends_a_divergence_from_a_gaussian_start():
    model, (x, y) = small_model(), images()
    ctx = context(model, x, y)
    clean = ctx.attack.logits(x).log_softmax(1)

    def divergence(logits: Tensor) -> Tensor:
        return nn.functional.kl_div(logits.log_softmax(1), clean, reduction="none", log_target=True).sum(1)

    begun = ctx.attack(divergence, start="gaussian", steps=0)
    moved = ctx.attack(divergence, start="gaussian")
    assert float((begun - x).std()) == pytest.approx(0.001, rel=0.1)
    chance = THREAT.sample(x, torch.Generator().manual_seed(0))
    assert divergence(ctx.attack.logits(moved)).mean() > 3 * divergence(ctx.attack.logits(chance)).mean()
    assert THREAT.contains(x, moved).all()


@dataclass(frozen=True)
class AtPerturbedWeights:
    """A wrapper in the manner of AWP: another objective's loss at weights shifted by a constant."""

    base: Any
    shift: float

    def __call__(self, ctx: StepContext) -> Loss:
        moved = {name: value + self.shift for name, value in ctx.model.named_parameters()}

        class Shifted(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return functional_call(ctx.model, moved, (x,))

        return self.base(replace(ctx, model=Shifted()))


def test_an_objective_can_wrap_another_and_move_the_weights():
    x, y = images()
    loss = AtPerturbedWeights(OBJECTIVES.build("at"), 0.05)(context(model := small_model(), x, y))
    loss.value.backward()
    reference = small_model()
    ctx = context(reference, x, y)
    x_adv = ctx.attack(ctx.cross_entropy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05
    ctx.cross_entropy(reference(x_adv)).mean().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_per_sample_state_is_created_once_and_indexed_by_id():
    model, (x, y) = small_model(), images()
    ctx = context(model, x, y)
    ctx.per_sample("radius", 0.5)[ctx.ids[:2]] = 0.25
    assert ctx.per_sample("radius", 9.0).shape == (1000,)
    assert ctx.state["radius"][:3].tolist() == [0.25, 0.25, 0.5]
