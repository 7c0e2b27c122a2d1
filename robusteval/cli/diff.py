"""`diff`: two evaluations side by side, with a paired test."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from robusteval.cli import _console

if TYPE_CHECKING:
    from robusteval.comparison.diff import Accuracy, Diff

SHOWN = 20


@click.command("diff")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help=f"List every changed sample, not the first {SHOWN}.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record on stdout; it has every changed sample.")
def command(a: Path, b: Path, everything: bool, as_json: bool) -> None:
    """Compare the evaluations in folders A and B: what differs, accuracies paired by sample, changed verdicts.

    Both must be of the same samples and norm, and share an eps. Differences are B minus A.
    """
    with _console.err.status("loading"):
        from robusteval.comparison.diff import diff, load

        found = diff(load(a), load(b))
    if as_json:
        click.echo(found.model_dump_json())
        return
    _show(found, a, b, everything)


def _show(found: Diff, a: Path, b: Path, everything: bool) -> None:
    for name, folder, what in (("A", a, found.a), ("B", b, found.b)):
        _console.out.print(Text(_console.printable(f"{name}: {what} ({folder})")))
    if found.facts:
        facts = _table("what differs", ("", "A", "B"), [(one.what, _said(one.a), _said(one.b)) for one in found.facts])
        _console.out.print(facts)
    title = f"{found.samples} samples, {found.norm}, accuracies in percent"
    header = ("accuracy", "eps", "A", "B", "B - A", "95 % interval", "p", "only A:B")
    _console.out.print(_table(title, header, [_row(one) for one in found.accuracies], wrap=False))
    _console.out.print(Text(found.method))
    for note in found.notes:
        _console.out.print(Text(_console.printable(f"note: {note}"), style="yellow"))
    _show_changes(found, everything)


def _row(one: Accuracy) -> tuple[str, ...]:
    from robusteval.render._text import percent

    down = one.measure == "certified"
    low, high = math.floor(one.low * 10_000) / 100, math.ceil(one.high * 10_000) / 100
    return (
        one.measure,
        one.eps or "",
        *(percent(rate.rate, down).removesuffix(" %") for rate in (one.a, one.b)),
        f"{100 * one.difference:+.2f}",
        f"[{low:+.2f}, {high:+.2f}]",
        f"{one.p:.2g}",
        f"{one.only_a}:{one.only_b}",
    )


def _show_changes(found: Diff, everything: bool) -> None:
    shown = found.changes if everything else found.changes[:SHOWN]
    rows = [(str(one.id), str(one.label), _verdict(one.a, one.a_stage), _verdict(one.b, one.b_stage)) for one in shown]
    title = f"{len(found.changes)} verdicts changed at eps {found.eps}"
    if not rows:
        click.echo(title)
        return
    _console.out.print(_table(title, ("sample", "label", "A", "B"), rows))
    if len(shown) < len(found.changes):
        click.echo(f"and {len(found.changes) - len(shown)} more; --all lists them")


def _verdict(verdict: str, stage: str | None) -> str:
    return f"{verdict} by {stage}" if stage else str(verdict)


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], wrap: bool = True) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold", no_wrap=not wrap)
    for row in rows:
        table.add_row(*(Text(_console.printable(cell)) for cell in row))
    return table
