"""`compare`: train and attack several objectives under one recipe, and write one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table as RichTable
from rich.text import Text

from robusteval.cli import _console
from robusteval.cli._study import base, command_line, dotted, fail, folder, study_options, watching
from robusteval.errors import UsageError

if TYPE_CHECKING:
    from robusteval.comparison.config import CompareConfig
    from robusteval.comparison.table import Frame, Table


@click.command("compare")
@click.option("--preset", help="Objectives and recipe, e.g. sovr-paper.")
@click.option("--objectives", metavar="A,B,...", help="Objectives, or the rows to take of a preset.")
@click.option("--limit", type=int, help="Evaluate only the first N test images.")
@study_options
def command(
    preset: str | None,
    objectives: str | None,
    recipe: str | None,
    config: Path | None,
    assignments: tuple[str, ...],
    out: Path | None,
    jobs: int | None,
    dry_run: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train objectives under one recipe with several seeds, attack every model, and write one table.

    Each run is an ordinary `train` and `evaluate` run in a folder under --out; the same command goes on where it
    was interrupted, and more objectives or seeds may be added later. A TOML file (--config) looks like a preset.
    Settings without a flag: `--set train.optimizer.lr=0.05`, `--set evaluate.chunk_size=500`, `--set full_seeds=3`.
    """
    with _console.err.status("loading"):  # torch is imported only when there is work to do
        from robusteval.comparison import run
        from robusteval.comparison.cells import default_jobs
        from robusteval.comparison.work import is_done

        settings = _settings(preset, recipe, config, assignments, objectives, flags)
        out = folder(out, settings.identity())
        frame, cells = run.prepare(settings, out, command_line())
    if settings.reference not in [row.label for row in settings.objectives]:
        _console.warn(f"no run of the reference '{settings.reference}': the table will have no differences.")
    if dry_run:
        _print_plan(frame, out, as_json)
        return
    left_out = run.finished_elsewhere(cells, out)
    if left_out:
        _console.warn(f"the table will not show what this command does not name: {', '.join(left_out)}.")
    left = [cell for cell in cells if not is_done(settings, cell)]
    jobs = jobs or default_jobs(settings.train.device)
    _console.say(f"{len(cells)} runs, {len(left)} left to do, {min(jobs, max(1, len(left)))} at once -> {out}")
    with watching(left, len(cells) - len(left)) as told:
        table = run.compare(frame, cells, out, jobs, told)
    _show(table, out, as_json)
    fail([f"{row.label}-s{seed}" for row in table.rows for seed in row.failures], len(cells), out)


def _settings(
    preset: str | None,
    recipe: str | None,
    config: Path | None,
    assignments: tuple[str, ...],
    objectives: str | None,
    flags: dict[str, Any],
) -> CompareConfig:
    from robusteval.comparison.config import CompareConfig, source
    from robusteval.settings import resolve

    if preset and recipe:
        raise UsageError(f"--preset {preset} has a recipe of its own; give --recipe {recipe} with --objectives.")
    toml, labels = source(preset, config), tuple(filter(None, (objectives or "").split(",")))
    if toml is None and not labels:
        raise UsageError("name what to compare: --preset sovr-paper, or --objectives at,sovr,trades.")
    given = dotted(flags) | ({"objectives": list(labels)} if toml is None else {})
    settings = resolve(CompareConfig, toml, assignments, given, base(recipe))
    return settings.pick(labels) if labels else settings


def _print_plan(frame: Frame, out: Path, as_json: bool) -> None:
    steps, seeds = frame.facts["steps"], frame.config.seeds
    rows = {label: {"forward": cost.forward, "backward": cost.backward} for label, cost in frame.passes.items()}
    total = steps * seeds * sum(cost["forward"] + cost["backward"] for cost in rows.values())
    if as_json:
        planned = {"out": str(out), "facts": frame.facts, "passes_per_step": rows, "training_passes": total}
        click.echo(json.dumps(planned))
        return
    for label, cost in rows.items():
        click.echo(f"{label}: {seeds} runs, {cost['forward']} forward + {cost['backward']} backward passes per step")
    click.echo(f"{len(rows) * seeds} runs of {steps} steps: {total} passes of a batch to train them")
    click.echo(f"folder: {out}")


def _show(table: Table, out: Path, as_json: bool) -> None:
    from robusteval.comparison.markdown import accuracies
    from robusteval.comparison.write import JSON

    if as_json:
        click.echo(json.dumps(json.loads((out / JSON).read_text(encoding="utf-8"))))
        return
    click.echo(table.config.title)
    for title, header, rows in accuracies(table, ranges=False):
        shown = RichTable(*header, title=Text(title))
        for row in rows:
            shown.add_row(*map(Text, row))
        _console.out.print(shown)
    click.echo(f"the whole comparison: {out / 'table.md'}")
