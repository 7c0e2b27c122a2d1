"""Every objective against slow references in plain floats, closed forms, its limits, and its own promises."""

from __future__ import annotations

import copy
import importlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENCE
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from robusteval.errors import UsageError
from robusteval.runs import RunDir
from robusteval.settings import resolve
from robusteval.testing.objectives import check_objective
from robusteval.threat import ThreatModel
from robusteval.training.adversary import Adversary
from robusteval.training.awp import Recording
from robusteval.training.config import TrainConfig
from robusteval.training.loop import train
from robusteval.training.objective import OBJECTIVES, Loss, StepContext
from robusteval.training.plan import prepare
from robusteval.training.share import Share

THREAT = ThreatModel.parse("Linf", "0.1")
MMA = OBJECTIVES.get("mma")  # makes the package of the trainers importable
ANPGD = importlib.import_module("robusteval.trainers._anpgd")


# The references: one sample, one class, one float at a time, from the formulas.

Row = Sequence[float]


@dataclass(frozen=True)
class Case:
    """What an objective sees of a batch. ``path`` holds the logits of the attack's iterates."""

    clean: list[Row]
    adv: list[Row]
    y: list[int]
    ids: list[int]
    path: list[list[Row]]
    distance: list[float]
    smoothing: float = 0.0


def log_p(row: Row) -> list[float]:
    top = max(row)
    total = top + math.log(sum(math.exp(z - top) for z in row))
    return [z - total for z in row]


def ce(row: Row, label: int, smoothing: float = 0.0) -> float:
    logs = log_p(row)
    return -(1 - smoothing) * logs[label] - smoothing * sum(logs) / len(logs)


def kl(row: Row, other: Row) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p(row), log_p(other), strict=True))


def ovr(row: Row, label: int) -> float:
    return sum(math.log1p(math.exp(-z if k == label else z)) for k, z in enumerate(row))


def rival(row: Row, label: int) -> float:
    return max(z for k, z in enumerate(row) if k != label)


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def softplus_margin(row: Row, label: int) -> float:
    return math.log(sum(math.exp(z) for k, z in enumerate(row) if k != label)) - row[label]


def hard_set(case: Case, m: float) -> list[bool]:
    size = len(case.y)
    lm = [rival(row, label) - row[label] for row, label in zip(case.adv, case.y, strict=True)]
    ranked = sorted(range(size), key=lambda i: (-lm[i], case.ids[i]))
    return [i in ranked[: int(m / 100 * size + 1e-9)] for i in range(size)]


def boosted(row: Row, label: int, smoothing: float, offset: float) -> float:
    best = max(math.exp(a) for k, a in enumerate(log_p(row)) if k != label)
    return ce(row, label, smoothing) - math.log(1 - best + offset)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mail_weights(case: Case, slope: float, bias: float, normalise: bool = False) -> list[float]:
    p = [[math.exp(a) for a in log_p(row)] for row in case.adv]
    pm = [rival(row, label) - row[label] for row, label in zip(p, case.y, strict=True)]
    weights = [sigmoid(slope * (each + bias)) for each in pm]
    return [w / mean(weights) if normalise else 3 * w for w in weights]


def gairat_weights(case: Case, form: str, shift: float = -1.0) -> list[float]:
    k, omega = len(case.path), []
    for i, label in enumerate(case.y):
        kappa = sum(step[i].index(max(step[i])) == label for step in case.path)
        level = shift + 5 * (1 - 2 * kappa / k)
        forms = {"tanh": (1 + math.tanh(level)) / 2, "sigmoid": sigmoid(level), "linear": 1 - kappa / (k + 1)}
        omega.append(forms[form])
    return [each * len(omega) / sum(omega) for each in omega]


def ewat_weights(case: Case, form: str) -> list[float]:
    entropy = [-sum(math.exp(a) * a for a in log_p(row)) for row in case.adv]
    omega = {
        "additive": [1 + h / mean(entropy) for h in entropy],
        "absolute": [1 + h / math.log(len(case.adv[0])) for h in entropy],
        "proportional": entropy,
    }[form]
    return [each / mean(omega) for each in omega]


def sides(case: Case) -> list[str]:
    """For each sample what MMA does with it."""
    right = [softplus_margin(row, label) < 0 for row, label in zip(case.clean, case.y, strict=True)]
    return ["wrong" if not r else "near" if d < 4.0 * 0.1 else "far" for r, d in zip(right, case.distance, strict=True)]


Constants = Any
Value = Callable[[Case, int, Constants], float]
"""A case, a sample, and what was held fixed -> the sample's loss."""


@dataclass(frozen=True)
class Reference:
    """An objective's definition: what it treats as constants, and each sample's loss given those."""

    value: Value
    constants: Callable[[Case], Constants] = lambda case: None


def adversarial_ce(case: Case, i: int, weights: Any) -> float:
    return (weights[i] if weights else 1.0) * ce(case.adv[i], case.y[i], case.smoothing)


def trades(case: Case, i: int, weights: Any, beta: float = 6.0) -> float:
    clean = ce(case.clean[i], case.y[i], case.smoothing)
    return clean + beta * (weights[i] if weights else 1.0) * kl(case.clean[i], case.adv[i])


def mart(case: Case, i: int, weights: Any, offset: float = 1e-4) -> float:
    weight = weights[i] if weights else 1.0
    doubt = 1 - math.exp(log_p(case.clean[i])[case.y[i]])
    first = boosted(case.adv[i], case.y[i], case.smoothing, offset)
    return weight * first + 5 * kl(case.clean[i], case.adv[i]) * doubt


def switched(case: Case, i: int, hard: Any, on: str, lam: float, beta: float) -> float:
    row, label = getattr(case, on)[i], case.y[i]
    first = lam * ovr(row, label) if hard[i] else ce(row, label, case.smoothing)
    return first + beta * kl(case.clean[i], case.adv[i])


def weighted_ce(case: Case, i: int, hard: Any, lam: float) -> float:
    return (lam if hard[i] else 1.0) * ce(case.adv[i], case.y[i], case.smoothing)


def max_margin(case: Case, i: int, side: Any) -> float:
    clean = ce(case.clean[i], case.y[i], case.smoothing)
    other = {"wrong": clean, "far": 0.0, "near": ce(case.adv[i], case.y[i], case.smoothing)}[side[i]]
    return clean / 3 + 2 / 3 * other


REFERENCES: list[tuple[str, dict[str, Any], Reference]] = [
    ("at", {}, Reference(adversarial_ce)),
    ("fgsm_rs", {}, Reference(adversarial_ce)),
    ("n_fgsm", {}, Reference(adversarial_ce)),
    ("standard", {}, Reference(lambda case, i, _: ce(case.clean[i], case.y[i], case.smoothing))),
    ("ovr", {}, Reference(lambda case, i, _: ovr(case.adv[i], case.y[i]))),
    ("sovr", {}, Reference(partial(switched, on="adv", lam=0.4, beta=0), partial(hard_set, m=40))),
    ("wce", {"m": 55, "lam": 3}, Reference(partial(weighted_ce, lam=3), partial(hard_set, m=55))),
    ("trades", {}, Reference(trades)),
    ("tsovr", {}, Reference(partial(switched, on="clean", lam=0.4, beta=6), partial(hard_set, m=40))),
    ("tsovr_adv", {}, Reference(partial(switched, on="adv", lam=0.4, beta=6), partial(hard_set, m=40))),
    ("mart", {}, Reference(mart)),
    ("mart", {"offset": 0}, Reference(partial(mart, offset=0))),
    ("mail", {"begin": 0}, Reference(adversarial_ce, partial(mail_weights, slope=10, bias=-0.5))),
    (
        "mail",
        {"begin": 0, "normalise": True, "slope": 3},
        Reference(adversarial_ce, partial(mail_weights, slope=3, bias=-0.5, normalise=True)),
    ),
    (
        "mail",
        {"begin": 0, "form": "trades"},
        Reference(partial(trades, beta=5), partial(mail_weights, slope=2, bias=0)),
    ),
    ("mail", {"begin": 0, "form": "mart"}, Reference(mart, partial(mail_weights, slope=10, bias=-0.5))),
    ("gairat", {"begin": 0}, Reference(adversarial_ce, partial(gairat_weights, form="tanh"))),
    (
        "gairat",
        {"begin": 0, "form": "sigmoid", "shift": 0.5},
        Reference(adversarial_ce, partial(gairat_weights, form="sigmoid", shift=0.5)),
    ),
    ("gairat", {"begin": 0, "form": "linear"}, Reference(adversarial_ce, partial(gairat_weights, form="linear"))),
    ("ewat", {}, Reference(adversarial_ce, partial(ewat_weights, form="additive"))),
    ("ewat", {"form": "absolute"}, Reference(adversarial_ce, partial(ewat_weights, form="absolute"))),
    ("ewat", {"form": "proportional"}, Reference(adversarial_ce, partial(ewat_weights, form="proportional"))),
    ("mma", {}, Reference(max_margin, sides)),
]


def label_of(name: str, params: dict[str, Any]) -> str:
    return "-".join([name, *(f"{key}={value}" for key, value in params.items())])


EVERY = pytest.mark.parametrize(
    ("name", "params"), [pytest.param(name, params, id=label_of(name, params)) for name, params, _ in REFERENCES]
)


# The objectives, as functions of logits alone.


class Table(nn.Module):
    """A model with free logits: one row per sample for the input 0, another for the input 1."""

    def __init__(self, clean: Tensor, adv: Tensor) -> None:
        super().__init__()
        self.clean, self.adv = nn.Parameter(clean.clone()), nn.Parameter(adv.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.adv if x.any() else self.clean


@dataclass(frozen=True)
class Scripted:
    """An inner attack that is told what to find, and notes how it was asked."""

    model: Table
    x: Tensor
    path: Tensor
    found: Any
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, loss: Any, **settings: Any) -> Tensor:
        self.asked.append(settings)
        for logits in self.path:
            loss(logits)
        return torch.ones_like(self.x)

    def logits(self, x: Tensor) -> Tensor:
        return self.model(x).detach()

    def run(self, search: Any) -> Any:
        return self.found


@dataclass(frozen=True)
class Tensors:
    """The tensors of a `Case`."""

    clean: Tensor
    adv: Tensor
    y: Tensor
    ids: Tensor
    path: Tensor
    distance: Tensor

    def rows(self, which: Any) -> Tensors:
        parts = (self.clean[which], self.adv[which], self.y[which], self.ids[which])
        return Tensors(*parts, self.path[:, which], self.distance[which])

    def case(self, smoothing: float) -> Case:
        parts = (self.clean, self.adv, self.y, self.ids, self.path, self.distance)
        return Case(*(part.tolist() for part in parts), smoothing=smoothing)


def made_up(count: int, classes: int, seed: int = 0) -> Tensors:
    rng = torch.Generator().manual_seed(seed + 10 * count + classes)
    draw = partial(torch.randn, generator=rng, dtype=torch.float64)
    y = torch.randint(0, classes, (count,), generator=rng)
    own = nn.functional.one_hot(y, classes)
    distance = 0.1 + 0.6 * torch.rand(count, generator=rng, dtype=torch.float64)
    ids = torch.randperm(500, generator=rng)[:count]
    path = draw(7, count, classes) + own
    return Tensors(1.5 * draw(count, classes) + 3 * own, 2 * draw(count, classes), y, ids, path, distance)


def on_table(objective: Any, data: Tensors, **changes: Any) -> tuple[Loss, Tensor, Tensor, StepContext]:
    """Return the loss, its gradients for the clean and the adversarial logits, and the context."""
    model, x = Table(data.clean, data.adv), torch.zeros(len(data.y), 1, 1, 1)
    found = ANPGD.Crossing(x + 1, data.distance) if isinstance(objective, MMA) else x + 1
    attack = Scripted(model, x, data.path, found)
    ctx = StepContext(model, x, data.y, data.ids, THREAT, attack, torch.Generator().manual_seed(1), 0.5, 500)
    ctx = replace(ctx, **changes)
    loss = objective(ctx)
    gradients = torch.autograd.grad(loss.value, [model.clean, model.adv], allow_unused=True)
    clean, adv = (torch.zeros_like(data.clean) if gradient is None else gradient for gradient in gradients)
    return loss, clean, adv, ctx


def slope(value: Callable[[], float], row: list[float], k: int, step: float = 1e-5) -> float:
    """Return the central difference of ``value()`` in ``row[k]``."""
    before = row[k]
    row[k] = before + step
    above = value()
    row[k] = before - step
    below = value()
    row[k] = before
    return (above - below) / (2 * step)


@pytest.mark.parametrize(("count", "classes"), [(1, 5), (2, 2), (9, 4), (10, 10)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "params", "reference"),
    [pytest.param(*each, id=label_of(each[0], each[1])) for each in REFERENCES],
)
def test_value_and_gradient_agree_with_a_loop_written_reference(
    name: str, params: dict[str, Any], reference: Reference, smoothing: float, count: int, classes: int
):
    data = made_up(count, classes)
    loss, *gradients, _ = on_table(OBJECTIVES.build(name, params), data, smoothing=smoothing)
    case = data.case(smoothing)
    fixed = reference.constants(case)
    assert loss.value.dtype == torch.float64
    values = [reference.value(case, i, fixed) for i in range(count)]
    assert loss.value.item() == pytest.approx(sum(values) / count, rel=1e-11)
    for ours, rows in zip(gradients, (case.clean, case.adv), strict=True):
        expected = [
            [slope(lambda i=i: reference.value(case, i, fixed) / count, rows[i], k) for k in range(classes)]
            for i in range(count)
        ]
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_the_made_up_samples_take_every_branch_of_the_definitions():
    case = made_up(10, 10).case(0.0)
    assert set(sides(case)) == {"wrong", "near", "far"}
    assert len({round(w, 9) for w in gairat_weights(case, "tanh")}) > 3
    assert sum(hard_set(case, 40)) == 4


@EVERY
def test_the_order_of_a_batch_does_not_matter(name: str, params: dict[str, Any]):
    objective, data = OBJECTIVES.build(name, params), made_up(9, 4)
    loss, *gradients, ctx = on_table(objective, data)
    for seed in range(3):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        shuffled, *others, other_ctx = on_table(objective, data.rows(order))
        assert shuffled.value.item() == pytest.approx(loss.value.item(), rel=1e-13)
        for ours, theirs in zip(gradients, others, strict=True):
            torch.testing.assert_close(theirs, ours[order], rtol=1e-12, atol=1e-15)
        assert shuffled.metrics == pytest.approx(loss.metrics, rel=1e-6)
        for key, value in ctx.state.items():
            assert torch.equal(value, other_ctx.state[key])


@dataclass(frozen=True)
class Beside(Share):
    """One of several threads that share a batch."""

    table: dict[int, Tensor] = field(default_factory=dict)
    barrier: Any = None

    def gather(self, values: Tensor) -> Tensor:
        self.table[self.rank] = values
        self.barrier.wait()
        whole = torch.cat([self.table[rank] for rank in range(self.size)])
        self.barrier.wait()
        return whole


@EVERY
def test_processes_that_share_a_batch_get_what_one_gets(name: str, params: dict[str, Any]):
    objective, data, found = OBJECTIVES.build(name, params), made_up(9, 4), {}
    data = data.rows(
        nn.functional.cross_entropy(data.adv, data.y, reduction="none").argsort()
    )  # the hard ones together
    whole, *gradients, ctx = on_table(objective, data)
    table, barrier = {}, threading.Barrier(2, timeout=PATIENCE)

    def work(rank: int) -> None:
        share = Beside(rank, 2, 9, table, barrier)
        mine = data.rows(share.mine(torch.arange(9)))
        loss, *parts, other_ctx = on_table(objective, mine, share=share)
        found[rank] = (share.weight * loss.value.item(), [share.weight * part for part in parts], other_ctx.state)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found[0][0] + found[1][0]) / 2 == pytest.approx(whole.value.item(), rel=1e-12)
    for ours, one, two in zip(gradients, found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(torch.cat([one, two]) / 2, ours, rtol=1e-11, atol=1e-15)
    for key, value in ctx.state.items():
        assert torch.equal(found[0][2][key], value)
        assert torch.equal(found[1][2][key], value)


@EVERY
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_value_and_gradients_are_finite_at_huge_logits(name: str, params: dict[str, Any], classes: int, scale: float):
    objective, count = OBJECTIVES.build(name, params), 2 * classes
    ladder = scale * nn.functional.one_hot(torch.arange(count) % classes, classes).float()
    for clean_label, adv_label in ((0, 0), (0, 1), (1, 0), (1, 1)):
        y = torch.arange(count) % classes
        clean, adv = ladder.roll(clean_label, 0), ladder.roll(adv_label, 0)
        distance = torch.linspace(0.1, 0.7, count)
        loss, *gradients, _ = on_table(objective, Tensors(clean, adv, y, y + 0, torch.stack([clean, adv]), distance))
        assert loss.value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert all(math.isfinite(value) for value in loss.metrics.values())


@pytest.mark.parametrize("form", ["additive", "absolute", "proportional"])
def test_ewat_without_any_uncertainty_is_adversarial_training(form: str):
    data = replace(made_up(6, 3), adv=1e4 * nn.functional.one_hot(torch.arange(6) % 3, 3).double())
    ours, theirs = (on_table(OBJECTIVES.build(*each), data) for each in (("ewat", {"form": form}), ("at",)))
    assert ours[0].value.item() == theirs[0].value.item() > 0


def test_mart_caps_the_second_term_only_with_an_offset():
    sure = Tensors(*[torch.tensor([[50.0, 0.0, 0.0]], dtype=torch.float64)] * 2, *[torch.tensor([1])] * 2,
                   torch.zeros(1, 1, 3, dtype=torch.float64), torch.zeros(1))  # fmt: skip
    capped, bare = (on_table(OBJECTIVES.build("mart", {"offset": o}), sure)[0].value.item() for o in (1e-4, 0))
    assert capped == pytest.approx(50 - math.log(1e-4), rel=1e-6)
    assert bare == pytest.approx(100 - math.log(2), rel=1e-6)


@EVERY
def test_only_divergences_choose_how_the_attack_starts(name: str, params: dict[str, Any]):
    *_, ctx = on_table(OBJECTIVES.build(name, params), made_up(4, 3))
    by_divergence = name in ("trades", "tsovr", "tsovr_adv") or params.get("form") == "trades"
    starts = [settings.get("start") for settings in ctx.attack.asked]
    own = {"fgsm_rs": ["uniform"], "standard": [], "n_fgsm": [], "mma": []}
    assert starts == (["gaussian"] if by_divergence else own.get(name, [None]))


# With a real model and the real attack.


def small_model(norm: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = nn.BatchNorm2d(4) if norm else nn.Identity()
        return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), middle, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).train()


def images(count: int = 24) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return x, (20 * x.flatten(1)[:, :16].mean(1) - 9).round().long().clamp(0, 2)


def context(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel = THREAT, **changes: Any) -> StepContext:
    settings = changes.pop("adversary", Adversary(steps=3))
    attack = settings.bind(model, x, threat, torch.Generator().manual_seed(2))
    rng = torch.Generator().manual_seed(1)
    return replace(StepContext(model, x, y, torch.arange(len(y)), threat, attack, rng, 0.5, 1000), **changes)


def real(name: str, params: dict[str, Any], count: int = 24, **changes: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    model = small_model()
    loss = OBJECTIVES.build(name, params)(context(model, *images(count), **changes))
    return loss.value, list(torch.autograd.grad(loss.value, list(model.parameters()))), loss.logits


@pytest.mark.parametrize("count", [24, 2])
@pytest.mark.parametrize(
    ("ours", "limit"),
    [
        (("sovr", {"m": 0, "lam": 7}), ("at", {})),
        (("sovr", {"m": 100, "lam": 1}), ("ovr", {})),
        (("wce", {"m": 50, "lam": 1}), ("at", {})),
        (("wce", {"m": 0, "lam": 9}), ("at", {})),
        (("tsovr", {"m": 0, "lam": 9}), ("trades", {})),
        (("tsovr", {"m": 0, "beta": 2.5}), ("trades", {"beta": 2.5})),
        (("mail", {"begin": 0.51}), ("at", {})),
        (("mail", {"begin": 0.51, "form": "trades"}), ("trades", {"beta": 5})),
        (("mail", {"begin": 0.51, "form": "mart"}), ("mart", {"beta": 5})),
        (("gairat", {"begin": 0.51}), ("at", {})),
    ],
)
def test_limits_are_other_objectives_bit_for_bit(ours: Any, limit: Any, count: int):
    value, gradients, logits = real(*ours, count)
    other, others, other_logits = real(*limit, count)
    assert torch.equal(value, other)
    assert torch.equal(logits, other_logits)
    assert all(map(torch.equal, gradients, others))


@pytest.mark.parametrize("name", ["mail", "gairat"])
def test_weights_begin_when_they_are_told_to(name: str):
    plain = real("at", {})[0]
    assert torch.equal(real(name, {"begin": 0.7}, progress=0.699)[0], plain)
    assert not torch.equal(real(name, {"begin": 0.7}, progress=0.7)[0], plain)


def test_max_margin_training_with_c_1_is_standard_training():
    data = made_up(9, 4)
    ours, theirs = (on_table(OBJECTIVES.build(*each), data) for each in (("mma", {"c": 1}), ("standard",)))
    assert torch.equal(ours[0].value, theirs[0].value)
    assert torch.equal(ours[1], theirs[1])
    assert not ours[2].any()


VARIANTS = [(name, params) for name, params, _ in REFERENCES if params]


@pytest.mark.parametrize(("name", "params"), VARIANTS, ids=[label_of(*each) for each in VARIANTS])
def test_variants_keep_the_contract_too(name: str, params: dict[str, Any]):
    check_objective(OBJECTIVES.build(name, params))


@EVERY
def test_all_that_is_adversarial_goes_through_the_inner_attack(name: str, params: dict[str, Any]):
    """What weight perturbation relies on: a replayed attack gives the same loss and runs no search."""
    model, (x, y) = small_model(norm=False), images()
    ctx = context(model, x, y)
    recording, state = Recording(ctx.attack), {}
    objective = OBJECTIVES.build(name, params)
    first = objective(replace(ctx, attack=recording, rng=ctx.rng.clone_state(), state=state))
    passes: list[Any] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    second = objective(replace(ctx, attack=recording.replay()))
    assert torch.equal(first.value, second.value)
    assert first.metrics == second.metrics
    assert len(passes) <= 2
    assert all(torch.equal(value, ctx.state[key]) for key, value in state.items())


def test_kappa_counts_the_iterates_that_are_still_right():
    model, (x, _) = small_model(), images()
    before = copy.deepcopy(model).eval()  # the pass of the loss moves the statistics of BatchNorm
    with torch.no_grad():
        y = before(x).argmax(1)
    iterates: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, inputs, __: iterates.append(inputs[0].detach().clone()))
    ctx = context(model, x, y, adversary=Adversary(steps=6, step_size="0.01"))
    loss = OBJECTIVES.build("gairat")(ctx)
    hook.remove()
    assert len(iterates) == 7  # six steps, and the pass of the loss
    kappa = []
    for i in range(len(y)):
        right = 0
        for point in iterates[:6]:
            with torch.no_grad():
                right += int(before(point[i : i + 1]).argmax()) == int(y[i])
        kappa.append(right)
    assert len(set(kappa)) >= 4
    omega = [(1 + math.tanh(-1 + 5 * (1 - 2 * each / 6))) / 2 for each in kappa]
    values = ctx.cross_entropy(loss.logits.detach()).tolist()
    expected = sum(w * value for w, value in zip(omega, values, strict=True)) / sum(omega)
    assert loss.value.item() == pytest.approx(expected, rel=1e-5)
    assert loss.metrics["kappa"] == pytest.approx(sum(kappa) / 6 / len(y), rel=1e-6)


# Geometry of the single-step methods.


class Linear(nn.Module):
    """Binary logits (0, w.(x - 1/2))."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = (x - 0.5).flatten(1) @ self.weight
        return torch.stack([torch.zeros_like(score), score], 1)


def trained_on(name: str, threat: ThreatModel, params: dict[str, Any] | None = None, **changes: Any) -> tuple[Any, ...]:
    """Return x, x', and the number of forward passes of one step."""
    model, (x, y) = small_model(), images()
    x[:4] = x[:4].round()  # black and white: the box must hold
    seen: list[Tensor] = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    OBJECTIVES.build(name, params)(context(model, x, y, threat, **changes))
    return x, seen[-1], len(seen)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", "0.03"), ("L2", "0.4"), ("L1", "2")])
def test_n_fgsm_leaves_the_ball_but_not_the_box(norm: str, eps: str):
    threat = ThreatModel.parse(norm, eps)
    x, x_adv, passes = trained_on("n_fgsm", threat)
    distance = threat.distance(x, x_adv)
    assert passes == 2
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (distance <= 3 * threat.radius * (1 + 1e-5)).all()
    assert distance.max() > 1.5 * threat.radius
    near = trained_on("n_fgsm", threat, {"noise": 0.25, "alpha": 0.5})[1]
    assert (threat.distance(x, near) <= 0.75 * threat.radius * (1 + 1e-5)).all()


def test_n_fgsm_is_noise_of_twice_eps_and_a_step_of_eps():
    x, x_adv, _ = trained_on("n_fgsm", THREAT, adversary=Adversary(steps=9, start="none"))
    model, (_, y) = small_model().eval(), images()
    noise = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 1
    start = (x + 0.2 * noise).clamp(0, 1).requires_grad_()
    nn.functional.cross_entropy(model(start), y).backward()
    expected = (start.detach() + 0.1 * start.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected)
    assert (x_adv - x).abs().max() > 0.25


@pytest.mark.parametrize(("norm", "eps"), [("Linf", "0.03"), ("L2", "0.4"), ("L1", "2")])
def test_fgsm_rs_takes_one_step_and_stays_in_the_ball(norm: str, eps: str):
    threat = ThreatModel.parse(norm, eps)
    x, x_adv, passes = trained_on("fgsm_rs", threat, adversary=Adversary(steps=9, start="none"))
    assert passes == 2
    assert threat.contains(x, x_adv).all()
    start = threat.sample(x, torch.Generator().manual_seed(2))
    moved = threat.distance(start, x_adv)
    if norm != "L1":  # the projection on an L1 ball is the nearest point in L2, not in L1
        assert (moved <= 1.25 * threat.radius * (1 + 1e-5)).all()
    assert moved.max() > 0.5 * threat.radius


def test_fgsm_rs_is_a_projected_step_of_alpha_eps():
    x, x_adv, _ = trained_on("fgsm_rs", THREAT, {"alpha": 0.5})
    model, (_, y) = small_model().eval(), images()
    start = THREAT.sample(x, torch.Generator().manual_seed(2)).requires_grad_()
    nn.functional.cross_entropy(model(start), y).backward()
    delta = (start.detach() + 0.05 * start.grad.sign() - x).clamp(-0.1, 0.1)
    torch.testing.assert_close(x_adv, (x + delta).clamp(0, 1))


# The search of MMA.


def linear_problem(factors: Tensor) -> tuple[Linear, Tensor, Tensor, Tensor]:
    """Return a model, inputs, labels, and the dual norms of its weight; |score| is ``factors``."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(36, generator=rng)
    noise = 0.02 * torch.randn(len(factors), 36, generator=rng)
    noise -= (noise @ weight / (weight @ weight))[:, None] * weight
    sign = torch.where(torch.arange(len(factors)) % 2 == 0, 1.0, -1.0)
    x = 0.5 + noise + (sign * factors / (weight @ weight))[:, None] * weight
    y = (sign > 0).long()
    return Linear(weight), x.view(-1, 1, 6, 6), y, weight


@pytest.mark.parametrize(("norm", "eps", "slack"), [("Linf", "0.05", 1e-4), ("L2", "0.3", 0.03)])
def test_mma_finds_the_exact_distance_of_a_linear_model(norm: str, eps: str, slack: float):
    threat = ThreatModel.parse(norm, eps)
    dual = {"Linf": 1.0, "L2": 2.0}[norm]
    size = float(torch.linalg.vector_norm(linear_problem(torch.ones(1))[3], ord=dual))
    wanted = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 3.8, 4.5, 6.0]) * threat.radius
    model, x, y, _ = linear_problem(wanted * size)
    ctx = context(model, x, y, threat, population=20, ids=torch.arange(8) * 2 + 1)
    loss = OBJECTIVES.build("mma")(ctx)
    found, limit = ctx.state["eps"][ctx.ids], 1.05 * 4 * threat.radius
    assert (found[:6] >= wanted[:6] * (1 - 1e-5)).all()
    assert (found[:6] <= wanted[:6] * (1 + slack) + limit / 2**10).all()
    assert found[6:].tolist() == pytest.approx([limit] * 2)
    assert not ctx.state["eps"][::2].any()  # nobody else's
    # Cross-entropy on the boundary is log 2; samples that are further than d_max count nothing there.
    clean = ctx.cross_entropy(model(x)).mean().item()
    assert loss.value.item() == pytest.approx(clean / 3 + 2 / 3 * 6 / 8 * math.log(2), rel=0.05)
    assert loss.metrics["near"] == pytest.approx(6 / 8)


def test_bisection_brackets_the_boundary_from_beyond():
    wanted = torch.tensor([0.02, 0.07, 0.12])
    model, x, y, weight = linear_problem(wanted * float(linear_problem(torch.ones(1))[3].abs().sum()))
    towards = x - 0.01 * ((2 * y - 1)[:, None] * weight.sign()).view_as(x)

    def margin(point: Tensor) -> Tensor:
        score = model(point)[:, 1].detach()
        return torch.where(y == 1, -score, score)

    for halvings in (1, 4, 12):
        found = ANPGD.bisect(margin, x, towards, THREAT, 0.4, halvings)
        assert (found.distance >= wanted - 1e-6).all()
        assert (found.distance <= wanted + 0.4 / 2**halvings + 1e-6).all()
        assert (margin(found.points) >= 0).all()
        assert THREAT.distance(x, found.points) == pytest.approx(found.distance.double(), rel=1e-4)
    away = ANPGD.bisect(margin, x, 2 * x - towards, THREAT, 0.4, 5)
    assert away.distance.tolist() == pytest.approx([0.4] * 3)
    nowhere = ANPGD.bisect(margin, x, x, THREAT, 0.4, 5)
    assert nowhere.distance.tolist() == pytest.approx([0.4] * 3)
    assert torch.equal(nowhere.points, x)
    beyond = ANPGD.bisect(margin, x, 2 * x - towards, THREAT, 2.0, 5)
    assert ((beyond.points == 0) | (beyond.points == 1)).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_climb_keeps_each_sample_in_its_own_ball_and_reaches_its_edge(norm: str):
    rng = torch.Generator().manual_seed(0)
    threat, radius = ThreatModel.parse(norm, "0.1"), torch.tensor([0.01, 0.1, 0.4, 2.0])
    model, x = Linear(torch.randn(36, generator=rng)), torch.rand(4, 1, 6, 6, generator=rng)
    far = x + 3 * torch.randn(x.shape, generator=rng)
    found = ANPGD.climb(lambda point: model(point)[:, 1], x, far, threat, radius, 10)
    distance = threat.distance(x, found)
    assert (distance <= radius * (1 + 1e-5)).all()
    assert (distance[:3] > 0.5 * radius[:3]).all()
    assert found.min() >= 0
    assert found.max() <= 1
    gain = (found - x).flatten(1) @ model.weight.detach()
    assert (gain.diff() > 0).all()


def test_mma_starts_from_the_radius_of_the_last_epoch(monkeypatch: pytest.MonkeyPatch):
    radii: list[Tensor] = []
    module = importlib.import_module("robusteval.trainers.mma")
    climb = ANPGD.climb
    monkeypatch.setattr(module, "climb", lambda *args: (radii.append(args[4]), climb(*args))[1])
    model, (x, y) = small_model(), images(4)
    ctx = context(model, x, y)
    objective = OBJECTIVES.build("mma", {"d_min": 0.5})
    objective(ctx)
    first = ctx.state["eps"][:4].clone()
    objective(ctx)
    assert radii[0].tolist() == pytest.approx([0.05] * 4)
    torch.testing.assert_close(radii[1], first.clamp_min(0.05))


def test_mma_refuses_a_norm_it_has_no_margins_for():
    with pytest.raises(UsageError, match="'mma' finds margins in Linf and L2, not in L1"):
        OBJECTIVES.build("mma")(context(small_model(), *images(2), ThreatModel.parse("L1", "1")))


# The simple problem: gradient flow on the logits themselves.


def flow(name: str, params: dict[str, Any], times: Sequence[float], classes: int = 10) -> list[float]:
    """Integrate dz/dt = -grad loss(z) from z = 0, in s = log(1 + t); return z_y - z_k at each time."""
    objective, y = OBJECTIVES.build(name, params), torch.tensor([0])

    def rate(s: float, z: Any) -> Any:
        logits = torch.tensor(z, dtype=torch.float64)[None]
        data = Tensors(logits, logits, y, y, logits[None], torch.zeros(1))
        return -math.exp(s) * on_table(objective, data)[2][0].numpy()

    stops = [math.log1p(t) for t in times]
    solution = solve_ivp(rate, (0, stops[-1]), [0.0] * classes, t_eval=stops, method="LSODA", rtol=1e-10, atol=1e-10)
    return [float(z[0] - z[1]) for z in solution.y.T]


@pytest.mark.parametrize(
    ("name", "params", "margins"),
    [
        ("at", {}, [0.938271, 4.152978, 6.845234, 9.202125]),
        ("wce", {"m": 100, "lam": 2}, [1.715572, 5.047133, 7.566776, 9.899073]),
        ("ovr", {}, [0.885709, 4.354650, 9.137659, 13.803672]),
        ("sovr", {"m": 100, "lam": 0.4}, [0.380679, 2.613117, 7.242212, 11.957878]),
    ],
)
def test_gradient_flow_reaches_the_closed_form_margins(name: str, params: dict[str, float], margins: list[float]):
    # The exact solutions: e^m + (K-1) m = 1 + w K t for cross-entropy, e^(m/2) + m/2 = 1 + lam t for OVR.
    assert flow(name, params, [1, 10, 100, 1000]) == pytest.approx(margins, abs=2e-6)


def test_one_versus_the_rest_margins_tend_to_twice_those_of_cross_entropy():
    times = [1e2, 1e4, 1e6, 1e8, 1e10]
    ratios = [a / b for a, b in zip(flow("ovr", {}, times), flow("at", {}, times), strict=True)]
    assert ratios == sorted(ratios)
    # 2 log t against log t + log 10, up to terms that vanish
    for t, ratio in list(zip(times, ratios, strict=True))[2:]:
        assert (2 - ratio) * (math.log(t) + math.log(10)) == pytest.approx(2 * math.log(10), rel=0.01)


# Runs.

SMALL = (
    "epochs=4", "batch_size=256", "adversary.steps=2", "validation.steps=2", "device=cpu", "threads=1",
    "model.params.width=2", "model.params.hidden=8", "train_limit=600",
)  # fmt: skip


@cache
def plan_of(*assignments: str) -> Any:
    return prepare(resolve(TrainConfig, None, (*SMALL, *assignments), {}))


@pytest.mark.parametrize("name", ["mma", "gairat", "mail", "n_fgsm", "tsovr", "ewat"])
def test_four_epochs_equal_two_and_two_more_bit_for_bit(tmp_path: Path, name: str):
    plan = plan_of(f"objective.name={name}")
    whole = train(plan, RunDir(tmp_path / "whole"))
    train(plan, RunDir(tmp_path / "halves"), stop_after=2)
    torch.rand(11)
    second = train(plan, RunDir(tmp_path / "halves"), stop_after=2)
    assert whole.history == second.history
    content = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "halves")]
    for part in ("model", "objective"):
        assert content[0][part].keys() == content[1][part].keys()
        assert all(torch.equal(value, content[1][part][key]) for key, value in content[0][part].items())
    assert (name == "mma") == ("eps" in content[0]["objective"])


def test_a_run_remembers_the_distances_of_the_samples_it_trained_on(tmp_path: Path):
    plan = plan_of("objective.name=mma")
    train(plan, RunDir(tmp_path / "run"), stop_after=2)
    stored = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["objective"]["eps"]
    assert (stored[plan.train.ids] > 0).all()
    assert not stored[plan.validation.ids].any()


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("trades", {"beta": -1}, "beta = -1.0 cannot weight a loss"),
        ("tsovr", {"m": 101}, "m = 101.0 is not a percentage"),
        ("tsovr_adv", {"lam": math.nan}, "lam = nan cannot weight a loss"),
        ("wce", {"lam": math.inf}, "lam = inf cannot weight a loss"),
        ("mart", {"beta": math.nan}, "beta = nan cannot weight a loss"),
        ("mart", {"offset": -0.1}, "offset = -0.1 is not a fraction"),
        ("mail", {"form": "mma"}, "form = 'mma' is not allowed"),
        ("mail", {"slope": math.inf}, "slope = inf is not finite"),
        ("mail", {"bias": math.nan}, "bias = nan is not finite"),
        ("mail", {"begin": 60}, "begin = 60.0 is not a fraction; choose a number from 0 to 1"),
        ("gairat", {"shift": math.inf}, "shift = inf is not finite"),
        ("gairat", {"begin": -0.1}, "begin = -0.1 is not a fraction"),
        ("ewat", {"form": "E1"}, "form = 'E1' is not allowed"),
        ("fgsm_rs", {"alpha": 0}, "alpha = 0.0 must be finite and above 0"),
        ("n_fgsm", {"noise": math.nan}, "noise = nan must be finite and above 0"),
        ("mma", {"d_max": -1}, "d_max = -1.0 must be finite and above 0"),
        ("mma", {"c": 2}, "c = 2.0 is not a fraction"),
        ("mma", {"steps": 0}, "steps = 0 is not a number of steps; choose at least 1"),
    ],
)
def test_impossible_parameters_are_refused(name: str, params: dict[str, Any], said: str):
    with pytest.raises(UsageError) as caught:
        OBJECTIVES.build(name, params)
    assert said in str(caught.value)


@pytest.mark.parametrize(("form", "expected"), [("at", (10.0, -0.5)), ("trades", (2.0, 0.0)), ("mart", (10.0, -0.5))])
def test_mail_records_the_slope_and_bias_it_uses(form: str, expected: tuple[float, float]):
    built = OBJECTIVES.build("mail", {"form": form})
    assert (built.slope, built.bias) == expected
    assert OBJECTIVES.build("mail", {"form": form, "bias": 0.25}).bias == 0.25
