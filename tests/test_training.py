"""The training frame: schedules, the inner adversary, exact resume, and every way a run can stop."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robusteval.errors import RobustevalError, UsageError
from robusteval.models.io import load_model
from robusteval.runs import RunDir
from robusteval.settings import resolve
from robusteval.threat import ThreatModel
from robusteval.training import loop
from robusteval.training.adversary import Adversary
from robusteval.training.augment import augment
from robusteval.training.config import TrainConfig
from robusteval.training.cost import passes_per_step
from robusteval.training.epoch import batches
from robusteval.training.loop import train
from robusteval.training.objective import Loss, StepContext
from robusteval.training.plan import Plan, prepare
from robusteval.training.schedule import Schedule, midpoint
from robusteval.training.validate import Scores, validate

SMALL = (
    "epochs=4", "batch_size=256", "adversary.steps=2", "validation.steps=2", "device=cpu", "threads=1",
    "model.params.width=2", "model.params.hidden=8",
)  # fmt: skip


def plan_of(*assignments: str) -> Plan:
    return prepare(resolve(TrainConfig, None, (*SMALL, *assignments), {}))


# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), {0.0: 1, 0.49: 1, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01, 1.0: 0.01}),
        (Schedule(warmup=0.2), {0.0: 0, 0.05: 0.25, 0.2: 1, 0.5: 0.1}),
        (Schedule(milestones=(), factor=0.5), {0.0: 1, 0.99: 1}),
        (Schedule(name="cosine"), {0.0: 1, 0.5: 0.5, 1.0: 0, 1 / 3: 0.75}),
        (Schedule(name="cosine", warmup=0.2), {0.1: 0.5, 0.2: 1, 0.6: 0.5, 1.0: 0}),
        (Schedule(name="onecycle"), {0.0: 0, 0.1: 0.25, 0.4: 1, 0.7: 0.5, 1.0: 0}),
        (Schedule(name="onecycle", peak=0.0), {0.0: 1, 0.25: 0.75}),
    ],
)
def test_schedules_have_their_closed_forms(schedule: Schedule, expected: dict[float, float]):
    for t, value in expected.items():
        assert schedule.scale(t) == pytest.approx(value, abs=1e-12), t


def test_no_step_has_learning_rate_zero():
    for name in ("multistep", "cosine", "onecycle"):
        schedule = Schedule(name=name, warmup=0.5)
        assert min(schedule.scale(midpoint(step, 10)) for step in range(10)) > 0


# The inner adversary


class Linear(nn.Module):
    """Binary logits (0, w.x) per image."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", "0.1"), ("L2", "0.5"), ("L1", "2")])
@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_adversary_stays_in_the_ball_and_finds_the_optimum_of_a_linear_model(norm: str, eps: str, start: Any):
    rng = torch.Generator().manual_seed(0)
    threat, weight = ThreatModel.parse(norm, eps), torch.randn(16, generator=rng)
    weight[3] = 4.0  # the coordinate that L1 puts everything on
    model, x = Linear(weight), 0.4 + 0.2 * torch.rand(5, 1, 4, 4, generator=rng)
    x[:, 0, 0, 3] = 0.0
    attack = Adversary(steps=40, start=start).bind(model, x, threat, torch.Generator().manual_seed(1))
    x_adv = attack(lambda logits: logits[:, 1])
    assert threat.contains(x, x_adv).all()
    gain = (x_adv - x).flatten(1) @ weight.detach()
    room = {"Linf": 0.1 * weight.abs().sum(), "L2": 0.5 * weight.norm(), "L1": 4.0}[norm]
    assert (gain > 0.97 * float(room) if norm != "L1" else gain >= 4.0 - 1e-5).all()
    assert model.weight.grad is None
    assert model.weight.requires_grad


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
def test_adversary_restores_each_module_and_only_train_mode_moves_batch_statistics(bn_mode: Any):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, 2))
    model.train()[3].eval()
    modes = [part.training for part in model.modules()]
    attack = Adversary(steps=3, bn_mode=bn_mode).bind(
        model, torch.rand(4, 1, 8, 8), ThreatModel.parse("Linf", "0.1"), torch.Generator()
    )
    attack(lambda logits: logits[:, 0])
    assert [part.training for part in model.modules()] == modes
    assert int(model[1].num_batches_tracked) == (3 if bn_mode == "train" else 0)
    assert int(model[3].num_batches_tracked) == 0


def test_step_size_is_a_quarter_of_eps_or_what_the_user_says():
    threat = ThreatModel.parse("Linf", "8/255")
    assert Adversary().size(threat) == pytest.approx(2 / 255)
    assert Adversary(step_size="1/255").size(threat) == pytest.approx(1 / 255)
    assert resolve(TrainConfig, None, ["adversary.step_size=0.01"], {}).adversary.step_size == "0.01"
    with pytest.raises(UsageError, match=r"adversary\.step_size = 'fast' is not allowed"):
        resolve(TrainConfig, None, ["adversary.step_size=fast"], {})


# Data


def test_augmentation_shifts_and_mirrors_each_image_by_itself():
    x = torch.arange(1.0, 65).view(1, 1, 8, 8).repeat(400, 1, 1, 1)
    padded = nn.functional.pad(x[0, 0], (2, 2, 2, 2))
    crops = [padded[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    allowed = {tuple(crop.flip(-1).flatten().tolist() if flip else crop.flatten().tolist()): (k, flip)
               for k, crop in enumerate(crops) for flip in (False, True)}  # fmt: skip
    moved = augment(x, 2, True, torch.Generator().manual_seed(0))
    seen = {allowed[tuple(image.flatten().tolist())] for image in moved}
    assert seen == {(k, flip) for k in range(25) for flip in (False, True)}
    assert torch.equal(augment(x, 0, False, torch.Generator()), x)


def test_every_sample_is_seen_once_per_epoch_in_a_new_order():
    plan = plan_of()
    first, second = (torch.cat(list(batches(plan, epoch))) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, torch.arange(len(plan.train)))
    assert set(plan.train.ids.tolist()).isdisjoint(plan.validation.ids.tolist())


def test_a_last_batch_of_one_sample_is_dropped():
    plan = plan_of("validation.size=157", "batch_size=639")  # trains on 1280 = 2 * 639 + 2
    assert [len(rows) for rows in batches(plan, 0)] == [639, 639, 2]
    plan = plan_of("validation.size=158", "batch_size=639")  # one less
    assert [len(rows) for rows in batches(plan, 0)] == [639, 639]


def test_runs_with_different_seeds_are_selected_on_the_same_samples():
    assert torch.equal(plan_of("seed=0").validation.ids, plan_of("seed=1").validation.ids)
    assert not torch.equal(plan_of().validation.ids, plan_of("validation.seed=1").validation.ids)


def test_plan_states_every_hyper_parameter_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    identity = plan_of("objective.params.m=20").identity
    assert torch.equal(torch.get_rng_state(), state)
    assert identity["objective"] == {"name": "sovr", "params": {"m": 20.0, "lam": 0.4}}
    assert identity["model"] == {"name": "small_cnn", "params": {"width": 2, "hidden": 8}}
    assert (identity["norm"], identity["eps"], identity["validation"]["size"]) == ("Linf", "0.1", 143)
    assert not identity.keys() & {"device", "threads", "data_dir", "download"}


def test_tiny_batches_run_on_one_thread_unless_told_otherwise():
    plan = prepare(TrainConfig(device="cpu"))
    assert plan.threads == 1
    assert replace(plan, config=plan.config.model_copy(update={"batch_size": 2048})).threads is None
    assert replace(plan, config=plan.config.model_copy(update={"threads": 2})).threads == 2


def test_cost_is_counted_in_network_passes():
    for name, forward, backward in (("at", 3, 3), ("sovr", 3, 3), ("standard", 1, 1)):
        passes = passes_per_step(plan_of(f"objective.name={name}"))
        assert (passes.forward, passes.backward) == (forward, backward), name


# Validation


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.eye(10)[3].repeat(len(x), 1) + 0 * x.sum()


def test_validation_of_a_constant_model_is_the_share_of_its_class():
    plan = plan_of()
    share = float((plan.validation.labels == 3).float().mean())
    assert validate(plan, Constant()) == Scores(*[pytest.approx(share)] * 3)


class Flipping(nn.Module):
    """Answers 3 on images of the data set, whose levels are sixteenths, and 4 on anything else."""

    def forward(self, x: Tensor) -> Tensor:
        clean = ((x * 16) % 1 == 0).flatten(1).all(1)
        return torch.eye(10)[torch.where(clean, 3, 4)] + 0 * x.sum()


def test_a_sample_that_only_the_attack_puts_right_does_not_count_as_robust():
    plan = plan_of()
    share = float((plan.validation.labels == 3).float().mean())
    # FGSM has no gradient to follow and stays where it is.
    assert validate(plan, Flipping()) == Scores(pytest.approx(share), 0.0, pytest.approx(share))


# The loop


@dataclass(frozen=True)
class Remembering:
    """An objective whose loss depends on what it remembers of each sample, as importance weighting would."""

    def __call__(self, ctx: StepContext) -> Loss:
        weights = ctx.per_sample("weight", 1.0)
        logits = ctx.model(ctx.attack(ctx.cross_entropy))
        values = ctx.cross_entropy(logits)
        value = (weights[ctx.ids] * values).mean()
        weights[ctx.ids] = 0.5 * weights[ctx.ids] + 0.5 * values.detach().clamp(max=2.0)
        noise = torch.rand(1, generator=ctx.rng).item()
        return Loss(value * (1 + 0.1 * noise), logits, {"noise": noise})


def stored(folder: Path) -> dict[str, bytes]:
    names = ("best/model.safetensors", "best/config.json", "last/model.safetensors", "history.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("decay", [None, 0.9])
def test_four_epochs_equal_two_and_two_more_bit_for_bit(tmp_path: Path, decay: float | None):
    average = ("average.name=ema", f"average.decay={decay}") if decay else ()
    plan = replace(plan_of(*average), objective=Remembering())
    whole = train(plan, RunDir(tmp_path / "whole"))
    first = train(plan, RunDir(tmp_path / "halves"), stop_after=2)
    torch.rand(11)
    second = train(plan, RunDir(tmp_path / "halves"), stop_after=2)
    assert (whole.status, first.status, second.status) == ("complete", "stopped", "complete")
    assert whole.history == second.history
    assert stored(tmp_path / "whole") == stored(tmp_path / "halves")
    content = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "halves")]
    assert torch.equal(*(each["objective"]["weight"] for each in content))
    for key in ("model", "average"):
        tensors = [list((each[key] or {}).values()) for each in content]
        assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_moving_average_is_what_is_validated_and_saved(tmp_path: Path):
    plan = plan_of("average.name=ema", "average.decay=0.9", "epochs=1")
    train(plan, RunDir(tmp_path / "run"))
    content = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    saved = load_model(str(tmp_path / "run/last"), None, (1, 8, 8), 10).module.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in content["average"].items())
    assert not torch.equal(content["average"]["backbone.0.weight"], content["model"]["backbone.0.weight"])


def test_a_kill_between_checkpoint_and_model_files_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of("epochs=1")
    train(plan, RunDir(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(plan, RunDir(tmp_path / "cut"))
    assert not (tmp_path / "cut/last").exists()
    train(plan, RunDir(tmp_path / "cut"))
    assert stored(tmp_path / "whole") == stored(tmp_path / "cut")


def test_a_finished_run_says_so_and_changes_nothing(tmp_path: Path):
    plan = plan_of("epochs=1")
    train(plan, RunDir(tmp_path / "run"))
    before = stored(tmp_path / "run")
    again = train(plan, RunDir(tmp_path / "run"))
    assert again.status == "already complete"
    assert stored(tmp_path / "run") == before


def test_training_leaves_global_state_as_found(tmp_path: Path):
    torch.rand(3)
    rng, flags = torch.get_rng_state(), (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads())
    cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled)
    train(plan_of("epochs=1"), RunDir(tmp_path / "run"))
    assert torch.equal(torch.get_rng_state(), rng)
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == flags
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled) == cudnn


def test_best_is_the_first_of_the_epochs_that_validate_equally(tmp_path: Path):
    scores = iter(Scores(clean, pgd, 0.5) for clean, pgd in ((0.5, 0.1), (0.6, 0.3), (0.7, 0.3), (0.7, 0.3)))
    result = train(plan_of(), RunDir(tmp_path / "run"), validate=lambda *_: next(scores))
    assert result.best["epoch"] == 3
    card = json.loads((tmp_path / "run/best/config.json").read_text())
    assert (card["training"]["epoch"], card["training"]["validation"]["pgd"]) == (3, 0.3)
    assert json.loads((tmp_path / "run/last/config.json").read_text())["training"]["epoch"] == 4


def test_events_tell_the_story(tmp_path: Path):
    told: list[str] = []
    train(plan_of("epochs=2"), RunDir(tmp_path / "run"), on_event=lambda kind, _: told.append(kind), stop_after=1)
    assert told == ["started", *["step"] * 6, "epoch", "ended"]
    train(plan_of("epochs=2"), RunDir(tmp_path / "run"), on_event=lambda kind, _: told.append(kind))
    logged = [json.loads(line)["event"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert logged == ["started", "epoch", "ended", "resumed", "epoch", "ended"]
    assert json.loads((tmp_path / "run/environment.json").read_text())["device"] == "cpu"


@dataclass(frozen=True)
class Watching:
    """An objective that notes how its inner attack starts."""

    starts: list[Tensor]

    def __call__(self, ctx: StepContext) -> Loss:
        self.starts.append((ctx.attack(ctx.cross_entropy, steps=0) - ctx.x)[0])
        logits = ctx.model(ctx.x)
        return Loss(ctx.cross_entropy(logits).mean(), logits)


def test_every_step_of_every_epoch_draws_its_own_noise(tmp_path: Path):
    starts: list[Tensor] = []
    train(replace(plan_of("epochs=2"), objective=Watching(starts)), RunDir(tmp_path / "run"))
    assert len(starts) == 12
    for a, b in itertools.combinations(starts, 2):
        unclipped = (a != 0) & (b != 0) & (a.sign() == b.sign())
        assert (a - b)[unclipped].abs().median() > 1e-3


# How a run can stop


@dataclass(frozen=True)
class Breaking:
    """An objective whose value, or whose gradient, is not a number after some fraction of the training."""

    after: float = 0.5
    gradient: bool = False

    def __call__(self, ctx: StepContext) -> Loss:
        logits = ctx.model(ctx.x)
        value = ctx.cross_entropy(logits).mean()
        if ctx.progress > self.after:
            value = value + (logits * 0).sum().sqrt() if self.gradient else value * math.nan
        return Loss(value, logits)


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (Breaking(), r"the loss is nan in epoch 2, step 1; .* Last good checkpoint: epoch 1 in '.*checkpoint.pt'"),
        (
            Breaking(after=0.95, gradient=True),  # in the last step alone, so that no later loss can show it
            r"weights are not finite after epoch 2; .*optimizer\.lr than 0\.1\. Last good checkpoint: epoch 1",
        ),
    ],
)
def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(tmp_path: Path, plugin: Any, said: str):
    plan = replace(plan_of("epochs=2"), objective=plugin)
    with pytest.raises(RobustevalError, match=said):
        train(plan, RunDir(tmp_path / "run"))
    content = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert len(content["history"]) == 1
    assert all(value.isfinite().all() for value in content["model"].values())


@dataclass(frozen=True)
class Hopeless:
    """An objective whose model never learns and always answers class 0."""

    def __call__(self, ctx: StepContext) -> Loss:
        logits = ctx.model(ctx.x)
        return Loss(0 * logits.sum(), torch.eye(10)[0].repeat(len(ctx.x), 1))


def test_a_collapsed_run_stops_once_it_had_its_chance(tmp_path: Path):
    plan = replace(plan_of("epochs=18"), objective=Hopeless())
    with pytest.raises(RobustevalError, match=r"collapsed: after epoch 6 of 18 .* Linf 0\.1 may be too strong"):
        train(plan, RunDir(tmp_path / "run"), validate=lambda *_: Scores(0.1, 0.0, 0.0))
    learning = train(plan, RunDir(tmp_path / "other"), validate=lambda *_: Scores(0.3, 0.0, 0.0), stop_after=7)
    assert learning.epochs == 7


def test_resuming_with_other_settings_names_the_field(tmp_path: Path):
    train(plan_of(), RunDir(tmp_path / "run"), stop_after=1)
    with pytest.raises(UsageError, match=r"started with optimizer\.lr = 0\.1, not 0\.2"):
        train(plan_of("optimizer.lr=0.2"), RunDir(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"objective\.params\.m = 40\.0, not 30\.0"):
        train(plan_of("objective.params.m=30"), RunDir(tmp_path / "run"))
    assert train(plan_of("threads=2"), RunDir(tmp_path / "run"), stop_after=1).epochs == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "pickle"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, damage: str):
    train(plan_of(), RunDir(tmp_path / "run"), stop_after=1)
    path = tmp_path / "run/checkpoint.pt"
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 255
    contents = {"truncated": data[:middle], "flipped": data, "empty": b"", "pickle": b"cos\nsystem\n(S'true'\ntR."}
    path.write_bytes(bytes(contents[damage]))
    with pytest.raises(
        RobustevalError, match=r"checkpoint '.*checkpoint\.pt' is damaged \(.*\); start over with --fresh"
    ):
        train(plan_of(), RunDir(tmp_path / "run"))


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("norm=L2", "Digits has no customary eps for L2; give --eps"),
        ("norm=L3", "unknown norm 'L3'"),
        ("eps=8", "eps '8' is above 1"),
        ("validation.size=1436", "leaves 1 of 1437 samples"),
        ("validation.size=5000", "validation split of 5000"),
        ("objective.name=sovrr", "Did you mean 'sovr'?"),
        ("optimizer.rl=1", "unknown setting 'optimizer.rl'"),
        ("schedule.name=step", "schedule.name = 'step' is not allowed"),
        ("precision=float16", "precision = 'float16' is not allowed"),
        ("optimizer.lr=nan", "optimizer.lr = nan is not allowed"),
        ("batch_size=1", "batch_size = 1 is not allowed"),
    ],
)
def test_impossible_settings_are_usage_errors(assignment: str, said: str):
    with pytest.raises(UsageError) as caught:
        plan_of(assignment)
    assert said in str(caught.value)
