"""Train on digits with and without bounds and compare what is certified; writes docs/results/certified_training.md.

    python tools/compare_certified_training.py [--seeds 2] [--keep runs/compare_certified_training]

All nets are `small_cnn` at Linf 0.1 and get the same optimizer, schedule and epochs; those trained on bounds begin
with IBP initialisation and have the regulariser of Shi et al. Each is evaluated with suite `certified` on all 360 test
images. The command can be interrupted and goes on where it was; delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from _study import cached, publish, table, versions

from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import prepare as prepare_evaluation
from robusteval.evaluation.run import evaluate
from robusteval.runs import RunDir
from robusteval.training.config import TrainConfig
from robusteval.training.loop import train
from robusteval.training.plan import prepare

EPS = "0.1"
TRAINING: dict[str, Any] = {
    "dataset": "digits",
    "eps": EPS,
    "epochs": 40,
    "optimizer": {"name": "adam", "lr": 2e-3, "weight_decay": 0.0},
    "schedule": {"milestones": (0.7, 0.85), "factor": 0.2},
    "clip_grad_norm": 10.0,
    "device": "cpu",
    "threads": 1,
}
ON_BOUNDS: dict[str, dict[str, Any]] = {
    "ibp": {"kappa_start": 0.0, "kappa_end": 0.0},
    "crown_ibp": {},
    "sabr": {"lam": 0.4},
    "mtl_ibp": {"alpha": 0.5},
}
HEADER = (
    "objective",
    "clean %",
    "empirical %",
    "certified %",
    "by intervals alone %",
    "undecided images",
    "training s",
)


def settings(objective: str, seed: int) -> TrainConfig:
    """Return the training run of an objective."""
    params = ON_BOUNDS.get(objective)
    own: dict[str, Any] = {"objective": {"name": objective}}
    if params is not None:
        own = {"objective": {"name": objective, "params": {"regularisation": 0.5, **params}}, "init": "ibp"}
    return TrainConfig.model_validate({**TRAINING, **own, "seed": seed})


def outcome(objective: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train, evaluate, and return rates, counts of images, and seconds."""
    start = time.perf_counter()
    train(prepare(settings(objective, seed)), RunDir(folder / "train"))
    seconds = time.perf_counter() - start
    config = {"model": str(folder / "train"), "dataset": "digits", "eps": EPS, "suite": "certified"}
    plan = prepare_evaluation(EvalConfig.model_validate({**config, "workers": 1, "device": "cpu"}))
    report = evaluate(plan, RunDir(folder / "evaluate"))
    found, total = report.results, report.results.clean.total
    assert found.certified is not None
    by_intervals = next(stage.closed for stage in report.stages if stage.name == "ibp")
    return {
        "rates": [100 * rate.rate for rate in (found.clean, found.empirical, found.certified)],
        "by_intervals": 100 * by_intervals / total,
        "undecided": found.empirical.count - found.certified.count,
        "seconds": seconds,
    }


def row(objective: str, runs: list[dict[str, Any]]) -> list[object]:
    """Return a row of the table: means, and the range of the certified accuracy."""
    clean, empirical, certified = zip(*(run["rates"] for run in runs), strict=True)
    spread = f"{fmean(certified):.1f} ({min(certified):.1f} to {max(certified):.1f})"
    rest = [fmean(run[key] for run in runs) for key in ("by_intervals", "undecided", "seconds")]
    return [objective, f"{fmean(clean):.1f}", f"{fmean(empirical):.1f}", spread, *(f"{value:.1f}" for value in rest)]


def main() -> None:
    """Train, evaluate and write."""
    parser = argparse.ArgumentParser(description="Compare certified training.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("runs/compare_certified_training"))
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("at", *ON_BOUNDS)}
    for seed in range(options.seeds):
        for objective, done in runs.items():
            name = f"{objective}-s{seed}"
            done.append(cached(options.keep, name, lambda o=objective, s=seed, n=name: outcome(o, s, options.keep / n)))
            print(name, json.dumps(done[-1]), flush=True)
    rows = [row(objective, done) for objective, done in runs.items()]
    note = f"Means over {options.seeds} seeds; in brackets the range."
    publish("certified_training.md", "\n\n".join([table(HEADER, rows), note, versions("torch")]))


if __name__ == "__main__":
    main()
