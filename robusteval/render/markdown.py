"""A report as Markdown: `report.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
from robusteval.render.eps_curve import CURVE_PICTURE
from robusteval.report import Report
from robusteval.settings import flatten


def render(report: Report) -> str:
    """Return the whole report as one Markdown document."""
    sections = [
        f"# Robustness report\n\n{_escape(subject(report))}",
        _table(("", "accuracy", "95 % interval", "samples"), accuracies(report)) + f"\n\n`{BRACKET}`",
        *_curve(report),
        f"## {_escape(report.suite.title)}\n\n{_escape(report.suite.reference)}\n\n"
        + _table(STAGE_HEADER, stage_rows(report))
        + f"\n\n{STAGE_LEGEND}. {cost(report)}."
        + "".join(f"\n\n{_escape(decided)}" for decided in rulings(report)),
        "## Findings\n\n" + _findings(report),
        "## Baselines\n\n" + _baselines(report),
        "## Provenance\n\n" + _table(("what", "value"), list(provenance(report).items())),
    ]
    return "\n\n".join(sections) + "\n"


def _escape(text: str) -> str:
    """Keep a report's own strings from acting as markup."""
    for character in "\\`*_{}[]<>|#":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _curve(report: Report) -> list[str]:
    if not report.curve:
        return []
    title = f"## Robust accuracy against {report.threat.norm} eps\n\n"
    return [title + _table(CURVE_HEADER, curve_rows(report)) + f"\n\n![robust accuracy against eps]({CURVE_PICTURE})"]


def _findings(report: Report) -> str:
    lines = [f"- adapted: {_escape(text)}" for text in report.suite.adaptations]
    for finding in report.findings:
        text = _escape(f"{finding.message} {finding.advice}".strip())
        lines.append(f"- **{finding.severity}** {_escape(finding.name)} ({finding.origin}): {text}")
    return "\n".join(lines) or "None: the model passed every check."


def _baselines(report: Report) -> str:
    text = _escape(placement(report.baselines))
    rows = [
        (str(n.rank), n.id, n.architecture, f"{n.clean:.2f}", f"{n.best_known:.2f}", "yes" if n.extra_data else "no")
        for n in report.baselines.neighbours
    ]
    if rows:
        text += "\n\n" + _table(("rank", "entry", "architecture", "clean", "best known", "extra data"), rows)
    return text + "".join(f"\n\n{_escape(note)}" for note in report.baselines.notes)


def provenance(report: Report) -> dict[str, str]:
    """Say where the numbers come from, what -> value."""
    environment = report.environment
    commit = environment.git_commit or "installed package"
    return {
        "command": report.command,
        "created": report.created,
        "seed": str(report.seed),
        "model": f"{report.model.architecture}, {report.model.parameters} parameters, from {report.model.source}",
        "training": ", ".join(f"{key} {value}" for key, value in flatten(report.model.training).items()),
        "model weights, SHA-256": report.model.weights_sha256,
        "samples, SHA-256": report.data.sha256,
        "suite, SHA-256": report.suite.sha256,
        "chunk size, batch size, workers": f"{report.chunk_size}, {report.batch_size}, {report.workers}",
        "source code": commit + (" with local changes" if environment.git_dirty else ""),
        "device": f"{environment.device} {environment.device_name}".strip(),
        "versions": ", ".join(f"{name} {version}" for name, version in environment.packages.items()),
    }
