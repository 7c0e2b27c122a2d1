"""A grid of SOVR's hyper-parameters, judged on validation samples alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robusteval.attacks.pgd import PGD
from robusteval.comparison.cells import Cell, make_cells, run_cells, train_cell
from robusteval.comparison.statistics import Spread, spread
from robusteval.models.base import frozen
from robusteval.models.io import load_folder
from robusteval.provenance import deterministic
from robusteval.rng import SampleRng
from robusteval.runs import RunDir, read_json, write_json
from robusteval.settings import PluginSpec, Settings
from robusteval.training.config import TrainConfig
from robusteval.training.plan import Plan

BATCH = 256
SCORES = "validation.json"
FIGURES = ("clean", "pgd", "strongest")
"""Accuracies: clean, under PGD on cross-entropy, under the stronger of that and PGD on the margin."""


class SweepConfig(Settings):
    """Everything `analyze sweep` depends on: the values of M (percent) and lambda, the recipe and the attack.

    M = 0, adversarial training itself, is always a cell. Seeds are 0 to ``seeds - 1``.
    """

    m: tuple[float, ...] = Field(default=(20.0, 40.0, 60.0, 80.0), min_length=1)
    lam: tuple[float, ...] = Field(default=(0.2, 0.4, 0.6, 0.8, 1.0), min_length=1)
    seeds: int = Field(default=1, ge=1, le=1000)
    steps: int = Field(default=20, ge=1)
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key in sorted(self.train.model_fields_set & {"objective", "seed"}):
            raise ValueError(f"train.{key} is decided by the sweep and cannot be set")
        if 0 in self.m:
            raise ValueError("m = 0 is adversarial training, which is always a cell; name the other values")
        return self

    def points(self) -> list[tuple[float, float]]:
        """Return every (M, lambda); the first is the reference M = 0, where lambda has no effect."""
        return [(0.0, 0.0), *((m, lam) for m in dict.fromkeys(self.m) for lam in dict.fromkeys(self.lam))]

    def cells(self, out: Path) -> list[Cell]:
        """Return the training runs."""
        return make_cells([(label(m, lam), spec(m, lam)) for m, lam in self.points()], self.seeds, self.train, out)

    def identity(self) -> dict[str, Any]:
        """Return the settings that all cells of a folder must share; points and seeds may be added later."""
        train = {key: value for key, value in self.train.identity().items() if key not in ("objective", "seed")}
        return {"command": "sweep", "steps": self.steps, "train": train}


def label(m: float, lam: float) -> str:
    """Return the name of a point of the grid."""
    return f"m{m:g}-lam{lam:g}" if m else "at"


def spec(m: float, lam: float) -> PluginSpec:
    """Return the objective of a point of the grid."""
    return PluginSpec(name="sovr", params={"m": m, "lam": lam} if m else {"m": 0.0})


@dataclass(frozen=True)
class Point:
    """A finished point of the grid: accuracies on the validation samples, over seeds, by `FIGURES`."""

    m: float
    lam: float
    values: dict[str, Spread]


def best_point(points: Iterable[Point]) -> Point:
    """Return the point with the highest accuracy under the strongest attack, then clean; of equal ones the first."""
    return max(points, key=lambda point: (point.values["strongest"].mean, point.values["clean"].mean))


def is_done(cell: Cell) -> bool:
    """Whether nothing is left to do for a cell."""
    return (cell.folder / SCORES).is_file()


def work(steps: int, cell: Cell) -> None:
    """Train a cell and attack the validation samples of its best epoch."""
    plan, _ = train_cell(cell)
    write_json(cell.folder / SCORES, score(plan, cell.run / "best", steps))


def score(plan: Plan, folder: Path, steps: int) -> dict[str, float]:
    """Return the accuracies `FIGURES` of a stored model on the validation samples."""
    model = load_folder(folder, plan.info.shape, plan.info.num_classes).module.eval().to(plan.device)
    split, seed = plan.validation, plan.config.validation.seed
    counts = torch.zeros(len(FIGURES), dtype=torch.int64)
    with deterministic(threads=1), frozen(model):
        for rows in torch.split(torch.arange(len(split)), BATCH):
            x, y = split.images(rows).to(plan.device), split.labels[rows].to(plan.device)
            rng = SampleRng(seed, tuple(split.ids[rows].tolist()), batch=0)

            def survives(point: Tensor, labels: Tensor = y) -> Tensor:
                with torch.no_grad():
                    right: Tensor = model(point).argmax(1) == labels
                return right

            clean = survives(x)
            ce, margin = (
                survives(PGD(steps=steps, loss=loss)(model, x, y, plan.threat, rng).candidates)
                for loss in ("ce", "margin")
            )
            counts += torch.stack([clean, clean & ce, clean & ce & margin]).sum(1).cpu()
    return {name: count / len(split) for name, count in zip(FIGURES, counts.tolist(), strict=True)}


def collect(config: SweepConfig, cells: Sequence[Cell]) -> list[Point]:
    """Return the points of which at least one cell is done."""
    points = []
    for m, lam in config.points():
        own = [read_json(cell.folder / SCORES) for cell in cells if cell.label == label(m, lam) and is_done(cell)]
        if own:
            points.append(Point(m, lam, {name: spread([scores[name] for scores in own]) for name in FIGURES}))
    return points


def sweep(
    config: SweepConfig, cells: Sequence[Cell], out: Path, jobs: int, told: Callable[[Cell | None, str | None], None]
) -> tuple[list[Point], dict[str, str]]:
    """Do the cells that are not done yet; return the finished points, and what went wrong by cell."""
    run, failures = RunDir(out), {}
    run.claim(config.identity())
    with run.locked():
        for news in run_cells([cell for cell in cells if not is_done(cell)], partial(work, config.steps), jobs):
            cell, problem = news or (None, None)
            if cell is not None and problem is not None:
                failures[cell.name] = problem
            told(cell, problem)
    return collect(config, cells), failures


def record(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the points as JSON values, the best one marked."""
    best = best_point(points) if points else None
    return [
        {"m": p.m, "lam": p.lam, "best": p is best, "values": {k: asdict(v) for k, v in p.values.items()}}
        for p in points
    ]
