"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import hypothesis
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robusteval.cli import main
from robusteval.datasets.base import Split
from robusteval.datasets.open import open_dataset
from robusteval.models.base import Classifier
from robusteval.models.io import build_model, save_model
from robusteval.settings import PluginSpec

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

if TYPE_CHECKING:
    from leaderboard_kit import Board

torch.set_num_threads(1)

hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

PATIENCE = 900
"""Seconds after which what a test waits for is given up; far beyond what a loaded machine needs."""


def shared(name: str) -> Path:
    """Return a file of the data folder beside the checkout, or skip the test."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"../shared/data/{name} is not there")
    return path


@pytest.fixture(scope="session")
def digits() -> Split:
    return open_dataset("digits").load("test")


def fit(model: nn.Module, split: Split, steps: int, noise: float) -> None:
    """Train full-batch with Adam on noisy inputs: seconds, and good enough to attack."""
    x, y = split.images(slice(None)), split.labels
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        shaken = (x + noise * (2 * torch.rand(x.shape, generator=rng) - 1)).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(model(shaken), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def make_model(split: Split, name: str = "small_cnn", classes: int | None = None, seed: int = 0) -> Classifier:
    info = split.info
    return build_model(PluginSpec(name=name), info.shape, classes or info.num_classes, info.mean, info.std, seed=seed)


@pytest.fixture(scope="session")
def digits_net() -> Classifier:
    train = open_dataset("digits").load("train")
    model = make_model(train)
    fit(model, train, steps=80, noise=0.15)
    return model


@pytest.fixture(scope="session")
def model_folder(digits_net: Classifier, digits: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "net"
    card = {
        "architecture": {"name": "small_cnn", "params": {}},
        "shape": digits.info.shape,
        "num_classes": 10,
        "classes": digits.info.classes,
        "training": {"dataset": "digits", "norm": "Linf", "eps": "0.1", "extra_data": False},
    }
    save_model(folder, digits_net, card)
    return folder


@pytest.fixture(scope="session")
def small_run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation of a few digits, with all its files."""
    from leaderboard_kit import make_run

    return make_run(model_folder, tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(scope="session")
def files(small_run: Path) -> dict[str, bytes]:
    """What a bundle of `small_run` holds."""
    from leaderboard_kit import files_of

    return files_of(small_run)


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """A leaderboard in this process; skips where the extra `server` is not installed."""
    for package in ("fastapi", "sqlalchemy", "httpx"):
        pytest.importorskip(package, reason="the extra `server` is not installed")
    from leaderboard_kit import board_in

    with board_in(tmp_path_factory.mktemp("board")) as board:
        yield board


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}


def launch(folder: Path, *arguments: object, log: IO[str] | None = None) -> subprocess.Popen[str]:
    """Start the real command line in its own process, to be killed or interrupted; it writes to pipes, or ``log``."""
    return subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(),
        stdout=log or subprocess.PIPE,
        stderr=log or subprocess.PIPE,
        text=True,
        # A shell starts background jobs deaf to Ctrl-C, and tests started that way would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture(scope="session")
def warm() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported torch and runs every command in a fork; see `warm_cli.py`."""
    server = [sys.executable, str(Path(__file__).with_name("warm_cli.py"))]
    with subprocess.Popen(
        server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def cli(warm: subprocess.Popen[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Run the real command in an empty folder; returns the finished process with its output as text."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        printed = tmp_path_factory.mktemp("printed")
        job = {"arguments": [str(argument) for argument in arguments], "cwd": str(tmp_path)}
        files = {"stdout": str(printed / "out"), "stderr": str(printed / "err")}
        assert warm.stdin is not None
        assert warm.stdout is not None
        warm.stdin.write(json.dumps({**job, **files}) + "\n")
        warm.stdin.flush()
        code = int(warm.stdout.readline())
        out, err = (Path(files[name]).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(job["arguments"], code, out, err)

    return run


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command in this process, in an empty folder: it sees what the test has patched, variables included."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        asked = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["cli.py", *asked])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(asked, code, printed.out, printed.err)

    return run


def one_sentence(error: str) -> bool:
    """Whether the last line of stderr is an error message and no traceback came with it."""
    return "Traceback" not in error and error.strip().splitlines()[-1].lower().startswith("error:")
