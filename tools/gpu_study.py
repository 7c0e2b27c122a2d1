"""Train AT, SOVR, TRADES and TSOVR under the unified recipe on one GPU, attack them with AutoAttack, make the table.

    python tools/gpu_study.py --data-dir ../shared/data --out runs/gpu-study --train-minutes 60 --minutes 10

It only composes `compare`: the recipe `unified` with bfloat16 and channels-last, shortened to the number of epochs that
`--train-minutes` of this machine allow (measured on the first call and kept in `epochs.json`). A call stops after
`--minutes`; the same call goes on. The table is `table.md` in --out. Where --data-dir is or has the JPEG copy of
CIFAR-10, everything is titled "CIFAR-10 (JPEG)". Unpack the archive first (`tar xf cifar10-jpeg.tar.xz`, --data-dir
cifar10-jpeg), as each of the eight runs would decompress it anew. `--dry-run` is a rehearsal on a CPU: 64 images,
1 epoch, 16 attacked.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from robusteval.provenance import deterministic
from robusteval.settings import flatten, resolve
from robusteval.training.config import TrainConfig
from robusteval.training.loop import begin
from robusteval.training.objective import OBJECTIVES
from robusteval.training.plan import Plan, prepare
from robusteval.training.recipes import load_recipe
from robusteval.training.step import train_step

CLI = Path(__file__).resolve().parents[1] / "cli.py"
NAMES = ("at", "sovr", "trades", "tsovr")
WARM_UP, TIMED = 5, 20
INTERRUPTED = 130
TINY: dict[str, Any] = {
    **{"train_limit": 64, "epochs": 1, "batch_size": 32, "model.name": "small_cnn"},
    **{"validation.size": 32, "validation.steps": 2, "adversary.steps": 2},
}


def training(data_dir: str, device: str, dry_run: bool) -> dict[str, Any]:
    """Return the shared settings of all runs: dotted key -> value."""
    over = {"data_dir": data_dir, "device": device, "precision": "bfloat16", "channels_last": True}
    return flatten(load_recipe("unified").settings) | over | (TINY if dry_run else {})


def seconds_per_step(plan: Plan, objective: str) -> float:
    """Time training steps on one batch, after some that do not count."""
    plan = replace(plan, objective=OBJECTIVES.build(objective))
    state, rows = begin(plan), torch.arange(plan.config.batch_size)
    state.model.train()
    with deterministic(plan.threads):
        for step in range(WARM_UP + TIMED):
            if step == WARM_UP:
                start = time.perf_counter()
            float(train_step(plan, state, step, rows).value.detach())  # waits for the GPU
    return (time.perf_counter() - start) / TIMED


def choose_epochs(settings: dict[str, Any], minutes: float) -> dict[str, Any]:
    """Return the common number of epochs that fits, and the measurements behind it."""
    plan = prepare(resolve(TrainConfig, None, (), settings))
    step = {name: seconds_per_step(plan, name) for name in NAMES}
    size, passes = plan.config.validation.size or 0, 2 * plan.config.validation.steps
    validation = step["at"] * passes / 22 * size / plan.config.batch_size  # a step of `at` has 22 passes
    epoch = {name: plan.steps_per_epoch * seconds + validation for name, seconds in step.items()}
    return {"epochs": max(1, int(60 * minutes / sum(epoch.values()))), "seconds_per_epoch": epoch}


def command(settings: dict[str, Any], out: Path, limit: int, suite: str, jobs: int | None) -> list[str]:
    """Return the `compare` command."""
    title = "AT, SOVR, TRADES and TSOVR under one recipe, shortened to what one GPU allows"
    chosen = {"title": title, "seeds": 1, "suite": suite, "full_suite": suite, "evaluate.limit": limit}
    chosen |= {f"train.{key}": value for key, value in settings.items()}
    sets = [f"--set={key}={json.dumps(value)}" for key, value in chosen.items()]
    rest = ["--jobs", str(jobs)] if jobs else []
    return [sys.executable, str(CLI), "compare", "--objectives", ",".join(NAMES), "--out", str(out), *rest, *sets]


def run_for(arguments: list[str], minutes: float) -> int:
    """Run a command, interrupt it after ``minutes``; return its exit code."""
    with subprocess.Popen(arguments) as process:
        try:
            return process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            return process.wait()


@click.command()
@click.option("--data-dir", required=True, help="Folder with CIFAR-10 or its JPEG copy.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
@click.option("--train-minutes", default=60.0, show_default=True, help="For training all four models, in all calls.")
@click.option("--minutes", default=1e5, help="Stop this call after so long.")
@click.option("--limit", default=1000, show_default=True, help="Test images to attack.")
@click.option("--suite", default="standard", show_default=True)
@click.option("--jobs", type=int, help="Runs at once on the GPU.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--dry-run", is_flag=True, help="Rehearse on the CPU with next to nothing.")
def main(
    data_dir: str,
    out: Path,
    train_minutes: float,
    minutes: float,
    limit: int,
    suite: str,
    jobs: int | None,
    device: str,
    dry_run: bool,
) -> None:
    """Run the study, or go on with it."""
    began = time.monotonic()
    settings = training(data_dir, "cpu" if dry_run else device, dry_run)
    measured = out / "epochs.json"
    if not dry_run:
        if not measured.exists():
            out.mkdir(parents=True, exist_ok=True)
            measured.write_text(json.dumps(choose_epochs(settings, train_minutes), indent=1) + "\n", encoding="utf-8")
        settings["epochs"] = json.loads(measured.read_text(encoding="utf-8"))["epochs"]
    arguments = command(settings, out, 16 if dry_run else limit, "quick" if dry_run else suite, jobs)
    print(shlex.join(arguments), file=sys.stderr)
    code = run_for(arguments, minutes - (time.monotonic() - began) / 60)
    if code == INTERRUPTED:
        print("interrupted; the same call goes on", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
