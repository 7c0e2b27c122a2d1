"""Every attack that is shipped, on linear classifiers, whose smallest adversarial perturbations are known exactly.

An attack of a fixed size must break just the samples that can be broken within eps; one that looks for the smallest
perturbation must come within 2 % of it. Where less is asked, `GRADES` says how much less, measured, and why. Distances:
``min_k (z_y - z_k) / ||w_y - w_k||_q`` with q dual to the norm, the box [0,1] being out of reach; in L0, where only the
box bounds a change, how many of the largest ``|w| * room`` it takes.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import product
from typing import Any, get_args

import pytest
import torch
from test_apgd_square import linear
from test_judge import THREAT, samples
from test_minimal_norm import sparse
from torch import Tensor, nn

from robusteval.attacks.autoattack import RANDOMISED, AutoAttack, Component
from robusteval.attacks.base import Attack
from robusteval.attacks.foolbox import Foolbox
from robusteval.errors import UsageError
from robusteval.evaluation.judge import judge
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.suite import ATTACKS, load_suite
from robusteval.rng import SampleRng
from robusteval.suites import suite_files
from robusteval.testing import examples
from robusteval.threat import Norm, ThreatModel
from robusteval.verdict import Verdict

EPS = {Norm.LINF: "0.03", Norm.L2: "0.1", Norm.L1: "0.3", Norm.L0: "30"}
FACTORS = (0.98, 1.02, 0.5, 1.3, 0.9, 1.05, 0.8, 0.95)
"""Distances of the samples from the decision boundary, in eps."""

SHAPES = ((48,), (6, 8), (3, 4, 4))
ONES, EACH = tuple((1, shape) for shape in SHAPES), tuple(zip((1, 3, 8), SHAPES, strict=True))
ALL = (*EACH, *zip((3, 8, 1), SHAPES, strict=True))
"""Batch sizes with shapes of one input."""

WRAPPERS = ("autoattack", "foolbox")
"""Plug-ins of which the suites say what is shipped; the others are tried with their own examples."""

IMAGES = (*WRAPPERS, "square")
"""Plug-ins that take only (N, C, H, W): they get inputs of fewer dimensions as images of one channel."""

PLUGINS_LEFT_OUT = {"transfer": "tries what another run found; see test_transfer"}
LEFT_OUT = {
    "*-noise-*": "noise: draws at random and optimises nothing",
    "*-salt-and-pepper": "noise: draws at random and optimises nothing",
}


@dataclass(frozen=True)
class Grade:
    """What is asked of an attack on a random linear classifier of ``classes`` classes.

    It breaks what is nearer than ``reach`` times eps. Where it minimises, by a perturbation at most ``excess`` times
    the smallest, in L0 of at most ``spare`` more values. With ``wasteful`` it sees only samples within its reach, as
    it would spend its whole budget on any other; ``sizes`` are batch sizes
    with shapes of an input, ``steps`` what is taken in place of the steps shipped.
    """

    classes: int = 2
    reach: float = 0.98
    excess: float = 1.02
    spare: int = 0
    wasteful: bool = False
    sizes: tuple[tuple[int, tuple[int, ...]], ...] = EACH
    steps: int | None = None
    why: str = ""

    def factors(self, count: int) -> tuple[float, ...]:
        """Return the distances of ``count`` samples from the boundary, in eps."""
        return tuple(self.reach * min(each, 1.0) if self.wasteful else each for each in FACTORS[:count])


SEARCH = "random search within a fixed number of queries, on weights without the structure of images"
SPARSE = "its steps move several of the 48 values at once, here two, where moving one is best"
ALONE = "attacks sample by sample, which costs seconds each; test_foolbox compares it alone and in company"
GRADES = {
    "L1-apgd-apgd-*": Grade(reach=0.7, why=SPARSE),
    "L1-pgd*": Grade(reach=0.7, why=SPARSE),
    "*-plus-*-t": Grade(classes=4, excess=math.inf, sizes=ONES[2:], why="the same as in standard"),
    "*-apgd-t": Grade(classes=4, why="tries every class"),
    "*-plus-apgd-dlr": Grade(classes=4, why="sees beyond two classes, as DLR is meant to"),
    "*-plus-fab": Grade(classes=4, sizes=EACH[1:], why="tries every class"),
    "*-rand-*": Grade(sizes=EACH[1:], why="takes 20 passes for one"),
    "*-fab-t": Grade(
        classes=4, excess=math.inf, why="tries every class, but stops at the first one that lies within eps"
    ),
    "*-apgd-*-3": Grade(classes=4, why="tries every class"),
    "*-apgd-*-9-*": Grade(classes=4, why="tries every class"),
    "*-fmn": Grade(classes=4, why="looks for the nearest class first"),
    "*-ddn": Grade(why="follows the cross-entropy, which mixes classes"),
    "*-deepfool-*": Grade(classes=4, excess=1.04, why="overshoots by 2 % on purpose"),
    "*-carlini-wagner": Grade(excess=1.12, why="six searches of 100 steps leave its trade-off coarse"),
    "*-ead": Grade(reach=0.85, excess=1.12, why="six searches of 100 steps leave its trade-off coarse"),
    "*-hop-skip-jump-*": Grade(
        reach=0.95, excess=1.05, sizes=ONES, wasteful=True, steps=15, why=f"half the steps; {ALONE}"
    ),
    "*-boundary": Grade(sizes=ONES[2:], wasteful=True, why=ALONE),
    "*-pointwise-l1": Grade(
        reach=0.05, excess=20, wasteful=True, why="undoes whole changes: it lowers counts, not sums"
    ),
    "*-pointwise-l0": Grade(spare=4, why="undoes changes one by one in random order"),
    "*-fmn-l0": Grade(spare=2, why="spreads its step over as many values as its budget allows"),
    "*-sigma_zero": Grade(spare=1, why="a smooth stand-in for the count leaves a change too many now and then"),
    "Linf-square*": Grade(wasteful=True, why="would put its 5000 queries into every survivor"),
    "Linf-*-square": Grade(reach=0.5, wasteful=True, why=f"{SEARCH}; its squares miss the last row and column"),
    "L2-*square*": Grade(reach=0.4, wasteful=True, why=SEARCH),
    "L1-*square*": Grade(reach=0.3, wasteful=True, why=SEARCH),
}


@dataclass(frozen=True)
class Case:
    """An attack as it is shipped, for one norm."""

    name: str
    plugin: str
    attack: Attack
    norm: Norm

    @property
    def left_out(self) -> bool:
        return any(fnmatch(self.name, pattern) for pattern in LEFT_OUT)

    @property
    def grade(self) -> Grade:
        return next((each for pattern, each in GRADES.items() if fnmatch(self.name, pattern)), Grade())


def shipped() -> Iterator[tuple[str, str, dict[str, Any], tuple[str, ...]]]:
    """Yield a name, plug-in, parameters and norms of each stage of a suite, and of each example of a plug-in."""
    for suite, path in suite_files().items():
        for stage in tomllib.loads(path.read_text(encoding="utf-8")).get("stages", ()):
            if "attack" in stage:
                norms = tuple(stage.get("norms", EPS))
                yield f"{suite}-{stage['name']}", stage["attack"], stage.get("params", {}), norms
    yield "pgd-ce", "pgd", {"loss": "ce"}, tuple(EPS)
    for plugin in set(ATTACKS.names()) - set(WRAPPERS):
        for params in examples(ATTACKS, plugin):
            yield "-".join([plugin, *map(str, params.values())]), plugin, dict(params), tuple(EPS)


def every_case() -> dict[tuple[str, Norm], Case]:
    """Return (attack, norm) -> case; what two suites have in common is one case."""
    cases: dict[tuple[str, Norm], Case] = {}
    for name, plugin, params, norms in sorted(shipped(), key=str):
        attack: Attack = ATTACKS.build(plugin, params)
        for norm in map(Norm, norms):
            if attack.supports(ThreatModel.parse(norm, EPS[norm])):
                cases.setdefault((repr(attack), norm), Case(f"{norm.value}-{name}", plugin, attack, norm))
    return cases


CASES = every_case()


@dataclass(frozen=True)
class Problem:
    """Inputs (N, ...) of classes ``y``, and how far they are from being misclassified (N,)."""

    model: nn.Module
    x: Tensor
    y: Tensor
    exact: Tensor


def affine(weight: Tensor) -> nn.Module:
    """Return ``weight (x - 1/2)`` as plain layers."""
    layer = nn.Linear(weight.shape[1], len(weight)).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(-0.5 * weight.sum(1))
    return nn.Sequential(nn.Flatten(), layer).eval()


def problem(norm: Norm, grade: Grade, count: int, shape: tuple[int, ...]) -> Problem:
    if norm is Norm.L0:
        rows, x, y, fewest = sparse(shape, count)
        return Problem(rows, x, y, fewest.double())
    threat = ThreatModel.parse(norm, EPS[norm])
    case = linear(threat, grade.classes, grade.factors(count), shape, seed=count)
    exact = torch.tensor(grade.factors(count), dtype=torch.float64) * threat.radius
    return Problem(affine(case.model.weights[0]), case.x, case.y, exact)


def run(case: Case, it: Problem) -> Tensor:
    """Return the candidates of an attack, taking the steps that its grade allows."""
    attack, count = case.attack, len(it.x)
    if case.grade.steps:
        assert isinstance(attack, Foolbox)
        attack = replace(attack, params={**attack.params, "steps": case.grade.steps})
    x = it.x.view(count, *[1] * (4 - it.x.dim()), *it.x.shape[1:]) if case.plugin in IMAGES else it.x
    rng = SampleRng(5, tuple(range(1000, 1000 + count)), 0)
    found = attack(it.model, x, it.y, ThreatModel.parse(case.norm, EPS[case.norm]), rng).candidates
    assert found.shape == x.shape
    return found.view_as(it.x)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES.values() if not case.left_out])
def test_a_shipped_attack_does_what_the_closed_form_says(case: Case) -> None:
    grade, threat = case.grade, ThreatModel.parse(case.norm, EPS[case.norm])
    minimises = getattr(case.attack, "minimal", False) or getattr(case.attack, "component", "") == "fab"
    for count, shape in grade.sizes if case.plugin in IMAGES else ALL:
        it = problem(case.norm, grade, count, shape)
        found = run(case, it)
        broken, sizes = it.model(found).argmax(1) != it.y, threat.distance(it.x, found)
        assert threat.contains(it.x, found).all()
        assert broken[it.exact <= grade.reach * threat.radius].all()
        assert not broken[it.exact > threat.radius].any()
        if minimises:
            most = it.exact + grade.spare if case.norm is Norm.L0 else it.exact * grade.excess
            assert (sizes <= most)[broken].all()


@pytest.mark.parametrize("suite", sorted(set(suite_files()) - {"decision", "plus", "smoothing"}))
def test_linf_robust_accuracy_is_the_exact_value(suite: str) -> None:
    """Without `decision` and `plus` for their cost: the attacks, graded above, take seconds on the survivors.

    And without `smoothing`, which is about another classifier and has no stage for Linf.
    """
    model, x, y = samples()
    model.requires_grad_(False)
    ids = torch.arange(len(x))
    asked = load_suite(suite, THREAT)
    rng = SampleRng(0, tuple(ids.tolist()), 0)
    judged = judge(Probe(model, 64), x, y, ids, THREAT, asked.stages(), rng, False, asked.repeat)
    robust = model.exactly_robust(x, y) & (model(x).argmax(1) == y)
    assert [row.verdict in (Verdict.UNKNOWN, Verdict.CERTIFIED) for row in judged.rows] == robust.tolist()
    assert 5 < int(robust.sum()) < 40, "the case must be interesting"


def test_every_shipped_attack_is_tried_or_left_out_with_a_reason() -> None:
    asked: set[tuple[str, Norm]] = set()
    for suite, norm in product(suite_files(), EPS):
        with suppress(UsageError):  # a suite that has no stage for the norm
            stages = load_suite(suite, ThreatModel.parse(norm, EPS[norm])).stages()
            asked |= {(repr(stage.run), norm) for stage in stages if stage.kind == "attack"}
    assert len(asked) > 50
    assert asked <= set(CASES)
    tried = [case for case in CASES.values() if not case.left_out]
    assert {case.plugin for case in tried} | set(PLUGINS_LEFT_OUT) == set(ATTACKS.names())
    components = {(case.attack.component, case.attack.version) for case in tried if isinstance(case.attack, AutoAttack)}
    assert components >= {(name, "plus") for name in get_args(Component)}
    assert components >= {(name, "standard") for name in ("apgd-ce", "apgd-t", "fab-t", "square")}
    assert components >= {(name, "rand") for name in RANDOMISED}
    for pattern in (*GRADES, *LEFT_OUT):
        assert any(fnmatch(case.name, pattern) for case in CASES.values()), pattern
