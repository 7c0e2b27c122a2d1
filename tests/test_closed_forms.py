"""Every attack that is shipped, on linear classifiers, whose smallest adversarial perturbations are known exactly.

An attack of a fixed size must break just the samples that can be broken within eps; one that looks for the smallest
perturbation must come within 2 % of it. Where less is asked, `quarantine.toml` says how much less, measured, and why,
and the attack must fall short of what is asked of the others. Distances:
``min_k (z_y - z_k) / ||w_y - w_k||_q`` with q dual to the norm, the box [0,1] being out of reach; in L0, where only the
box bounds a change, how many of the largest ``|w| * room`` it takes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import product
from typing import Any, get_args

import pytest
import torch
from pyautoattack.square import SquareAttack
from test_apgd_square import linear
from test_judge import THREAT, samples
from test_minimal_norm import sparse
from torch import Tensor, nn

from robusteval.attacks._loose import TIGHT, Limit, Loose, loose_entries, looseness
from robusteval.attacks.autoattack import RANDOMISED, AutoAttack, Component
from robusteval.attacks.base import Attack
from robusteval.attacks.foolbox import Foolbox
from robusteval.attacks.square import Square
from robusteval.catalog import parameters
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


@dataclass(frozen=True)
class Setting:
    """How an attack is tried: on random linear classifiers of ``classes`` classes.

    With ``wasteful`` it sees only samples within its reach, as it would spend its whole budget on any other; ``sizes``
    are batch sizes with shapes of an input, ``steps`` what is taken in place of the steps shipped.
    """

    classes: int = 2
    wasteful: bool = False
    sizes: tuple[tuple[int, tuple[int, ...]], ...] = EACH
    steps: int | None = None
    why: str = ""

    def factors(self, count: int, limit: Limit = TIGHT) -> tuple[float, ...]:
        """Return the distances of ``count`` samples from the boundary, in eps."""
        return tuple(limit.reach * min(each, 1.0) if self.wasteful else each for each in FACTORS[:count])


ALONE = "attacks sample by sample, which costs seconds each; test_foolbox compares it alone and in company"
SETTINGS = {
    "*-plus-*-t": Setting(classes=4, sizes=ONES[2:], why="the same as in standard"),
    "*-apgd-t": Setting(classes=4, why="tries every class"),
    "*-plus-apgd-dlr": Setting(classes=4, why="sees beyond two classes, as DLR is meant to"),
    "*-plus-fab": Setting(classes=4, sizes=EACH[1:], why="tries every class"),
    "*-rand-*": Setting(sizes=EACH[1:], why="takes 20 passes for one"),
    "*-fab-t": Setting(classes=4, why="tries every class"),
    "*-apgd-*-3": Setting(classes=4, why="tries every class"),
    "*-apgd-*-9-*": Setting(classes=4, why="tries every class"),
    "*-fmn": Setting(classes=4, why="looks for the nearest class first"),
    "*-deepfool-*": Setting(classes=4, why="looks for the nearest class first"),
    "*-hop-skip-jump-*": Setting(sizes=ONES, wasteful=True, steps=15, why=f"half the steps; {ALONE}"),
    "*-boundary": Setting(sizes=ONES[2:], wasteful=True, why=ALONE),
    "*-pointwise-l1": Setting(wasteful=True, why="is far from the nearest"),
    "*square*": Setting(wasteful=True, why="would put its 5000 queries into every survivor"),
}


@dataclass(frozen=True)
class Case:
    """An attack as it is shipped, for one norm."""

    name: str
    plugin: str
    attack: Attack
    norm: Norm

    @property
    def setting(self) -> Setting:
        return next((each for pattern, each in SETTINGS.items() if fnmatch(self.name, pattern)), Setting())

    @property
    def loose(self) -> Loose | None:
        return looseness(self.plugin, parameters(self.attack), self.norm)

    @property
    def minimises(self) -> bool:
        return getattr(self.attack, "minimal", False) or getattr(self.attack, "component", "") == "fab"


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


def problem(norm: Norm, classes: int, factors: tuple[float, ...], shape: tuple[int, ...]) -> Problem:
    """Return a sample per factor, at that many eps from the boundary; in L0 the factors only count."""
    count = len(factors)
    if norm is Norm.L0:
        rows, x, y, fewest = sparse(shape, count)
        return Problem(rows, x, y, fewest.double())
    threat = ThreatModel.parse(norm, EPS[norm])
    case = linear(threat, classes, factors, shape, seed=count)
    exact = torch.tensor(factors, dtype=torch.float64) * threat.radius
    return Problem(affine(case.model.weights[0]), case.x, case.y, exact)


def run(case: Case, it: Problem) -> Tensor:
    """Return the candidates of an attack, with the steps of its setting."""
    attack, count = case.attack, len(it.x)
    if case.setting.steps:
        assert isinstance(attack, Foolbox)
        attack = replace(attack, params={**attack.params, "steps": case.setting.steps})
    x = it.x.view(count, *[1] * (4 - it.x.dim()), *it.x.shape[1:]) if case.plugin in IMAGES else it.x
    rng = SampleRng(5, tuple(range(1000, 1000 + count)), 0)
    found = attack(it.model, x, it.y, ThreatModel.parse(case.norm, EPS[case.norm]), rng).candidates
    assert found.shape == x.shape
    return found.view_as(it.x)


def obeys(case: Case, limit: Limit, it: Problem, found: Tensor) -> bool:
    """Say whether an attack broke what it must, with perturbations no larger than they may be."""
    threat = ThreatModel.parse(case.norm, EPS[case.norm])
    broken, sizes = it.model(found).argmax(1) != it.y, threat.distance(it.x, found)
    if not broken[it.exact <= limit.reach * threat.radius].all():
        return False
    most = it.exact + limit.spare if case.norm is Norm.L0 else it.exact * limit.excess
    return not case.minimises or bool((sizes <= most)[broken].all())


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES.values()])
def test_a_shipped_attack_does_what_the_closed_form_says(case: Case) -> None:
    threat, limit = ThreatModel.parse(case.norm, EPS[case.norm]), limit_of(case)
    for count, shape in case.setting.sizes if case.plugin in IMAGES else ALL:
        it = problem(case.norm, case.setting.classes, case.setting.factors(count, limit), shape)
        found = run(case, it)
        assert threat.contains(it.x, found).all()
        assert obeys(case, limit, it, found)
        assert not (it.model(found).argmax(1) != it.y)[it.exact > threat.radius].any()


def limit_of(case: Case) -> Limit:
    return case.loose.norms[case.norm] if case.loose else TIGHT


LOOSE = [
    pytest.param(entry, norm, id=f"{norm.value}-{entry.loose}") for entry in loose_entries() for norm in entry.norms
]


@pytest.mark.parametrize(("entry", "norm"), LOOSE)
def test_a_loose_attack_still_falls_short(entry: Loose, norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a few samples of 192 values just within eps; Square gets a fifth of its queries, which are its cost."""
    theirs = SquareAttack.perturb
    monkeypatch.setattr(
        SquareAttack, "perturb", lambda self, *args: setattr(self, "n_queries", 1000) or theirs(self, *args)
    )
    case = next(case for case in CASES.values() if case.loose is entry and case.norm is norm)
    if isinstance(case.attack, Square):
        case = replace(case, attack=replace(case.attack, queries=1000))
    problems = (problem(norm, 2, (0.97,) * count, (3, 8, 8)) for count in (3, 2))
    assert not all(obeys(case, TIGHT, it, run(case, it)) for it in problems)
    assert len(entry.reason) > 30


@pytest.mark.parametrize("suite", sorted(set(suite_files()) - {"decision", "plus", "smoothing"}))
def test_linf_robust_accuracy_is_the_exact_value(suite: str) -> None:
    """Without `decision` and `plus` for their cost: the attacks, tried above, take seconds on the survivors.

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


def test_every_shipped_attack_is_tried() -> None:
    asked: set[tuple[str, Norm]] = set()
    for suite, norm in product(suite_files(), EPS):
        with suppress(UsageError):  # a suite that has no stage for the norm
            stages = load_suite(suite, ThreatModel.parse(norm, EPS[norm])).stages()
            asked |= {(repr(stage.run), norm) for stage in stages if stage.kind == "attack"}
    assert len(asked) > 50
    assert asked <= set(CASES)
    tried = CASES.values()
    assert {case.plugin for case in tried} | set(PLUGINS_LEFT_OUT) == set(ATTACKS.names())
    components = {(case.attack.component, case.attack.version) for case in tried if isinstance(case.attack, AutoAttack)}
    assert components >= {(name, "plus") for name in get_args(Component)}
    assert components >= {(name, "standard") for name in ("apgd-ce", "apgd-t", "fab-t", "square")}
    assert components >= {(name, "rand") for name in RANDOMISED}
    for pattern in SETTINGS:
        assert any(fnmatch(case.name, pattern) for case in CASES.values()), pattern
