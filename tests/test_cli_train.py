"""The real `train` command: runs, kills, resumes, refusals."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import conftest
import pytest
import torch
from conftest import PATIENCE
from PIL import Image

from robusteval.models.io import load_model

CLI = Path(__file__).parents[1] / "cli.py"
TINY = (
    "train", "--device", "cpu", "--threads", "1", "--set", "adversary.steps=2", "--set", "validation.steps=2",
    "--set", "model.params.width=2", "--set", "model.params.hidden=8",
)  # fmt: skip
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(cli: conftest.Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command in an empty folder, which is also this process's; return exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        done = cli(*arguments)
        return done.returncode, done.stdout, done.stderr

    return run


def epochs_in(run: Path) -> int:
    log = run / "events.jsonl"
    return log.read_text().count('"event": "epoch"') if log.exists() else 0


def weights(run: Path) -> dict[str, bytes]:
    return {name: (run / name / "model.safetensors").read_bytes() for name in ("best", "last")}


def interrupt(
    run: Path, arguments: tuple[str, ...], sign: signal.Signals, epochs: int = 2
) -> subprocess.CompletedProcess[str]:
    """Start the command in its own process and send ``sign`` at a random moment soon after ``epochs`` are done."""
    process = conftest.launch(conftest.ROOT, *arguments)
    try:
        deadline = time.monotonic() + PATIENCE
        while epochs_in(run) < epochs:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(sign)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 epochs that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    arguments = (*TINY, "--epochs", "20", "--out", str(folder))
    done = subprocess.run([sys.executable, str(CLI), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def finished(run: Path) -> bool:
    history = run / "history.json"
    return history.exists() and len(json.loads(history.read_text())) == 20


@pytest.mark.slow
def test_kill_at_three_moments_and_the_same_command_give_identical_weights(
    cli: Cli, tmp_path: Path, uninterrupted: Path
):
    run = tmp_path / "run"
    arguments = (*TINY, "--epochs", "20", "--out", str(run))
    for epochs in (0, 4, 9):
        killed = interrupt(run, arguments, signal.SIGKILL, epochs)
        assert killed.returncode == -signal.SIGKILL
        assert epochs <= epochs_in(run)
    assert not finished(run), "the kills must come before the end"
    code, out, _ = cli(*arguments)
    assert (code, out.splitlines()[0]) == (0, "complete: epoch 20 of 20")
    assert weights(run) == weights(uninterrupted)
    assert (run / "history.json").read_bytes() == (uninterrupted / "history.json").read_bytes()
    code, out, _ = cli(*arguments)
    assert (code, out.splitlines()[0]) == (0, "already complete: epoch 20 of 20")


@pytest.mark.slow
def test_ctrl_c_exits_130_and_resume_needs_no_settings(cli: Cli, tmp_path: Path, uninterrupted: Path):
    run = tmp_path / "run"
    stopped = interrupt(run, (*TINY, "--epochs", "20", "--out", str(run)), signal.SIGINT)
    assert stopped.returncode == 130
    assert "resumes a run where it stopped" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    code, out, _ = cli("train", "--resume", str(run), "--device", "cpu", "--threads", "1")
    assert (code, out.splitlines()[0]) == (0, "complete: epoch 20 of 20")
    assert weights(run) == weights(uninterrupted)


def test_the_same_command_finds_its_own_run_folder(cli: Cli, tmp_path: Path):
    command = (*TINY, "--epochs", "3")
    code, out, err = cli(*command, "--stop-after", "1")
    assert code == 0
    assert out.splitlines()[0] == "stopped: epoch 1 of 3"
    assert "epoch 1/3" in err
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "latest")
    assert folder.name.startswith("sovr-digits-small_cnn-")
    assert (tmp_path / "runs/latest").resolve() == folder
    code, out, _ = cli(*command, "--json")
    record = json.loads(out)
    assert (record["status"], record["epoch"], record["model"]) == ("complete", 3, f"runs/{folder.name}/best")
    assert set(record["best"]) >= {"epoch", "val_clean", "val_pgd", "train_loss"}
    assert Image.open(folder / "training.png").size[0] > 300
    loaded = load_model(str(folder), None, (1, 8, 8), 10)
    assert loaded.training["dataset"] == "digits"
    assert (loaded.training["norm"], loaded.training["eps"]) == ("Linf", "0.1")
    assert loaded.module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    code, out, _ = cli("train", "--resume", "runs/latest", "--json")
    assert json.loads(out)["status"] == "already complete"
    assert (tmp_path / "runs/latest").resolve() == folder
    assert cli(*command, "--seed", "1", "--stop-after", "1")[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_fresh_starts_over_and_deletes_runs_only(cli: Cli, tmp_path: Path):
    command = (*TINY, "--epochs", "2", "--out", "mine", "--stop-after", "1")
    assert cli(*command)[0] == 0
    assert cli(*command, "--fresh")[1].startswith("stopped: epoch 1 of 2")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    code, _, err = cli(*TINY, "--out", "precious", "--fresh")
    assert code == 2
    assert "--fresh deletes training runs only, and 'precious' is not one" in err
    code, _, err = cli(*TINY, "--out", "precious")
    assert code == 2
    assert "'precious' exists and is not a run folder" in err
    assert (tmp_path / "precious/thesis.txt").read_text() == "years of work"


def test_dry_run_shows_settings_and_cost_and_writes_nothing(cli: Cli, tmp_path: Path):
    code, out, _ = cli("train", "--dry-run", "--device", "cpu", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["cost"] == {"forward": 11, "backward": 11, "steps": 330}
    assert record["settings"]["objective"] == {"name": "sovr", "params": {"m": 40.0, "lam": 0.4}}
    assert record["settings"]["eps"] == "0.1"
    code, out, _ = cli("train", "--dry-run", "--device", "cpu", "--objective", "standard")
    assert "1 forward + 1 backward passes per step, 11 steps x 30 epochs = 330 steps" in out
    assert list(tmp_path.iterdir()) == []


def test_toml_is_weaker_than_set_and_flags(cli: Cli, tmp_path: Path):
    (tmp_path / "recipe.toml").write_text('epochs = 7\nseed = 3\n[optimizer]\nlr = 0.3\n[objective]\nname = "at"\n')
    _, out, _ = cli("train", "--config", "recipe.toml", "--set", "seed=4", "--lr", "0.2", "--dry-run", "--json")
    settings = json.loads(out)["settings"]
    chosen = (settings["epochs"], settings["seed"], settings["optimizer"]["lr"], settings["objective"]["name"])
    assert chosen == (7, 4, 0.2, "at")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--objective", "sover"), "unknown objective 'sover'. Did you mean 'sovr'?"),
        (("--model", "smal_cnn"), "unknown architecture 'smal_cnn'. Did you mean 'small_cnn'?"),
        (("--dataset", "digit"), "unknown dataset 'digit'. Did you mean 'digits'?"),
        (("--eps", "8"), "eps '8' is above 1"),
        (("--eps", "abc"), "eps 'abc' is not a number"),
        (("--eps", "0"), "eps '0' is zero"),
        (("--eps", "1/0"), "eps '1/0' divides by zero"),
        (("--norm", "L2"), "no customary eps for L2; give --eps"),
        (("--set", "objective.params.m=101"), "m = 101.0 is not a percentage of the batch"),
        (("--set", "epoch=3"), "unknown setting 'epoch'. Did you mean 'epochs'?"),
        (("--epochs", "0"), "epochs = 0 is not allowed"),
        (("--stop-after", "0"), "0 is not in the range"),
        (("--resume", "nowhere"), "--resume 'nowhere' is not the folder of a training run"),
        (("--resume", "nowhere", "--lr", "1"), "--resume takes its settings from 'nowhere'; drop --lr"),
        (("--resume", "nowhere", "--set", "seed=1"), "drop --set"),
        (("--out", "runs/latest"), "is the link to the newest run's folder"),
        (("--device", "tpu9"), "device 'tpu9' cannot be used"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_2(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], said: str):
    code, out, err = cli("train", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_does_not_fit_the_data_is_refused(cli: Cli, tmp_path: Path):
    for label in ("a", "b"):
        for part in ("train", "test"):
            (tmp_path / "pictures" / part / label).mkdir(parents=True)
            for index in range(20):
                Image.new("RGB", (3, 3), (index, 0, 0)).save(tmp_path / "pictures" / part / label / f"{index}.png")
    code, out, err = cli("train", "--dataset", "imagefolder:pictures", "--eps", "8/255", "--out", "run")
    assert code in (1, 2)
    assert out == ""
    assert "small_cnn" in err
    assert "3x3" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_is_one_sentence(cli: Cli, tmp_path: Path, out: str):
    (tmp_path / "file").write_text("in the way")
    code, _, err = cli(*TINY, "--out", out)
    assert code in (1, 2)
    assert f"'{out}" in err
    assert "Traceback" not in err


def test_resuming_with_other_settings_names_the_field(cli: Cli):
    assert cli(*TINY, "--epochs", "2", "--out", "run", "--stop-after", "1")[0] == 0
    code, _, err = cli(*TINY, "--epochs", "3", "--out", "run")
    assert code == 2
    assert "'run' was started with epochs = 2, not 3" in err


def test_tensorboard_is_written_or_asked_for(cli: Cli, tmp_path: Path):
    code, _, err = cli(*TINY, "--epochs", "1", "--out", "run", "--tensorboard")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert code == 2
        assert "pip install 'robusteval[tensorboard]'" in err
        assert not (tmp_path / "run").exists()
    else:
        assert code == 0
        assert list((tmp_path / "run/tensorboard").iterdir())
