"""A comparison as Markdown: `table.md`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from robusteval.comparison.caption import caption, footnotes
from robusteval.comparison.statistics import Paired, Spread
from robusteval.comparison.table import Row, Table

NONE = "-"

Cells = tuple[str, ...]


def render(table: Table) -> str:
    """Return the whole comparison as one Markdown document."""
    notes = "".join(f"\n- {_plain(note)}" for note in footnotes(table.rows))
    sections = [
        f"# {_plain(table.config.title)}",
        *(f"## {_plain(title)}\n\n{_table(header, rows)}" for title, header, rows in accuracies(table)),
        "## Margins, cost and the last epoch\n\n" + _others(table),
        f"## Differences from {table.config.reference}\n\n" + _differences(table),
        *([f"## Notes\n{notes}"] if notes else []),
        "## How these numbers came about\n\n" + "\n\n".join(caption(table)),
    ]
    return "\n\n".join(sections) + "\n"


def accuracies(table: Table, ranges: bool = True) -> Iterator[tuple[str, Cells, list[Cells]]]:
    """Yield title, header and rows of each table of accuracies: clean, PGD and after each stage; with ranges or not.

    Seeds that alone were attacked with the full suite have a table of their own: beside means over all seeds their
    figures could not be compared.
    """
    before = ("objective", "runs", "clean", f"PGD-{table.config.margin_steps}")
    stages = table.shared if table.some_fully else table.full
    names = ("clean", "pgd", *stages)
    yield (
        "All seeds",
        (*before, *stages),
        [(row.label, _runs(row), *(percent(row.spreads.get(name), ranges) for name in names)) for row in table.rows],
    )
    if table.some_fully:
        names = ("clean", "pgd", *table.full)
        yield (
            f"Suite {table.config.full_suite}, {fully_seeds(table)} alone",
            (before[0], *before[2:], *table.full),
            [(row.label, *(percent(row.fully.get(name), ranges) for name in names)) for row in table.rows],
        )


def fully_seeds(table: Table) -> str:
    """Name the seeds that were attacked with the full suite."""
    some = range(min(table.config.full_seeds, table.config.seeds))
    return f"{'seed' if len(some) == 1 else 'seeds'} {', '.join(map(str, some))}"


def _others(table: Table) -> str:
    header = (
        "objective", "margin mean", "margin median", "scaled mean", "scaled median", "last: clean",
        f"last: PGD-{table.config.margin_steps}", "best epoch", "passes per step", "training seconds",
    )  # fmt: skip
    return _table(header, (_other(row) for row in table.rows))


def _other(row: Row) -> tuple[str, ...]:
    margins = ("margin_mean", "margin_median", "scaled_margin_mean", "scaled_margin_median")
    timed = [result.seconds["training"] for result in row.results]
    seconds = [value for value in timed if value is not None]
    return (
        row.label,
        *(_number(row.spreads.get(name)) for name in margins),
        *(percent(row.spreads.get(name)) for name in ("last_clean", "last_pgd")),
        f"{row.spreads['best_epoch'].mean:.1f}" if row.results else NONE,
        f"{row.passes.forward} + {row.passes.backward}",
        f"{fmean(seconds):.0f}" if seconds else NONE,
    )


def _differences(table: Table) -> str:
    rows = [row for row in table.rows if row.robust and row.clean]
    if not rows:
        return f"No run of `{table.config.reference}` to compare with."
    header = (
        "objective", f"robust ({table.shared[-1]})", "95 % interval", "p", "p (Holm)", "by seed", "p of t over seeds",
        "clean", "95 % interval",
    )  # fmt: skip
    return _table(header, (_difference(row, row.robust, row.clean) for row in rows if row.robust and row.clean))


def _difference(row: Row, robust: Paired, clean: Paired) -> tuple[str, ...]:
    return (
        row.label,
        f"{100 * robust.difference:+.2f}",
        _interval(robust),
        f"{robust.p:.4f}",
        NONE if row.p_holm is None else f"{row.p_holm:.4f}",
        ", ".join(f"{100 * value:+.2f}" for value in robust.by_seed),
        NONE if robust.seed_p is None else f"{robust.seed_p:.3f}",
        f"{100 * clean.difference:+.2f}",
        _interval(clean),
    )


def _interval(tested: Paired) -> str:
    return f"[{100 * tested.low:+.2f}, {100 * tested.high:+.2f}]"


def _runs(row: Row) -> str:
    return f"{len(row.results)}, {len(row.failures)} FAILED" if row.failures else str(len(row.results))


def percent(value: Spread | None, ranges: bool = True) -> str:
    """Format a fraction as percent: mean, and for several runs standard deviation and range."""
    if value is None:
        return NONE
    mean = f"{100 * value.mean:.2f}"
    if value.std is None:
        return mean
    reach = f" [{100 * value.min:.2f}, {100 * value.max:.2f}]" if ranges else ""
    return f"{mean} ± {100 * value.std:.2f}{reach}"


def _number(value: Spread | None) -> str:
    if value is None:
        return NONE
    return f"{value.mean:.3f}" if value.std is None else f"{value.mean:.3f} ± {value.std:.3f}"


def _plain(text: str) -> str:
    """Keep text from acting as markup."""
    for character in "\\`*_{}<>|#":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
