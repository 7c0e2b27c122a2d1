"""The report model, its schemas, its numbers and its renderings."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import binomtest

from robusteval.provenance import Environment
from robusteval.render import markdown, terminal
from robusteval.render._text import percent
from robusteval.report import SCHEMAS, Rate, Report, count_verdicts, json_schema
from robusteval.verdict import Verdict


@pytest.mark.parametrize("name", SCHEMAS)
def test_committed_schemas_are_the_models(name: str) -> None:
    """Regenerate with `make schemas`."""
    committed = json.loads((ROOT / "schemas" / "v1" / f"{name}.schema.json").read_text())
    assert committed == json_schema(name)
    jsonschema.Draft202012Validator.check_schema(committed)


@settings(max_examples=200)
@given(total=st.integers(1, 10_000), share=st.floats(0, 1))
def test_intervals_are_clopper_pearson(total: int, share: float) -> None:
    count = round(share * total)
    rate, theirs = Rate.of(count, total), binomtest(count, total).proportion_ci(0.95, method="exact")
    assert (rate.low, rate.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert rate.low <= rate.rate <= rate.high


@settings(max_examples=200)
@given(st.lists(st.integers(0, 300), min_size=4, max_size=4).filter(any))
def test_the_bracket_holds_by_construction(counts: list[int]) -> None:
    results = count_verdicts(dict(zip(Verdict, counts, strict=True)), certifying=True)
    assert results.certified is not None
    assert results.certified.count <= results.empirical.count <= results.clean.count <= sum(counts)


@given(st.floats(0, 1))
def test_certified_percentages_are_rounded_down(value: float) -> None:
    shown = float(percent(value, down=True).rstrip(" %"))
    assert shown <= 100 * value + 1e-9
    assert shown > 100 * value - 0.0101


def example(**changes: Any) -> Report:
    rate = Rate.of(150, 200)
    stage = {"name": "pgd", "kind": "attack"}
    base: dict[str, Any] = {
        "created": "2026-01-01T00:00:00+00:00",
        "command": "robusteval evaluate",
        "seed": 0,
        "chunk_size": 250,
        "batch_size": 250,
        "workers": 1,
        "seconds": 1.5,
        "model": {
            "name": "<script>alert(1)</script>|`x`",
            "source": "file",
            "architecture": "small_cnn",
            "parameters": 3,
            "weights_sha256": "0" * 64,
            "extra_data": None,
            "training": {},
        },
        "data": {
            "name": "digits",
            "title": "Digits",
            "part": "test",
            "total": 360,
            "evaluated": 200,
            "shape": (1, 8, 8),
            "classes": ("a", "b"),
            "benchmark": None,
            "sha256": "1" * 64,
        },
        "threat": {"norm": "Linf", "eps": "0.1", "radius": 0.1, "tolerance": 1e-6},
        "suite": {
            "name": "quick",
            "title": "Quick look",
            "reference": "",
            "sha256": "2" * 64,
            "stages": [{**stage, "plugin": "pgd", "params": {}}],
            "skip_certified": False,
            "adaptations": ["fewer targets"],
        },
        "results": {
            "verdicts": {"misclassified": 10, "broken": 40, "unknown": 150, "certified": 0},
            "clean": Rate.of(190, 200),
            "empirical": rate,
            "certified": None,
        },
        "stages": [
            {
                **stage,
                "entered": 190,
                "closed": 40,
                "broken": 40,
                "rejected": 0,
                "non_finite": 0,
                "forward": 1900,
                "backward": 1800,
                "seconds": 1.5,
                "adaptations": [],
                "warnings": [],
            }
        ],
        "findings": [
            {"name": "odd", "severity": "warning", "origin": "robusteval", "message": "Odd.", "advice": "Look."}
        ],
        "baselines": {
            "snapshot": "s",
            "reason": None,
            "rank": 3,
            "rank_best": 2,
            "rank_worst": 9,
            "provisional": True,
            "entries": 67,
            "neighbours": [
                {
                    "id": "Wong2020Fast",
                    "architecture": "PreActRN-18",
                    "clean": 83.34,
                    "best_known": 43.21,
                    "extra_data": False,
                    "rank": 60,
                }
            ],
            "notes": ["a note"],
        },
        "environment": Environment(
            python="3.11",
            platform="Linux x86_64",
            packages={"torch": "2.6"},
            git_commit=None,
            git_dirty=None,
            device="cpu",
            device_name="",
            threads=1,
            deterministic=True,
        ),
    }
    return Report.model_validate({**base, **changes})


def test_the_schema_alone_accepts_a_report_and_refuses_a_changed_one() -> None:
    validator = jsonschema.Draft202012Validator(json_schema("report"))
    record = json.loads(example().model_dump_json())
    assert list(validator.iter_errors(record)) == []
    for change in ({"seed": "0"}, {"extra": 1}, {"schema_version": "9"}, {"chunk_size": 0}):
        assert list(validator.iter_errors({**record, **change})), change
    assert list(validator.iter_errors({key: value for key, value in record.items() if key != "findings"}))


def test_both_renderings_say_what_matters() -> None:
    report = example()
    console = Console(width=200, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(terminal.render(report))
    for text in (capture.get(), markdown.render(report)):
        for fact in ("75.00 %", "95.00 %", "150/200", "not attempted", "first 200 of 360", "Wong2020Fast", "rank 3"):
            assert fact in text, fact
        assert "2 to 9" in text
        assert "fewer targets" in text
        assert "Odd. Look." in text


def test_markdown_does_not_pass_on_markup_from_a_report() -> None:
    text = markdown.render(example())
    assert "<script>" not in text
    rows = [line for line in text.splitlines() if line.startswith("| command")]
    assert len(rows) == 1


def test_intervals_shown_are_rounded_outwards() -> None:
    from robusteval.render._text import interval

    rate = Rate.of(150, 200)
    low, high = (float(part) for part in interval(rate).strip("[]").split(","))
    assert low <= 100 * rate.low
    assert high >= 100 * rate.high
    assert math.isclose(low, 100 * rate.low, abs_tol=0.011)
