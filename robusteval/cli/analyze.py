"""`analyze`: figures and numbers that explain how robust a model is, and why."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from robusteval.cli import _console
from robusteval.cli._options import data_options, run_options, threat_options
from robusteval.errors import UsageError, nearest

if TYPE_CHECKING:
    from robusteval.analysis._points import Told
    from robusteval.analysis.subjects import Subjects

SUBCOMMANDS = {
    "margins": "Logit margins, clean and under PGD: histograms, by class, the hard set against the rest.",
    "gradients": "Input-gradient norms, clean and under PGD, and against the margin.",
    "trajectory": "Exact margins of CE, weighted CE and OVR over time on the simple problem; needs no model.",
    "sweep": "Heat map of SOVR's M and lambda.",
}


class Analyses(click.Group):
    """The subcommands of this file, and `sweep`, imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order a user meets them."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return the subcommand; suggest the nearest name if there is none."""
        if name not in SUBCOMMANDS:
            ctx.fail(f"no analysis '{name}'.{nearest(name, SUBCOMMANDS)} Analyses: {', '.join(SUBCOMMANDS)}.")
        if name in self.commands:
            return self.commands[name]
        found: click.Command = importlib.import_module(f"robusteval.cli._{name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUBCOMMANDS.items()))


def _model_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add what every analysis of trained models takes."""
    function = run_options(function)
    for option in (
        click.option("--label", "labels", multiple=True, help="Name of a model in figures, in the order of MODEL."),
        click.option("--batch-size", type=int, help="Images on the device at once.  [default: 256]"),
        click.option("--steps", type=int, help="PGD steps of eps / 4 on cross-entropy.  [default: 20]"),
        click.option("--limit", type=int, help="Take only the first N images of each split."),
    ):
        function = option(function)
    return click.argument("models", nargs=-1, metavar="[MODEL]...")(data_options(threat_options(function)))


@click.group("analyze", cls=Analyses)
def command() -> None:
    """Explain a result: each analysis writes figures (PNG, SVG) and the CSV behind each, and prints a short table.

    MODEL is what `evaluate --model` takes; without one, runs/latest. Several are compared on the same axes.
    """


@command.command("margins")
@_model_options
@click.option("--m", type=float, default=40.0, show_default=True, help="Percent of a split that form the set L.")
def margins(m: float, out: Path | None, as_json: bool, **flags: Any) -> None:
    """Measure logit margins z_y - max z_k, clean and under PGD, on the training and the test part.

    The training part is what the models were trained on, or all of it where they differ or do not say. L are the
    samples of a split with the smallest margins. Accuracies under this PGD are optimistic; `evaluate` measures
    robustness.
    """
    if not 0 <= m <= 100:
        raise UsageError(f"--m {m:g} is not a percentage from 0 to 100.")
    subjects = _subjects(flags)
    from robusteval.analysis.margin_views import check_finite, draw, summary
    from robusteval.analysis.margins import measure

    splits = {part: subjects.split(part) for part in ("train", "test")}
    found: dict[str, dict[str, Any]] = {}
    with _progress("margins", len(subjects.models) * sum(map(len, splits.values()))) as told:
        for label, model in subjects.models.items():
            module, threat, search = model.module, subjects.threat, subjects.search
            found[label] = {part: measure(module, split, threat, **search, told=told) for part, split in splits.items()}
    check_finite(found)
    classes = subjects.info.classes
    results = {label: {part: summary(one, m, classes) for part, one in by.items()} for label, by in found.items()}
    settings = {"analysis": "margins", **subjects.facts(), "m": m}
    folder = _folder(out, settings)
    draw(found, results, m, subjects.title, folder)
    _finish(folder, {**settings, "results": results}, as_json)


@command.command("gradients")
@_model_options
@click.option("--split", "part", type=click.Choice(["train", "test"]), default="test", show_default=True)
def gradients(part: str, out: Path | None, as_json: bool, **flags: Any) -> None:
    """Measure L1 and L2 norms of d CE/dx and d margin/dx at the clean inputs and at the PGD points.

    A large margin with a large gradient is not robust: the linear distance is margin / norm of its gradient, the
    norm dual to the threat model's, and says where the boundary would be if the margin were linear.
    """
    subjects = _subjects(flags)
    from robusteval.analysis.gradient_views import POINTS, check_finite, draw, summary
    from robusteval.analysis.gradients import measure

    split = subjects.split("train" if part == "train" else "test")
    found = {}
    with _progress("gradients", len(subjects.models) * len(split)) as told:
        for label, model in subjects.models.items():
            found[label] = measure(model.module, split, subjects.threat, **subjects.search, told=told)
    check_finite(found)
    norm = subjects.threat.norm
    results = {label: {point: summary(getattr(one, point), norm) for point in POINTS} for label, one in found.items()}
    settings = {"analysis": "gradients", **subjects.facts(), "split": part}
    folder = _folder(out, settings)
    draw(found, norm, f"{subjects.title}, {part}", folder)
    _finish(folder, {**settings, "results": results}, as_json)


@command.command("trajectory")
@click.option("--classes", default="10,100,1000", show_default=True, metavar="K,...", help="Numbers of classes.")
@click.option("--times", default="1,10,100,1000", show_default=True, metavar="T,...", help="Times in the table.")
@click.option("--weight", type=float, default=2.0, show_default=True, help="Weight of the weighted CE.")
@click.option("--lam", type=float, default=1.0, show_default=True, help="Weight of OVR.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the result.  [default: a new one under runs/]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON record on stdout.")
def trajectory(classes: str, times: str, weight: float, lam: float, out: Path | None, as_json: bool) -> None:
    """Compute how far CE, weighted CE and OVR push a margin in time t, exactly, when the logits are free.

    OVR's margin grows like 2 log t, CE's like log t, so their ratio tends to 2; for K >= 5 classes and equal weights
    OVR is behind at first.
    """
    from robusteval.analysis.trajectory_views import Problem, draw, record

    problem = Problem(_numbers("classes", classes, int), _numbers("times", times, float), weight, lam)
    result = {"analysis": "trajectory", **record(problem)}
    folder = _folder(out, result)
    draw(problem, folder)
    _finish(folder, result, as_json)


Number = TypeVar("Number", int, float)


def _numbers(name: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--{name} '{text}' is not a list of numbers such as 10,100.") from error


def _subjects(flags: Mapping[str, Any]) -> Subjects:
    with _console.err.status("loading"):  # torch is imported only when there is work to do
        from robusteval.analysis.subjects import Request, gather
        from robusteval.settings import resolve

        return gather(resolve(Request, None, (), {key: value for key, value in flags.items() if value != ()}))


@contextmanager
def _progress(what: str, total: int) -> Iterator[Told]:
    with _console.progress() as bar:
        task = bar.add_task(what, total=total, status="")
        yield lambda done: bar.advance(task, done)


def _folder(out: Path | None, settings: Mapping[str, Any]) -> Path:
    from robusteval.runs import digest

    return out or Path("runs") / f"analyze-{settings['analysis']}-{digest(settings)[:8]}"


def _finish(folder: Path, record: dict[str, Any], as_json: bool) -> None:
    """Store the record beside the figures and print it: as it is, or as a table."""
    from robusteval.analysis.tables import tables
    from robusteval.runs import write_json

    write_json(folder / "analysis.json", record)
    if as_json:
        click.echo(json.dumps({**record, "out": str(folder)}))
        return
    _console.out.print(tables(record))
    click.echo(f"figures: {folder}")
