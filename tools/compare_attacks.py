"""Compare our attacks with those of three libraries on one net, norm by norm; writes docs/results/attacks.md.

    python tools/compare_attacks.py ../shared/data [--torchattacks FOLDER] [--seed 0] [--keep runs/compare_attacks]

The first argument is a folder with `fashion-mnist/` (idx files) and `models/fashion_mnist_wk.pth` (Wong & Kolter 2018),
FOLDER is where `pip install --no-deps --target FOLDER torchattacks` put that library; without it its rows are left out.
Rows are kept, so that the command can be interrupted; delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _libraries import Case, Entry, entries, load_torchattacks
from _study import cached, publish, table, versions
from torch import Tensor

from robusteval.datasets.open import open_dataset
from robusteval.evaluation.probe import Probe
from robusteval.models.base import frozen
from robusteval.models.io import load_model
from robusteval.provenance import deterministic
from robusteval.rng import seeded
from robusteval.settings import PluginSpec
from robusteval.threat import BUDGET_TOLERANCE, ThreatModel

SAMPLES = 200
BUDGETS = {"Linf": "0.1", "L2": "1", "L1": "6", "L0": "6"}
WHOLE = {"Linf": "1", "L2": "28", "L1": "784", "L0": "784"}
"""Balls that hold every image of 784 values."""
HEADER = ("library", "attack", "robust", "median", "near", "none", "forward", "backward", "seconds")


@dataclass(frozen=True)
class Row:
    """What an attack found: the norm per sample (None: no adversarial input), passes per sample, seconds.

    ``outside`` candidates were misclassified but left the ball or the box; ``error`` is what the attack raised.
    """

    norms: list[float | None]
    outside: int = 0
    forward: float = 0.0
    backward: float = 0.0
    seconds: float = 0.0
    error: str = ""

    def broken(self, radius: float) -> set[int]:
        """Return the samples with an adversarial input within ``radius``."""
        return {i for i, norm in enumerate(self.norms) if norm is not None and norm <= radius + BUDGET_TOLERANCE}


def judged(case: Case, candidates: Tensor) -> Row:
    """Believe no candidate: it must be finite, in the box, in the ball and misclassified."""
    allowed, norms = case.threat.contains(case.x, candidates), case.threat.distance(case.x, candidates)
    with torch.no_grad():
        wrong = case.model(candidates.detach().nan_to_num()).argmax(1) != case.y
    kept = [norm if good else None for norm, good in zip(norms.tolist(), (wrong & allowed).tolist(), strict=True)]
    return Row(kept, outside=int((wrong & ~allowed).sum()))


def measure(entry: Entry, case: Case) -> dict[str, Any]:
    """Run an attack, seeded and on one thread; what it raises is its result."""
    probe = Probe(case.model, batch_size=len(case.x))
    np.random.seed(case.seed)  # foolbox and torchattacks draw from it
    start, error, row = time.perf_counter(), "", Row([None] * len(case.x))
    with deterministic(threads=1), seeded(case.seed, case.x.device):
        try:
            candidates = entry.run(replace(case, model=probe))
        except Exception as problem:  # whatever a library raises
            error = ": ".join(filter(None, [type(problem).__name__, *str(problem).splitlines()[:1]]))
        seconds, passes = time.perf_counter() - start, probe.passes
        row = row if error else judged(case, candidates)
    each = {"forward": passes.forward / len(case.x), "backward": passes.backward / len(case.x)}
    return asdict(replace(row, **each, seconds=seconds, error=error))


def load(data: Path) -> tuple[Case, int]:
    """Return the correctly classified of the first images, and how many are not."""
    split = open_dataset("fashion_mnist", str(data / "fashion-mnist"), False).load("test").take(slice(0, SAMPLES))
    net = load_model(str(data / "models" / "fashion_mnist_wk.pth"), PluginSpec(name="small_cnn"), (1, 28, 28), 10)
    x, y = split.images(slice(None)), split.labels
    with torch.no_grad():
        right = net.module(x).argmax(1) == y
    case = Case(net.module, x[right], y[right], ThreatModel.parse("Linf", BUDGETS["Linf"]))
    return case, int((~right).sum())


def cells(entry: Entry, row: Row, radius: float, best: list[float]) -> list[object]:
    """Return a row of the table; ``best`` is the smallest norm per sample that any attack found."""
    if row.error:
        return [entry.library, entry.attack, f"raises {row.error}", *[""] * 6]
    found = [math.inf if norm is None else norm for norm in row.norms]
    near = sum(norm <= 1.01 * least for norm, least in zip(found, best, strict=True) if least < math.inf)
    minimal = [f"{statistics.median(found):.4g}", near, found.count(math.inf)] if entry.minimal else [""] * 3
    passes = [round(row.forward), round(row.backward), round(row.seconds)]
    return [entry.library, entry.attack, len(found) - len(row.broken(radius)), *minimal, *passes]


def missed(rows: list[tuple[Entry, Row]], radius: float, total: int) -> str:
    """Say what our attacks together miss, and what the others together miss."""
    own = set[int]().union(*(row.broken(radius) for entry, row in rows if entry.library == "robusteval"))
    other = set[int]().union(*(row.broken(radius) for entry, row in rows if entry.library != "robusteval"))
    return (
        f"Robust to all of ours: {total - len(own)}; to all of the others: {total - len(other)}; to every attack: "
        f"{total - len(own | other)}. Broken only by others: {len(other - own)}; only by ours: {len(own - other)}. "
        f"Misclassified candidates outside the ball or the box: {sum(row.outside for _, row in rows)}."
    )


def section(norm: str, case: Case, torchattacks: Path | None, keep: Path) -> str:
    """Run every attack for ``norm`` that is not kept yet; return its table."""
    rows = []
    for entry in entries(norm, torchattacks):
        ball = ThreatModel.parse(norm, WHOLE[norm] if entry.minimal else BUDGETS[norm])
        name = re.sub(r"\W+", "-", f"seed {case.seed} {ball} {entry.library} {entry.attack}")
        kept = cached(keep, name, lambda e=entry, b=ball: measure(e, replace(case, threat=b)))
        rows.append((entry, Row(**kept)))
        print(norm, *cells(*rows[-1], float(BUDGETS[norm]), [math.inf] * len(case.x)), flush=True)
    radius, total = float(BUDGETS[norm]), len(case.x)
    found = [[math.inf if norm is None else norm for norm in row.norms] for _, row in rows if not row.error]
    best = [min(column) for column in zip(*found, strict=True)]
    body = table(HEADER, (cells(entry, row, radius, best) for entry, row in rows))
    return f"## {norm}, eps {BUDGETS[norm]}\n\n{body}\n\n{missed(rows, radius, total)}"


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description="Compare attacks of four libraries.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--torchattacks", type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/compare_attacks"))
    options = parser.parse_args()
    case, errors = load(options.data)
    with frozen(case.model) as module:
        case = replace(case, model=module, seed=options.seed)
        parts = [section(norm, case, options.torchattacks, options.keep) for norm in BUDGETS]
    fourth = load_torchattacks(options.torchattacks).__version__ if options.torchattacks else "left out"
    made = f"{versions('torch', 'numpy', 'pyautoattack', 'foolbox')}, torchattacks {fourth}; CPU, one thread"
    counts = f"{len(case.x)} of the first {SAMPLES} test images are classified correctly and attacked; {errors} are not"
    publish("attacks.md", "\n\n".join([f"{counts}. Seed {options.seed}. {made}.", *parts]))


if __name__ == "__main__":
    main()
