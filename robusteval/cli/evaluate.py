"""`evaluate`: attack a model, bracket its robust accuracy, write a report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from robusteval.cli import _console
from robusteval.cli._options import config_options, data_options, run_options, threat_options
from robusteval.errors import CheckFailed, RobustevalError, UsageError

if TYPE_CHECKING:
    from robusteval.evaluation.plan import Plan
    from robusteval.report import Report
    from robusteval.runs import RunDir


@click.command("evaluate")
@click.option("--model", help="Run folder, model folder, weights file, robustbench:ID, ... or package.module:factory.")
@click.option("--architecture", help="Architecture of a weights file, e.g. small_cnn.")
@data_options
@threat_options
@click.option(
    "--curve", is_flag=True, default=None, help="Also at 1/4, 1/2, 2 and 4 times eps; or list --eps 2/255,4/255."
)
@click.option("--suite", help="Suite name or TOML file.  [default: standard]")
@click.option("--witnesses", metavar="RUN", help="Try the adversarial inputs of another evaluation first.")
@click.option(
    "--queries", type=int, help="Forward passes that all attacks together may spend on an image.  [default: no limit]"
)
@click.option("--precision", help="float32 or bfloat16, in which attacks search; float32 decides.  [default: float32]")
@click.option("--compile", "compiled", is_flag=True, default=None, help="Compile the model for the attacks.")
@click.option("--limit", type=int, help="Evaluate only the first N test images.")
@click.option("--batch-size", type=int, help="Images on the device at once.  [default: a chunk]")
@click.option("--workers", type=int, help="Processes.  [default: one per CPU core]")
@click.option("--extra-data/--no-extra-data", default=None, help="Whether the model saw data beyond the training set.")
@click.option("--allow", multiple=True, metavar="FINDING", help="Go on in spite of this finding.")
@click.option("--fail-under", type=float, metavar="PERCENT", help="Exit with 3 if empirical robust accuracy is lower.")
@run_options
@config_options
def command(
    config: Path | None,
    assignments: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    fail_under: float | None,
    architecture: str | None,
    allow: tuple[str, ...],
    **flags: Any,
) -> None:
    """Attack a model with a suite, re-check every result, and write a report that others can check.

    Without --model the newest training run, runs/latest, is evaluated, on its own data and threat model unless told
    otherwise. The same command resumes an interrupted evaluation and shows a finished one.
    """
    if fail_under is not None and not 0 <= fail_under <= 100:
        raise UsageError(f"--fail-under {fail_under} is not a percentage from 0 to 100.")
    flags |= {"architecture.name": architecture, "allow": allow or None}
    if "," in (flags["eps"] or "") and flags["curve"] is None:
        flags["curve"] = False  # several eps replace the curve of a file
    with _console.err.status("loading"):  # torch is imported only when there is work to do
        plan, run = _plan(config, assignments, flags, out)
    report = _finished(run, plan) or _run(plan, run)
    _show(report, run.path, as_json)
    if fail_under is not None and 100 * report.results.empirical.rate < fail_under:
        robust = 100 * report.results.empirical.rate
        raise CheckFailed(f"empirical robust accuracy {robust:.2f} % is below --fail-under {fail_under:g}.")


def _plan(
    toml: Path | None, assignments: tuple[str, ...], flags: dict[str, Any], folder: Path | None
) -> tuple[Plan, RunDir]:
    from robusteval.evaluation.config import EvalConfig
    from robusteval.evaluation.plan import identity, prepare
    from robusteval.runs import RunDir, digest
    from robusteval.settings import resolve

    given = resolve(EvalConfig, toml, assignments, flags)
    plan = prepare(given)
    if given.model is None:
        _console.say(f"no --model given: evaluating {plan.config.model}")
    if given.limit and given.limit > plan.available:
        _console.warn(f"--limit {given.limit} is more than the {plan.available} test images; all are evaluated.")
    name = (
        f"evaluate-{Path(plan.suite.name).stem}-{str(plan.config.dataset).split(':')[0]}-{digest(identity(plan))[:8]}"
    )
    return plan, RunDir(folder or Path("runs") / name)


def _finished(run: RunDir, plan: Plan) -> Report | None:
    """Return the report of a run that is already complete, if its settings are these."""
    from robusteval.evaluation.plan import identity
    from robusteval.evaluation.validate import MANIFEST, read_report, validate

    if not (run.path / MANIFEST).is_file():
        return None
    run.claim(identity(plan))
    problems = validate(run.path)
    if problems:
        raise RobustevalError(f"the report in '{run.path}' was changed: {problems[0]}; choose another --out.")
    _console.say(f"already complete: {run.path}")
    return read_report(run.path)


def _run(plan: Plan, run: RunDir) -> Report:
    from robusteval.evaluation.chunks import ChunkResult
    from robusteval.evaluation.run import evaluate
    from robusteval.evaluation.validate import seal
    from robusteval.render.documents import write_documents
    from robusteval.runs import LAUNCH, write_json
    from robusteval.verdict import ROBUST

    asked = f"{plan.threat.norm.value} {', '.join(budget.label for budget in plan.budgets)}"
    _console.say(f"suite {plan.suite.name}, {asked}: {len(plan.split)} samples -> {run.path}")
    done, robust = 0, 0
    with _console.progress() as bar:
        task = bar.add_task("evaluating", total=len(plan.split), status="")

        def told(news: ChunkResult | str) -> None:
            nonlocal done, robust
            if isinstance(news, str):
                bar.update(task, description=escape(news))
                return
            done += len(news.rows)
            robust += sum(row.verdict in ROBUST for row in news.rows)
            bar.update(task, completed=done, status=f"robust so far {100 * robust / done:.1f} %")

        report = evaluate(plan, run, told)
    write_documents(report, run.path, plan.split)
    if plan.config.data_dir is not None:  # where `render` will look for the samples
        write_json(run.path / LAUNCH, {"data_dir": str(Path(plan.config.data_dir).expanduser().resolve())})
    seal(run.path)
    return report


def _show(report: Report, folder: Path, as_json: bool) -> None:
    from robusteval.render.terminal import render

    if as_json:
        click.echo(report.model_dump_json())
        return
    _console.out.print(render(report))
    click.echo(f"report: {folder}")
    click.echo(f"to read: {folder / 'report.html'}")
    click.echo(f"check it: {_console.program()} validate {shlex.quote(str(folder))}")
