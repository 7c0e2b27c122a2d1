"""How long a training step takes, against a textbook loop and against what its network passes alone cost.

    python benchmarks/train_throughput.py --model resnet18 --threads 2 --json out.json --markdown out.md

All contestants run in one process, in a new random order in every round, and ratios are taken within rounds, because
machines are noisy. Images are random: no data is needed.

    at, sovr     `robusteval.training.step.train_step`, with all that a real step does: reading, augmentation, seeding
    textbook     PGD-10 adversarial training as tutorials write it (see `Textbook`)
    floor        10 bare passes for input gradients (eval mode, frozen parameters) and one training pass and update
    eleven       11 bare passes with parameter gradients and one update
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from _record import output, write
from torch import Tensor
from torch.nn import functional as F

from robusteval.datasets.base import Cut, DataInfo, Split, TensorPixels
from robusteval.models.base import frozen
from robusteval.provenance import deterministic, environment
from robusteval.threat import ThreatModel
from robusteval.training.config import TrainConfig
from robusteval.training.loop import begin
from robusteval.training.objective import OBJECTIVES
from robusteval.training.plan import Plan
from robusteval.training.step import train_step

STEPS, EPS, SIZE = 10, 8 / 255, 2 / 255
SHAPES = {"cifar10": (3, 32, 32), "fashion_mnist": (1, 28, 28)}
RATIOS = (
    ("textbook", "at", "speed-up over the textbook loop", "at least 1.30"),
    ("at", "floor", "time of AT over its bare passes", "at most 1.10"),
    ("at", "eleven", "time of AT over 11 full passes", ""),
    ("sovr", "at", "time of SOVR over AT", "at most 1.03"),
)
PRECISIONS = ("float32", "bfloat16")


def synthetic(shape: tuple[int, int, int], count: int) -> Split:
    """Random images (count, C, H, W) of 10 classes that may be cropped and flipped."""
    rng, channels = torch.Generator().manual_seed(0), shape[0]
    info = DataInfo("synthetic", shape, tuple("0123456789"), (0.5,) * channels, (0.25,) * channels, flip=True, pad=4)
    images = torch.randint(0, 256, (count, *shape), generator=rng, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=rng)
    return Split(info, "train", TensorPixels(images), labels, torch.arange(count))


def make_plan(objective: str, data: Split, config: TrainConfig) -> Plan:
    """Return a real training plan on ``data``."""
    device = torch.device(config.device)
    threat = ThreatModel.parse("Linf", "8/255")
    return Plan(config, OBJECTIVES.build(objective), threat, data, data, Cut(held_out=1, seed=0), device, "synthetic")


@dataclass
class Ours:
    """One step of this project's training, under the flags that training sets."""

    plan: Plan

    def __post_init__(self) -> None:
        self.state, self.step = begin(self.plan), 0
        self.state.model.train()

    def __call__(self, rows: Tensor) -> None:
        """Train on the samples ``rows``."""
        train_step(self.plan, self.state, self.step % self.plan.steps_per_epoch, rows)
        self.step += 1

    def flags(self) -> AbstractContextManager[None]:
        """Deterministic kernels."""
        return deterministic(self.plan.threads)


@dataclass
class Bare:
    """What the others share: the same network and optimizer, batches that are ready, torch's default flags."""

    plan: Plan

    def __post_init__(self) -> None:
        self.model, settings = self.plan.build_model().train(), self.plan.config.optimizer
        self.optimizer = torch.optim.SGD(self.model.parameters(), **settings.model_dump())
        self.images = self.plan.train.images(slice(None)).to(self.plan.device)
        self.labels = self.plan.train.labels.to(self.plan.device)
        low = self.plan.config.precision == "bfloat16"
        self.cast = (lambda: torch.autocast(self.plan.device.type, torch.bfloat16)) if low else nullcontext
        if self.plan.config.channels_last:
            self.images = self.images.contiguous(memory_format=torch.channels_last)

    def flags(self) -> AbstractContextManager[None]:
        """Leave torch's flags alone."""
        return nullcontext()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy in float32."""
        with self.cast():
            logits = self.model(x)
        return F.cross_entropy(logits.float(), y)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take one optimizer step."""
        self.optimizer.zero_grad()
        self.loss(x, y).backward()
        self.optimizer.step()


class Textbook(Bare):
    """PGD-10 as tutorials write it: `loss.backward()` in the attack, parameter gradients on, the net in train mode."""

    def __call__(self, rows: Tensor) -> None:
        """Train on the samples ``rows``."""
        x, y = self.images[rows], self.labels[rows]
        delta = torch.empty_like(x).uniform_(-EPS, EPS)
        delta.data = (x + delta).clamp(0, 1) - x
        for _ in range(STEPS):
            delta.requires_grad_()
            self.loss(x + delta, y).backward()
            step = delta.detach() + SIZE * delta.grad.sign()
            delta = (x + step.clamp(-EPS, EPS)).clamp(0, 1) - x
        self.update(x + delta.detach(), y)


class Floor(Bare):
    """The passes that PGD-10 training cannot do without, and nothing else."""

    def __call__(self, rows: Tensor) -> None:
        """Pass the samples ``rows``."""
        x, y = self.images[rows], self.labels[rows]
        with frozen(self.model):
            for _ in range(STEPS):
                point = x.detach().requires_grad_()
                torch.autograd.grad(self.loss(point, y), point)
        self.update(x, y)


class Eleven(Bare):
    """11 passes with parameter gradients."""

    def __call__(self, rows: Tensor) -> None:
        """Pass the samples ``rows``."""
        x, y = self.images[rows], self.labels[rows]
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            self.loss(x, y).backward()
        self.update(x, y)


def contestants(data: Split, config: TrainConfig) -> dict[str, Any]:
    """Everyone at one precision; the textbook keeps the plain memory format."""
    at, plain = make_plan("at", data, config), config.model_copy(update={"channels_last": False})
    return {
        "at": Ours(at),
        "sovr": Ours(make_plan("sovr", data, config)),
        "textbook": Textbook(make_plan("at", data, plain)),
        "floor": Floor(at),
        "eleven": Eleven(at),
    }


def seconds(run: Callable[[Tensor], None], rows: Tensor, device: torch.device) -> float:
    """Time one step."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run(rows)
    wait()
    return time.perf_counter() - start


def measure(everyone: dict[str, Any], rounds: int, batch: int, count: int, device: torch.device) -> dict[str, Any]:
    """Return seconds per step, (rounds,) for each contestant, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in everyone}
    order, rng = random.Random(0), torch.Generator().manual_seed(0)
    for turn in range(rounds + 2):
        rows = torch.randperm(count, generator=rng)[:batch]
        for name in order.sample(list(everyone), len(everyone)):
            with everyone[name].flags():
                elapsed = seconds(everyone[name], rows, device)
            if turn >= 2:
                times[name].append(elapsed)
        print(f"\rround {turn + 1}/{rounds + 2}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def summary(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """Median, quartiles, and a bootstrap 95 % interval of the median."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": median, "q1": q1, "q3": q3, "low": float(low), "high": float(high)}


def ratios(times: dict[str, list[float]], precisions: list[str]) -> list[dict[str, Any]]:
    """Return `RATIOS` at each precision, and what bfloat16 gains."""
    wanted = [(f"{a} {p}", f"{b} {p}", f"{what}, {p}", goal) for p in precisions for a, b, what, goal in RATIOS]
    if len(precisions) == 2:
        wanted += [
            (f"{name} float32", f"{name} bfloat16", f"gain of {name} by bfloat16", "") for name in ("at", "sovr")
        ]
    return [
        {"what": what, "of": a, "over": b, "goal": goal, **summary(np.array(times[a]) / np.array(times[b]))}
        for a, b, what, goal in wanted
    ]


def markdown(record: dict[str, Any]) -> str:
    """Return the record as two tables."""
    lines = [f"{record['setting']}.", "", "| ratio, within rounds | median | quartiles | 95 % of the median | goal |"]
    lines.append("|---|---|---|---|---|")
    for row in record["ratios"]:
        spread = f"{row['q1']:.3f} to {row['q3']:.3f} | {row['low']:.3f} to {row['high']:.3f}"
        lines.append(f"| {row['what']} | {row['median']:.3f} | {spread} | {row['goal']} |")
    lines += ["", "| contestant | median ms per step | images per second |", "|---|---|---|"]
    for name, values in record["seconds"].items():
        median = statistics.median(values)
        lines.append(f"| {name} | {1000 * median:.1f} | {record['batch_size'] / median:.0f} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--model", default="small_cnn", show_default=True)
@click.option("--dataset", type=click.Choice(list(SHAPES)), default="cifar10", help="Whose image shape to use.")
@click.option("--batch-size", default=128, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--precision", type=click.Choice([*PRECISIONS, "both"]), default="both", show_default=True)
@click.option("--channels-last", is_flag=True, help="For all but the textbook loop.")
@click.option("--rounds", default=21, show_default=True)
@output
def main(
    model: str,
    dataset: str,
    batch_size: int,
    threads: int,
    device: str,
    precision: str,
    channels_last: bool,
    rounds: int,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Time training steps; prints a Markdown table."""
    torch.set_num_threads(threads)
    data, where = synthetic(SHAPES[dataset], 8 * batch_size), torch.device(device)
    precisions = list(PRECISIONS) if precision == "both" else [precision]
    everyone: dict[str, Any] = {}
    for kind in precisions:
        base = {"model": {"name": model}, "batch_size": batch_size, "precision": kind, "channels_last": channels_last}
        rest = {"adversary": {"step_size": "2/255"}, "optimizer": {"lr": 0.01}, "device": device, "threads": threads}
        config = TrainConfig.model_validate({**base, **rest})
        everyone |= {f"{name} {kind}": one for name, one in contestants(data, config).items()}
    times = measure(everyone, rounds, batch_size, len(data), where)
    layout = ", channels last" if channels_last else ""
    setting = f"{model}, {'x'.join(map(str, data.info.shape))}, batch {batch_size}, {device}, {threads} threads{layout}"
    record = {
        "setting": f"{setting}, {rounds} rounds",
        "batch_size": batch_size,
        "environment": environment(where).model_dump(mode="json"),
        "seconds": times,
        "ratios": ratios(times, precisions),
    }
    write(record, markdown(record), json_file, markdown_file)


if __name__ == "__main__":
    main()
