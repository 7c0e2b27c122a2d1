"""Recipes: every one resolves, builds and keeps its source's learning rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, one_sentence

from robusteval.errors import UsageError
from robusteval.models.io import ARCHITECTURES
from robusteval.settings import resolve
from robusteval.threat import ThreatModel
from robusteval.training.config import TrainConfig
from robusteval.training.cost import passes_per_step
from robusteval.training.objective import OBJECTIVES
from robusteval.training.plan import prepare
from robusteval.training.recipes import describe_recipes, load_recipe, recipe_files
from robusteval.training.schedule import midpoint

NAMES = list(recipe_files())
STEPS = 383
"""Steps of 128 through 49 000 images."""

# Recipe -> epoch (from 0) -> the official learning rate, where it is constant within epochs.
RATES: dict[str, dict[int, float]] = {
    "unified": {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 199: 0.001},
    "at-rice2020": {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 199: 0.001},
    "at-madry2018": {0: 0.1, 101: 0.1, 103: 0.01, 152: 0.01, 154: 0.001, 204: 0.001},
    "trades-zhang2019": {0: 0.1, 73: 0.1, 74: 0.01, 75: 0.01},
    "mart-wang2020": {0: 0.01, 73: 0.01, 74: 1e-3, 88: 1e-3, 89: 1e-4, 98: 1e-4, 99: 1e-5, 119: 1e-5},
    "mma-ding2020": {0: 0.3, 55: 0.3, 57: 0.09, 84: 0.09, 86: 0.03, 112: 0.03, 114: 0.009, 141: 0.009},
    "gairat-zhang2021": {0: 0.1, 58: 0.1, 59: 0.01, 88: 0.01, 89: 1e-3, 108: 1e-3, 109: 5e-4, 119: 5e-4},
    "mail-liu2021": {0: 0.01, 74: 0.01, 75: 1e-3, 89: 1e-3, 90: 1e-4, 99: 1e-4, 100: 1e-5, 119: 1e-5},
    "at-awp-wu2020": {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 199: 0.001},
    "trades-awp-wu2020": {0: 0.1, 98: 0.1, 99: 0.01, 148: 0.01, 149: 0.001, 199: 0.001},
    "swa-chen2021": {0: 0.1, 49: 0.1, 50: 0.01, 149: 0.01, 150: 0.001, 199: 0.001},
    "ibp-shi2021": {0: 5e-4, 119: 5e-4, 120: 1e-4, 139: 1e-4, 140: 2e-5, 159: 2e-5},
    "crown-ibp-zhang2020": {0: 5e-4, 2599: 5e-4, 2600: 5e-5, 3039: 5e-5, 3040: 5e-6, 3199: 5e-6},
    "sabr-mueller2023": {0: 5e-4, 139: 5e-4, 140: 1e-4, 159: 1e-4, 160: 2e-5, 179: 2e-5},
    "mtl-ibp-depalma2024": {0: 5e-4, 179: 5e-4, 180: 1e-4, 219: 1e-4, 220: 2e-5, 259: 2e-5},
    "gaussian-cohen2019": {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001},
    "smoothadv-salman2019": {0: 0.1, 49: 0.1, 50: 0.01, 99: 0.01, 100: 0.001, 149: 0.001},
    "consistency-jeong2020": {0: 0.1, 49: 0.1, 50: 0.01, 99: 0.01, 100: 0.001, 149: 0.001},
}
# Recipe -> the epochs, from 0, in which the ball begins to grow and is first at its full size.
RAMPS = {
    "ibp-shi2021": (1, 81),
    "crown-ibp-zhang2020": (320, 1921),
    "sabr-mueller2023": (1, 82),
    "mtl-ibp-depalma2024": (1, 81),
}
SMOOTHED = {"gaussian-cohen2019", "smoothadv-salman2019", "consistency-jeong2020"}
# Recipe -> fraction of the training -> the official learning rate, where it moves with every step or epoch.
MOVING: dict[str, dict[float, float]] = {
    "seat-wang2022": {0.0: 0.01, 1 / 3: 0.01, 0.5: 0.0055, 2 / 3: 0.001, 5 / 6: 0.00055, 1.0: 0.0001},
    "fgsm-rs-wong2020": {0.0: 0.0, 0.25: 0.1, 0.5: 0.2, 0.75: 0.1, 1.0: 0.0},
    "n-fgsm-dejorge2022": {0.0: 0.0, 0.25: 0.1, 0.5: 0.2, 0.75: 0.1, 1.0: 0.0},
    "trades-extra": {0.0: 0.0, 0.0125: 0.1, 0.025: 0.2, 0.5125: 0.1, 1.0: 0.0},
    "smoke": {0.0: 0.0, 0.4: 0.05, 1.0: 0.0},
}


def resolved(name: str, *assignments: str, **flags: Any) -> TrainConfig:
    return resolve(TrainConfig, None, assignments, flags, load_recipe(name).settings)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves_and_its_parts_build(name: str) -> None:
    recipe, config = load_recipe(name), resolved(name)
    assert recipe.title
    assert recipe.notes.endswith(".")
    assert name == name.lower().replace("_", "-")
    OBJECTIVES.build(config.objective.name, config.objective.params)
    ARCHITECTURES.build(config.model.name, config.model.params)
    if name != "smoke":
        assert config.dataset == "cifar10"
        assert config.eps in (("0.25", "255/256") if name in SMOOTHED else ("8/255", "0.031"))
        assert ThreatModel.parse(config.norm, config.eps).label == config.eps
        assert config.augment


@pytest.mark.parametrize("name", NAMES)
def test_the_official_learning_rates(name: str) -> None:
    config = resolved(name)
    base, scale, steps = config.optimizer.lr, config.schedule.scale, config.epochs * STEPS
    assert (name in RATES) != (name in MOVING), f"the official learning rates of '{name}' belong in this test"
    for epoch, rate in RATES.get(name, {}).items():
        ends = [base * scale(midpoint(step, steps)) for step in (epoch * STEPS, (epoch + 1) * STEPS - 1)]
        assert ends == pytest.approx([rate, rate], rel=1e-9), f"epoch {epoch}"
    for fraction, rate in MOVING.get(name, {}).items():
        assert base * scale(fraction) == pytest.approx(rate, rel=1e-9, abs=1e-12), f"at {fraction}"


def test_the_official_numbers_that_set_methods_apart() -> None:
    configs = {name: resolved(name) for name in NAMES}
    decay = {name: config.optimizer.weight_decay for name, config in configs.items()}
    assert {decay[name] for name in ("mart-wang2020", "mail-liu2021", "seat-wang2022")} == {3.5e-3}
    assert {decay[name] for name in ("trades-zhang2019", "mma-ding2020", "gairat-zhang2021", "at-madry2018")} == {2e-4}
    train_mode = {name for name, config in configs.items() if config.adversary.bn_mode == "train"}
    assert train_mode == {
        *("at-rice2020", "at-madry2018", "at-awp-wu2020", "swa-chen2021", "fgsm-rs-wong2020", "n-fgsm-dejorge2022")
    }
    assert configs["at-awp-wu2020"].awp.gamma == 0.01
    assert configs["trades-awp-wu2020"].awp.gamma == 0.005
    swa = configs["swa-chen2021"]
    assert [(epoch + 1) / swa.epochs > swa.average.start for epoch in (54, 55)] == [False, True]
    mma = configs["mma-ding2020"].objective.params
    assert (mma["d_max"] * 8 / 255, mma["d_min"] * 8 / 255) == pytest.approx((32 / 255, 0.005))


@pytest.mark.parametrize(("name", "epochs"), RAMPS.items())
def test_the_official_ramps(name: str, epochs: tuple[int, int]) -> None:
    config = resolved(name)
    params, steps = config.objective.params, config.epochs * STEPS
    assert [params[key] * steps for key in ("warmup", "ramp")] == pytest.approx([each * STEPS for each in epochs])


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_takes_a_step_on_other_data(name: str) -> None:
    over = {"dataset": "digits", "model.name": "small_cnn", "device": "cpu"}
    plan = prepare(resolved(name, "validation.size=100", **over))
    assert plan.config.epochs == resolved(name).epochs
    without_attack = (*RAMPS, *SMOOTHED) if name not in ("sabr-mueller2023", "smoothadv-salman2019") else ()
    assert passes_per_step(plan).backward >= (1 if name in without_attack else 2)


def test_a_dry_run_on_other_data(cli: Cli) -> None:
    over = ("--dataset", "digits", "--model", "small_cnn", "--set", "validation.size=100", "--json")
    done = cli("train", "--recipe", "gairat-zhang2021", *over, "--dry-run")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["settings"]["dataset"], record["settings"]["epochs"]) == ("digits", 120)
    assert record["cost"]["backward"] == 11
    assert load_recipe("gairat-zhang2021").notes.splitlines()[0] in done.stderr


def test_recipe_is_weaker_than_config_set_and_flags(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("batch_size = 64\nseed = 1\n[optimizer]\nlr = 0.3\n")
    over = ("--dataset", "digits", "--model", "small_cnn", "--json", "--dry-run")
    given = ("--config", "mine.toml", "--set", "optimizer.lr=0.2", "--set", "seed=2", "--seed", "3")
    settings = json.loads(cli("train", "--recipe", "mart-wang2020", *given, *over).stdout)["settings"]
    assert settings["epochs"] == 120
    assert settings["optimizer"]["weight_decay"] == 3.5e-3
    assert (settings["batch_size"], settings["optimizer"]["lr"], settings["seed"]) == (64, 0.2, 3)


def test_another_plugin_leaves_the_parameters_of_the_recipe_s_behind() -> None:
    other = resolved("trades-zhang2019", **{"objective.name": "at"})
    assert other.objective.params == {}
    assert other.model.params == {"depth": 34, "width": 10}
    own = resolved("trades-zhang2019", "objective.params.m=20", **{"objective.name": "sovr"})
    assert own.objective.params == {"m": 20}
    same = resolved("mail-liu2021", 'objective.params.form="trades"', **{"objective.name": "mail"})
    assert same.objective.params["form"] == "trades"
    assert "begin" in same.objective.params


def test_an_unknown_recipe_and_one_for_a_run_that_goes_on(cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown recipe .trades_zhang2019.\. Did you mean .trades-zhang2019."):
        load_recipe("trades_zhang2019")
    done = cli("train", "--recipe", "unifed")
    assert done.returncode == 2
    assert "Did you mean 'unified'?" in done.stderr
    assert one_sentence(done.stderr)
    assert "drop --recipe" in cli("train", "--resume", "run", "--recipe", "unified").stderr


def test_recipes_are_listed(cli: Cli) -> None:
    assert json.loads(cli("list", "recipes", "--json").stdout) == {"recipes": describe_recipes()}


def test_smoke_trains(cli: Cli, tmp_path: Path) -> None:
    done = cli("train", "--recipe", "smoke", "--epochs", "1", "--out", "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
