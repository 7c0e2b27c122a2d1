"""The wheel: one top-level name, and the commands work far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from the files git would ship, with the installed hatchling."""
    out = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


def test_the_wheel_adds_exactly_one_top_level_name(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"robusteval"}


def test_the_wheel_has_what_is_not_python(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "trainers/sovr.py",
        "schemas/v1/report.schema.json",
        "suites/standard.toml",
        "baselines/robustbench.json",
        "render/templates/report.html.j2",
        "render/templates/_style.css.j2",
        "leaderboard/templates/index.html",
        "leaderboard/static/leaderboard.js",
        "py.typed",
    ):
        assert f"robusteval/{name}" in names, name


@pytest.mark.slow
def test_commands_work_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """A new venv with our wheel alone; third-party packages are lent to it by a path file, to save gigabytes."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    before = {path.name for path in purelib.iterdir()}
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    added = {path.name for path in purelib.iterdir() if path.suffix not in (".dist-info", ".pth")} - before
    assert added == {"robusteval"}
    (purelib / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    robusteval = venv / "bin" / "robusteval"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [robusteval, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import robusteval; print(robusteval.__file__)"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(venv))
    assert "sovr" in run("list", "objectives")
    run("train", "--epochs", "1", "--set", "adversary.steps=1")
    run("evaluate", "--suite", "quick", "--limit", "30")
    report = next((elsewhere / "runs").glob("evaluate-quick-*"))
    run("validate", str(report))
    assert (elsewhere / "runs" / "latest" / "best" / "model.safetensors").is_file()
