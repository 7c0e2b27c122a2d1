"""Cells: training runs that differ in objective or seed, done by worker processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch

from robusteval.errors import RobustevalError, UsageError
from robusteval.processes import worker_pool
from robusteval.provenance import cpu_count, pick_device
from robusteval.runs import CONFIG, LAUNCH, RunDir, read_json, write_json
from robusteval.settings import PluginSpec
from robusteval.training.config import ObjectiveSpec, TrainConfig
from robusteval.training.loop import HISTORY, TrainResult, train
from robusteval.training.parallel import launched_team
from robusteval.training.plan import Plan, prepare

POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Cell:
    """One training run and what is measured on it, in a folder of its own."""

    label: str
    seed: int
    folder: Path
    train: TrainConfig

    @property
    def name(self) -> str:
        """Label and seed."""
        return f"{self.label}-s{self.seed}"

    @property
    def run(self) -> Path:
        """The folder of the training run."""
        return self.folder / "train"

    @property
    def epoch(self) -> int:
        """Epochs trained so far."""
        history = self.run / HISTORY
        return len(read_json(history)) if history.is_file() else 0


Work = Callable[[Cell], None]
"""What is to be done for a cell; sent to the workers, so a module's function or a `partial` of one."""


def make_cells(rows: Sequence[tuple[str, PluginSpec]], seeds: int, recipe: TrainConfig, out: Path) -> list[Cell]:
    """Return every (label, objective) of ``rows`` with every seed, all of one seed before the next.

    On the CPU a run gets one thread unless the recipe says otherwise, so that results do not depend on the jobs.
    """
    threads = recipe.threads or (1 if pick_device(recipe.device).type == "cpu" else None)
    cells = []
    for seed in range(seeds):
        for label, spec in rows:
            objective = ObjectiveSpec(name=spec.name, params=spec.params)
            settings = recipe.model_copy(update={"objective": objective, "seed": seed, "threads": threads})
            cells.append(Cell(label, seed, out / f"{label}-s{seed}", settings))
    return cells


def default_jobs(device: str) -> int:
    """Return how many cells to run at once: one per CPU core, or one per GPU."""
    return torch.cuda.device_count() if pick_device(device).type == "cuda" else cpu_count()


def check(cells: Sequence[Cell]) -> dict[str, Plan]:
    """Return label -> plan of its first cell; raise `UsageError` if a setting is wrong or not the folder's."""
    if (processes := launched_team().size) > 1:
        raise UsageError(f"torchrun started {processes} processes that would all do the same runs; use --jobs instead.")
    plans: dict[str, Plan] = {}
    for cell in cells:
        if cell.label not in plans:
            plans[cell.label] = prepare(cell.train)
        if (cell.run / CONFIG).is_file():
            seeded = {**plans[cell.label].identity, "seed": cell.seed}
            RunDir(cell.run).claim(seeded)
    return plans


def train_cell(cell: Cell) -> tuple[Plan, TrainResult]:
    """Train a cell, or go on where it was interrupted."""
    plan = prepare(cell.train)
    RunDir(cell.run).claim(plan.identity)
    if plan.config.data_dir is not None:
        write_json(cell.run / LAUNCH, {"data_dir": str(Path(plan.config.data_dir).expanduser().resolve())})
    return plan, train(plan, RunDir(cell.run))


def run_cells(cells: Sequence[Cell], work: Work, jobs: int) -> Iterator[tuple[Cell, str | None] | None]:
    """Do ``work`` for ``cells`` in ``jobs`` processes; yield each as it ends, with what went wrong, if anything.

    Yields None every few seconds in between, for progress to be shown.
    """
    if not cells:
        return
    started = multiprocessing.get_context("spawn").Value("i", 0)
    with worker_pool(min(jobs, len(cells)), "--jobs", _start_worker, started) as pool:
        waiting = {pool.submit(_attempt, work, cell): cell for cell in cells}
        while waiting:
            for future in wait(waiting, POLL_SECONDS, FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
            yield None


def _start_worker(started: Synchronized[int]) -> None:
    """Use one CPU thread, and the GPUs in turn."""
    torch.set_num_threads(1)
    with started.get_lock():
        turn, started.value = started.value, started.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(turn % torch.cuda.device_count())


def _attempt(work: Work, cell: Cell) -> str | None:
    """Return what went wrong as a sentence: one cell that fails must not stop the others."""
    try:
        work(cell)
    except RobustevalError as error:
        return str(error)
    except Exception as error:  # an objective may be anybody's code
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None
