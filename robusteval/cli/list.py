"""`list`: name every plug-in, suite and recipe without importing any."""

from __future__ import annotations

import json
import tomllib
from importlib import resources

import click
from rich.table import Table
from rich.text import Text

from robusteval.cli import _console
from robusteval.errors import unknown

KINDS = {
    "objectives": ("objective", "trainers"),
    "attacks": ("attack", "attacks"),
    "certifiers": ("certifier", "certifiers"),
    "datasets": ("dataset", "datasets"),
    "models": ("architecture", "models"),
    "sources": ("model source", "models.zoo"),
    "exports": ("exporter", "exports"),
}


def _describe(kind: str) -> dict[str, str]:
    from robusteval.catalog import Catalog
    from robusteval.suites import describe_suites
    from robusteval.training.recipes import describe_recipes

    data = {"suites": describe_suites, "recipes": describe_recipes}
    found = data[kind]() if kind in data else Catalog(*KINDS[kind]).describe()
    if kind == "attacks":
        found = {name: f"{summary} {loose_note(name)}".strip() for name, summary in found.items()}
    return found


def loose_note(plugin: str) -> str:
    """Return what is said about an attack of which something is loose, read without importing any."""
    text = resources.files("robusteval").joinpath("attacks", "quarantine.toml").read_text(encoding="utf-8")
    entries = [entry for entry in tomllib.loads(text)["loose"] if entry["plugin"] == plugin]
    parts = [f"{', '.join(entry['norms'])} {', '.join(entry.get('attacks', ()))}".strip() for entry in entries]
    return f"Loose, never enough alone: {'; '.join(parts)}." if parts else ""


@click.command("list")
@click.argument("kinds", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record on stdout.")
def command(kinds: tuple[str, ...], as_json: bool) -> None:
    """Name all plug-ins, or those of the given KINDS.

    KINDS: objectives, attacks, certifiers, datasets, models, sources, exports, suites, recipes.
    """
    known = [*KINDS, "suites", "recipes"]
    for kind in kinds:
        if kind not in known:
            raise unknown("kind of plug-in", kind, known)
    found = {kind: _describe(kind) for kind in kinds or known}
    if as_json:
        click.echo(json.dumps(found))
        return
    for kind, plugins in found.items():
        table = Table(title=kind, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, summary in plugins.items():
            table.add_row(Text(name), Text(summary))
        _console.out.print(table if plugins else f"{kind}: none yet")
