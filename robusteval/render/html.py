"""A report as one HTML file: `report.html`, which loads nothing and may be sent, printed or served as it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robusteval.datasets.base import Split
from robusteval.evaluation.assemble import CALIBRATION, REPORT, SAMPLES
from robusteval.evaluation.curve import verdict_at
from robusteval.render import _charts, _text
from robusteval.render._page import page
from robusteval.render.markdown import provenance
from robusteval.render.pictures import Gallery, gallery
from robusteval.report import Calibration, Rate, Report, SampleRow
from robusteval.runs import file_digest, read_json, write_atomic
from robusteval.verdict import Verdict

HTML = "report.html"
SHOWN_EXAMPLES = 6
_SOURCES = (REPORT, SAMPLES, CALIBRATION)
SIGNS = {"misclassified": "–", "broken": "✗", "unknown": "?", "certified": "✓"}  # noqa: RUF001, a dash is meant


def write_html(report: Report, folder: Path, clean: Split | None) -> None:
    """Write `report.html` into ``folder``, where rows and witnesses are, and the calibration if there is one.

    ``clean`` holds the evaluated samples; without it there are no pictures of them, and the page says so.
    """
    lines = (folder / SAMPLES).read_text(encoding="utf-8").splitlines()
    rows = [SampleRow.model_validate_json(line) for line in lines]
    path = folder / CALIBRATION
    calibration = Calibration.model_validate(read_json(path)) if path.is_file() else None
    write_atomic(folder / HTML, render(report, rows, gallery(folder, clean), _digests(folder), calibration).encode())


def is_current(folder: Path) -> bool:
    """Whether `report.html` in ``folder`` names the hashes of what it is made from."""
    text = (folder / HTML).read_text(encoding="utf-8", errors="replace")
    return f'<meta name="robusteval-sources" content="{" ".join(_digests(folder).values())}">' in text


def _digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in _SOURCES if (folder / name).is_file()}


def render(
    report: Report,
    rows: Sequence[SampleRow],
    pictures: Gallery,
    digests: dict[str, str],
    calibration: Calibration | None = None,
) -> str:
    """Return the page; ``digests`` are of the files that it is made from, by name."""
    margins = [(row.margin, row.verdict) for row in rows]
    reached = [(row.adv_margin, row.verdict) for row in rows if row.adv_margin is not None]
    return page(
        "report.html.j2",
        "_report.js.j2",
        report=report,
        text=_text,
        signs=SIGNS,
        lead=lead(report),
        bars=_charts.stacked(report.results.verdicts),
        meanings={verdict.value: meaning for verdict, meaning in _charts.STACK.items()},
        bounds=_bounds(report),
        curve=_charts.eps_curve(report, rows),
        histograms=[
            ("clean", "Clean margin", _charts.histogram(margins)),
            ("witness", "Margin at the witness", _charts.histogram(reached)),
        ],
        classes=_class_rows(report, rows),
        examples=[(row, pictures.pictures[row.id]) for row in rows if row.id in pictures.pictures][:SHOWN_EXAMPLES],
        class_name=_namer(report),
        gallery=pictures,
        provenance=provenance(report),
        digests=digests,
        data=_data(report, rows, pictures),
        calibration=calibration,
    )


def lead(report: Report) -> str:
    """Say the result in one sentence, without more confidence than it deserves."""
    results, threat = report.results, report.threat
    images = f"of the {report.data.evaluated} images"
    within = f"{images} keep their right class on every input within {threat.norm} {threat.eps}"
    most = _text.percent(results.empirical.rate)
    if results.certified is None:
        said = f"At most {most} {within}. Nothing was proved."
    elif results.certified.count == results.empirical.count:
        said = f"{most} {within}: attacks and proofs meet."
    else:
        said = f"Between {_text.percent(results.certified.rate, down=True)} and {most} {within}."
    return said + (" This is about the smoothed classifier, and statistical." if report.guarantee else "")


def _bounds(report: Report) -> list[tuple[str, Rate, str]]:
    results = report.results
    named = (("clean", results.clean), ("empirical", results.empirical), ("certified", results.certified))
    return [(name, rate, _text.percent(rate.rate, down=name == "certified")) for name, rate in named if rate]


def _namer(report: Report) -> Callable[[int], str]:
    """Return class index -> its name."""
    names = report.data.classes
    return lambda label: names[label] if label < len(names) else f"class {label}"


def _class_rows(report: Report, rows: Sequence[SampleRow]) -> list[dict[str, Any]]:
    """Return name, bars and rates (clean, empirical, certified or None) of every class that has samples."""
    found = []
    for label, counts in _charts.by_class(rows).items():
        total = counts.total()
        certified, robust = counts[Verdict.CERTIFIED], counts[Verdict.CERTIFIED] + counts[Verdict.UNKNOWN]
        rates = [(robust + counts[Verdict.BROKEN], False), (robust, False)]
        rates += [(certified, True)] if report.results.certified else []
        shown = [(count, _text.percent(count / total, down)) for count, down in rates]
        found.append({"label": label, "total": total, "bars": _charts.stacked(counts), "rates": shown})
    return found


def _data(report: Report, rows: Sequence[SampleRow], pictures: Gallery) -> dict[str, Any]:
    """Return what the script needs: every row as a list, repeated words as places in lists of them."""
    words = {
        "verdict": [verdict.value for verdict in Verdict],
        "stage": [stage.name for stage in report.stages],
        "reason": list(Counter(row.reason for row in rows if row.reason)),
    }
    places = {kind: {word: place for place, word in enumerate(known)} for kind, known in words.items()}
    return {
        "words": words,
        "signs": SIGNS,
        "classes": report.data.classes,
        "eps": [point.eps for point in report.curve],
        "rows": [_row(row, report, places) for row in rows],
        "pictures": {sample: asdict(picture) for sample, picture in pictures.pictures.items()},
    }


def _row(row: SampleRow, report: Report, places: dict[str, dict[str, int]]) -> list[Any]:
    verdicts, stages = places["verdict"], places["stage"]
    levels = [
        (verdict_at(row, stage, point.radius), stage) for stage, point in zip(row.stages, report.curve, strict=True)
    ]
    return [
        *(row.id, row.label, row.prediction, verdicts[row.verdict], stages.get(row.stage or "")),
        *(_short(row.margin), _short(row.adv_distance), row.adv_prediction, _short(row.adv_margin)),
        places["reason"].get(row.reason or ""),
        [(verdicts[verdict], stages.get(stage or "")) for verdict, stage in levels],
        f"{math.floor(row.votes.radius * 10_000) / 10_000:.4f}" if row.votes else None,  # never more than is proved
    ]


def _short(value: float | None) -> float | None:
    """Keep six digits: more are not shown."""
    return None if value is None else float(f"{value:.6g}")
