"""The attacks that compare_attacks.py compares: four libraries, one table of entries each, the same budgets for all."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import foolbox
import pyautoattack
from torch import Tensor, nn

from robusteval.attacks.apgd import APGD
from robusteval.attacks.base import Attack
from robusteval.attacks.ddn import DDN
from robusteval.attacks.fmn import FMN
from robusteval.attacks.pgd import PGD
from robusteval.attacks.sigma_zero import SigmaZero
from robusteval.attacks.square import Square
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel

STEPS, QUERIES = 100, 5000
SEARCH = {"binary_search_steps": 9, "steps": STEPS}


@dataclass(frozen=True)
class Case:
    """Correctly classified images (N, C, H, W), labels (N,), the model, the ball to stay in, and the seed."""

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: ThreatModel
    seed: int = 0


Run = Callable[[Case], Tensor]
"""Returns one candidate per image."""


@dataclass(frozen=True)
class Entry:
    """An attack of a library; one that is ``minimal`` looks for the smallest perturbation, in a ball without bounds."""

    library: str
    attack: str
    run: Run
    minimal: bool = False


def ours(norm: str) -> Iterator[Entry]:
    """Our attacks."""
    if norm in {"Linf", "L2"}:
        yield _ours("pgd", "100 steps", PGD(STEPS))
        for steps, targets in ((20, 5), (STEPS, 9)):
            attack = APGD(steps, loss="margin", targets=targets, shrink=(10.0, 3.0))
            yield _ours("apgd, targeted margin, from 10 and 3 eps", f"{targets} x {steps} steps", attack)
    if norm != "L0":
        yield _ours("apgd, ce", "100 steps", APGD(STEPS))
        yield _ours("apgd, dlr", "100 steps", APGD(STEPS, loss="dlr"))
        yield _ours("apgd, targeted dlr", "9 x 100 steps", APGD(STEPS, loss="dlr", targets=9))
        yield _ours("square", "5000 queries", Square(QUERIES))
    special = {"L2": DDN, "L0": SigmaZero}.get(norm)
    for steps in (STEPS, 10 * STEPS):
        yield _ours("fmn", f"{steps} steps", FMN(steps))
        if special:
            yield _ours("ddn" if norm == "L2" else "sigma_zero", f"{steps} steps", special(steps))


def _ours(name: str, budget: str, attack: Attack) -> Entry:
    def run(case: Case) -> Tensor:
        rng = SampleRng(case.seed, tuple(range(len(case.x))), case.seed)
        return attack(case.model, case.x, case.y, case.threat, rng).candidates

    return Entry("robusteval", f"{name}, {budget}", run, getattr(attack, "minimal", False))


def autoattack(norm: str) -> Iterator[Entry]:
    """Pyautoattack's components, set as in its version `standard` but for one restart and nine targets, in L1 too."""
    if norm == "L0":
        return
    once, nine = {"n_restarts": 1}, {"n_restarts": 1, "n_target_classes": 9}
    yield _auto("APGD-CE, 100 steps", "apgd", once)
    yield _auto("APGD-DLR, 100 steps", "apgd", {"loss": "dlr", **once})
    yield _auto("APGD-T, 9 x 100 steps", "apgd_targeted", nine)
    yield _auto("FAB-T, 9 x 100 steps", "fab", {"targeted": True, **nine})
    yield _auto("Square, 5000 queries", "square", {"n_queries": QUERIES})
    yield _auto("FAB, 100 steps", "fab", {"targeted": False, **once}, minimal=True)


def _auto(name: str, component: str, changes: dict[str, Any], minimal: bool = False) -> Entry:
    def run(case: Case) -> Tensor:
        norm, eps = case.threat.norm.value, case.threat.radius
        suite = pyautoattack.AutoAttack(case.model, norm=norm, eps=eps, seed=case.seed)
        attack = getattr(suite, component)
        for key, value in changes.items():
            setattr(attack, key, value)
        found: Tensor = attack.perturb(case.x.clone(), case.y.clone())
        return found

    return Entry("pyautoattack", name, run, minimal)


def of_foolbox(norm: str) -> Iterator[Entry]:
    """Foolbox's attacks as they come, not through our adapter: beyond the budget only EAD is told to minimise L1."""
    for name in {
        "Linf": ("LinfBasicIterativeAttack", "LinfPGD"),
        "L2": ("L2BasicIterativeAttack", "L2PGD"),
        "L1": ("L1BasicIterativeAttack", "SparseL1DescentAttack"),
        "L0": (),
    }[norm]:
        yield _fool(name, "100 steps", {"steps": STEPS}, minimal=False)
    fmn = {"Linf": "LInfFMNAttack", "L2": "L2FMNAttack", "L1": "L1FMNAttack", "L0": "L0FMNAttack"}[norm]
    for steps in (STEPS, 10 * STEPS):
        for name in (fmn, "DDNAttack") if norm == "L2" else (fmn,):
            yield _fool(name, f"{steps} steps", {"steps": steps})
    if norm == "L2":
        yield _fool("L2CarliniWagnerAttack", "9 x 100 steps", SEARCH)
    if norm == "L1":
        yield _fool("EADAttack", "9 x 100 steps", {**SEARCH, "decision_rule": "L1"})


def _fool(name: str, budget: str, settings: dict[str, Any], minimal: bool = True) -> Entry:
    def run(case: Case) -> Tensor:
        model = foolbox.PyTorchModel(case.model, bounds=(0, 1), device="cpu")
        attack, eps = getattr(foolbox.attacks, name)(**settings), None if minimal else case.threat.radius
        found: Tensor = attack(model, case.x.clone(), case.y, epsilons=eps)[1]
        return found

    return Entry("foolbox", f"{name}, {budget}", run, minimal)


def of_torchattacks(library: ModuleType, norm: str) -> Iterator[Entry]:
    """Torchattacks' attacks, by default but for the budget, which is 10 steps there."""
    if norm == "L0":
        return
    yield _torch("APGD, 100 steps", library.APGD, {"norm": norm, "steps": STEPS})
    yield _torch("APGDT, 9 x 100 steps", library.APGDT, {"norm": norm, "steps": STEPS})
    yield _torch("Square, 5000 queries", library.Square, {"norm": norm, "n_queries": QUERIES})
    yield _torch("FAB, 100 steps", library.FAB, {"norm": norm, "steps": STEPS}, minimal=True)


def _torch(name: str, attack: Any, settings: dict[str, Any], minimal: bool = False) -> Entry:
    def run(case: Case) -> Tensor:
        ready = attack(case.model, eps=case.threat.radius, seed=case.seed, **settings)
        found: Tensor = ready(case.x.clone(), case.y.clone())
        return found

    return Entry("torchattacks", name, run, minimal)


@cache
def load_torchattacks(folder: Path) -> ModuleType:
    """Import ``folder``/torchattacks alone: the `robustbench` that its wheel puts beside it stays unseen."""
    path = folder / "torchattacks" / "__init__.py"
    spec = importlib.util.spec_from_file_location("torchattacks", path, submodule_search_locations=[str(path.parent)])
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{folder} holds no torchattacks")
    module = importlib.util.module_from_spec(spec)
    sys.modules["torchattacks"] = module
    spec.loader.exec_module(module)
    return module


def entries(norm: str, torchattacks: Path | None) -> Iterator[Entry]:
    """All attacks for ``norm``, those of fixed size first."""
    theirs = [partial(of_torchattacks, load_torchattacks(torchattacks))] if torchattacks else []
    listed = [entry for library in (ours, autoattack, of_foolbox, *theirs) for entry in library(norm)]
    return iter(sorted(listed, key=lambda entry: entry.minimal))
