"""Suites that join or include others."""

from __future__ import annotations

from pathlib import Path

import pytest

from robusteval.cli.list import loose_note
from robusteval.errors import UsageError
from robusteval.evaluation.aftermath import _loose_alone
from robusteval.evaluation.suite import Suite, load_suite
from robusteval.suites import describe_suites
from robusteval.threat import ThreatModel

LINF = ThreatModel.parse("Linf", "0.1")


def names(suite: Suite) -> list[str]:
    return [spec.name for spec in suite.specs]


def test_joined_suites_prove_first_and_keep_every_stage() -> None:
    both = load_suite("standard+certified", LINF)
    certified, standard = (load_suite(name, LINF) for name in ("certified", "standard"))
    assert both.specs == (*certified.specs, *standard.specs)
    assert both.skip_certified
    assert both.certifying
    assert both.sha256 not in (certified.sha256, standard.sha256)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_full_has_all_of_three_suites_and_attacks_what_is_proved(norm: str) -> None:
    threat = ThreatModel.parse(norm, "0.1")
    full = load_suite("full", threat)
    assert not full.skip_certified
    parts = {name for part in ("certified", "standard", "foolbox") for name in names(load_suite(part, threat))}
    assert set(names(full)) == parts | ({"apgd-shrink"} if norm == "L2" else set())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    "name", ["standard", "certified", "foolbox", "apgd", "score", "quick", "decision", "plus", "full"]
)
def test_rapid_can_be_joined_with_what_people_ask_for_beside_it(name: str, norm: str) -> None:
    threat = ThreatModel.parse(norm, "0.1")
    joined = names(load_suite(f"rapid+{name}", threat))
    assert set(joined) == {*names(load_suite("rapid", threat)), *names(load_suite(name, threat))}


def test_a_stage_in_both_runs_once() -> None:
    assert names(load_suite("standard+apgd", LINF)) == names(load_suite("standard", LINF))


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('title = "other"\n[[stages]]\nname = "apgd-ce"\nattack = "pgd"\n')
    with pytest.raises(UsageError, match="two different stages called 'apgd-ce'"):
        load_suite(f"standard+{other}", LINF)
    with pytest.raises(UsageError, match="different ways"):
        load_suite("standard+rand", LINF)
    with pytest.raises(UsageError, match="Did you mean 'certified'"):
        load_suite("standard+certifed", LINF)
    circle = tmp_path / "circle.toml"
    circle.write_text(f'title = "circle"\ninclude = ["{circle.as_posix()}"]\n')
    with pytest.raises(UsageError, match="one level"):
        load_suite(str(circle), LINF)


def test_a_suite_without_stages_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text('title = "nothing"\n')
    with pytest.raises(UsageError, match="no stage"):
        load_suite(str(empty), LINF)


LOOSE = {"apgd": "L1", "score": ("L2", "L1"), "decision": ("Linf", "L1", "L0"), "foolbox": "L0", "full": "L0"}
"""Suites and norms for which they hold loose attacks only."""


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1", "L0"])
@pytest.mark.parametrize("name", sorted(describe_suites()))
def test_loose_attacks_have_company_or_the_suite_and_the_report_say_so(name: str, norm: str) -> None:
    threat = ThreatModel.parse(norm, "1")
    try:
        suite = load_suite(name, threat)
    except UsageError:
        pytest.skip("no stage for the norm")
    findings = list(_loose_alone(suite, threat.norm))
    assert bool(findings) == (norm in LOOSE.get(name, ()))
    assert not findings or "verstates robustness" in describe_suites()[name]
    assert all(spec.name in findings[0].message for spec in suite.specs if findings)


def test_the_list_names_what_is_loose() -> None:
    assert loose_note("square") == "Loose, never enough alone: L2, L1."
    assert "L1 apgd-ce, apgd-dlr, apgd-t" in loose_note("autoattack")
    assert loose_note("apgd") == ""
