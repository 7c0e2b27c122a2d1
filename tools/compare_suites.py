"""Compare the union of Foolbox's and our own attacks with AutoAttack standard; writes docs/results/suites.md.

    python tools/compare_suites.py ../shared/data [--keep runs/compare_suites]

The first argument is a folder with `fashion-mnist/` (idx files), `cifar10-jpeg.tar.xz` and `models/` with three
published nets. A fourth is trained first, in the folder that keeps the results too. The command can be interrupted and
goes on where it was; delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _nets import cifar10, cifar_cnn_a_adv, fashion_mnist, fashion_mnist_wk, resnet2b
from _study import ROOT, cached, publish, table, versions

from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.run import evaluate
from robusteval.models.base import LoadedModel
from robusteval.runs import RunDir
from robusteval.verdict import Verdict

SAMPLES = 200
SUITES = {"standard": "standard", "foolbox": "foolbox", "own": str(ROOT / "tools" / "own_suite.toml")}
HEADER = ("net", "clean", "standard", "foolbox", "own", "union", "union - standard, points", "seconds")


@dataclass(frozen=True)
class Case:
    """A net and a threat model; a ``model`` is given where the configuration cannot name it."""

    title: str
    config: Mapping[str, Any]
    model: LoadedModel | None = None


def cases(data: Path, keep: Path) -> list[Case]:
    """Return what is compared."""
    linf = {"norm": "Linf", "eps": "0.1"}
    wk = fashion_mnist_wk(data)
    sovr = {**fashion_mnist(data), **linf, "model": str(trained(data, keep / "sovr"))}
    return [
        Case("fashion_mnist_wk, Fashion-MNIST, Linf 0.1", {**wk, **linf}),
        Case("cifar_cnn_a_adv, CIFAR-10 (JPEG), Linf 2/255", cifar_cnn_a_adv(data)),
        Case("resnet2b, CIFAR-10 (JPEG), Linf 2/255", cifar10(data), resnet2b(data / "models" / "resnet2b.pth")),
        Case("SOVR small_cnn, Fashion-MNIST, Linf 0.1", sovr),
        Case("fashion_mnist_wk, Fashion-MNIST, L2 1", {**wk, "norm": "L2", "eps": "1"}),
    ]


def trained(data: Path, folder: Path) -> Path:
    """Train SOVR for two epochs unless ``folder`` has the run; return ``folder``."""
    if not (folder / "best" / "config.json").is_file():
        flags = ["--objective", "sovr", "--dataset", "fashion_mnist", "--data-dir", str(data / "fashion-mnist")]
        flags += ["--eps", "0.1", "--epochs", "2", "--threads", "1", "--device", "cpu", "--out", str(folder)]
        subprocess.run([sys.executable, str(ROOT / "cli.py"), "train", *flags], check=True)
    return folder


def attack(case: Case, suite: str, folder: Path) -> dict[str, Any]:
    """Evaluate with one suite; return the verdict and the deciding stage of every sample, by id, and seconds."""
    common = {"suite": SUITES[suite], "limit": SAMPLES, "chunk_size": 100, "workers": 1, "device": "cpu"}
    run, start = RunDir(folder), time.perf_counter()
    evaluate(prepare(EvalConfig.model_validate({**case.config, **common}), case.model), run)
    lines = [json.loads(line) for line in (run.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    verdicts = {line["id"]: (line["verdict"], line["stage"]) for line in lines}
    return {"verdicts": verdicts, "seconds": time.perf_counter() - start}


@dataclass(frozen=True)
class Outcome:
    """Verdicts of one suite: id -> (verdict, stage)."""

    verdicts: dict[str, tuple[str, str | None]]
    seconds: float

    def clean(self) -> set[str]:
        """Return the correctly classified samples."""
        return {i for i, (verdict, _) in self.verdicts.items() if verdict != Verdict.MISCLASSIFIED}

    def robust(self) -> set[str]:
        """Return the samples that nothing broke."""
        return {i for i, (verdict, _) in self.verdicts.items() if verdict == Verdict.UNKNOWN}

    def broken_by(self, samples: set[str]) -> str:
        """Name the stage that broke each of ``samples``."""
        return ", ".join(f"{i} ({self.verdicts[i][1]})" for i in sorted(samples, key=int)) or "none"


def row(case: Case, outcomes: Mapping[str, Outcome]) -> list[object]:
    """Return a row of the table."""
    robust = {name: outcome.robust() for name, outcome in outcomes.items()}
    union = robust["foolbox"] & robust["own"]
    points = 100 * (len(union) - len(robust["standard"])) / SAMPLES
    seconds = " / ".join(f"{outcome.seconds:.0f}" for outcome in outcomes.values())
    counts = [len(outcomes["standard"].clean()), *map(len, robust.values()), len(union)]
    return [case.title, *counts, f"{points:+.1f}", seconds]


def differences(case: Case, outcomes: Mapping[str, Outcome]) -> str:
    """Name the samples on which union and standard disagree, and what broke them."""
    standard, foolbox, own = (outcomes[name] for name in ("standard", "foolbox", "own"))
    union = foolbox.robust() & own.robust()
    by_standard = standard.broken_by(union - standard.robust())
    by_union = standard.robust() - union
    by_foolbox, by_own = (half.broken_by(by_union - half.robust()) for half in (foolbox, own))
    missed = f"Standard misses, Foolbox breaks: {by_foolbox}; ours break: {by_own}."
    return f"- {case.title}. Only standard breaks: {by_standard}. {missed}"


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description="Compare suites.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=Path, default=Path("runs/compare_suites"))
    options = parser.parse_args()
    rows, notes = [], []
    for number, case in enumerate(cases(options.data, options.keep)):
        outcomes = {}
        for suite in SUITES:
            name = f"{number}-{suite}"
            kept = cached(options.keep, name, lambda c=case, s=suite, n=name: attack(c, s, options.keep / n))
            outcomes[suite] = Outcome(**kept)
            print(case.title, suite, len(outcomes[suite].robust()), f"{outcomes[suite].seconds:.0f} s", flush=True)
        rows.append(row(case, outcomes))
        notes.append(differences(case, outcomes))
    made = versions("torch", "pyautoattack", "foolbox")
    publish("suites.md", "\n\n".join([table(HEADER, rows), "\n".join(notes), made]))


if __name__ == "__main__":
    main()
