"""The packaged RobustBench facts and the places that are worked out from them."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from robusteval.baselines.rank import Placement, comparable, load, place, source
from robusteval.threat import Norm, ThreatModel

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "make_baselines.py"
PACKAGED = ROOT / "robusteval" / "baselines" / "robustbench.json"
MODEL_INFO = ROOT.parent / "shared" / "data" / "robustbench" / "model_info.json"
LINF_8 = ThreatModel.parse("Linf", "8/255")


def placed(
    robust: float, width: float = 0.01, extra_data: bool | None = False, complete: bool = True, eps: str = "8/255"
) -> Placement:
    interval = (max(0.0, robust - width), min(1.0, robust + width))
    return place("CIFAR-10", "cifar10", ThreatModel.parse("Linf", eps), robust, interval, extra_data, complete)


@pytest.mark.skipif(not MODEL_INFO.is_file(), reason="no ../shared/data/robustbench/model_info.json")
def test_the_packaged_file_is_what_the_script_makes(tmp_path: Path) -> None:
    made = tmp_path / "made.json"
    subprocess.run([sys.executable, str(SCRIPT), str(MODEL_INFO), str(made)], check=True)
    assert made.read_bytes() == PACKAGED.read_bytes()


def test_the_script_parses_numbers_and_keeps_gaps(tmp_path: Path) -> None:
    facts = {
        "eps": "0.031",
        "architecture": "A",
        "clean_acc": "84.00",
        "autoattack_acc": "0.0",
        "external": "",
        "additional_data": False,
        "footnote": "It uses additional 1M synthetic images in training.",
        "name": "N",
        "venue": "V",
        "link": "L",
    }
    (tmp_path / "in.json").write_text(json.dumps({"cifar10/Linf/Me2024It.json": facts}))
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "in.json"), str(tmp_path / "out.json")], check=True)
    (entry,) = json.loads((tmp_path / "out.json").read_text())["entries"]
    assert (entry["id"], entry["dataset"], entry["threat"], entry["eps"]) == ("Me2024It", "cifar10", "Linf", "0.031")
    assert (entry["clean_acc"], entry["autoattack_acc"], entry["external"]) == (84.0, 0.0, None)
    assert (entry["unreliable"], entry["says_synthetic"]) == (None, True)
    assert subprocess.run([sys.executable, str(SCRIPT)], capture_output=True).returncode == 2


def test_the_counts_are_robustbenchs() -> None:
    def count(dataset: str, threat: str) -> int:
        return sum((entry.dataset, entry.threat) == (dataset, threat) for entry in load())

    assert len(load()) == 236
    assert [count("cifar10", threat) for threat in ("Linf", "L2", "corruptions")] == [99, 21, 23]
    assert [count("cifar100", threat) for threat in ("Linf", "corruptions")] == [38, 13]
    assert [count("imagenet", threat) for threat in ("Linf", "corruptions")] == [30, 12]
    assert source() == "RobustBench model_info, 2025-03-31, commit 78fcc9e, MIT"


def test_the_flags_of_cifar10_linf() -> None:
    board = [entry for entry in load() if (entry.dataset, entry.threat) == ("cifar10", "Linf")]
    assert sum(entry.external is not None for entry in board) == 17
    assert sum(entry.unreliable is True for entry in board) == 2
    assert sum(entry.unreliable is None for entry in board) == 32
    assert sum(entry.additional_data for entry in board) == 26
    assert sum(entry.says_synthetic for entry in board) == 24
    neither = [entry for entry in board if not entry.additional_data and not entry.says_synthetic]
    assert len(neither) == 51
    best = max(neither, key=lambda entry: entry.best_known)
    assert (best.id, best.clean_acc, best.best_known) == ("Chen2024Data_WRN_34_20", 86.10, 58.09)


def test_the_top_is_ranked_by_the_best_known_figure() -> None:
    top = comparable("cifar10", Norm.LINF, Fraction(8, 255), None)[:5]
    assert [entry.id for entry in top] == [
        "Bartoldson2024Adversarial_WRN-94-16",
        "Amini2024MeanSparse_S-WRN-94-16",
        "Bartoldson2024Adversarial_WRN-82-8",
        "Peng2023Robust",
        "Wang2023Better_WRN-70-16",
    ]
    assert [entry.best_known for entry in top] == [73.71, 73.10, 71.59, 71.07, 70.69]
    assert top[1].autoattack_acc == 75.28


def test_like_is_compared_with_like() -> None:
    def count(eps: str, extra_data: bool | None, norm: Norm = Norm.LINF) -> int:
        return len(comparable("cifar10", norm, Fraction(eps), extra_data))

    assert [count("8/255", extra) for extra in (None, True, False)] == [93, 93, 67]
    assert [count("0.031", extra) for extra in (None, False)] == [6, 6]
    assert count("16/510", None) == 93
    assert count("31/1000", None) == 6
    assert count("0.0314", None) == 0
    assert [count("0.5", extra, Norm.L2) for extra in (None, False)] == [21, 15]
    assert count("0.5", None, Norm.L1) == 0
    assert comparable(None, Norm.LINF, Fraction(8, 255), None) == []


def test_a_place_in_the_middle() -> None:
    found = placed(0.5248)
    rivals = comparable("cifar10", Norm.LINF, Fraction(8, 255), False)
    assert found.reason is None
    assert found.entries == 67
    assert found.rank == 1 + sum(entry.best_known > 52.48 for entry in rivals)
    assert (found.best_rank, found.rank, found.worst_rank) == (38, 40, 42)
    assert found.below[0].id == "Addepalli2022Efficient_RN18"
    assert [entry.best_known for entry in found.above] == [53.42, 52.84]
    assert found.best == rivals[0]
    assert not found.provisional


@pytest.mark.parametrize("percent", ["73.71", "58.09", "55.54", "52.48"])
def test_an_equal_entry_is_not_better(percent: str) -> None:
    rivals = comparable("cifar10", Norm.LINF, Fraction(8, 255), None)
    same = next(index for index, entry in enumerate(rivals) if entry.best_known == float(percent))
    assert placed(float(percent) / 100, extra_data=None).rank == same + 1


def test_first_and_last_place() -> None:
    first, last = placed(0.9), placed(0.0)
    assert (first.rank, first.above, len(first.below)) == (1, (), 2)
    assert first.best == first.below[0]
    tied = sum(entry.best_known == 0 for entry in comparable("cifar10", Norm.LINF, Fraction(8, 255), False))
    assert last.rank == last.worst_rank == 67 - tied + 1
    assert len(last.above) == 2
    assert len(last.below) == min(2, tied)


def test_part_of_the_test_set_is_provisional() -> None:
    found = placed(0.55, width=0.05, complete=False)
    assert found.provisional
    assert found.best_rank is not None
    assert found.rank is not None
    assert found.worst_rank is not None
    assert found.best_rank < found.rank < found.worst_rank
    assert any("provisional" in note for note in found.notes)


def test_unknown_extra_data_is_compared_with_all_and_said() -> None:
    found = placed(0.55, extra_data=None)
    assert found.entries == 93
    assert any("not known" in note for note in found.notes)
    assert not any("not known" in note for note in placed(0.55, extra_data=True).notes)
    assert any("22 of these entries used synthetic images" in note for note in placed(0.55).notes)


@pytest.mark.parametrize(
    ("title", "benchmark", "norm", "eps", "reason"),
    [
        ("Digits", None, "Linf", "0.1", "Digits is not a RobustBench dataset."),
        ("CIFAR-10 (JPEG)", None, "Linf", "8/255", "CIFAR-10 (JPEG) is a re-encoded CIFAR-10, so RobustBench's"),
        (
            "CIFAR-10",
            "cifar10",
            "Linf",
            "4/255",
            "no CIFAR-10 entry at Linf 4/255; its Linf entries are at eps 0.031 and",
        ),
        ("CIFAR-10", "cifar10", "L1", "12", "RobustBench has no L1 entries for CIFAR-10."),
        ("ImageNet", "imagenet", "L2", "3", "RobustBench has no L2 entries for ImageNet."),
    ],
)
def test_no_place_and_why(title: str, benchmark: str | None, norm: str, eps: str, reason: str) -> None:
    found = place(title, benchmark, ThreatModel.parse(norm, eps), 0.5, (0.4, 0.6), None, complete=True)
    assert found.reason is not None
    assert reason in found.reason
    assert (found.rank, found.entries, found.best, found.above) == (None, 0, None, ())


@pytest.mark.parametrize(("robust", "interval"), [(52.4, (51.0, 54.0)), (0.5, (0.6, 0.7)), (float("nan"), (0.0, 1.0))])
def test_percent_is_not_taken_for_a_fraction(robust: float, interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="not ordered within"):
        place("CIFAR-10", "cifar10", LINF_8, robust, interval, None, complete=True)


def test_importing_the_ranking_is_cheap() -> None:
    program = "import sys, robusteval.baselines.rank as rank\nrank.load()\nprint('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
