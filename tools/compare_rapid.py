"""Suite `rapid` against `standard`: the same samples, side by side in one process; writes docs/results/speed.md.

    python tools/compare_rapid.py ../shared/data [--samples 1000] [--keep runs/compare_rapid] [--net NAME ...]

The first argument is a folder with `fashion-mnist/` (idx files), `cifar10-jpeg.tar.xz` and `models/` with three
published nets; four others are trained first, in the folder that keeps the results too. The command can be interrupted
and goes on where it was; delete the folder to begin anew. Suites are tuned on the first six nets; the next two were
added after that, and the last two are for the end alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _nets import cifar10, cifar_cnn_a_adv, fashion_mnist, fashion_mnist_wk, resnet2b
from _study import ROOT, cached, publish, table, versions

from robusteval.comparison.calibrate import reference, side_by_side
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import Plan, judge_samples, prepare
from robusteval.mcnemar import mcnemar
from robusteval.models.base import LoadedModel
from robusteval.rng import SampleRng
from robusteval.verdict import ROBUST, Verdict

PART = 250
"""Samples judged at once, as `evaluate` does by default; the study can be interrupted between parts."""
HEADER = (
    *("net", "clean", "robust, `rapid`", "of these proved", "robust, `standard`", "difference, points (95 %)"),
    *("passes, `rapid`", "passes, `standard`", "seconds, `rapid`", "seconds, `standard`", "ratio", "range of ratios"),
)


@dataclass(frozen=True)
class Net:
    """A net and a threat model; ``trained`` are an objective, norm and eps for a net that is trained here.

    Its run is in the folder of that name, or in that of ``run``, another net.
    """

    name: str
    title: str
    config: Mapping[str, Any] = field(default_factory=dict)
    model: LoadedModel | None = None
    trained: tuple[str, str, str] | None = None
    run: str = ""

    def plan(self, data: Path, keep: Path, samples: int) -> Plan:
        """Load it."""
        config = {**self.config, "suite": "rapid", "limit": samples, "chunk_size": PART, "device": "cpu"}
        if self.trained:
            config |= {**fashion_mnist(data), "model": str(train(data, keep / (self.run or self.name), *self.trained))}
        return prepare(EvalConfig.model_validate(config), self.model)


def nets(data: Path) -> list[Net]:
    """Return what is compared; the last four had no part in tuning."""
    residual = resnet2b(data / "models" / "resnet2b.pth")
    linf, l2 = {"norm": "Linf", "eps": "0.1"}, {"norm": "L2", "eps": "1"}
    sovr, mart = ("sovr", "Linf", "0.1"), ("mart", "Linf", "0.1")
    return [
        Net("sovr", "SOVR small_cnn, Fashion-MNIST, Linf 0.1", trained=sovr),
        Net("wk", "fashion_mnist_wk, Fashion-MNIST, Linf 0.1", {**fashion_mnist_wk(data), **linf}),
        Net("cnn_a", "cifar_cnn_a_adv, CIFAR-10 (JPEG), Linf 2/255", cifar_cnn_a_adv(data)),
        Net("resnet2b", "resnet2b, CIFAR-10 (JPEG), Linf 2/255", cifar10(data), residual),
        Net("l2", "AT small_cnn, Fashion-MNIST, L2 1", trained=("at", "L2", "1")),
        Net("wk-l2", "fashion_mnist_wk, Fashion-MNIST, L2 1", {**fashion_mnist_wk(data), **l2}),
        Net("sovr-l2", "SOVR small_cnn, trained in Linf, L2 1 +", l2, trained=sovr, run="sovr"),
        Net("mart-l2", "MART small_cnn, trained in Linf, L2 1 +", l2, trained=mart, run="mart"),
        Net("mart", "MART small_cnn, Fashion-MNIST, Linf 0.1 *", trained=mart),
        Net("standard", "small_cnn trained without an adversary, Linf 0.1 *", trained=("standard", "Linf", "0.1")),
    ]


def train(data: Path, folder: Path, objective: str, norm: str, eps: str) -> Path:
    """Train for two epochs unless ``folder`` has the run; return ``folder``."""
    if not (folder / "best" / "config.json").is_file():
        flags = ["--objective", objective, "--dataset", "fashion_mnist", "--data-dir", str(data / "fashion-mnist")]
        flags += ["--norm", norm, "--eps", eps, "--epochs", "2", "--threads", "1", "--device", "cpu"]
        subprocess.run([sys.executable, str(ROOT / "cli.py"), "train", *flags, "--out", str(folder)], check=True)
    return folder


def judged(plan: Plan, first: int) -> dict[str, Any]:
    """Run both suites on the part of the samples that begins at ``first``."""
    places = range(first, min(first + PART, len(plan.split)))
    sides = side_by_side(plan, reference(plan, "standard"), places, PART, begin=first // PART)
    return {
        side.plan.suite.name: {
            "verdicts": {str(sample): verdict.value for sample, verdict in side.verdicts.items()},
            "seconds": side.seconds,
            "forward": side.forward,
            "backward": side.backward,
        }
        for side in sides
    }


def whole(parts: list[dict[str, Any]], suite: str) -> dict[str, Any]:
    """Put the parts of one suite together."""
    mine = [part[suite] for part in parts]
    verdicts = {int(sample): verdict for part in mine for sample, verdict in part["verdicts"].items()}
    forward, backward = (sum(part[way] for part in mine) / len(verdicts) for way in ("forward", "backward"))
    return {
        "verdicts": verdicts,
        "robust": {i for i, verdict in verdicts.items() if verdict in ROBUST},
        "seconds": [second for part in mine for second in part["seconds"]],
        "passes": f"{forward:.0f} + {backward:.0f}",
    }


def row(title: str, parts: list[dict[str, Any]]) -> tuple[list[object], str]:
    """Return a row of the table, and the samples on which the suites disagree."""
    rapid, standard = whole(parts, "rapid"), whole(parts, "standard")
    total = len(rapid["verdicts"])
    by_rapid, by_standard = (sorted(a["robust"] - b["robust"]) for a, b in ((standard, rapid), (rapid, standard)))
    paired = mcnemar(len(by_rapid), len(by_standard), total)
    ratios = [b / a for a, b in zip(rapid["seconds"], standard["seconds"], strict=True)]
    clean = sum(verdict != Verdict.MISCLASSIFIED for verdict in rapid["verdicts"].values())
    proved = sum(verdict == Verdict.CERTIFIED for verdict in rapid["verdicts"].values())
    figures: list[object] = [f"{title} ({total})", clean, len(rapid["robust"]), proved, len(standard["robust"])]
    figures += [f"{100 * paired.difference:+.2f} ({100 * paired.low:+.2f} to {100 * paired.high:+.2f})"]
    figures += [rapid["passes"], standard["passes"], *(f"{sum(one['seconds']):.0f}" for one in (rapid, standard))]
    figures += [f"{sum(standard['seconds']) / sum(rapid['seconds']):.1f}", f"{min(ratios):.1f} to {max(ratios):.1f}"]
    named = [", ".join(map(str, ids)) or "none" for ids in (by_rapid, by_standard)]
    return figures, f"- {title}. Only `rapid` breaks: {named[0]}. Only `standard` breaks: {named[1]}."


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description="Compare rapid with standard.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=Path, default=Path("runs/compare_rapid"))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--net", action="append", help="only these nets; nothing is written then")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, notes = [], []
    for net in nets(options.data):
        if options.net and net.name not in options.net:
            continue
        plan, parts = net.plan(options.data, options.keep, options.samples), []
        judge_samples(plan, torch.arange(16), SampleRng(0, tuple(range(16)), 0))  # what is done once in a process
        for first in range(0, len(plan.split), PART):
            name = f"{net.name}-{plan.suite.sha256[:8]}-{len(plan.split)}-{first}-{PART}"
            parts.append(cached(options.keep, name, lambda p=plan, f=first: judged(p, f)))
            figures, note = row(net.title, parts)
            print(*figures, note, flush=True)
        rows.append(figures)
        notes.append(note)
    if not options.net:
        ratios = [float(str(figures[-2])) for figures in rows]
        said = f"Ratio on the median net {statistics.median(ratios):.1f}, on the worst {min(ratios):.1f}."
        made = versions("torch", "pyautoattack")
        publish("speed.md", "\n\n".join([table(HEADER, rows), "\n".join(notes), said, made]))


if __name__ == "__main__":
    main()
