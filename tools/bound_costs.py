"""What bounds cost per sample, and how much memory they take; writes docs/results/bound_costs.md.

    python tools/bound_costs.py ../shared/data

The first argument is a folder with `cifar10-jpeg.tar.xz` and `models/resnet2b.pth`. The other two nets are not
trained: their undecided values, which set the cost, are those of random weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from _nets import CIFAR10, cifar10, resnet2b
from _study import publish, table, versions
from torch import Tensor, nn

from robusteval.bounds.alpha import Ascent
from robusteval.bounds.ball import Ball
from robusteval.bounds.first import mixed_margins
from robusteval.bounds.graph import trace
from robusteval.bounds.interval import intervals
from robusteval.bounds.margins import Problem, interval_margins, linear_margins, optimised_margins
from robusteval.bounds.tighten import tightened
from robusteval.certifiers.ibp import interval_bound
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import prepare
from robusteval.models.base import Classifier
from robusteval.models.cnn7 import CNN7
from robusteval.models.small_cnn import SmallCNN
from robusteval.threat import Norm

EPS, SAMPLES, STEPS, REPEATS = 2 / 255, 4, 5, 3
COSTS = ("net", "parameters", "undecided by intervals", "IBP", "CROWN-IBP", "CROWN", "alpha-CROWN, per step")
MEMORY = ("memory allowed, MiB", "peak beyond the loaded net, MiB", "CROWN, ms per sample")
BUDGETS = (16, 64, 256, 1024)


def nets(data: Path) -> dict[str, nn.Module]:
    """Return the nets, for CIFAR-10."""
    torch.manual_seed(0)
    built = (plugin.build((3, 32, 32), 10) for plugin in (SmallCNN(), CNN7()))
    small, large = (Classifier(net, CIFAR10["mean"], CIFAR10["std"]).eval() for net in built)
    return {"small_cnn": small, "resnet2b": resnet2b(data / "models" / "resnet2b.pth").module, "cnn7": large}


def problem(data: Path, net: nn.Module, memory: int) -> Problem:
    """Return the first test images and the classes that ``net`` gives them."""
    config = {**cifar10(data), "limit": SAMPLES, "device": "cpu"}
    split = prepare(EvalConfig.model_validate(config), resnet2b(data / "models" / "resnet2b.pth")).split
    x = split.images(slice(0, SAMPLES)).double()
    graph = trace(net, x)
    with torch.no_grad():
        return Problem(graph, Ball.around(x, Norm.LINF, EPS), graph(x).argmax(1), memory * 2**20)


def milliseconds(compute: Callable[[], object]) -> float:
    """Return the median time per sample."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        with torch.no_grad():
            compute()
        taken.append(1000 * (time.perf_counter() - start) / SAMPLES)
    return median(taken)


def undecided(task: Problem) -> float:
    """Return the number of values per sample that intervals leave on both sides of 0 before an activation."""
    bounds, count = intervals(task.graph, task.ball), 0
    for place in {node.inputs[0] for node in task.graph.nodes if node.nonlinear}:
        low, high = bounds[place]
        count += int(((low < 0) & (high > 0)).sum())
    return count / SAMPLES


def costs(name: str, net: nn.Module, data: Path) -> list[object]:
    """Return a row of the first table; `cnn7` is too large for more than one pass backwards on a CPU."""
    task = problem(data, net, 2048)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    row: list[object] = [name, f"{parameters / 1e6:.2f} M", f"{undecided(task):.0f}"]
    row += [f"{milliseconds(lambda f=bound: f(task)):.1f}" for bound in (interval_bound, mixed_margins)]
    if name == "cnn7":
        return [*row, "not run", "not run"]
    bounds: list[tuple[Tensor, Tensor]] = []

    def crown() -> Tensor:
        bounds[:] = tightened(task).bounds
        return linear_margins(task, bounds)

    row.append(f"{milliseconds(crown):.0f}")
    low = torch.full_like(interval_margins(task, bounds), -torch.inf)
    ascent = milliseconds(lambda: optimised_margins(task, bounds, Ascent(STEPS), low))
    return [*row, f"{ascent / STEPS:.0f}"]


def peak(data: Path, memory: int) -> None:
    """Print by how much CROWN raises the peak of this process (on Linux), in MiB, and its time."""
    net = nets(data)["resnet2b"]
    task = problem(data, net, memory)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading the data
    before = resident("VmRSS")
    taken = milliseconds(lambda: linear_margins(task, tightened(task).bounds))
    print(f"{resident('VmHWM') - before:.0f} {taken:.0f}")


def resident(what: str) -> float:
    """Return the memory of this process that is in use (VmRSS) or was at most (VmHWM), in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0]) / 1024


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Measure what bounds cost.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--memory", type=int, help="measure the peak for this much, in MiB, and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        peak(options.data, options.memory)
        return
    rows = [costs(name, net, options.data) for name, net in nets(options.data).items()]
    memory = []
    for budget in BUDGETS:
        command = [sys.executable, __file__, str(options.data), "--memory", str(budget)]
        memory.append([budget, *subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()])
    first = f"## Milliseconds per sample\n\n{table(COSTS, rows)}"
    second = f"## Memory: CROWN on resnet2b\n\n{table(MEMORY, memory)}"
    publish("bound_costs.md", "\n\n".join([first, second, versions("torch")]))


if __name__ == "__main__":
    main()
