"""Brackets of published nets, and an anchor for the bounds; writes docs/results/certified.md.

    python tools/compare_certified.py ../shared/data [--keep runs/compare_certified] [--workers 2]

The first argument is a folder with `fashion-mnist/` (idx files), `cifar10-jpeg.tar.xz` and `models/` with three
published nets. The command can be interrupted and goes on where it was; delete the folder that keeps the results to
begin anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _nets import cifar10, cifar_cnn_a_adv, fashion_mnist_wk, resnet2b
from _study import ROOT, cached, publish, table, versions
from torch import nn

from robusteval.bounds.ball import Ball
from robusteval.bounds.graph import trace
from robusteval.bounds.margins import Problem, linear_margins
from robusteval.bounds.tighten import tightened
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.run import evaluate
from robusteval.models.base import LoadedModel
from robusteval.report import Report
from robusteval.runs import RunDir
from robusteval.threat import ThreatModel

STUDY = str(ROOT / "tools" / "certified_study.toml")
EPS = ThreatModel.parse("Linf", "0.1")
PIECE = 32
ANCHOR = ("ball cut to [0, 1]", "certified", "%", "published %", "within 1e-5 of the boundary", "seconds")
STAGES = ("stage", "samples", "broken", "proved", "certified so far", "robust so far", "seconds")


@dataclass(frozen=True)
class Case:
    """A net, what it is evaluated on and how; a ``model`` is given where the configuration cannot name it."""

    title: str
    config: Mapping[str, Any]
    model: LoadedModel | None = None


def cases(data: Path) -> list[Case]:
    """Return the nets whose brackets are measured."""
    wk = {**fashion_mnist_wk(data), "norm": "Linf", "eps": "0.1"}
    few = {"suite": STUDY, "limit": 200, "chunk_size": 25}
    residual = resnet2b(data / "models" / "resnet2b.pth")
    return [
        Case("fashion_mnist_wk, Linf 0.1, suite `certified`, first 1000", {**wk, "suite": "certified", "limit": 1000}),
        Case("cifar_cnn_a_adv, CIFAR-10 (JPEG), Linf 2/255, first 200", {**cifar_cnn_a_adv(data), **few}),
        Case("resnet2b, CIFAR-10 (JPEG), Linf 2/255, first 200", {**cifar10(data), **few}, residual),
        Case("fashion_mnist_wk, Linf 0.1, all 10 000", {**wk, "suite": STUDY, "chunk_size": 500}),
    ]


def bracket(case: Case, folder: Path, workers: int) -> dict[str, Any]:
    """Evaluate; return clean accuracy, a row per stage, and the seconds of all workers, of interrupted runs too."""
    config = EvalConfig.model_validate({"chunk_size": 100, **case.config, "workers": workers, "device": "cpu"})
    report = evaluate(prepare(config, case.model), RunDir(folder))
    return {"stages": _stages(report), "clean": report.results.clean.count, "seconds": report.seconds}


def _stages(report: Report) -> list[list[object]]:
    rows: list[list[object]] = []
    certified, robust = 0, report.results.clean.count
    for stage in report.stages:
        certified, robust = certified + stage.closed - stage.broken, robust - stage.broken
        done = [stage.name, stage.entered, stage.broken, stage.closed - stage.broken, certified, robust]
        rows.append([*done, f"{stage.seconds:.0f}"])
    return rows


def anchor(data: Path, clip: bool) -> dict[str, Any]:
    """Count the samples that one pass of Fast-Lin's bounds proves, of all test images of Fashion-MNIST at Linf 0.1."""
    torch.set_num_threads(1)
    plan = prepare(EvalConfig.model_validate({**fashion_mnist_wk(data), "norm": "Linf", "eps": "0.1", "device": "cpu"}))
    net: nn.Module = plan.model.module.double()
    start, proved, near, clean = time.perf_counter(), 0, 0, 0
    graph = None
    for first in range(0, len(plan.split), PIECE):
        x, y = plan.split.images(slice(first, first + PIECE)).double(), plan.split.labels[first : first + PIECE]
        with torch.no_grad():
            graph = graph or trace(net, x)
            right = net(x).argmax(1) == y
            problem = Problem(graph, Ball.around(x[right], EPS.norm, EPS.radius, clip), y[right], 2**28, parallel=True)
            margins = linear_margins(problem, tightened(problem).bounds)
        clean += int(right.sum())
        proved += int((margins > 0).all(1).sum())
        near += int((margins.amin(1).abs() < 1e-5).sum())
    return {"proved": proved, "near": near, "clean": clean, "seconds": time.perf_counter() - start}


def anchor_rows(data: Path, keep: Path) -> list[list[object]]:
    """Return the rows of the anchor."""
    rows: list[list[object]] = []
    for clip, published in ((False, "65.47"), (True, "")):
        name = f"anchor-{'clip' if clip else 'whole'}-parallel"
        found = cached(keep, name, lambda c=clip: anchor(data, c))
        counts = [found["proved"], f"{found['proved'] / 100:.2f}", published, found["near"]]
        rows.append(["yes" if clip else "no", *counts, f"{found['seconds']:.0f}"])
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Measure brackets.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=Path, default=Path("runs/compare_certified"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    parts = []
    for number, case in enumerate(cases(options.data)):
        run = options.keep / f"{number}-run"
        kept = cached(options.keep, f"{number}-bracket", lambda c=case, r=run: bracket(c, r, options.workers))
        said = f"{kept['clean']} classified correctly, {kept['seconds']:.0f} worker seconds."
        parts.append(f"## {case.title}\n\n{said}\n\n{table(STAGES, kept['stages'])}")
        print(case.title, kept, flush=True)
    anchors = table(ANCHOR, anchor_rows(options.data, options.keep))
    first = f"## The anchor\n\nParallel (Fast-Lin) slopes, one pass.\n\n{anchors}"
    publish("certified.md", "\n\n".join([first, *parts, versions("torch", "pyautoattack", "scipy")]))


if __name__ == "__main__":
    main()
