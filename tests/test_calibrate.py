"""`calibrate`: two suites on the same samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Cli
from test_evaluation import finish, plan_for

from robusteval.comparison.calibrate import CALIBRATION, calibrate, reference, side_by_side
from robusteval.errors import UsageError
from robusteval.evaluation.validate import validate, validator
from robusteval.report import Calibration, Search

WEAK = """
title = "One step"
[[stages]]
name = "step"
attack = "pgd"
params = { steps = 1, step_size = 0.1 }
"""


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "weak.toml"
    path.write_text(WEAK)
    return path


@pytest.fixture(scope="module")
def run(model_folder: Path, weak: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "weak"
    finish(plan_for(model_folder, suite=str(weak), limit=50), folder)
    return folder


def told(done: int, name: str) -> None:
    pass


def test_a_weak_suite_is_shown_to_be_weak(model_folder: Path, weak: Path, run: Path) -> None:
    plan = plan_for(model_folder, suite=str(weak), limit=50)
    found = calibrate(plan, run, "quick", 40, 3, told)
    assert len(found.samples) == 40
    assert set(found.only_against_breaks) <= set(found.samples)
    assert found.suite.robust - found.against.robust == len(found.only_against_breaks) - len(found.only_suite_breaks)
    assert found.difference == pytest.approx((found.suite.robust - found.against.robust) / 40)
    assert found.low < found.difference < found.high
    assert len(found.only_against_breaks) > 0
    assert found.against.forward > found.suite.forward > 0
    assert found.suite.seconds > 0 < found.against.seconds


def test_the_seed_alone_chooses_the_samples(model_folder: Path, weak: Path, run: Path) -> None:
    plan = plan_for(model_folder, suite=str(weak), limit=50)
    first, again, other = (calibrate(plan, run, str(weak), 20, seed, told) for seed in (0, 0, 1))
    assert first.samples == again.samples != other.samples
    assert first.difference == 0
    assert first.only_suite_breaks == first.only_against_breaks == ()


def test_verdicts_are_those_of_the_run_and_the_suites_take_turns(model_folder: Path, run: Path) -> None:
    plan = plan_for(model_folder, suite="quick", limit=50)
    finish(plan, run.parent / "quick")
    rows = [json.loads(line) for line in (run.parent / "quick" / "samples.jsonl").read_text().splitlines()]
    order: list[str] = []
    sides = side_by_side(plan, reference(plan, "rapid"), range(10, 40), 15, lambda _, name: order.append(name))
    assert {row["id"]: row["verdict"] for row in rows[10:40]} == sides[0].verdicts
    assert order == ["quick", "rapid", "rapid", "quick"]


def test_the_other_suite_runs_as_it_does_by_itself(model_folder: Path) -> None:
    plan = plan_for(model_folder, precision="bfloat16", queries=10, eps="0.05,0.1")
    other = reference(plan, "standard")
    assert (other.config.search, other.config.queries, len(other.budgets)) == (Search(), None, 1)
    with pytest.raises(UsageError, match="another way"):
        reference(plan_for(model_folder, norm="L2", eps="0.5"), "smoothing")


def test_the_command_adds_to_the_report(run: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    done = cli("calibrate", str(folder), "--samples", "20", "--against", "quick", "--seed", "1", "--json")
    assert done.returncode == 0, done.stderr
    stored = json.loads((folder / CALIBRATION).read_text())
    assert json.loads(done.stdout) == stored
    assert list(validator("calibration").iter_errors(stored)) == []
    assert Calibration.model_validate(stored).seed == 1
    assert validate(folder) == []
    (folder / CALIBRATION).write_text("{}")
    assert any(CALIBRATION in problem for problem in validate(folder))
    said = cli("calibrate", str(folder), "--samples", "0")
    assert said.returncode == 2


def test_a_damaged_report_is_refused(run: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "samples.jsonl").write_text("")
    done = cli("calibrate", str(folder))
    assert done.returncode == 1
    assert "not valid" in done.stderr
