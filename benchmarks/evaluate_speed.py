"""How long suites take on one model, against AutoAttack as it comes and against other libraries' suites.

    python benchmarks/evaluate_speed.py --model runs/latest --dataset fashion_mnist --data-dir DATA --eps 0.1

Each contestant has a process of its own and one CPU thread; libraries are called as their documentation does, so they
do not freeze the weights. Contestants take turns on the same samples, in a new random order in every round, and ratios
are taken within rounds (median and range), because machines are noisy. What is robust to each is counted, too: speed
alone says nothing.

    rapid, rapid bfloat16, standard, foolbox    our suites, with all that an evaluation does to each sample
    rapid bfloat16 compiled                     only where --only names it
    pyautoattack                                AutoAttack standard called by itself
    torchattacks                                torchattacks' AutoAttack, from the folder that --torchattacks names
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyautoattack
import torch
from _record import output, write
from torch import Tensor

from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import Plan, judge_samples, prepare
from robusteval.evaluation.suite import load_suite
from robusteval.processes import worker_pool
from robusteval.provenance import environment
from robusteval.report import Search
from robusteval.rng import SampleRng
from robusteval.verdict import ROBUST

SEED = 0
COMPILED = "rapid bfloat16 compiled"
SUITES = {
    **{name: (name, Search()) for name in ("rapid", "standard", "foolbox")},
    "rapid bfloat16": ("rapid", Search(precision="bfloat16")),
    COMPILED: ("rapid", Search(precision="bfloat16", compiled=True)),
}

Contestant = Callable[[Tensor], list[bool]]
"""Places of samples (n,) -> which of them are robust."""


def suite(plan: Plan, name: str, how: Search) -> Contestant:
    """Return one of our suites."""
    config = plan.config.model_copy(update=how.model_dump())
    own = replace(plan, config=config, suite=load_suite(name, plan.threat))

    def run(places: Tensor) -> list[bool]:
        rows = judge_samples(own, places, SampleRng(SEED, tuple(own.split.ids[places].tolist()), SEED)).rows
        return [row.verdict in ROBUST for row in rows]

    return run


def bare(plan: Plan) -> Contestant:
    """Return AutoAttack standard as its package runs it."""
    budget = {"norm": plan.threat.norm.value, "eps": plan.threat.radius, "device": str(plan.device)}
    attack = pyautoattack.AutoAttack(plan.model.module.eval(), **budget, seed=SEED, version="standard")

    def run(places: Tensor) -> list[bool]:
        x, y = plan.split.images(places).to(plan.device), plan.split.labels[places].to(plan.device)
        _, found = attack.run_standard_evaluation(x, y, batch_size=len(x))
        return (found == y).tolist()

    return run


def torchattacks(plan: Plan) -> Contestant:
    """Return AutoAttack standard of torchattacks, which attacks what is misclassified as well."""
    import torchattacks as library

    settings = {"norm": plan.threat.norm.value, "eps": plan.threat.radius, "n_classes": plan.split.info.num_classes}
    attack = library.AutoAttack(plan.model.module.eval(), **settings, version="standard", seed=SEED)

    def run(places: Tensor) -> list[bool]:
        x, y = plan.split.images(places).to(plan.device), plan.split.labels[places].to(plan.device)
        found = attack(x, y)
        with torch.no_grad():
            return (plan.model.module(found).argmax(1) == y).tolist()

    return run


LIBRARIES: dict[str, Callable[[Plan], Contestant]] = {"pyautoattack": bare, "torchattacks": torchattacks}


def contestant(plan: Plan, name: str) -> Contestant:
    """Return who is called ``name``."""
    return suite(plan, *SUITES[name]) if name in SUITES else LIBRARIES[name](plan)


class _Turns:
    """What a contestant's process keeps between its turns."""

    device: torch.device
    run: Contestant


def _begin(config: EvalConfig, folder: Path | None, name: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # full float32 for everyone, as our suites have it
    if folder:
        sys.path.append(str(folder))
    plan = prepare(config)
    _Turns.device, _Turns.run = plan.device, staticmethod(contestant(plan, name))


def _take(places: Tensor) -> tuple[list[bool], float]:
    """Return which samples are robust, and the seconds it took."""
    began = time.perf_counter()
    robust = _Turns.run(places)
    if _Turns.device.type == "cuda":
        torch.cuda.synchronize()
    return robust, time.perf_counter() - began


def measure(
    config: EvalConfig, folder: Path | None, names: Sequence[str], places: Tensor, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return seconds by round and which samples are robust, by contestant; each round has its part of ``places``."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "robust": []} for name in names}
    order = random.Random(0)
    with ExitStack() as stack:
        turns = {name: stack.enter_context(worker_pool(1, "--only", _begin, config, folder, name)) for name in names}
        for one in turns.values():
            one.submit(_take, places[:2]).result()  # what is done once in a process is not anyone's time
        for turn, part in enumerate(places.chunk(rounds)):
            for name in order.sample(list(names), len(names)):
                robust, seconds = turns[name].submit(_take, part).result()
                found[name]["seconds"].append(seconds)
                found[name]["robust"] += robust
                print(f"round {turn + 1}/{rounds} {name} {seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def markdown(record: Mapping[str, Any]) -> str:
    """Return the record as a table."""
    found = record["found"]
    least = np.array(found["standard"]["seconds"])
    lines = [f"{record['setting']}.", ""]
    lines += [
        "| contestant | robust | only `standard` breaks | only it breaks | seconds | `standard`'s time over its own |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for name, one in found.items():
        ratio = least / np.array(one["seconds"])
        spread = f"{statistics.median(ratio):.2f}, {ratio.min():.2f} to {ratio.max():.2f}"
        pairs = list(zip(one["robust"], found["standard"]["robust"], strict=True))
        counts = [sum(one["robust"]), pairs.count((True, False)), pairs.count((False, True))]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {sum(one['seconds']):.0f} | {spread} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--model", required=True)
@click.option("--architecture")
@click.option("--dataset")
@click.option("--data-dir")
@click.option("--norm", default="Linf", show_default=True)
@click.option("--eps")
@click.option("--samples", default=200, show_default=True)
@click.option("--rounds", default=4, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--torchattacks", "folder", type=click.Path(path_type=Path), help="Folder that has torchattacks.")
@click.option("--only", "names", multiple=True, help="A contestant besides `standard`; may be repeated.")
@output
def main(
    samples: int,
    rounds: int,
    folder: Path | None,
    names: tuple[str, ...],
    json_file: Path | None,
    markdown_file: Path | None,
    architecture: str | None,
    **given: Any,
) -> None:
    """Time suites on one CPU thread or one accelerator; prints a Markdown table."""
    torch.set_num_threads(1)
    settings = {key: value for key, value in given.items() if value is not None}
    settings |= {"architecture": {"name": architecture}} if architecture else {}
    config = EvalConfig.model_validate({**settings, "limit": samples, "chunk_size": -(-samples // rounds)})
    plan = prepare(config)
    everyone = [*SUITES, *(name for name in LIBRARIES if folder or name != "torchattacks")]
    if unknown := set(names) - set(everyone):
        raise click.UsageError(f"no contestant is called {', '.join(unknown)}; there are {', '.join(everyone)}.")
    wanted = [name for name in everyone if (name in (*names, "standard") if names else name != COMPILED)]
    found = measure(config, folder, wanted, torch.arange(len(plan.split)), rounds)
    about = f"{plan.model.name}, {plan.split.info.title}, {plan.threat.norm.value} {plan.threat.label}"
    record = {
        "setting": f"{about}, {len(plan.split)} images in {rounds} rounds, {plan.device}",
        "environment": environment(plan.device).model_dump(mode="json"),
        "found": found,
    }
    write(record, markdown(record), json_file, markdown_file)


if __name__ == "__main__":
    main()
