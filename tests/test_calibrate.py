"""`calibrate`: two suites on the same samples."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import safetensors.torch
from conftest import Cli
from test_evaluation import finish, plan_for
from torch import Tensor, nn

from robusteval.certifiers.crown import Crown
from robusteval.cli.calibrate import command
from robusteval.comparison.calibrate import calibrate, reference, side_by_side
from robusteval.errors import SoundnessContradiction, UsageError
from robusteval.evaluation.assemble import CALIBRATION
from robusteval.evaluation.validate import read_report, reseal, validate, validator
from robusteval.models.io import state_digest
from robusteval.render._text import calibrated
from robusteval.render.html import HTML, is_current
from robusteval.report import Calibration, Search
from robusteval.runs import write_json
from robusteval.verdict import Certificate

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


@pytest.mark.parametrize("change", [{"queries": 10}, {"search": Search(precision="bfloat16")}])
def test_it_is_said_where_the_other_suite_ran_in_another_way(
    change: dict[str, Any], model_folder: Path, weak: Path, run: Path
) -> None:
    report = read_report(run)
    found = calibrate(plan_for(model_folder, suite=str(weak), limit=50), run, "quick", 5, 0, told)
    said = "quick ran as it does by itself: in float32, not compiled, without a budget of queries"
    assert said not in calibrated(found, report)
    assert said in calibrated(found, report.model_copy(update=change))


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
    assert is_current(folder)
    page = (folder / HTML).read_text()
    low, high = math.floor(stored["low"] * 10_000) / 100, math.ceil(stored["high"] * 10_000) / 100
    said = f"minus quick: {100 * stored['difference']:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
    assert all(text in page for text in ("Beside suite quick", said))
    assert stored["only_against_breaks"], "the case must be interesting"
    assert f"broken by quick alone: {', '.join(map(str, stored['only_against_breaks'][:20]))}" in page
    (folder / CALIBRATION).write_text(json.dumps(stored | {"difference": 0}))
    assert not is_current(folder), "the page must not show figures that the record no longer has"
    (folder / CALIBRATION).write_text("{}")
    assert any(CALIBRATION in problem for problem in validate(folder))
    said = cli("calibrate", str(folder), "--samples", "0")
    assert said.returncode == 2


def test_a_calibration_cut_off_before_its_page_is_mended_by_render(
    run: Path, tmp_path: Path, cli: Cli, model_folder: Path, weak: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("robusteval.render.documents.write_documents", stopped)
        arguments = [str(folder), "--samples", "20", "--against", "quick", "--seed", "1"]
        with pytest.raises((KeyboardInterrupt, click.Abort)):
            command.main(arguments, standalone_mode=False)
    assert validate(folder) == []
    assert not (folder / HTML).exists()
    assert cli("render", str(folder)).returncode == 0
    assert is_current(folder)
    assert "Beside suite quick" in (folder / HTML).read_text()


SIDES = ("suite", "against")
FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another suite by name": lambda r: r["suite"].update(name="standard"),
    "another suite by hash": lambda r: r["suite"].update(sha256="0" * 64),
    "more robust than right": lambda r: [r[side].update(robust=r[side]["robust"] + 50) for side in SIDES],
    "fewer robust than named": lambda r: [r[side].update(robust=0) for side in SIDES],
    "passes beyond numbers": lambda r: r["suite"].update(forward=10**400),
    "seconds beyond time": lambda r: r["against"].update(seconds=1e300),
    "another report": lambda r: r.update(report_sha256="0" * 64),
    "a better difference": lambda r: r.update(difference=0.0, low=0.0, high=0.0),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_calibration_is_not_valid(
    forgery: str, model_folder: Path, weak: Path, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    found = calibrate(plan_for(model_folder, suite=str(weak), limit=50), folder, "quick", 40, 3, told)
    record = found.model_dump(mode="json")
    write_json(folder / CALIBRATION, record)
    assert validate(folder) == [f"manifest.json does not list {CALIBRATION}"]
    reseal(folder, CALIBRATION)
    assert validate(folder) == []
    FORGERIES[forgery](record)
    write_json(folder / CALIBRATION, record)
    reseal(folder, CALIBRATION)
    assert any(CALIBRATION in problem for problem in validate(folder))


def test_a_damaged_report_is_refused(run: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "samples.jsonl").write_text("")
    done = cli("calibrate", str(folder))
    assert done.returncode == 1
    assert "not valid" in done.stderr


def test_another_model_is_refused(run: Path, tmp_path: Path, cli: Cli, model_folder: Path) -> None:
    """The report's own place now holds other weights: figures about them must not be sealed into it."""
    folder, other = tmp_path / "run", tmp_path / "net"
    shutil.copytree(run, folder)
    shutil.copytree(model_folder, other)
    state = safetensors.torch.load_file(other / "model.safetensors")
    state |= {key: value + 0.01 for key, value in state.items() if key.startswith("backbone")}
    safetensors.torch.save_file(state, other / "model.safetensors")
    card = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", {**card, "weights_sha256": state_digest(state)})
    done = cli("calibrate", str(folder), "--model", str(other), "--samples", "5", "--against", "quick")
    assert done.returncode == 1
    assert "not what the report" in done.stderr
    assert not (folder / CALIBRATION).exists()


def test_what_one_suite_proves_and_the_other_breaks_is_a_contradiction(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(self: Crown, model: nn.Module, x: Tensor, *rest: Any) -> list[Certificate]:
        return [Certificate(True, "")] * len(x)

    monkeypatch.setattr(Crown, "__call__", lie)
    plan = plan_for(model_folder, suite="rapid", limit=40)
    with pytest.raises(SoundnessContradiction, match="certified by suite 'rapid' and broken by suite 'quick'"):
        side_by_side(plan, reference(plan, "quick"), range(40), 40)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"report_sha256": "0" * 64}, "another report"),
        ({"difference": 0.5}, "does not follow from its counts"),
        ({"low": -0.9}, "does not follow from its counts"),
        ({"clean": 50}, "do not follow from its samples"),
        ({"only_suite_breaks": [999]}, "cannot be about"),
        ({"against": {"robust": 0}}, "only one suite breaks"),
        ({"kind": "other"}, "kind"),
    ],
)
def test_a_calibration_must_follow_from_its_counts(
    run: Path, model_folder: Path, weak: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    found = calibrate(plan_for(model_folder, suite=str(weak), limit=50), folder, str(weak), 20, 0, told)
    record = found.model_dump(mode="json")
    for key, value in change.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    write_json(folder / CALIBRATION, record)
    reseal(folder, CALIBRATION)
    assert any(said in problem for problem in validate(folder))
