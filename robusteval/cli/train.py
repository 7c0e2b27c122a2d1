"""`train`: train a robust classifier, or go on with a run that was interrupted."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from robusteval.cli._console import err, program, progress, say, warn
from robusteval.cli._options import config_options, data_options, run_options, threat_options
from robusteval.errors import RobustevalError, UsageError
from robusteval.render.curves import training_curves
from robusteval.runs import CONFIG, LAUNCH, RunDir, point_latest, read_json, write_json
from robusteval.settings import resolve
from robusteval.training.config import EXECUTION_ONLY, TrainConfig
from robusteval.training.cost import passes_per_step
from robusteval.training.epoch import OnEvent
from robusteval.training.loop import TrainResult, ignore, train
from robusteval.training.parallel import connected
from robusteval.training.plan import Plan, prepare
from robusteval.training.recipes import Recipe, load_recipe
from robusteval.training.tensorboard import check_installed, tensorboard

RUNS = Path("runs")
LATEST = "latest"
DOTTED = {"objective": "objective.name", "model": "model.name", "lr": "optimizer.lr"}
"""Flags whose setting has another name."""


@click.command("train", short_help="Train a robust classifier.")
@click.option("--recipe", help="Named settings to start from; see `list recipes`.")
@click.option("--objective", help="Training objective, e.g. sovr, at, standard.  [default: sovr]")
@data_options
@click.option("--model", help="Architecture.  [default: small_cnn]")
@click.option("--epochs", type=int, help="Passes through the training data.  [default: 30]")
@click.option("--batch-size", type=int, help="Samples per step.  [default: 128]")
@click.option("--lr", type=float, help="Base learning rate.  [default: 0.1]")
@threat_options
@run_options
@click.option("--threads", type=int, help="CPU threads.  [default: torch's choice, 1 for tiny images]")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with the run in this folder, with its settings.")
@click.option("--stop-after", type=click.IntRange(min=1), metavar="N", help="Stop cleanly after N more epochs.")
@click.option("--fresh", is_flag=True, help="Delete the run in the run folder and start over.")
@click.option("--dry-run", is_flag=True, help="Print the resolved settings and the cost; train nothing.")
@click.option("--tensorboard", "board", is_flag=True, help="Write figures for TensorBoard to the run folder.")
@config_options
def command(
    recipe: str | None,
    config: Path | None,
    assignments: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    stop_after: int | None,
    fresh: bool,
    dry_run: bool,
    board: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a robust classifier: SOVR on digits unless told otherwise.

    The same command finds its own run folder again and goes on where it was interrupted. Any setting without a flag
    is set by `--set`, e.g. `--set objective.params.m=20` or `--set adversary.steps=7`.
    """
    chosen = load_recipe(recipe) if recipe else Recipe()
    if resume is None:
        dotted = {DOTTED.get(key, key): flags[key] for key in flags}
        settings = resolve(TrainConfig, config, assignments, dotted, chosen.settings)
    else:
        own = {"recipe": recipe, "config": config, "set": assignments or None, "out": out, "fresh": fresh or None}
        settings = _resumed(resume, {**own, **flags})
    plan = prepare(settings)
    folder = _folder(resume or out or RUNS / plan.name)
    if dry_run:
        for line in chosen.notes.splitlines():
            say(line)
        _print_plan(plan, folder, as_json)
        return
    if board:
        check_installed()
    run = RunDir(folder)
    with connected(plan.team, plan.device):
        if not plan.team.leads:
            train(plan, run, stop_after=stop_after)
            return
        result = _lead(plan, run, fresh, board, stop_after)
    training_curves(result.history, f"{plan.name}: {plan.info.title}, {plan.threat}", folder / "training.png")
    _print_result(result, plan, as_json)


def _lead(plan: Plan, run: RunDir, fresh: bool, board: bool, stop_after: int | None) -> TrainResult:
    """Train, and do what one process of a team does for all: write, show, point `runs/latest` at the run."""
    folder = run.path
    if fresh:
        _delete_run(folder)
    run.claim(plan.identity)
    if plan.config.data_dir is not None:
        write_json(folder / LAUNCH, {"data_dir": str(Path(plan.config.data_dir).expanduser().resolve())})
    together = f" in {plan.team.size} processes" if plan.team.size > 1 else ""
    say(f"training {plan.name}: {len(plan.train)} samples, {plan.threat}{together} -> {folder}")
    _point_latest(folder)
    try:
        with _listener(plan, folder / "tensorboard" if board else None) as on_event:
            return train(plan, run, on_event=on_event, stop_after=stop_after)
    finally:
        _point_latest(folder)


def _point_latest(folder: Path) -> None:
    """Point `runs/latest` at a run that has a model already."""
    if folder.parent.resolve() == RUNS.resolve() and (folder / "best").is_dir():
        point_latest(folder)


def _resumed(folder: Path, flags: Mapping[str, Any]) -> TrainConfig:
    """Return the settings stored in ``folder``, changed only by flags that do not alter what is computed."""
    given = {key: value for key, value in flags.items() if value is not None}
    for key in sorted(given.keys() - EXECUTION_ONLY):
        flag = f"--{key.replace('_', '-')}"
        raise UsageError(
            f"--resume takes its settings from '{folder}'; drop {flag}, or start a new run without --resume."
        )
    if not _is_run(folder):
        raise UsageError(f"--resume '{folder}' is not the folder of a training run: it has no {CONFIG} of one.")
    stored = {key: value for key, value in read_json(folder / CONFIG).items() if key in TrainConfig.model_fields}
    return resolve(TrainConfig, None, (), {**stored, **given})


def _is_run(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    stored = read_json(folder / CONFIG)
    return isinstance(stored, dict) and stored.get("command") == "train"


def _folder(folder: Path) -> Path:
    """Follow the link `latest`, which must not come to point at itself."""
    if folder.is_symlink():
        return folder.parent / folder.readlink()
    if folder.name == LATEST:
        raise UsageError(f"'{folder}' is the link to the newest run's folder, so no run can be called that.")
    return folder


def _delete_run(folder: Path) -> None:
    if not folder.exists():
        return
    if not _is_run(folder):
        raise UsageError(f"--fresh deletes training runs only, and '{folder}' is not one; choose another --out.")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise RobustevalError(f"cannot delete '{folder}': {error.strerror}.") from error


@contextmanager
def _listener(plan: Plan, board: Path | None) -> Iterator[OnEvent]:
    """Show progress on stderr: a bar on a terminal, else a line per epoch."""
    write = ignore if board is None else tensorboard(board)
    steps, epochs = plan.steps_per_epoch, plan.config.epochs
    with progress() as bar:
        task = bar.add_task(f"epoch 1/{epochs}", total=steps * epochs, status="")

        def listen(kind: str, fields: Mapping[str, Any]) -> None:
            write(kind, fields)
            if kind == "step":
                bar.advance(task)
            elif kind == "resumed":
                say(f"resuming after epoch {fields['epoch']}")
                bar.update(task, completed=steps * fields["epoch"], description=f"epoch {fields['epoch'] + 1}/{epochs}")
            elif kind == "epoch":
                scores = f"val {fields['val_clean']:.1%} PGD {fields['val_pgd']:.1%}"
                following = min(fields["epoch"] + 1, epochs)
                bar.update(task, description=f"epoch {following}/{epochs}", status=scores)
                if not err.is_terminal:
                    say(_epoch_line(fields, epochs))
            elif kind == "alarm":
                warn(fields["alarm"])

        yield listen


def _epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  "
        f"validation clean {row['val_clean']:.1%}  PGD {row['val_pgd']:.1%}"
    )


def _print_plan(plan: Plan, folder: Path, as_json: bool) -> None:
    passes = passes_per_step(plan)
    steps = plan.steps_per_epoch * plan.config.epochs
    cost = {"forward": passes.forward, "backward": passes.backward, "steps": steps}
    if as_json:
        click.echo(json.dumps({"settings": plan.identity, "out": str(folder), "cost": cost}))
        return
    click.echo(json.dumps(plan.identity, indent=2))
    click.echo(f"run folder: {folder}")
    click.echo(f"samples:    {len(plan.train)} training, {len(plan.validation)} validation")
    click.echo(
        f"cost:       {passes.forward} forward + {passes.backward} backward passes per step, "
        f"{plan.steps_per_epoch} steps x {plan.config.epochs} epochs = {steps} steps"
    )


def _print_result(result: TrainResult, plan: Plan, as_json: bool) -> None:
    epochs = plan.config.epochs
    best, model = result.best, result.path / "best"
    if as_json:
        record = {"status": result.status, "epoch": result.epochs, "epochs": epochs, "best": best, "model": str(model)}
        click.echo(json.dumps(record))
        return
    click.echo(f"{result.status}: epoch {result.epochs} of {epochs}")
    click.echo(f"best epoch {best['epoch']}: validation clean {best['val_clean']:.2%}, PGD {best['val_pgd']:.2%}")
    click.echo(f"model: {model}")
    if result.status == "stopped":
        click.echo("the same command goes on from here")
    click.echo(f"next:  {program()} evaluate --model {shlex.quote(str(model))} {_next_suite(plan)}")


def _next_suite(plan: Plan) -> str:
    """Return the flags of the suite that asks what the objective trains for."""
    objective = plan.objective
    suite = getattr(objective, "suite", "standard")
    if suite != "smoothing":
        return f"--suite {suite}"
    return f"--suite smoothing --norm L2 --eps {objective.sigma:g} --set smoothing.sigma={objective.sigma:g}"  # type: ignore[attr-defined]
