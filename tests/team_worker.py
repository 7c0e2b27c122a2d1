"""Run by torchrun from `test_parallel.py`: train each given objective for an epoch, in float64, in OUT/<objective>."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from robusteval.runs import RunDir
from robusteval.settings import resolve
from robusteval.training.config import TrainConfig
from robusteval.training.loop import train
from robusteval.training.parallel import connected
from robusteval.training.plan import Plan, prepare

SETTINGS = (
    "epochs=2", "batch_size=32", "train_limit=83", "validation.size=50", "adversary.steps=2", "validation.steps=2",
    "precision=float64", "device=cpu", "threads=1", "average.name=ema", "average.decay=0.9", "eps=0.1",
    "awp.gamma=0.01", "clip_grad_norm=1",
    "model.params.width=2", "model.params.hidden=8",
)  # fmt: skip
"""83 samples in batches of 32 leave a last batch of 19, which two processes cannot share evenly."""


def plan_of(objective: str) -> Plan:
    return prepare(resolve(TrainConfig, None, SETTINGS, {"objective.name": objective}))


def main() -> None:
    out, *objectives = sys.argv[1:]
    plans = {name: plan_of(name) for name in objectives}
    first = next(iter(plans.values()))
    with connected(first.team, torch.device("cpu")):
        for name, plan in plans.items():
            train(plan, RunDir(Path(out) / name))


if __name__ == "__main__":
    main()
