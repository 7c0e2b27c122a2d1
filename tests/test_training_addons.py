"""What combines with any objective: averages, weight perturbation, clipping, smoothing, precision, alarms."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared
from torch import Tensor, nn

from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.preflight import training_alarms
from robusteval.models.io import load_model
from robusteval.runs import RunDir
from robusteval.settings import resolve
from robusteval.training import average
from robusteval.training.alarms import alarms
from robusteval.training.config import Average, TrainConfig
from robusteval.training.cost import passes_per_step
from robusteval.training.epoch import batches
from robusteval.training.loop import begin, train
from robusteval.training.network import Network
from robusteval.training.objective import Loss, StepContext
from robusteval.training.parallel import ALONE
from robusteval.training.plan import Plan, prepare
from robusteval.training.step import train_step
from robusteval.training.validate import Scores

SMALL = (
    "epochs=4", "batch_size=256", "adversary.steps=2", "validation.steps=2", "device=cpu", "threads=1",
    "model.params.width=2", "model.params.hidden=8",
)  # fmt: skip
NORMED = ("model.name=preact_resnet18", "model.params.width=2", "train_limit=64", "batch_size=32", "epochs=2")


def plan_of(*assignments: str) -> Plan:
    return prepare(resolve(TrainConfig, None, (*SMALL, *assignments), {}))


def normed_plan(*assignments: str) -> Plan:
    """A net with BatchNorm on a few digits."""
    shared = ("adversary.steps=1", "validation.steps=1", "validation.size=20", "device=cpu", "threads=1")
    return prepare(resolve(TrainConfig, None, (*shared, *NORMED, *assignments), {}))


# Averages


def pair() -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean, model = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
    model[1].num_batches_tracked.fill_(7)
    model[1].running_mean.fill_(3.0)
    return mean, model


def test_exponential_average_moves_weights_and_statistics_and_shares_no_memory():
    mean, model = pair()
    before = {name: value.clone() for name, value in mean.state_dict().items()}
    average.after_step(mean, model, Average(name="ema", decay=0.9), 8, 100)  # (1 + 8) / (10 + 8) = 0.5 < 0.9
    for name, value in mean.state_dict().items():
        ours = model.state_dict()[name]
        torch.testing.assert_close(value, (before[name] + ours) / 2 if value.is_floating_point() else ours)
        assert value.data_ptr() != ours.data_ptr()


def test_exponential_average_follows_its_formula_and_starts_late():
    mean, model = pair()
    settings, expected = Average(name="ema", decay=0.5, start=0.5), float(mean[0].weight.detach()[0, 0])
    for step in range(20):
        with torch.no_grad():
            model[0].weight.fill_(step)
        average.after_step(mean, model, settings, step, 20)
        decay = 0.0 if step < 10 else min(0.5, (1 + step - 10) / (10 + step - 10))
        expected = decay * expected + (1 - decay) * step
        assert float(mean[0].weight.detach()[0, 0]) == pytest.approx(expected, rel=1e-5), step


def test_uniform_average_is_the_mean_over_the_last_epochs():
    mean, model = pair()
    for epoch in range(10):
        with torch.no_grad():
            model[0].weight.fill_(epoch)
        average.after_epoch(mean, model, Average(name="swa", start=0.6), epoch, 10)
        expected = epoch if epoch < 6 else sum(range(6, epoch + 1)) / (epoch - 5)
        torch.testing.assert_close(mean[0].weight, torch.full((2, 2), float(expected)))


@pytest.mark.parametrize("buffers", ["average", "copy", "recompute"])
def test_statistics_of_an_average_come_from_where_the_user_said(buffers: str, tmp_path: Path):
    plan = normed_plan("average.name=swa", f"average.buffers={buffers}", "augment=false")
    train(plan, RunDir(tmp_path / "run"))
    content = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    mean, model = content["average"], content["model"]
    name = next(key for key in mean if key.endswith("running_mean"))
    copied = torch.equal(mean[name], model[name])
    assert copied == (buffers == "copy")
    if buffers == "recompute":
        fresh = plan.build_model()
        fresh.load_state_dict(mean)
        seen: list[Tensor] = []
        norm = dict(fresh.named_modules())[name.removesuffix(".running_mean")]
        norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3))))
        fresh.train()
        with torch.no_grad():
            for rows in torch.split(torch.arange(64), 32):
                fresh(plan.train.images(rows))
        torch.testing.assert_close(mean[name], torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)


def test_recomputed_statistics_need_two_images_at_a_time(tmp_path: Path):
    plan = normed_plan("average.name=ema", "average.buffers=recompute", "train_limit=65", "epochs=1")
    assert train(plan, RunDir(tmp_path / "run")).epochs == 1


# Adversarial weight perturbation


@dataclass(frozen=True)
class Clean:
    """An objective without an attack, so that a reference is short."""

    def __call__(self, ctx: StepContext) -> Loss:
        logits = ctx.model(ctx.x)
        return Loss(ctx.fit(logits).mean(), logits)


def test_weight_perturbation_takes_the_gradient_where_the_formula_says():
    assignments = ("awp.gamma=0.05", "precision=float64", "optimizer.momentum=0", "optimizer.weight_decay=0")
    plan = replace(plan_of(*assignments, "augment=false", "optimizer.lr=0.1"), objective=Clean())
    state, rows = begin(plan), torch.arange(16)
    x, y = plan.train.images(rows).double(), plan.train.labels[rows]
    reference = copy.deepcopy(state.model)
    weights = dict(reference.named_parameters())

    def slope() -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(reference(x), y)
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    start, ascent = {name: weight.detach().clone() for name, weight in weights.items()}, slope()
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.dim() > 1:
                scale = 0.05 * math.sqrt(float((start[name] ** 2).sum()) / float((ascent[name] ** 2).sum()))
                weight += scale * ascent[name]
    descent = slope()
    state.model.train()
    train_step(plan, state, 0, rows)
    for name, weight in state.model.named_parameters():
        torch.testing.assert_close(weight.detach(), start[name] - 0.1 * descent[name], rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Telling:
    """An objective that notes what each of its calls saw of the attack."""

    seen: list[Any]

    def __call__(self, ctx: StepContext) -> Loss:
        heard: list[Tensor] = []

        def loss(logits: Tensor) -> Tensor:
            heard.append(logits.detach().clone())
            return ctx.cross_entropy(logits)

        x_adv = ctx.attack(loss)
        clean, found = ctx.attack.logits(ctx.x), ctx.attack.run(lambda model: torch.rand(3, generator=ctx.rng))
        counts = ctx.per_sample("calls", 0.0)
        counts[ctx.ids] += 1
        self.seen.append([x_adv, clean, found, torch.rand(2, generator=ctx.rng), *heard])
        logits = ctx.model(x_adv)
        return Loss(ctx.cross_entropy(logits).mean(), logits)


def test_the_second_call_under_weight_perturbation_sees_the_same_attack_and_counts_once():
    seen: list[Any] = []
    plan = replace(normed_plan("awp.gamma=0.01"), objective=Telling(seen))
    state = begin(plan)
    state.model.train()
    before = {name: value.clone() for name, value in state.model.named_buffers()}
    weights = {name: value.detach().clone() for name, value in state.model.named_parameters()}
    train_step(plan, state, 0, torch.arange(16))
    first, second = seen
    assert all(torch.equal(a, b) for a, b in zip(first[:3] + first[4:], second[:3] + second[4:], strict=True))
    assert state.objective["calls"].max() == 1
    tracked = [name for name in before if name.endswith("num_batches_tracked")]
    assert all(int(dict(state.model.named_buffers())[name]) == 1 for name in tracked)
    assert any(not torch.equal(weights[name], value) for name, value in state.model.named_parameters())


def test_weight_perturbation_costs_one_more_pass_and_waits_for_its_start():
    for assignments, forward, backward in (
        (("awp.gamma=0.01",), 4, 4),
        ((), 3, 3),
        (("awp.gamma=0.01", "objective.name=at"), 4, 4),
    ):
        passes = passes_per_step(plan_of(*assignments))
        assert (passes.forward, passes.backward) == (forward, backward), assignments
    states = []
    for gamma in ("0", "0.05"):
        plan = plan_of(f"awp.gamma={gamma}", "awp.start=0.5")
        state = begin(plan)
        state.model.train()
        train_step(plan, state, 0, torch.arange(16))
        states.append(state.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# Clipping, smoothing, extra data


def test_gradient_clipping_bounds_the_step():
    assignments = ("optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.lr=0.1", "precision=float64")
    for limit in (0.01, 1e6):
        plan = plan_of(f"clip_grad_norm={limit}", *assignments)
        state = begin(plan)
        before = nn.utils.parameters_to_vector(state.model.parameters()).detach().clone()
        state.model.train()
        train_step(plan, state, 0, torch.arange(64))
        moved = float((nn.utils.parameters_to_vector(state.model.parameters()).detach() - before).norm())
        assert moved == pytest.approx(0.001, rel=1e-4) if limit == 0.01 else moved > 0.01


def test_label_smoothing_acts_on_what_is_descended_and_is_refused_where_it_would_do_nothing(tmp_path: Path):
    ctx = StepContext(nn.Identity(), *[torch.arange(4)] * 3, None, None, torch.Generator(), 0.5, 4, smoothing=0.2)
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(1)
    by_hand = -(0.8 * log_p.gather(1, ctx.y[:, None])[:, 0] + 0.2 * log_p.mean(1))
    torch.testing.assert_close(ctx.fit(logits), by_hand)
    torch.testing.assert_close(ctx.cross_entropy(logits), -log_p.gather(1, ctx.y[:, None])[:, 0])
    assert train(plan_of("label_smoothing=0.1", "epochs=1"), RunDir(tmp_path / "run")).epochs == 1
    with pytest.raises(UsageError, match=r"label_smoothing = 0\.1 has no effect on objective 'sovr'"):
        train(plan_of("label_smoothing=0.1", "objective.params.m=100"), RunDir(tmp_path / "other"))


def test_a_training_limit_keeps_the_validation_samples_and_the_proportions():
    whole, part = plan_of(), plan_of("train_limit=100")
    assert len(part.train) == 100
    assert torch.equal(part.validation.ids, whole.validation.ids)
    assert set(part.train.ids.tolist()) < set(whole.train.ids.tolist())
    assert part.train.labels.bincount().tolist() == pytest.approx([10] * 10, abs=1)


def test_extra_data_is_mixed_into_every_batch_and_stated(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "more.npz", image=images, label=np.arange(300) % 10)
    extra = f"extra.dataset=npz:{tmp_path / 'more.npz'}"
    plan = plan_of(extra, "extra.fraction=0.25", "epochs=1", "train_limit=600")
    assert plan.extra == 300
    assert plan.steps_per_epoch == 3
    for rows in batches(plan, 0):
        assert int((rows >= 600).sum()) == 64
    result = train(plan, RunDir(tmp_path / "run"))
    assert json.loads((result.path / "best/config.json").read_text())["training"]["extra_data"] is True
    assert plan.identity["data_sha256"] != plan_of("train_limit=600").identity["data_sha256"]


def test_extra_data_may_not_hold_the_validation_samples():
    with pytest.raises(UsageError, match=r"extra data 'Digits' holds 143 images that are held out for validation"):
        plan_of("extra.dataset=digits")


# Precision and layout


@pytest.mark.parametrize(
    ("assignment", "tolerance"),
    [("precision=bfloat16", 0.05), ("channels_last=true", 1e-5), ("precision=float64", 1e-5)],
)
def test_network_runs_the_same_model_another_way(assignment: str, tolerance: float):
    plan = normed_plan(assignment)
    model = plan.build_model().eval()
    x = plan.train.images(slice(0, 32)).to(plan.dtype).requires_grad_()
    logits = Network(model, plan.config)(x)
    assert logits.dtype == plan.dtype
    plain = copy.deepcopy(model).float().to(memory_format=torch.contiguous_format)
    expected = plain(x.detach().float())
    difference = (logits - expected).detach()
    assert float(difference.norm() / expected.detach().norm()) < tolerance
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, plan.train.labels[:32]), x)
    assert gradient.dtype == plan.dtype
    exact = x.detach().float().requires_grad_()
    (reference,) = torch.autograd.grad(nn.functional.cross_entropy(plain(exact), plan.train.labels[:32]), exact)
    assert int(((gradient == 0) & (reference != 0)).sum()) == 0  # a zero gradient would weaken the attack silently
    agreement = float((gradient.sign() == reference.sign()).float().mean())
    assert agreement > (0.9 if assignment == "precision=bfloat16" else 0.999)


@pytest.mark.parametrize("assignment", ["precision=bfloat16", "precision=float64", "channels_last=true"])
def test_any_precision_trains_resumes_exactly_and_saves_float32(assignment: str, tmp_path: Path):
    plan = plan_of(assignment, "epochs=2", "objective.name=at")
    whole = train(plan, RunDir(tmp_path / "whole"))
    train(plan, RunDir(tmp_path / "halves"), stop_after=1)
    train(plan, RunDir(tmp_path / "halves"))
    saved = [(tmp_path / run / "last/model.safetensors").read_bytes() for run in ("whole", "halves")]
    assert saved[0] == saved[1]
    assert whole.history[-1]["val_clean"] > 0.1
    state = load_model(str(tmp_path / "whole/last"), None, (1, 8, 8), 10).module.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_a_compiled_network_takes_the_same_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced; needs no C++ compiler
    states = []
    for compiled in ("false", "true"):
        plan = plan_of(f"compile={compiled}", "objective.name=at", "awp.gamma=0.01")
        state = begin(plan)
        state.model.train()
        train_step(plan, state, 0, torch.arange(32))
        states.append(state.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)


# Alarms


def rows(*scores: tuple[float, float]) -> list[dict[str, float]]:
    return [{"epoch": i + 1, "val_pgd": pgd, "val_fgsm": fgsm} for i, (pgd, fgsm) in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "kinds"),
    [
        ([(0.30, 0.35), (0.40, 0.45), (0.39, 0.45), (0.45, 0.5)], []),
        ([(0.40, 0.45), (0.01, 0.80)], ["catastrophic overfitting in epoch 2"]),
        ([(0.40, 0.45), (0.01, 0.02)], ["robust accuracy collapsed in epoch 2"]),
        ([(0.40, 0.45), (0.10, 0.80), (0.00, 0.90)], ["catastrophic overfitting in epoch 2"]),
        ([(0.22, 0.3), (0.10, 0.15)], ["robust accuracy collapsed in epoch 2"]),
        ([(0.15, 0.2), (0.06, 0.1)], []),
        ([(0.6, 0.7), (0.3, 0.35), (0.1, 0.7)], ["robust accuracy collapsed in epoch 2", "catastrophic overf"]),
    ],
)
def test_alarms_name_the_first_collapse_of_each_kind(scores: list[tuple[float, float]], kinds: list[str]):
    found = alarms(rows(*scores))
    assert len(found) == len(kinds)
    for sentence, kind in zip(found, kinds, strict=True):
        assert sentence.startswith(kind)


def test_an_alarm_is_logged_and_stays_with_the_earlier_best_model(tmp_path: Path):
    scores = iter([Scores(0.5, 0.4, 0.45), Scores(0.6, 0.01, 0.7), Scores(0.7, 0.02, 0.7)])
    told: list[str] = []
    plan = plan_of("epochs=3")
    train(plan, RunDir(tmp_path / "run"), validate=lambda *_: next(scores), on_event=lambda kind, _: told.append(kind))
    assert told.count("alarm") == 1
    logged = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (event,) = [line for line in logged if line["event"] == "alarm"]
    assert event["epoch"] == 2
    assert "from 40.0% (epoch 1) to 1.0%" in event["alarm"]
    for name in ("best", "last"):
        training = load_model(str(tmp_path / "run" / name), None, (1, 8, 8), 10).training
        assert training["alarms"] == [event["alarm"]]
        (finding,) = training_alarms(training)
        assert finding.severity == "warning"
        assert event["alarm"] in finding.message
    assert json.loads((tmp_path / "run/best/config.json").read_text())["training"]["epoch"] == 1


def test_adversarial_training_that_collapses_raises_the_alarm(tmp_path: Path):
    # A learning rate thirty times too high from two thirds of the training on, clipped so that nothing overflows.
    spike = "schedule.points=[[0, 1], [0.65, 1], [0.7, 30], [1, 30]]"
    training = ("objective.name=at", "epochs=12", "batch_size=64", "optimizer.momentum=0.5", "clip_grad_norm=1")
    attack = ("adversary.steps=3", "validation.steps=5", "device=cpu", "threads=1", "augment=false")
    settings = (*training, *attack, "schedule.name=linear", spike)
    plan = prepare(resolve(TrainConfig, None, settings, {}))
    with suppress(RobustevalError):  # it may end up answering one class, which stops it
        train(plan, RunDir(tmp_path / "run"))
    logged = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    told = [line["alarm"] for line in logged if line["event"] == "alarm"]
    assert told
    assert told[0].startswith("robust accuracy collapsed in epoch")
    assert json.loads((tmp_path / "run/best/config.json").read_text())["training"]["alarms"] == told


def test_single_step_training_that_overfits_catastrophically_raises_the_alarm(tmp_path: Path):
    # FGSM without a random start on a large ball overfits within 26 epochs for each of the seeds 0 to 4.
    data = ("dataset=fashion_mnist", f"data_dir={shared('fashion-mnist')}", "train_limit=2000", "validation.size=100")
    fgsm = ("objective.name=at", "adversary.steps=1", "adversary.start=none", "eps=0.2", "adversary.step_size=0.2")
    training = ("epochs=26", "batch_size=50", "model.params.width=32", "schedule.milestones=[]", "augment=false")
    rest = ("optimizer.weight_decay=0", "validation.steps=10", "device=cpu", "threads=1", "seed=2")
    plan = prepare(resolve(TrainConfig, None, (*data, *fgsm, *training, *rest), {}))
    told: list[str] = []

    def listen(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "alarm":
            told.append(fields["alarm"])

    while not any(alarm.startswith("catastrophic overfitting in epoch") for alarm in told):
        result = train(plan, RunDir(tmp_path / "run"), on_event=listen, stop_after=1)
        assert result.status == "stopped", "no alarm in 26 epochs"
    assert json.loads((tmp_path / "run/last/config.json").read_text())["training"]["alarms"] == told


@pytest.mark.parametrize("stated", [None, "text", 7, [1, None], {"a": 1}])
def test_a_hostile_card_raises_no_alarm(stated: Any):
    assert training_alarms({"alarms": stated}) == []


def test_alone_is_the_default_team():
    assert plan_of().team == ALONE
