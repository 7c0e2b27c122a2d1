"""Compare certificates at planned looks with certificates from 10 000 draws; writes docs/results/smoothing.md.

    python tools/compare_smoothing.py ../shared/data [--keep runs/compare_smoothing]

The first argument is a folder with `fashion-mnist/` (idx files); digits are built in. The nets are trained first, with
Gaussian noise, in the folder that keeps the results too. The command can be interrupted and goes on where it was;
delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _study import ROOT, cached, publish, table, versions

from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.run import evaluate
from robusteval.report import SampleRow
from robusteval.runs import RunDir
from robusteval.smoothing import LookPlan
from robusteval.threat import BUDGET_TOLERANCE

N0, ALPHA = 100, 0.001
PLANS = {
    "fixed": (10_000,),
    "3 looks": (100, 1000, 10_000),
    "7 looks": (100, 200, 500, 1000, 2000, 5000, 10_000),
}
RADII = {0.25: ("0.25", "0.5", "0.75"), 0.5: ("0.25", "0.5", "0.75", "1")}
SUITE = str(ROOT / "tools" / "certify_smoothing.toml")
HEADER = (
    *("data, sigma", "L2 radius", "tried", "certified: fixed", "3 looks", "7 looks"),
    *("only fixed / only looks: 3", "7", "copies per sample: fixed", "3 looks", "7 looks", "fixed / 3", "fixed / 7"),
)


@dataclass(frozen=True)
class Case:
    """A net and its data."""

    title: str
    data: Mapping[str, Any]
    sigma: float
    epochs: int
    limit: int

    @property
    def name(self) -> str:
        """Name the case in file names."""
        return f"{self.data['dataset']}-{self.sigma:g}"


def cases(data: Path) -> list[Case]:
    """Return what is compared."""
    fashion = {"dataset": "fashion_mnist", "data_dir": str(data / "fashion-mnist")}
    both = [("Digits", {"dataset": "digits"}, 30, 360), ("Fashion-MNIST", fashion, 5, 200)]
    return [Case(f"{title}, {sigma:g}", facts, sigma, *how) for title, facts, *how in both for sigma in RADII]


def trained(case: Case, folder: Path) -> Path:
    """Train with Gaussian noise unless ``folder`` has the run; return ``folder``."""
    if not (folder / "best" / "config.json").is_file():
        where = [part for key, value in case.data.items() for part in (f"--{key.replace('_', '-')}", value)]
        flags = ["--objective", "gaussian", "--set", f"objective.params.sigma={case.sigma}", *where]
        flags += ["--epochs", str(case.epochs), "--threads", "1", "--device", "cpu", "--out", str(folder)]
        subprocess.run([sys.executable, str(ROOT / "cli.py"), "train", *flags], check=True)
    return folder


def certify(case: Case, plan: str, keep: Path) -> dict[str, Any]:
    """Certify at every radius in one run; return the rows."""
    config = {
        **{**case.data, "model": str(trained(case, keep / case.name)), "suite": SUITE, "limit": case.limit},
        **{"norm": "L2", "eps": ",".join(RADII[case.sigma]), "workers": 1, "device": "cpu"},
        "smoothing": {"sigma": case.sigma, "n0": N0, "alpha": ALPHA, "looks": PLANS[plan]},
    }
    run = RunDir(keep / f"{case.name}-{plan.replace(' ', '-')}")
    evaluate(prepare(EvalConfig.model_validate(config)), run)
    return {"rows": (run.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()}


@dataclass(frozen=True)
class Outcome:
    """The rows of the samples whose certificate was tried, under one plan."""

    plan: LookPlan
    rows: list[SampleRow]

    def certified(self, level: int) -> set[int]:
        """Return the samples certified at the radius at ``level``."""
        return {row.id for row in self.rows if row.stages[level]}

    def copies(self, radius: float | None) -> float:
        """Return the mean number of noisy copies for ``radius`` alone, or for all that were asked."""
        return sum(N0 + self._draws(row, radius) for row in self.rows) / len(self.rows)

    def _draws(self, row: SampleRow, radius: float | None) -> int:
        assert row.votes is not None
        counts, looks = row.votes.counts, len(row.votes.counts)
        if radius is not None and looks:
            ends = (t for t in range(looks + 1) if self.plan.stops(counts[:t], radius + BUDGET_TOLERANCE))
            looks = next(ends, looks)
        return self.plan.looks[looks - 1] if looks else 0


def outcome(case: Case, plan: str, lines: list[str]) -> Outcome:
    """Read the rows that one plan left."""
    rows = [SampleRow.model_validate_json(line) for line in lines]
    tried = [row for row in rows if row.votes and row.votes.chosen is not None]
    return Outcome(LookPlan(case.sigma, PLANS[plan], ALPHA), tried)


def lines(case: Case, outcomes: Mapping[str, Outcome]) -> Iterator[list[object]]:
    """Yield a row of the table for every radius, and one for all of them in one run."""
    fixed, *others = outcomes.values()
    for level, label in enumerate(RADII[case.sigma]):
        ours = [one.certified(level) for one in outcomes.values()]
        apart = [f"{len(ours[0] - other)} / {len(other - ours[0])}" for other in ours[1:]]
        yield [case.title, label, len(fixed.rows), *map(len, ours), *apart, *_cost(outcomes, float(label))]
    yield [case.title, "all together", len(fixed.rows), *[""] * (len(outcomes) + len(others)), *_cost(outcomes, None)]


def _cost(outcomes: Mapping[str, Outcome], radius: float | None) -> list[str]:
    copies = [one.copies(radius) for one in outcomes.values()]
    return [*(f"{mean:.0f}" for mean in copies), *(f"{copies[0] / mean:.1f}" for mean in copies[1:])]


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description="Compare plans of looks.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=Path, default=Path("runs/compare_smoothing"))
    options = parser.parse_args()
    rows: list[list[object]] = []
    for case in cases(options.data):
        outcomes = {}
        for plan in PLANS:
            kept = cached(options.keep, f"{case.name}-{plan}", lambda c=case, p=plan: certify(c, p, options.keep))
            outcomes[plan] = outcome(case, plan, kept["rows"])
            print(case.title, plan, f"{outcomes[plan].copies(None):.0f} copies per sample", flush=True)
        rows += lines(case, outcomes)
    publish("smoothing.md", "\n\n".join([table(HEADER, rows), versions("torch", "scipy")]))


if __name__ == "__main__":
    main()
