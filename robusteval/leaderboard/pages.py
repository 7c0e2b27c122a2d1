"""The leaderboard as HTML: the same templates for the server and for a static site."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from robusteval.baselines.rank import Baseline, load, source
from robusteval.leaderboard.entry import MEANINGS, TRACKS, Published
from robusteval.render._text import interval, percent
from robusteval.report import Rate
from robusteval.runs import write_atomic

HERE = Path(__file__).parent
STATIC = HERE / "static"
MOST = 1000
"""Submissions that the page shows; the API has them all."""
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Figure:
    """A rate as shown; ``value`` in percent is what sorting compares, None where there is no figure."""

    text: str
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table. ``id`` is None for the reference rows, which link to their paper."""

    id: str | None
    link: str
    model: str
    architecture: str
    extra_data: bool | None
    dataset: str
    norm: str
    eps: str
    radius: float
    track: str
    clean: Figure
    empirical: Figure
    certified: Figure
    suite: str
    status: str
    date: str
    flags: tuple[str, ...] = ()
    part: str = ""
    """Of which images the figures are; empty: of all."""

    @property
    def setting(self) -> tuple[str, str, float, str]:
        """What must be the same for two rows to be compared."""
        return self.dataset, self.norm, self.radius, self.track


def index(found: Sequence[Published], total: int, suffix: str = "") -> str:
    """Return the page with the table; ``suffix`` ends the links to single submissions."""
    own = [_row(one, suffix) for one in found]
    rows = sorted([*own, *_reference()], key=_order({row.setting for row in own}))
    return _render("index.html", rows=rows, shown=len(own), total=total, snapshot=source(), tracks=TRACKS, root="")


def detail(one: Published, home: str = "../") -> str:
    """Return the page of one submission; ``home`` is where the table is."""
    facts = {name: _figure(getattr(one.report, name), name) for name in ("clean", "empirical", "certified")}
    curve = [
        (point.eps, _figure(point.empirical, "empirical"), _figure(point.certified, "certified"))
        for point in one.report.curve
    ]
    shown = {"one": one, "report": one.report, **facts, "curve": curve, "tracks": TRACKS}
    return _render("detail.html", **shown, root="../", home=home)


def write_site(found: Sequence[Published], out: Path) -> None:
    """Write the leaderboard as files: `index.html`, `submissions/ID.html`, `static/`."""
    write_atomic(out / "index.html", index(found, len(found), ".html").encode())
    for one in found:
        write_atomic(out / "submissions" / f"{one.id}.html", detail(one, "../index.html").encode())
    shutil.copytree(STATIC, out / "static", dirs_exist_ok=True)


def _order(submitted: set[tuple[str, str, float, str]]) -> Any:
    """Compare like with like: settings of which something was submitted first, in each the best first.

    What is of some images comes after what is of all, and what is refuted last.
    """
    return lambda row: (
        row.setting not in submitted,
        row.setting,
        row.status == "refuted",
        bool(row.part),
        -(row.empirical.value or 0.0),
        row.model,
    )


def _row(one: Published, suffix: str) -> Row:
    report = one.report
    return Row(
        id=one.id,
        link=f"submissions/{one.id}{suffix}",
        model=report.model,
        architecture=report.architecture,
        extra_data=report.extra_data,
        dataset=report.dataset,
        norm=report.norm,
        eps=report.eps,
        radius=report.radius,
        track=report.track,
        clean=_figure(report.clean, "clean"),
        empirical=_figure(report.empirical, "empirical"),
        certified=_figure(report.certified, "certified"),
        suite=report.suite,
        status=one.status,
        date=one.received[:10],
        flags=tuple(flag.name for flag in report.findings if flag.severity != "info"),
        part="" if report.evaluated == report.total else f"first {report.evaluated} of {report.total}",
    )


def _figure(rate: Rate | None, name: str) -> Figure:
    if rate is None:
        return Figure("none")
    return Figure(percent(rate.rate, down=name == "certified"), 100 * rate.rate, interval(rate))


@cache
def _reference() -> tuple[Row, ...]:
    """Return RobustBench's entries with a norm and an eps."""
    return tuple(_published(entry) for entry in load() if entry.threat in ("Linf", "L2") and entry.eps)


def _published(entry: Baseline) -> Row:
    eps = entry.eps or ""
    return Row(
        id=None,
        link=entry.link,
        model=entry.id,
        architecture=entry.architecture,
        extra_data=entry.additional_data,
        dataset=entry.dataset,
        norm=entry.threat,
        eps=eps,
        radius=float(Fraction(eps)),
        track="standard",
        clean=Figure(f"{entry.clean_acc:.2f} %", entry.clean_acc),
        empirical=Figure(f"{entry.best_known:.2f} %", entry.best_known),
        certified=Figure("none"),
        suite="AutoAttack" if entry.external is None else "best known attack",
        status="published",
        date=entry.venue,
        flags=("potentially unreliable",) if entry.unreliable else (),
    )


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(HERE / "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _render(name: str, **values: Any) -> str:
    return _environment().get_template(name).render(meanings=MEANINGS, policy=POLICY, **values)
