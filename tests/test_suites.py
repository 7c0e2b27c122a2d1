"""Suites that join or include others."""

from __future__ import annotations

from pathlib import Path

import pytest

from robusteval.errors import UsageError
from robusteval.evaluation.suite import Suite, load_suite
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
    assert set(names(full)) == {
        name for part in ("certified", "standard", "foolbox") for name in names(load_suite(part, threat))
    }


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
