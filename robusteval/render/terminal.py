"""A report on the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robusteval.render._text import (
    BRACKET,
    CURVE_HEADER,
    STAGE_HEADER,
    STAGE_LEGEND,
    accuracies,
    cost,
    curve_rows,
    placement,
    rulings,
    stage_rows,
    subject,
)
from robusteval.report import Report


def render(report: Report) -> RenderableType:
    """Return the result table, the stages, the findings and the place among RobustBench entries."""
    parts: list[RenderableType] = [Text(subject(report), style="bold"), _results(report)]
    if report.curve:
        parts.append(_curve(report))
    parts.append(_stages(report))
    parts.append(Text(cost(report)))
    parts += [Text(decided) for decided in rulings(report)]
    parts += [Text(f"adapted: {text}", style="yellow") for text in report.suite.adaptations]
    for finding in report.findings:
        style = {"error": "red", "warning": "yellow", "info": ""}[finding.severity]
        parts.append(Text(f"{finding.severity} ({finding.name}): {finding.message} {finding.advice}", style=style))
    parts.append(Text(placement(report.baselines)))
    if report.baselines.neighbours:
        parts.append(_neighbours(report))
    parts += [Text(f"note: {note}") for note in report.baselines.notes]
    return Group(*parts)


def _results(report: Report) -> Table:
    table = Table("", "accuracy", "95 % interval", "samples", caption=BRACKET)
    for row in accuracies(report):
        table.add_row(*map(Text, row))
    return table


def _curve(report: Report) -> Table:
    table = Table(title=f"robust accuracy against {report.threat.norm} eps")
    for name in CURVE_HEADER:
        table.add_column(name, justify="right")
    for row in curve_rows(report):
        table.add_row(*map(Text, row), style="bold" if row[0] == report.threat.eps else "")
    return table


def _stages(report: Report) -> Table:
    table = Table(title=Text(f"suite {report.suite.name}: {report.suite.title}"), caption=STAGE_LEGEND)
    for i, name in enumerate(STAGE_HEADER):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in stage_rows(report):
        table.add_row(*map(Text, row))
    return table


def _neighbours(report: Report) -> Table:
    table = Table("rank", "RobustBench entry", "architecture", "clean", "best known", "extra data")
    for entry in report.baselines.neighbours:
        extra = "yes" if entry.extra_data else "no"
        cells = (str(entry.rank), entry.id, entry.architecture, f"{entry.clean:.2f}", f"{entry.best_known:.2f}", extra)
        table.add_row(*map(Text, cells))
    return table
