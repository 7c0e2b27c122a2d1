"""`diff`: the paired test against published numbers and loops, what may be compared, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli, one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multinomial, norm
from test_report import example

from robusteval.comparison.diff import COUNTED, Side, diff
from robusteval.errors import UsageError
from robusteval.mcnemar import mcnemar
from robusteval.report import CurvePoint, Report, SampleRow


@pytest.mark.parametrize(
    ("only_a", "only_b", "total", "low", "high", "p"),
    [(7, 1, 21, -0.517, -0.026, 0.0703), (16, 6, 161, -0.1240, -0.0054, 0.0525)],
)
def test_published_examples(only_a: int, only_b: int, total: int, low: float, high: float, p: float) -> None:
    """Bentur et al. 2009 and Cavo et al. 2012, as in Fagerland, Lydersen & Laake 2014, Stat. Med. 33(16)."""
    found = mcnemar(only_a, only_b, total)
    assert (round(found.low, 3), round(found.high, 3)) == pytest.approx((low, high), abs=6e-4)
    assert found.p == pytest.approx(p, abs=5e-5)
    assert found.difference == (only_b - only_a) / total


counts = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)).filter(any)


@settings(max_examples=60)
@given(counts)
def test_p_is_the_chance_of_a_split_as_uneven(given: tuple[int, int, int]) -> None:
    only_a, only_b, same = given
    if not only_a + only_b + same:
        return
    n, worst = only_a + only_b, max(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(worst, n + 1)) / 2**n
    assert mcnemar(only_a, only_b, n + same).p == pytest.approx(min(1.0, 2 * tail))


@settings(max_examples=60)
@given(counts)
def test_the_interval_inverts_the_score_test(given: tuple[int, int, int]) -> None:
    """Reference: the likelihood maximised on a grid under each difference, and every difference tested."""
    only_a, only_b, same = given
    total = sum(given)
    found = mcnemar(only_a, only_b, total)
    assert -1 <= found.low <= found.difference <= found.high <= 1
    mirrored = mcnemar(only_b, only_a, total)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    for difference in np.linspace(-0.97, 0.97, 15).tolist():
        q = np.linspace(max(0.0, -difference), min(1.0, (1 - difference) / 2), 40_001)[1:-1]
        chances = np.stack([q, q + difference, 1 - 2 * q - difference])
        observed = np.array([only_a, only_b, same])[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            likely = np.where(observed > 0, observed * np.log(np.maximum(chances, 1e-300)), 0.0).sum(0)
        best = float(q[likely.argmax()])
        variance = total * (2 * best + difference * (1 - difference))
        score = abs(only_b - only_a - total * difference) / math.sqrt(variance)
        if abs(score - norm.isf(0.025)) > 0.02:  # the grid is coarse
            assert (found.low <= difference <= found.high) == (score < norm.isf(0.025)), (difference, score)


@pytest.mark.parametrize(("a", "b"), [(0.1, 0.1), (0.05, 0.2), (0.01, 0.02)])
def test_the_interval_covers(a: float, b: float) -> None:
    """The chance, summed over every outcome of 30 samples, that the interval holds the true difference."""
    n, covered = 30, 0.0
    for x in range(n + 1):
        for y in range(n + 1 - x):
            chance = multinomial.pmf([x, y, n - x - y], n, [a, b, 1 - a - b])
            if chance > 1e-9:
                found = mcnemar(x, y, n)
                covered += chance * (found.low <= b - a <= found.high)
    assert 0.93 < covered <= 1


def side(verdicts: str, certifying: bool = True, eps: str = "0.1", **data: Any) -> Side:
    """Return an evaluation in which sample i has the verdict that letter i of ``verdicts`` begins."""
    names = {"m": "misclassified", "b": "broken", "u": "unknown", "c": "certified"}
    rows = [
        SampleRow.model_validate(
            {"id": i, "label": i % 2, "prediction": 0, "margin": 0.5, "verdict": names[letter], "stage": letter}
        )
        for i, letter in enumerate(verdicts)
    ]
    facts = json.loads(example().model_dump_json())
    facts["data"] |= {"evaluated": len(rows), "sha256": f"{len(rows):064d}", **data}
    facts["threat"] |= {"eps": eps}
    facts["results"]["certified"] = facts["results"]["empirical"] if certifying else None
    return Side(Report.model_validate(facts), rows)


def test_pairs_are_counted_sample_by_sample() -> None:
    ours, theirs = "mbucmbucmmcc", "cccubbbummcb"
    found = diff(side(ours), side(theirs))
    assert [(one.measure, one.eps) for one in found.accuracies] == [
        ("clean", None),
        ("robust", "0.1"),
        ("certified", "0.1"),
    ]
    for one in found.accuracies:
        right = {verdict.value[0] for verdict in COUNTED[one.measure]}
        pairs = [(x in right, y in right) for x, y in zip(ours, theirs, strict=True)]
        assert (one.only_a, one.only_b) == (pairs.count((True, False)), pairs.count((False, True)))
        assert (one.a.count, one.b.count) == (sum(x for x, _ in pairs), sum(y for _, y in pairs))
        assert one.difference == pytest.approx((one.b.count - one.a.count) / 12)
    changed = [i for i, (x, y) in enumerate(zip(ours, theirs, strict=True)) if x != y]
    assert [change.id for change in found.changes] == changed
    assert (found.facts, found.notes[0][:1]) == ((), "A")


def curved(distances: list[float | None], eps: tuple[str, ...]) -> Side:
    """Return an evaluation at several ``eps`` in which sample i has its nearest witness at the given distance."""
    base = side("u" * len(distances), eps=eps[-1])
    stages = [tuple("x" if far is not None and far <= float(one) else None for one in eps) for far in distances]
    changes = [{"adv_distance": far, "stages": closed} for far, closed in zip(distances, stages, strict=True)]
    rows = [row.model_copy(update=change) for row, change in zip(base.rows, changes, strict=True)]
    points = [
        {"eps": one, "radius": float(one), "results": base.report.results, "closed": {}, "broken": {}} for one in eps
    ]
    curve = [CurvePoint.model_validate(point) for point in points]
    return Side(base.report.model_copy(update={"curve": tuple(curve)}), rows)


def test_every_shared_eps_has_its_own_verdicts() -> None:
    ours = curved([0.05, 0.15, 0.15, 0.25, None], ("0.1", "0.2", "0.3"))
    theirs = curved([0.25, 0.35, 0.15, 0.35, 0.35], ("0.2", "0.3", "0.4"))
    found = [one for one in diff(ours, theirs).accuracies if one.measure == "robust"]
    assert [(one.eps, one.a.count, one.b.count, one.only_a, one.only_b) for one in found] == [
        ("0.2", 2, 4, 0, 2),
        ("0.3", 1, 3, 0, 2),
    ]
    assert diff(ours, theirs).eps == "0.3"
    assert [change.id for change in diff(ours, theirs).changes] == [1, 3]


def test_a_longer_run_is_compared_on_what_both_have() -> None:
    found = diff(side("bbuu"), side("buuuuu"))
    assert found.samples == 4
    assert "the first 4 are compared" in found.notes[0]
    assert [(one.a.total, one.only_a, one.only_b) for one in found.accuracies][1] == (4, 0, 1)


REFUSED = {
    "as many, with another SHA-256": (side("bbuu"), side("bbuu", sha256="f" * 64)),
    "the classes of the data differs": (side("bbuu"), side("bbuuu", classes=("a", "c"))),
    "the name of the data differs": (side("bbuu"), side("bbuuu", name="npz:other")),
    "no eps in common": (side("bbuu"), side("bbuu", eps="0.2")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_paired_is_refused(message: str) -> None:
    with pytest.raises(UsageError, match=message):
        diff(*REFUSED[message])


def test_other_refusals() -> None:
    ours, other = side("bbuu"), side("bbuuu")
    with pytest.raises(UsageError, match="two labels"):
        diff(ours, Side(other.report, [row.model_copy(update={"label": 1 - row.label}) for row in other.rows]))
    threat = ours.report.threat.model_copy(update={"norm": "L2"})
    with pytest.raises(UsageError, match="two threat models"):
        diff(ours, Side(ours.report.model_copy(update={"threat": threat}), ours.rows))
    smoothing = {"sigma": 0.25, "n0": 100, "n": 1000, "alpha": 0.001, "looks": (100,)}
    smoothed = type(ours.report.suite).model_validate({**ours.report.suite.model_dump(), "smoothing": smoothing})
    with pytest.raises(UsageError, match="smoothed"):
        diff(ours, Side(ours.report.model_copy(update={"suite": smoothed}), ours.rows))


def test_the_same_eps_may_be_written_in_two_ways() -> None:
    assert diff(side("bbuu", eps="1/10"), side("bbuu", eps="0.1")).accuracies[1].eps == "1/10"


def test_certified_is_compared_only_where_both_tried() -> None:
    found = diff(side("bbcu"), side("bbuu", certifying=False))
    assert [one.measure for one in found.accuracies] == ["clean", "robust"]
    assert any("Only A was certified" in note for note in found.notes)


SUITE = """title = "Small"
[[stages]]
name = "pgd"
attack = "pgd"
params = { steps = %d }
"""


def test_the_command(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    """A run of one step on 40 samples and two eps, and one of 10 on 30 and two eps, of which one is shared."""
    for name, steps, eps, limit in (("a", 1, "0.1,0.2", "40"), ("b", 10, "0.2,0.25", "30")):
        (tmp_path / f"{name}.toml").write_text(SUITE % steps)
        flags = ("--suite", f"{name}.toml", "--eps", eps, "--limit", limit, "--workers", "1", "--out", name)
        done = cli("evaluate", "--model", model_folder, *flags)
        assert done.returncode == 0, done.stderr
    found = json.loads(cli("diff", "a", "b", "--json").stdout)
    assert (found["samples"], found["eps"], found["norm"]) == (30, "0.2", "Linf")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in "ab"]
    rows = [
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()] for name in "ab"
    ]
    broken = [[bool(row["adv_distance"]) and row["adv_distance"] <= 0.2 + 1e-6 for row in side[:30]] for side in rows]
    wrong = [[row["verdict"] == "misclassified" for row in side[:30]] for side in rows]
    robust = found["accuracies"][1]
    assert (robust["measure"], robust["eps"]) == ("robust", "0.2")
    assert robust["only_a"] == sum(
        not (x or u) and (y or v) for x, y, u, v in zip(broken[0], broken[1], *wrong, strict=True)
    )
    assert robust["only_a"] > 0, "ten steps break more than one"
    assert len(found["changes"]) == robust["only_a"] + robust["only_b"]
    assert found["accuracies"][0]["difference"] == 0
    told = {fact["what"]: (fact["a"], fact["b"]) for fact in found["facts"]}
    assert told["suite.sha256"] == tuple(report["suite"]["sha256"] for report in reports)
    assert told["data.evaluated"] == (40, 30)
    assert not [what for what in told if what.startswith("model.")]

    done = cli("diff", "a", "b")
    assert (done.returncode, "attacked" in done.stdout, "Tango 1998" in done.stdout) == (0, True, True)
    assert f"{len(found['changes'])} verdicts changed at eps 0.2" in done.stdout
    same = cli("diff", "a", "a")
    assert (same.returncode, "0 verdicts changed" in same.stdout, "what differs" in same.stdout) == (0, True, False)

    text = (tmp_path / "b" / "samples.jsonl").read_text()
    (tmp_path / "b" / "samples.jsonl").write_text(text.replace('"prediction":0', '"prediction":1', 1))
    done = cli("diff", "a", "b")
    assert (done.returncode, one_sentence(done.stderr), done.stdout) == (3, True, ""), done.stderr
