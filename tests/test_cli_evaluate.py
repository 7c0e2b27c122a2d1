"""The real `evaluate`, `validate` and `list` commands: bad input, interruption, exit codes."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, Cli, launch, one_sentence

QUICK = ("--suite", "quick", "--limit", "40", "--workers", "1")

WRONG: dict[str, tuple[tuple[str, ...], int, str]] = {
    "unknown suite": (("--suite", "standrad"), 2, "Did you mean 'standard'?"),
    "unknown dataset": (("--dataset", "digit"), 2, "Did you mean 'digits'?"),
    "unknown norm": (("--norm", "Lnf"), 2, "Did you mean 'Linf'?"),
    "unknown setting": (("--set", "chunk_sise=3"), 2, "Did you mean 'chunk_size'?"),
    "eps of zero": (("--eps", "0"), 2, "eps '0' is zero"),
    "negative eps": (("--eps", "-8/255"), 2, "negative"),
    "eps over nothing": (("--eps", "8/0"), 2, "divides by zero"),
    "eps above one": (("--eps", "8"), 2, "above 1"),
    "limit of zero": (("--limit", "0"), 2, "limit"),
    "batch of nothing": (("--batch-size", "0"), 2, "batch_size"),
    "unknown finding": (("--allow", "randomized"), 2, "Did you mean 'randomised'?"),
    "no percentage": (("--fail-under", "nan"), 2, "percentage"),
    "negative seed": (("--seed", "-1"), 2, "seed -1"),
    "unknown device": (("--device", "gpu"), 2, "device 'gpu'"),
    "missing model": (("--model", "nowhere"), 2, "no model 'nowhere'"),
    "architecture only": (("--model", "small_cnn"), 2, "weights"),
    "unknown source": (("--model", "robustbnech:X"), 2, "Did you mean 'robustbench'?"),
    "missing data": (("--dataset", "cifar10"), 1, "--download"),
    "missing config": (("--config", "none.toml"), 2, "none.toml"),
    "not a fraction of a setting": (("--set", "seed"), 2, "key=value"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(cli: Cli, model_folder: Path, name: str) -> None:
    arguments, code, text = WRONG[name]
    model = () if "--model" in arguments else ("--model", str(model_folder))
    done = cli("evaluate", *model, *arguments)
    assert (done.returncode, one_sentence(done.stderr)) == (code, True), done.stderr
    assert text in done.stderr
    assert done.stdout == ""


def test_unknown_command_names_the_nearest(cli: Cli) -> None:
    done = cli("evalaute")
    assert done.returncode == 2
    assert "Did you mean 'evaluate'?" in done.stderr


def test_nothing_trained_yet(cli: Cli) -> None:
    done = cli("evaluate")
    assert done.returncode == 2
    assert "runs/latest" in done.stderr
    assert one_sentence(done.stderr)


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def test_pickled_code_in_a_checkpoint_is_refused_and_not_run(cli: Cli, tmp_path: Path) -> None:
    torch.save({"state_dict": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload()))
    for name in ("evil.pt", "raw.pt"):
        done = cli("evaluate", "--model", name, "--architecture", "small_cnn")
        assert done.returncode == 1
        assert one_sentence(done.stderr)
        assert not (tmp_path / "executed").exists()


def test_truncated_checkpoint(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    whole = (model_folder / "model.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    done = cli("evaluate", "--model", "half.safetensors", "--architecture", "small_cnn")
    assert (done.returncode, one_sentence(done.stderr)) == (1, True), done.stderr


def test_architecture_that_does_not_fit_the_file(cli: Cli, model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    done = cli("evaluate", "--model", weights, "--architecture", "cnn7")
    assert (done.returncode, one_sentence(done.stderr)) == (1, True), done.stderr


FACTORY = """
import torch
from torch import nn

class Twisted(nn.Module):
    def __init__(self, twist):
        super().__init__()
        self.line, self.twist = nn.Linear(64, 10), twist
    def forward(self, x):
        return self.twist(self.line(x.flatten(1)))

def nan(): return Twisted(lambda z: z * torch.nan)
def probabilities(): return Twisted(lambda z: z.softmax(1))
def shape(): return Twisted(lambda z: z[:, :3])
def cut(): return Twisted(lambda z: z.detach())
"""


@pytest.mark.parametrize(
    ("factory", "text"), [("nan", "NaN"), ("probabilities", "softmax"), ("shape", "(2, 10)"), ("cut", "gradient")]
)
def test_models_that_cannot_be_judged(cli: Cli, tmp_path: Path, factory: str, text: str) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    done = cli("evaluate", "--model", f"mine:{factory}", *QUICK)
    assert (done.returncode, one_sentence(done.stderr)) == (1, True), done.stderr
    assert text in done.stderr


def folder_of_images(root: Path, part: str, classes: int, count: int) -> None:
    from PIL import Image

    for label in range(classes):
        folder = root / part / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 60 * label + i).save(folder / f"{i}.png")


@pytest.mark.parametrize(("classes", "count", "text"), [(1, 3, "class"), (3, 0, "test")])
def test_one_class_and_an_empty_split(cli: Cli, tmp_path: Path, classes: int, count: int, text: str) -> None:
    folder_of_images(tmp_path / "images", "train", max(classes, 1), 3)
    folder_of_images(tmp_path / "images", "test", classes, count)
    (tmp_path / "mine.py").write_text(FACTORY)
    done = cli("evaluate", "--model", "mine:shape", "--dataset", "imagefolder:images", *QUICK)
    assert done.returncode in (1, 2)
    assert one_sentence(done.stderr), done.stderr
    assert text in done.stderr


def test_out_that_cannot_be_written(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = cli("evaluate", "--model", model_folder, *QUICK, "--out", "file/run")
    assert (done.returncode, one_sentence(done.stderr)) == (1, True), done.stderr
    assert "file/run" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_loses_nothing(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    """The event log goes to a device that is always full; once it does not, the same command finishes."""
    run = tmp_path / "run"
    run.mkdir()
    first = cli("evaluate", "--model", model_folder, *QUICK, "--out", "other", "--set", "chunk_size=20")
    assert first.returncode == 0, first.stderr
    (run / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    (run / "events.jsonl").symlink_to("/dev/full")
    full = cli("evaluate", "--model", model_folder, *QUICK, "--out", "run", "--set", "chunk_size=20")
    assert (full.returncode, one_sentence(full.stderr)) == (1, True), full.stderr
    assert "No space left" in full.stderr
    (run / "events.jsonl").unlink()
    assert cli("evaluate", "--model", model_folder, *QUICK, "--out", "run", "--set", "chunk_size=20").returncode == 0
    assert (run / "samples.jsonl").read_bytes() == (tmp_path / "other" / "samples.jsonl").read_bytes()


def test_resume_with_other_settings_names_the_field(cli: Cli, model_folder: Path) -> None:
    assert cli("evaluate", "--model", model_folder, *QUICK, "--out", "run").returncode == 0
    done = cli("evaluate", "--model", model_folder, *QUICK, "--out", "run", "--eps", "0.05")
    assert (done.returncode, one_sentence(done.stderr)) == (2, True), done.stderr
    assert "eps = '0.1'" in done.stderr


def test_report_json_on_stdout_fail_under_and_validate(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    done = cli("evaluate", "--model", model_folder, *QUICK, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    robust = json.loads(done.stdout)["results"]["empirical"]["rate"]
    assert 0 < robust < 1
    again = cli("evaluate", "--model", model_folder, *QUICK, "--out", "run", "--fail-under", str(100 * robust + 1))
    assert again.returncode == 3
    assert "already complete" in again.stderr
    assert cli("validate", "run").returncode == 0
    lines = (tmp_path / "run" / "samples.jsonl").read_text().replace('"broken"', '"unknown"')
    (tmp_path / "run" / "samples.jsonl").write_text(lines)
    broken = cli("validate", "run")
    assert (broken.returncode, one_sentence(broken.stderr)) == (3, True)
    assert cli("validate", "elsewhere").returncode == 2


SLOW = ("--limit", "120", "--set", "chunk_size=20", "--suite", "slow.toml")
SLOW_SUITE = """
title = "slow"
about = "long enough to be interrupted"
[[stages]]
name = "pgd"
attack = "pgd"
params = { steps = 100, restarts = 2 }
"""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_kill_at_three_moments_then_the_same_command(
    cli: Cli, tmp_path: Path, model_folder: Path, workers: str
) -> None:
    (tmp_path / "slow.toml").write_text(SLOW_SUITE)
    arguments = ("evaluate", "--model", str(model_folder), *SLOW, "--workers", workers)
    assert cli(*arguments, "--out", "whole").returncode == 0
    chunks = tmp_path / "run" / "chunks"
    for done in (0, 1, 3):
        process = launch(tmp_path, *arguments, "--out", "run")
        wait_for(lambda at=done: (tmp_path / "run" / "config.json").exists() and count(chunks) >= at, process)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "run" / "report.json").exists(), "the kills must come before the end"
    assert cli(*arguments, "--out", "run").returncode == 0
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    for path in (tmp_path / "whole" / "witnesses").iterdir():
        assert path.read_bytes() == (tmp_path / "run" / "witnesses" / path.name).read_bytes()
    assert cli("validate", "run").returncode == 0


def count(folder: Path) -> int:
    return len(list(folder.glob("*.json"))) if folder.is_dir() else 0


@pytest.mark.slow
def test_ctrl_c_is_130_says_so_and_resumes(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "slow.toml").write_text(SLOW_SUITE)
    arguments = ("evaluate", "--model", str(model_folder), *SLOW, "--workers", "2", "--out", "run")
    process = launch(tmp_path, *arguments)
    wait_for(lambda: count(tmp_path / "run" / "chunks") >= 1, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, error
    assert "resumes" in error
    assert "Traceback" not in error
    assert cli(*arguments).returncode == 0


def test_list_names_everything_without_torch(cli: Cli) -> None:
    done = cli("list", "--json")
    named = json.loads(done.stdout)
    assert {"standard", "at", "sovr"} <= set(named["objectives"])
    assert {"standard", "quick"} <= set(named["suites"])
    assert all(summary for kind in named.values() for summary in kind.values())
    assert cli("list", "attaks").returncode == 2
