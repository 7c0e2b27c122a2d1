"""`analyze sweep`: SOVR over a grid of M and lambda, judged on validation samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from robusteval.cli import _console
from robusteval.cli._study import base, command_line, dotted, fail, folder, study_options, watching
from robusteval.errors import UsageError


def _numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{parameter.opts[0]} '{text}' is not a list of numbers such as 20,40,60.") from error


@click.command("sweep")
@click.option("--m", callback=_numbers, metavar="A,B,...", help="Percentages M.  [default: 20,40,60,80]")
@click.option("--lam", callback=_numbers, metavar="A,B,...", help="Weights lambda.  [default: 0.2,0.4,0.6,0.8,1.0]")
@study_options
def command(
    recipe: str | None,
    config: Path | None,
    assignments: tuple[str, ...],
    out: Path | None,
    jobs: int | None,
    dry_run: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train SOVR on a grid of M and lambda and draw validation accuracies as heat maps; test data is not touched.

    The same command goes on where it was interrupted; values and seeds may be added later. Settings without a flag:
    `--set train.optimizer.lr=0.05`, `--set steps=50`.
    """
    with _console.err.status("loading"):  # torch is imported only when there is work to do
        from robusteval.comparison.cells import check, default_jobs
        from robusteval.comparison.heatmap import write_sweep
        from robusteval.comparison.sweep import SweepConfig, is_done, record, sweep
        from robusteval.settings import resolve

        settings = resolve(SweepConfig, config, assignments, dotted(flags), base(recipe))
        out = folder(out, settings.identity())
        cells = settings.cells(out)
        plan = next(iter(check(cells).values()))
    facts = {
        "dataset": plan.info.title,
        "norm": plan.threat.norm.value,
        "eps": plan.threat.label,
        "epochs": plan.config.epochs,
        "steps": settings.steps,
        "seeds": settings.seeds,
        "training_samples": len(plan.train),
        "validation_samples": len(plan.validation),
        "command": command_line(),
        "train": settings.identity()["train"],
    }
    if dry_run:
        planned = {"out": str(out), "runs": [cell.name for cell in cells], "facts": facts}
        click.echo(json.dumps(planned, indent=None if as_json else 2))
        return
    left = [cell for cell in cells if not is_done(cell)]
    jobs = jobs or default_jobs(settings.train.device)
    _console.say(f"{len(cells)} runs, {len(left)} left to do, {min(jobs, max(1, len(left)))} at once -> {out}")
    with watching(left, len(cells) - len(left)) as told:
        points, failures = sweep(settings, cells, out, jobs, told)
    write_sweep(points, facts, out)
    for entry in record(points):
        values = ", ".join(f"{name} {100 * value['mean']:.2f} %" for name, value in entry["values"].items())
        if entry["best"] and not as_json:
            point = f"M {entry['m']:g}, lambda {entry['lam']:g}" if entry["m"] else "M 0, which is plain AT"
            click.echo(f"best on validation: {point}: {values}")
    click.echo(json.dumps(record(points)) if as_json else f"the grid: {out / 'sweep.png'}, {out / 'sweep.csv'}")
    fail(list(failures), len(cells), out)
