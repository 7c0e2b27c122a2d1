"""Several processes on halves of each batch are one process on whole batches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, ROOT, environment
from team_worker import plan_of

from robusteval.runs import RunDir
from robusteval.training.loop import train
from robusteval.training.objective import OBJECTIVES
from robusteval.training.share import Share

NAMES = OBJECTIVES.names()


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together")
    torchrun(Path(__file__).with_name("team_worker.py"), out, *NAMES)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_with_half_a_batch_each_are_one_process(name: str, together: Path, tmp_path: Path):
    alone = train(plan_of(name), RunDir(tmp_path / "alone"))
    ours, theirs = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path / "alone", together / name)
    )
    for part in ("model", "average", "objective"):
        assert ours[part].keys() == theirs[part].keys()
        for key, value in ours[part].items():
            torch.testing.assert_close(theirs[part][key], value, rtol=1e-9, atol=1e-11, msg=f"{part} {key}")
    for row, other in zip(alone.history, theirs["history"], strict=True):
        assert other == pytest.approx(row, rel=1e-6)  # accuracies are means in float32


def test_the_command_line_under_torchrun_speaks_with_one_voice(tmp_path: Path):
    settings = ["--epochs", "1", "--device", "cpu", "--json", "--set", "adversary.steps=1"]
    done = torchrun("cli.py", "train", *settings, "--out", tmp_path / "run")
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["status"] == "complete"
    assert done.stderr.count("in 2 processes") == 1
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "epoch", "ended"]
    assert events[0]["processes"] == 2


DEPARTING = """
from pathlib import Path

import torch

from robusteval.training.parallel import connected, launched_team


def tasks() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


team, before = launched_team(), tasks()
with connected(team, torch.device("cpu")):
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    team.wait()
    group = tasks() - before
assert group, "the group has threads"
assert not group & tasks(), "and they are gone with it"
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to list threads by")
def test_no_thread_of_the_group_outlives_it(tmp_path: Path):
    worker = tmp_path / "departing.py"
    worker.write_text(DEPARTING)
    torchrun(worker)


def test_shares_are_consecutive_nearly_equal_and_weighted_to_the_mean():
    whole = torch.arange(11.0)
    parts = [Share(rank, 3, 11) for rank in range(3)]
    assert [part.mine(whole).tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    means = [float(part.mine(whole).mean()) * part.weight for part in parts]
    assert sum(means) / 3 == pytest.approx(float(whole.mean()))
