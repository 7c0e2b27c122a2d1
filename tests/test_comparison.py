"""`compare` and `analyze sweep`: the tables say what the runs say, survive kills and failures, and test correctly."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from conftest import PATIENCE, Cli, launch, one_sentence
from PIL import Image

from robusteval.cli import group
from robusteval.cli._study import folder as default_folder
from robusteval.comparison import run
from robusteval.comparison.cells import Cell, make_cells
from robusteval.comparison.config import CompareConfig, Contender, presets, source
from robusteval.comparison.figure import draw
from robusteval.comparison.heatmap import write_sweep
from robusteval.comparison.results import Result, _after_stages, read_result
from robusteval.comparison.run import finished_elsewhere
from robusteval.comparison.statistics import holm, paired, sign_flip, spread
from robusteval.comparison.sweep import FIGURES, Point, SweepConfig
from robusteval.comparison.table import Frame, Row, Table, build
from robusteval.comparison.work import check_suites
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.suite import load_suite
from robusteval.evaluation.validate import read_report
from robusteval.models.base import Classifier
from robusteval.models.io import load_folder
from robusteval.report import Report
from robusteval.runs import RunDir
from robusteval.settings import PluginSpec, resolve
from robusteval.threat import ThreatModel
from robusteval.training.config import TrainConfig
from robusteval.training.cost import Passes
from robusteval.training.objective import OBJECTIVES

TINY = (
    "--dataset", "digits", "--device", "cpu", "--jobs", "1", "--train-limit", "300", "--batch-size", "64",
    "--set", "train.adversary.steps=2", "--set", "train.validation.steps=2", "--set", "train.validation.size=50",
    "--set", "train.model.params.width=2", "--set", "train.model.params.hidden=16",
)  # fmt: skip
STUDY = ("compare", "--config", "mine.toml", "--epochs", "4", "--limit", "40", *TINY, "--out", "out")
MINE = """
title = "Mine"
suite = "cheap.toml"
full_suite = "more.toml"
objectives = ["at", { name = "sovr", label = "half", params = { m = 50 } }]
"""
CHEAP = """
title = "One cheap stage"
about = "For tests."
[[stages]]
name = "pgd-3"
attack = "pgd"
params = { steps = 3, loss = "ce" }
"""
MORE = (
    CHEAP
    + """
[[stages]]
name = "pgd-margin"
attack = "pgd"
params = { steps = 10, loss = "margin" }
"""
)


def settings(folder: Path, mine: str = MINE) -> None:
    for name, text in (("mine", mine), ("cheap", CHEAP), ("more", MORE)):
        (folder / f"{name}.toml").write_text(text)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nobody disturbed."""
    folder = tmp_path_factory.mktemp("study")
    settings(folder)
    with launch(folder, *STUDY, "--seeds", "2") as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    assert "at-s0: done" in err
    return folder / "out"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_values_are_those_of_the_runs_own_reports(study: Path):
    found = rows(study / "runs.csv")
    assert [(row["label"], row["seed"], row["suite"]) for row in found] == [
        ("at", "0", "more.toml"),
        ("at", "1", "cheap.toml"),
        ("half", "0", "more.toml"),
        ("half", "1", "cheap.toml"),
    ]
    for row in found:
        cell = study / f"{row['label']}-s{row['seed']}"
        full = row["suite"] == "more.toml"
        report = read_report(cell / ("evaluate-more" if full else "evaluate-cheap"))
        margins = json.loads((cell / "margins-best.json").read_text())
        last = json.loads((cell / "margins-last.json").read_text())
        history = json.loads((cell / "train/history.json").read_text())
        assert float(row["clean"]) == report.results.clean.rate == margins["clean_accuracy"]
        assert float(row["pgd-3"]) == (report.results.clean.count - report.stages[0].closed) / 40
        assert row["pgd-margin"] == (str(report.results.empirical.rate) if full else "")
        assert float(row["pgd"]) == margins["robust_accuracy"]
        assert float(row["margin_mean"]) == pytest.approx(np.mean(margins["adversarial"]))
        assert float(row["margin_median"]) == pytest.approx(np.median(margins["adversarial"]))
        assert (float(row["last_clean"]), float(row["last_pgd"])) == (last["clean_accuracy"], last["robust_accuracy"])
        assert float(row["val_pgd"]) == max(epoch["val_pgd"] for epoch in history)


def test_rows_summarise_the_runs(study: Path):
    runs, table = rows(study / "runs.csv"), json.loads((study / "table.json").read_text())
    at, half = rows(study / "table.csv")
    for row in (at, half):
        values = [float(run["pgd-3"]) for run in runs if run["label"] == row["label"]]
        assert float(row["pgd-3_mean"]) == pytest.approx(np.mean(values))
        assert float(row["pgd-3_std"]) == pytest.approx(np.std(values, ddof=1))
        assert (float(row["pgd-3_min"]), float(row["pgd-3_max"])) == (min(values), max(values))
        assert (row["pgd-3_n"], row["pgd-margin_n"], row["runs"], row["failed"]) == ("2", "1", "2", "0")
    assert (at["forward_per_step"], at["backward_per_step"]) == ("3", "3")
    assert at["robust_difference"] == ""
    difference = float(half["pgd-3_mean"]) - float(at["pgd-3_mean"])
    assert float(half["robust_difference"]) == pytest.approx(difference)
    assert float(half["robust_difference_p_holm"]) == float(half["robust_difference_p"])
    assert table["objectives"][1]["params"] == {"m": 50.0, "lam": 0.4}
    assert table["facts"]["eps"] == "0.1"
    assert [Image.open(study / "table.png").size[0] > 800, (study / "table.svg").is_file()] == [True, True]


def test_the_caption_says_how_the_numbers_came_about(study: Path):
    text = (study / "table.md").read_text()
    said = (
        "Digits, Linf eps 0.1, model small_cnn, 4 epochs on 300 training samples", "float32", "first 40 of 360",
        "highest validation PGD-2 accuracy", "over the seeds 0, 1", "Samples are the units", "`last` is the last epoch",
        "NOT confirmed, as no full text or official code could be read", "Trained with robusteval ",
        "Evaluated with robusteval ", "with 1 run at once", "python cli.py compare --config mine.toml",
    )  # fmt: skip
    assert [part for part in said if part not in text] == []


@pytest.mark.slow
def test_a_kill_and_more_seeds_later_give_the_same_bytes(study: Path, tmp_path: Path):
    settings(tmp_path)
    with launch(tmp_path, *STUDY, "--seeds", "1") as process:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "out/half-s0/train/checkpoint.pt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "out/at-s0/evaluate-more/manifest.json").exists()
    assert not (tmp_path / "out/at-s1").exists()
    with launch(tmp_path, *STUDY, "--seeds", "2") as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    assert "4 runs, 3 left to do" in err
    for name in ("table.csv", "runs.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (study / name).read_bytes(), name
    mine, undisturbed = (json.loads((folder / "table.json").read_text()) for folder in (tmp_path / "out", study))
    for table in (mine, undisturbed):
        for work in ("trained", "evaluated"):
            del table["facts"][f"{work}_with"]  # names the commit, and somebody may commit while the tests run
    assert mine == undisturbed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--epochs", "2"), "started with epochs = 4, not 2"),
        (("--limit", "30"), "started with evaluate.limit = 40, not 30"),
        (("--eps", "0.2"), "not '0.2'"),
        (("--set", "suite=more.toml"), "started with suite = 'cheap.toml', not 'more.toml'"),
        (("--seeds", "3", "--set", "full_suite=quick", "--set", "full_seeds=0"), "full_suite = 'more.toml', not"),
    ],
)
def test_other_settings_are_refused(study: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, ...], said: str):
    monkeypatch.chdir(study.parent)
    before = (study / "table.json").read_bytes()
    with pytest.raises(UsageError) as refused:
        group.main([*STUDY, *change], standalone_mode=False)
    assert said in str(refused.value)
    assert (study / "table.json").read_bytes() == before


def test_an_edited_suite_is_refused(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings(tmp_path)
    (tmp_path / "cheap.toml").write_text(CHEAP.replace("steps = 3", "steps = 4"))
    (tmp_path / "more.toml").write_text(MORE.replace("steps = 3", "steps = 4"))
    monkeypatch.chdir(tmp_path)
    for more in ((), ("--seeds", "3"), ("--dry-run",)):
        with pytest.raises(UsageError, match="started with full_suite_sha256 = "):
            group.main([*STUDY, "--out", str(study), *more], standalone_mode=False)


def finished(study: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Frame, list[Cell]]:
    monkeypatch.chdir(study.parent)
    wanted = {"train.model.params.width": 2, "train.model.params.hidden": 16, "train.validation.size": 50}
    wanted |= {"train.epochs": 4, "train.device": "cpu", "train.train_limit": 300, "train.batch_size": 64, "seeds": 1}
    wanted |= {"train.adversary.steps": 2, "train.validation.steps": 2, "evaluate.limit": 40}
    return run.prepare(resolve(CompareConfig, Path("mine.toml"), (), wanted), out, "")


def test_results_of_another_suite_or_model_are_refused(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    frame, cells = finished(study, study, monkeypatch)
    results = [read_result(frame.config, cell, ("pgd-3",)) for cell in cells]
    assert [row.label for row in build(frame, results, {}).rows] == ["at", "half"]
    swapped = replace(frame, suites=(frame.suites[0], replace(frame.suites[1], skip_certified=True)))
    with pytest.raises(RobustevalError, match=r"at-s0 was evaluated with other stages than suite 'more\.toml' has now"):
        build(swapped, results, {})
    shutil.copytree(study / "at-s0", tmp_path / "at-s0")
    shutil.copytree(study / "half-s0/train/best", tmp_path / "at-s0/train/best", dirs_exist_ok=True)
    with pytest.raises(RobustevalError, match="evaluate-more' is not about the model in"):
        read_result(frame.config, replace(cells[0], folder=tmp_path / "at-s0"), ("pgd-3",))


def test_every_commit_that_trained_a_cell_and_a_cut_off_log_are_seen(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    frame, cells = finished(study, study, monkeypatch)
    shutil.copytree(study / "at-s0", tmp_path / "at-s0")
    log = tmp_path / "at-s0/train/events.jsonl"
    facts = json.loads((tmp_path / "at-s0/train/environment.json").read_text())
    with log.open("a") as file:
        resumed = {"event": "resumed", "environment": {**facts, "git_commit": "f" * 40, "git_dirty": False}}
        file.write(json.dumps(resumed) + '\n{"event": "epoch", "epoch": 4, "sec')
    at = read_result(frame.config, replace(cells[0], folder=tmp_path / "at-s0"), ("pgd-3",))
    trained = build(frame, [at, read_result(frame.config, cells[1], ("pgd-3",))], {}).facts["trained_with"]
    assert len(trained) == 2
    assert [text for text in trained if text.endswith(f", commit {'f' * 12} (at-s0)")]
    assert [text for text in trained if text.endswith(" (at-s0, half-s0)")]
    assert (at.seconds["training"] or 0) > 0
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"epoch": 2,' not in line))
    assert read_result(frame.config, at.cell, ("pgd-3",)).seconds["training"] is None


def test_a_failed_cell_is_shown_and_the_rest_is_completed(cli: Cli, tmp_path: Path):
    bad = '[{ name = "sovr", label = "bad", params = { lam = 1e38, m = 100 } }, "at", "trades"]'
    settings(tmp_path, f'title = "Mine"\nsuite = "cheap.toml"\nfull_seeds = 0\nobjectives = {bad}\n')
    done = cli(*STUDY, "--seeds", "1", "--epochs", "1")
    assert (done.returncode, one_sentence(done.stderr)) == (1, True), done.stderr
    assert "bad-s0: FAILED: " in done.stderr
    assert "1 of 3 runs failed: bad-s0" in done.stderr
    text = (tmp_path / "out/table.md").read_text()
    assert "| bad | 0, 1 FAILED |" in text
    assert "bad, seed 0: FAILED: " in text
    by_label = {row["label"]: row for row in rows(tmp_path / "out/table.csv")}
    assert (by_label["bad"]["failed"], by_label["bad"]["clean_mean"]) == ("1", "")
    assert by_label["trades"]["robust_difference"] != ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--preset sovr-paper, or --objectives"),
        (("--preset", "sovr_paper"), "Did you mean 'sovr-paper'?"),
        (("--preset", "sovr-paper", "--config", "mine.toml"), "give one of them"),
        (("--preset", "sovr-paper", "--objectives", "trade"), "Did you mean 'trades'?"),
        (("--objectives", "sover"), "Did you mean 'sovr'?"),
        (("--objectives", "at,at"), "label 'at' is repeated"),
        (("--objectives", "../at"), "it names a folder"),
        (("--objectives", "at", "--set", "train.seed=3"), "train.seed is decided by the comparison"),
        (("--objectives", "at", "--set", "evaluate.suite=quick"), "evaluate.suite is decided by the comparison"),
        (("--objectives", "at", "--set", "suite=quick"), "does not begin with the stages of suite 'quick'"),
        (("--objectives", "at", "--set", "train.epoch=3"), "Did you mean 'epochs'?"),
        (("--objectives", "at", "--set", "evaluate.seed=-1"), "seed -1 is out of range"),
        (("--objectives", "at", "--set", "evaluate.allow=['randomized']"), "Did you mean 'randomised'?"),
        (("--objectives", "at,sovr", "--set", "reference=sover"), "no objective's label. Did you mean 'sovr'?"),
        (("--objectives", "at", "--seeds", "0"), "seeds = 0 is not allowed"),
        (("--objectives", "at", "--eps", "8"), "above 1"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(tmp_path: Path, arguments: tuple[str, ...], said: str):
    out = tmp_path / "out"
    with pytest.raises(UsageError) as refused:
        group.main(["compare", *arguments, "--out", str(out)], standalone_mode=False)
    assert said in str(refused.value)
    assert not out.exists()


def test_a_misspelt_objective_of_a_preset_is_named(tmp_path: Path):
    (tmp_path / "preset.toml").write_text('objectives = [{ name = "at", parms = {} }]')
    with pytest.raises(UsageError, match=r"an objective has no 'parms'\. Did you mean 'params'"):
        resolve(CompareConfig, tmp_path / "preset.toml", (), {})


def test_dry_run_counts_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ("compare", "--objectives", "at,trades", "--seeds", "3", "--epochs", "1", *TINY, "--dry-run")
    group.main([*arguments, "--out", str(tmp_path / "out")], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "at: 3 runs, 3 forward + 3 backward passes per step"
    trades = sum(int(word) for word in lines[1].split() if word.isdigit()) - 3
    assert lines[3] == f"folder: {tmp_path / 'out'}"
    assert lines[2] == f"6 runs of 5 steps: {5 * 3 * (6 + trades)} passes of a batch to train them"
    assert not (tmp_path / "out").exists()


def test_the_default_folder_is_the_same_for_more_rows_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    few, more = (
        resolve(CompareConfig, None, (), {"objectives": rows, "seeds": len(rows)}) for rows in (["at"], ["at", "mart"])
    )
    assert few.identity() == more.identity()
    assert re.fullmatch("runs/compare-[0-9a-f]{8}", str(default_folder(None, few.identity())))
    grids = (resolve(SweepConfig, None, (), {"m": m, "seeds": 1 + len(m)}).identity() for m in ([20], [20, 40]))
    names = {str(default_folder(None, grid)) for grid in grids}
    assert re.fullmatch("runs/sweep-[0-9a-f]{8}", names.pop())
    assert not names
    assert default_folder(Path("mine"), few.identity()) == Path("mine")


def test_a_missing_reference_is_said_and_a_dataset_without_test_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    group.main(["compare", "--objectives", "trades", "--seeds", "1", *TINY, "--dry-run"], standalone_mode=False)
    told = capsys.readouterr()
    assert "warning: no run of the reference 'at'" in told.err
    assert "folder: runs/compare-" in told.out
    images = np.zeros((60, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "made.npz", image=images, label=np.arange(60) % 3)
    made = ("--dataset", "npz:made.npz", "--eps", "0.1", "--train-limit", "20", "--set", "train.validation.size=10")
    with pytest.raises(UsageError, match="there is no test part"):
        group.main(["compare", "--objectives", "at", *TINY, *made, "--dry-run"], standalone_mode=False)
    assert not (tmp_path / "runs").exists()


def test_suites_that_would_share_a_folder_are_refused(tmp_path: Path):
    (tmp_path / "standard.toml").write_text(CHEAP)
    config = CompareConfig(objectives=(Contender(name="at", label="at"),), suite=str(tmp_path / "standard.toml"))
    with pytest.raises(UsageError, match="both called 'standard'"):
        check_suites(config.model_copy(update={"full_seeds": 0}), ThreatModel.parse("Linf", "0.1"))


@pytest.mark.parametrize("words", [("compare", "--objectives", "at"), ("analyze", "sweep")])
def test_torchrun_is_refused(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match=r"torchrun started 2 processes .* use --jobs"):
        group.main([*words, "--dry-run"], standalone_mode=False)


def test_what_is_not_confirmed_is_read_from_the_plug_ins_file():
    found = {name for name in OBJECTIVES.names() if OBJECTIVES.unconfirmed(name)}
    assert found >= {"sovr", "tsovr", "tsovr_adv", "ewat", "mail", "mma", "wce"}
    assert found.isdisjoint({"at", "trades", "standard"})
    assert OBJECTIVES.unconfirmed("wce").startswith(
        "NOT confirmed: the paper compares OVR with weighted cross-entropy;"
    )
    assert OBJECTIVES.unconfirmed("nobody") == ""


def test_a_certifier_takes_nothing_from_the_accuracy_after_a_stage():
    """Of 10 right samples an attack breaks 2 and a certifier proves 5: 8 are left after both."""
    stages = [
        SimpleNamespace(name="pgd", kind="attack", closed=2, broken=2),
        SimpleNamespace(name="ibp", kind="certifier", closed=5, broken=0),
    ]
    report = SimpleNamespace(stages=stages, results=SimpleNamespace(clean=SimpleNamespace(count=10, total=20)))
    assert _after_stages(cast(Report, report)) == {"pgd": 0.4, "ibp": 0.4}


def test_figures_take_equal_runs_and_any_title(tmp_path: Path):
    same = spread([0.1] * 3)
    assert (same.mean, same.min, same.max) == (0.1, 0.1, 0.1)
    columns = ("clean", "pgd", "a$b", "c$", "scaled_margin_mean", "scaled_margin_median")
    difference = paired(np.ones((3, 9), dtype=bool), np.zeros((3, 9), dtype=bool))
    result = cast(Result, None)
    values = dict.fromkeys(columns, same)
    row = Row("at", "at", {}, "", Passes(1, 1), (result,), {}, values, values, difference, difference)
    facts = {"dataset": "my$^data$", "norm": "Linf", "eps": "0.1", "model": {"name": "small_cnn"}, "epochs": 1}
    config = CompareConfig(objectives=(Contender(name="at", label="at"),))
    draw(Table(config, facts, ("a$b",), ("a$b", "c$"), (1,), (row,)), tmp_path)
    assert Image.open(tmp_path / "table.png").size[0] > 800
    points = [Point(m, 0.5, dict.fromkeys(FIGURES, same)) for m in (0.0, 20.0)]
    write_sweep(points, {**facts, "steps": 2, "validation_samples": 9, "seeds": 3}, tmp_path)
    assert Image.open(tmp_path / "sweep.png").size[0] > 800


def test_presets_name_objectives_and_suites_that_exist():
    for path in presets().values():
        config = resolve(CompareConfig, path, (), {})
        for row in config.objectives:
            OBJECTIVES.build(row.name, row.params)
        assert config.reference in [row.label for row in config.objectives]
    paper = resolve(CompareConfig, presets()["sovr-paper"], (), {})
    listed = ["at", "mart", "mma", "gairat", "mail", "ewat", "trades", "wce", "ovr", "sovr", "tsovr"]
    assert [row.label for row in paper.objectives] == listed


def test_apgd_is_the_beginning_of_standard(digits_net: Classifier, model_folder: Path, tmp_path: Path):
    threat = ThreatModel.parse("Linf", "0.1")
    shared = load_suite("apgd", threat).specs
    assert load_suite("standard", threat).specs[: len(shared)] == shared
    rows = {}
    for suite in ("apgd", "standard"):
        config = EvalConfig(dataset="digits", norm="Linf", eps="0.1", suite=suite, limit=16, workers=1)
        report = evaluate(prepare(config, load_folder(model_folder, (1, 8, 8), 10)), RunDir(tmp_path / suite))
        lines = map(json.loads, (tmp_path / suite / "samples.jsonl").read_text().splitlines())
        rows[suite] = [(line["stage"], line["adv_margin"]) for line in lines if line["stage"] in ("apgd-ce", "apgd-t")]
        rows[f"{suite} stages"] = [(stage.entered, stage.closed, stage.forward) for stage in report.stages[:2]]
    assert rows["apgd"] == rows["standard"]
    assert rows["apgd stages"] == rows["standard stages"]
    assert rows["apgd"]


def test_sweep_draws_the_grid_from_validation_samples_and_goes_on(cli: Cli, tmp_path: Path):
    arguments = ("analyze", "sweep", "--m", "20,50", "--lam", "0.3,0.6", "--epochs", "1", *TINY, "--out", "out")
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    assert "best on validation: " in done.stdout
    found = rows(tmp_path / "out/sweep.csv")
    grid = [("0.0", "0.0"), ("20.0", "0.3"), ("20.0", "0.6"), ("50.0", "0.3"), ("50.0", "0.6")]
    assert [(row["m"], row["lam"]) for row in found] == grid
    for row in found:
        label = f"m{float(row['m']):g}-lam{row['lam']}" if float(row["m"]) else "at"
        scores = json.loads((tmp_path / f"out/{label}-s0/validation.json").read_text())
        assert float(row["val_pgd_mean"]) == scores["pgd"] >= float(row["val_strongest_mean"])
        assert scores["clean"] * 50 == pytest.approx(round(scores["clean"] * 50))
    best = max(found, key=lambda row: (float(row["val_strongest_mean"]), float(row["val_clean_mean"])))
    assert [row for row in found if row["best"] == "True"] == [best]
    assert Image.open(tmp_path / "out/sweep.png").size[0] > 800
    again = cli(*arguments, "--json")
    assert "0 left to do" in again.stderr
    assert len(json.loads(again.stdout)) == 5
    refused = cli(*arguments, "--set", "steps=3")
    assert (refused.returncode, "started with steps = 20, not 3" in refused.stderr) == (2, True)


def test_spread_of_one_and_of_several():
    assert spread([0.5]).std is None
    three = spread([1.0, 2.0, 6.0])
    assert (three.n, three.mean, three.min, three.max) == (3, 3.0, 1.0, 6.0)
    assert three.std == pytest.approx(math.sqrt(7))


def test_sign_flip_is_exact_for_few_differences():
    """As the two-sided binomial test of McNemar: 8 against 2 discordant samples, 2 P(X >= 8 | 10, 1/2)."""
    d = np.array([1] * 8 + [-1] * 2 + [0] * 30)
    assert sign_flip(d) == pytest.approx(2 * (45 + 10 + 1) / 1024)
    assert sign_flip(np.array([1, 2, 3])) == pytest.approx(2 / 8)
    assert sign_flip(np.array([3, -1, 2, 0])) == pytest.approx(4 / 8)  # 6, 4, 0 and 2 with both signs
    assert sign_flip(np.zeros(5, dtype=int)) == sign_flip(np.array([0, 1])) == 1.0


def test_sign_flip_is_exact_for_many_differences():
    d = np.array([1] * 60 + [-1] * 40)
    exact = 2 * sum(math.comb(100, k) for k in range(60, 101)) / 2**100
    assert sign_flip(d) == pytest.approx(exact, rel=1e-9)
    drawn = np.random.default_rng(0).integers(-3, 4, 500)
    flips = np.random.default_rng(1).choice([-1, 1], (20000, 500)) @ drawn
    assert sign_flip(drawn) == pytest.approx(np.mean(np.abs(flips) >= abs(drawn.sum())), abs=0.015)


def test_paired_against_a_hand_computed_case():
    method = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=bool)
    reference = np.array([[1, 0, 0, 0], [0, 0, 0, 1]], dtype=bool)
    found = paired(method, reference)
    assert found.difference == pytest.approx(0.375)
    assert found.by_seed == pytest.approx((0.5, 0.25))
    assert found.p == pytest.approx(2 / 8)
    assert found.seed_p == pytest.approx(1 - 2 / math.pi * math.atan(3))  # t = 3 with one degree of freedom
    half = 3.182446 * 0.25 / 2  # t(0.975, 3) sd / sqrt(4)
    assert (found.low, found.high) == pytest.approx((0.375 - half, 0.375 + half), abs=1e-6)
    assert paired(method[:1], reference[:1]).seed_p is None


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_parameters_of_a_presets_row_can_be_set_alone():
    settings = resolve(CompareConfig, source("sovr-paper", None), ("params.sovr.m=60", "params.mail.form=mart"), {})
    params = {row.label: row.params for row in settings.contenders}
    assert (params["sovr"], params["mail"], params["at"]) == ({"m": 60}, {"form": "mart"}, {})
    with pytest.raises(UsageError, match=r"there is no objective 'sovrr'\. Did you mean 'sovr'"):
        resolve(CompareConfig, source("sovr-paper", None), ("params.sovrr.m=60",), {})


def test_finished_runs_that_the_table_will_not_show_are_named(tmp_path: Path):
    for name in ("at-s0", "at-s1", "sovr-s0"):
        (tmp_path / name / "evaluate-apgd").mkdir(parents=True)
        (tmp_path / name / "evaluate-apgd" / "manifest.json").touch()
    (tmp_path / "trades-s0" / "evaluate-apgd").mkdir(parents=True)  # under way
    cells = make_cells([("at", PluginSpec(name="at"))], 1, TrainConfig(), tmp_path)
    assert finished_elsewhere(cells, tmp_path) == ["at-s1", "sovr-s0"]
