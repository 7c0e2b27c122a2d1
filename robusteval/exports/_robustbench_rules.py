"""What RobustBench admits (Croce et al. 2021, arXiv:2010.09670; the README of its repository), checked on a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

from robusteval.baselines.rank import load, place
from robusteval.errors import UsageError
from robusteval.evaluation.suite import load_suite, suite_digest
from robusteval.exports._markdown import plain
from robusteval.report import Report
from robusteval.threat import ThreatModel

TEST_SETS = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
"""Images that RobustBench evaluates on; of ImageNet a fixed list of validation images."""

RANDOM = ("randomised", "randomized")
FLAT = ("no-gradient", "zero-gradients")
OPTIMISING = ("dynamic",)
SUSPICIOUS = ("masked-gradients", "black-box-beats-white-box")
"""Findings of ours that call for adaptive attacks, as AutoAttack's own flags do."""


def board_eps(benchmark: str, norm: str) -> str | None:
    """Return the eps of RobustBench's board as they spell it: that of most of its entries, None without any."""
    spelled = Counter(entry.eps for entry in load() if (entry.dataset, entry.threat) == (benchmark, norm))
    return spelled.most_common(1)[0][0] if spelled else None


def unreliable(report: Report) -> bool:
    """Say whether a finding, AutoAttack's or ours, tells that AutoAttack may be too weak here."""
    return any(one.name in SUSPICIOUS or one.origin == "autoattack" for one in report.findings)


def barred(report: Report) -> tuple[str, ...]:
    """Return every reason why RobustBench would not take the report, each as a sentence."""
    rules = (_data, _whole, _suite, _deterministic, _gradients, _inference, _doubts)
    return tuple(plain(reason) for rule in rules for reason in rule(report))


def _data(report: Report) -> Iterator[str]:
    data, threat = report.data, ThreatModel.parse(report.threat.norm, report.threat.eps)
    rate = report.results.empirical
    span = (rate.low, rate.high)
    placed = place(data.title, data.benchmark, threat, rate.rate, span, report.model.extra_data, complete=True)
    theirs = board_eps(data.benchmark, threat.norm.value) if data.benchmark else None
    if placed.reason:
        yield placed.reason
    elif theirs and Fraction(theirs) != threat.eps:
        several = ", the headline of this run for several eps" if report.curve else ""
        board = f"RobustBench's {threat.norm.value} board of {data.title}"
        yield f"{board} is for eps {theirs}, not {threat.label}{several}."


def _whole(report: Report) -> Iterator[str]:
    data = report.data
    size = TEST_SETS.get(data.benchmark or "", data.total)
    if data.part != "test":
        yield f"The samples are those of the part '{data.part}', not of the test set."
    if data.evaluated < data.total:
        yield f"Only {data.evaluated} of the {data.total} test images were evaluated; RobustBench wants all."
    if data.total != size:
        yield f"The test set has {data.total} images, RobustBench's has {size}."


def _suite(report: Report) -> Iterator[str]:
    suite = report.suite
    if suite.smoothing:
        yield "The numbers are about a smoothed classifier, a track that RobustBench does not have."
    ran = suite_digest(suite.stages, suite.skip_certified, suite.repeat, suite.smoothing)
    if ran != _standard(report) or suite.sha256 != ran:
        yield f"The suite '{suite.name}' is not exactly `standard`, all of AutoAttack standard and nothing else."
    yield from (f"AutoAttack was adapted: {text}" for text in suite.adaptations)
    if report.queries is not None:
        yield f"Attacks had only {report.queries} queries per sample."
    if report.search.precision != "float32":
        yield f"Attacks searched in {report.search.precision}."


def _standard(report: Report) -> str | None:
    try:
        return load_suite("standard", ThreatModel.parse(report.threat.norm, report.threat.eps)).sha256
    except UsageError:  # AutoAttack has no attack in this norm
        return None


def _named(report: Report, names: tuple[str, ...]) -> list[str]:
    return sorted({f"{one.name}: {one.message}" for one in report.findings if one.name in names})


def _deterministic(report: Report) -> Iterator[str]:
    if report.suite.repeat:
        yield "The model was judged as a randomised one, by repeated evaluations; RobustBench admits no randomness."
    for said in _named(report, RANDOM):
        yield f"The model is randomised, which RobustBench does not admit ({said})"


def _gradients(report: Report) -> Iterator[str]:
    for said in _named(report, FLAT):
        yield f"RobustBench admits no model whose input gradients are zero ({said})"


def _inference(report: Report) -> Iterator[str]:
    for said in _named(report, OPTIMISING):
        yield f"RobustBench admits no optimisation at test time ({said})"


def _doubts(report: Report) -> Iterator[str]:
    for finding in report.findings:
        if finding.severity == "error" and finding.name not in (*RANDOM, *FLAT, *OPTIMISING):
            yield f"The result is doubtful ({finding.name}: {finding.message})"
