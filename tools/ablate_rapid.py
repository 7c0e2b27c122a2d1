"""What each ingredient of suite `rapid` buys in time and costs in verdicts; writes docs/results/rapid_ablation.md.

    python tools/ablate_rapid.py ../shared/data [--samples 1000] [--keep runs/compare_rapid]

The nets are those of compare_rapid.py on which the suite was tuned. All variants of a net run in one process, in turns
on the same samples, and ratios are taken within turns. The command can be interrupted and goes on where it was.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _study import cached, publish, table, versions
from compare_rapid import nets

from robusteval.evaluation.plan import Plan, judge_samples
from robusteval.report import StageSpec
from robusteval.rng import SampleRng
from robusteval.verdict import ROBUST

TUNED, PIECE = 6, 250
Specs = Sequence[StageSpec]
Change = Callable[[Specs], Specs]


def without(*names: str) -> Change:
    """Leave stages out."""
    return lambda specs: [spec for spec in specs if spec.name not in names]


def but(name: str, **params: Any) -> Change:
    """Change parameters of a stage."""
    return lambda specs: [
        spec.model_copy(update={"params": {**spec.params, **params}}) if spec.name == name else spec for spec in specs
    ]


def for_all(specs: Specs) -> Specs:
    """Give the dear attacks every sample."""
    return [spec.model_copy(update={"near": None}) for spec in specs]


VARIANTS: dict[str, Change] = {
    "rapid": lambda specs: specs,
    "no cheap start (APGD, 10 steps)": without("apgd-margin"),
    "no way in from larger balls (L2)": without("apgd-shrink"),
    "no proofs (CROWN, Linf)": without("crown-part"),
    "every target climbs to the end": but("halving", keep=[], reach=None),
    "far samples climb on": but("halving", reach=None),
    "no halving": without("halving"),
    "no restarts": without("restarts"),
    "no second look at all targets": without("targets"),
    "no Square": without("square-near"),
    "Square: one query at a time": but("square-near", at_once=1),
    "Square: 5000 queries": but("square-near", queries=5000),
    "dear attacks see every sample": for_all,
    "bfloat16": lambda specs: specs,
}
HEADER = ("variant", "robust, all nets", "robust, by net", "time over rapid's: median, range over turns", "by net")


def variant(plan: Plan, name: str) -> Plan:
    """Return the plan with a variant of its suite."""
    config = plan.config.model_copy(update={"precision": name if name == "bfloat16" else "float32"})
    return replace(plan, config=config, suite=replace(plan.suite, specs=tuple(VARIANTS[name](plan.suite.specs))))


def measured(plan: Plan) -> dict[str, Any]:
    """Return seconds per turn, and the robust samples, by variant."""
    found: dict[str, Any] = {name: {"seconds": [], "robust": []} for name in VARIANTS}
    order, places = random.Random(0), torch.arange(len(plan.split))
    judge_samples(plan, places[:16], SampleRng(0, tuple(range(16)), 0))  # what is done once is not anyone's time
    for part in places.split(PIECE):
        for name in order.sample(list(VARIANTS), len(VARIANTS)):
            began = time.perf_counter()
            rows = judge_samples(variant(plan, name), part, SampleRng(0, tuple(part.tolist()), 0)).rows
            found[name]["seconds"].append(time.perf_counter() - began)
            found[name]["robust"] += [r.id for r in rows if r.verdict in ROBUST]
    return found


def row(name: str, by_net: Sequence[dict[str, Any]]) -> list[object]:
    """Return a row of the table."""
    counts = [len(found[name]["robust"]) for found in by_net]
    pairs = [(found[name]["seconds"], found["rapid"]["seconds"]) for found in by_net]
    ratios = [a / b for own, least in pairs for a, b in zip(own, least, strict=True)]
    spread = f"{statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
    totals = " / ".join(f"{sum(own) / sum(least):.2f}" for own, least in pairs)
    return [name, sum(counts), " / ".join(map(str, counts)), spread, totals]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Leave out what rapid is made of, one at a time.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--keep", type=Path, default=Path("runs/compare_rapid"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    by_net, titles = [], []
    for net in nets(options.data)[:TUNED]:
        plan = net.plan(options.data, options.keep, options.samples)
        by_net.append(
            cached(
                options.keep,
                f"ablation-{net.name}-{plan.suite.sha256[:8]}-{len(plan.split)}-{PIECE}",
                lambda p=plan: measured(p),
            )
        )
        titles.append(net.title)
        print(net.title, {name: len(one["robust"]) for name, one in by_net[-1].items()}, flush=True)
    nets_said = "Nets, in this order: " + "; ".join(titles) + f". The first {options.samples} images of each."
    rows = [row(name, by_net) for name in VARIANTS]
    publish("rapid_ablation.md", "\n\n".join([nets_said, table(HEADER, rows), versions("torch")]))


if __name__ == "__main__":
    main()
