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

import torch
from _study import ROOT, cached, publish, table, versions
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.run import evaluate
from robusteval.models.base import Classifier, LoadedModel
from robusteval.runs import RunDir
from robusteval.verdict import Verdict

SAMPLES = 200
SUITES = {"standard": "standard", "foolbox": "foolbox", "own": str(ROOT / "tools" / "own_suite.toml")}
CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}
HEADER = ("net", "clean", "standard", "foolbox", "own", "union", "union - standard, points", "seconds")


class _Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.shortcut = nn.Sequential(*([nn.Conv2d(width, out, 1, stride)] if stride > 1 else []))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(conv(relu(conv(x))) + shortcut(x))."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class Resnet2b(nn.Module):
    """The residual net `resnet2b` of VNN-COMP 2021 for normalised CIFAR-10 images (N, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(_Block(8, 16, 2), _Block(16, 16, 1))
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10)."""
        return self.linear2(F.relu(self.linear1(self.layer1(F.relu(self.conv1(x))).flatten(1))))


def resnet2b(path: Path) -> LoadedModel:
    """Load the published weights."""
    net = Resnet2b()
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["state_dict"])
    module = Classifier(net, CIFAR10["mean"], CIFAR10["std"]).eval()
    return LoadedModel(module, "resnet2b", str(path), "resnet2b", 10, (3, 32, 32))


@dataclass(frozen=True)
class Case:
    """A net and a threat model; a ``model`` is given where the configuration cannot name it."""

    title: str
    config: Mapping[str, Any]
    model: LoadedModel | None = None


def cases(data: Path, keep: Path) -> list[Case]:
    """Return what is compared."""
    small, linf = {"architecture": {"name": "small_cnn"}}, {"norm": "Linf"}
    fashion = {"dataset": "fashion_mnist", "data_dir": str(data / "fashion-mnist")}
    cifar = {"dataset": "cifar10", "data_dir": str(data), "eps": "2/255", **linf}
    models = data / "models"
    wk = {**small, **fashion, "model": str(models / "fashion_mnist_wk.pth")}
    cnn_a = {**small, **cifar, **CIFAR10, "model": str(models / "cifar_cnn_a_adv.model")}
    sovr = {**fashion, **linf, "eps": "0.1", "model": str(trained(data, keep / "sovr"))}
    return [
        Case("fashion_mnist_wk, Fashion-MNIST, Linf 0.1", {**wk, **linf, "eps": "0.1"}),
        Case("cifar_cnn_a_adv, CIFAR-10 (JPEG), Linf 2/255", cnn_a),
        Case("resnet2b, CIFAR-10 (JPEG), Linf 2/255", cifar, resnet2b(models / "resnet2b.pth")),
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
