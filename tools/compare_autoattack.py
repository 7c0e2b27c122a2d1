"""Compare suite `standard` with a bare pyautoattack run on two nets; writes docs/results/autoattack.md.

    python tools/compare_autoattack.py ../shared/data

The argument is a folder with `fashion-mnist/` (idx files) and `models/fashion_mnist_wk.pth` (Wong & Kolter 2018).
Ours: seed 0, chunks of 100. Theirs: seed 1, batches of 200. So the random draws share nothing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyautoattack
import torch

from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import Plan, prepare
from robusteval.evaluation.run import evaluate
from robusteval.provenance import deterministic
from robusteval.runs import RunDir
from robusteval.verdict import Verdict

SAMPLES = 200
OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "autoattack.md"


@dataclass(frozen=True)
class Row:
    """One comparison: robust flags of both runs, and seconds."""

    title: str
    ours: list[bool]
    theirs: list[bool]
    seconds: tuple[float, float]


def robust_here(plan: Plan) -> list[bool]:
    """Robust flags of our run."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run")
        evaluate(plan, run)
        lines = (run.path / "samples.jsonl").read_text().splitlines()
    return [f'"verdict":"{Verdict.UNKNOWN}"' in line for line in lines]


def robust_there(plan: Plan) -> list[bool]:
    """Robust flags of a bare AutoAttack run."""
    x, y = plan.split.images(slice(None)), plan.split.labels
    attack = pyautoattack.AutoAttack(
        plan.model.module, norm=plan.threat.norm.value, eps=plan.threat.radius, seed=1, version="standard", device="cpu"
    )
    with deterministic(threads=1):
        _, y_adv = attack.run_standard_evaluation(x, y, batch_size=SAMPLES)
    return (y_adv == y).tolist()


def compare(title: str, config: EvalConfig) -> Row:
    """Run both on the same samples, one after the other, each on one thread."""
    plan = prepare(config)
    start = time.perf_counter()
    ours = robust_here(plan)
    middle = time.perf_counter()
    theirs = robust_there(plan)
    return Row(title, ours, theirs, (middle - start, time.perf_counter() - middle))


def configs(data: Path) -> dict[str, EvalConfig]:
    """Return the two cases."""
    common = {"limit": SAMPLES, "chunk_size": 100, "workers": 1, "norm": "Linf", "eps": "0.1"}
    wk = {"model": str(data / "models" / "fashion_mnist_wk.pth"), "architecture": {"name": "small_cnn"}}
    fashion = {"dataset": "fashion_mnist", "data_dir": str(data / "fashion-mnist")}
    return {
        "SOVR `small_cnn` on digits (`runs/latest`)": EvalConfig.model_validate({**common, "dataset": "digits"}),
        "`fashion_mnist_wk` on Fashion-MNIST": EvalConfig.model_validate({**common, **wk, **fashion}),
    }


def table(rows: list[Row]) -> str:
    """Render the comparison."""
    lines = ["| net | robust, ours | pyautoattack | verdicts that differ | seconds |", "|---|---|---|---|---|"]
    for row in rows:
        differ = sum(a != b for a, b in zip(row.ours, row.theirs, strict=True))
        lines.append(
            f"| {row.title} | {sum(row.ours)}/{SAMPLES} | {sum(row.theirs)}/{SAMPLES} | {differ} | "
            f"{row.seconds[0]:.0f} / {row.seconds[1]:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compare and write."""
    rows = [compare(title, config) for title, config in configs(Path(sys.argv[1])).items()]
    text = f"""# `standard` against a bare AutoAttack

Linf, eps 0.1, the first {SAMPLES} test images. Ours: seed 0, chunks of 100. Theirs:
`pyautoattack.AutoAttack(version="standard", seed=1)`, one batch of {SAMPLES}. The random draws share nothing,
so this is how far two honest runs of the same protocol lie apart. With equal seeds and batches every verdict
is equal (`tests/test_autoattack.py`).

{table(rows)}

Made by `python tools/compare_autoattack.py ../shared/data` after `python cli.py train`, torch {torch.__version__},
CPU, one thread each. Seconds (ours / theirs) were taken once on a shared machine; no claim rests on them.
"""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
