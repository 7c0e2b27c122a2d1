"""Certifiers as plug-ins and in the harness: what they must refuse, what they must not prove, what they must prove."""

from __future__ import annotations

import copy
import math
import random
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from test_bounds import random_net
from test_judge import THREAT, samples
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.attacks.pgd import PGD
from robusteval.bounds.ball import Ball
from robusteval.bounds.graph import trace
from robusteval.bounds.margins import Problem
from robusteval.certifiers._margins import judged
from robusteval.certifiers.base import Certifier
from robusteval.certifiers.crown import Crown
from robusteval.evaluation.assemble import SAMPLES
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.consistency import _able, _check_levels
from robusteval.evaluation.judge import judge
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.suite import CERTIFIERS, Stage
from robusteval.evaluation.validate import read_report, seal, validate
from robusteval.models.base import frozen
from robusteval.report import Report, SampleRow
from robusteval.rng import SampleRng
from robusteval.runs import RunDir
from robusteval.threat import Norm, ThreatModel
from robusteval.verdict import Certificate, Verdict

NAMES = [name for name in CERTIFIERS.names() if name != "smoothing"]  # which samples: test_smoothing
WIDE = ThreatModel.parse("Linf", "0.1")


def certified(
    certifier: Certifier, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel = WIDE
) -> list[Certificate]:
    return certifier(model, x.clone(), y, threat, SampleRng(0, tuple(range(len(x))), 0))


class Net(nn.Module):
    """A network made of a function on the flattened input, a layer of two outputs, and state of its own.

    On inputs of nine values near 0.5 the first class wins by far, so that all but a refusal is a proof.
    """

    def __init__(self, f: Callable[[Tensor, nn.Linear], Tensor], **state: Any) -> None:
        super().__init__()
        self.f, self.last = f, nn.Linear(9, 2)
        vars(self).update(state)
        with torch.no_grad():
            self.last.weight.copy_(torch.linspace(-1, 1, 18).view(2, 9) / 9)
            self.last.bias.copy_(torch.tensor([20.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.last)


def images(count: int) -> Tensor:
    return 0.4 + 0.2 * torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(count))


def after(change: Callable[[Tensor], Any]) -> Callable[[Tensor, nn.Linear], Tensor]:
    """Return a network that changes the flattened input before its layer."""
    return lambda x, last: last(change(x.flatten(1)))


def numpy_code(z: Tensor) -> Tensor:
    return torch.as_tensor(numpy.tanh(z.detach().numpy()))


REFUSED: dict[str, Callable[[Tensor, nn.Linear], Tensor]] = {
    "unknown operation": after(lambda z: z.abs()),
    "product of two values": after(lambda z: z * z),
    "quotient": after(lambda z: 1 / (1 + z)),
    "softmax": lambda x, last: last(x.flatten(1)).softmax(1),
    "sorting": after(lambda z: z.sort(1).values),
    "branch on pixels": lambda x, last: last(x.flatten(1)) if x.mean() > 0.5 else last(-x.flatten(1)),
    "comparison": after(lambda z: torch.where(z > 0.5, z, 0 * z)),
    "numpy": after(numpy_code),
    "mean of the batch": after(lambda z: z - z.mean(0)),
    "first of the batch": after(lambda z: z - z[0]),
    "order of the batch": after(lambda z: z.flip(0)),
    "transposed batch": after(lambda z: z.T.contiguous().T),
    "transposed square": after(lambda z: torch.cat([z[:, :7], z[:, : len(z)].T], 1)),
    "statistics of the batch": lambda x, last: last(F.batch_norm(x, None, None, training=True).flatten(1)),
    "sum over everything": after(lambda z: z + z.sum()),
    "dropout at work": after(lambda z: F.dropout(z, 0.5, training=True)),
    "noise": after(lambda z: z + 1e-9 * torch.rand(9, dtype=z.dtype)),
    "noise like the input": after(lambda z: z + 1e-9 * torch.randn_like(z)),
    "another precision": lambda x, last: last(x.flatten(1)).to(torch.float16),
    "two outputs": lambda x, last: (last(x.flatten(1)), x),  # type: ignore[return-value]
    "constant": lambda x, last: torch.ones(len(x), 2, dtype=x.dtype),
    "leaky ReLU that falls": after(lambda z: F.leaky_relu(z, -0.5)),
    "leaky ReLU that is steeper below 0": after(lambda z: F.leaky_relu(z, 2.0)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("case", "count"), product(REFUSED, (1, 2, 3)))
def test_what_no_bound_is_known_for_is_refused(name: str, case: str, count: int) -> None:
    x = images(count)
    answers = certified(CERTIFIERS.build(name, {}), Net(REFUSED[case]).eval(), x, torch.zeros(count, dtype=torch.long))
    assert len(answers) == count
    assert not any(answer.proved for answer in answers)
    assert all(answer.reason.startswith("unsupported") for answer in answers), answers[0]


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm2d(1), nn.BatchNorm2d(1, track_running_stats=False)])
def test_layers_in_training_mode_are_refused(layer: nn.Module) -> None:
    net = nn.Sequential(layer, nn.Flatten(), Net(after(lambda z: z)).last).train()
    state = copy.deepcopy(net.state_dict())
    (answer,) = certified(CERTIFIERS.build("crown", {}), net, images(1), torch.zeros(1, dtype=torch.long))
    assert (answer.proved, answer.reason.split(":")[0]) == (False, "unsupported")
    assert net.training
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_that_round_more_than_float32_does_are_refused(dtype: torch.dtype) -> None:
    with frozen(Net(after(lambda z: z)).to(dtype)) as net:
        (answer,) = certified(CERTIFIERS.build("crown", {}), net, images(1), torch.zeros(1, dtype=torch.long))
    assert (answer.proved, answer.reason.split(":")[0]) == (False, "unsupported")


def autocast(x: Tensor, last: nn.Linear) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return last(x.flatten(1)).to(x.dtype)


def view_in_place(x: Tensor, last: nn.Linear) -> Tensor:
    """Margin ``0.01 + h - relu(h)``, at x = 0.55 -0.04 in the ball; ``h - h`` if the view's change is lost."""
    h = torch.cat([x.flatten(1)[:, :1]] * 2, 1) - 0.5
    h[:, :1].relu_()
    return F.linear(h, h.new_tensor([[-1.0, 1.0], [0.0, 0.0]]), h.new_tensor([0.01, 0.0]))


def negative_divisor(x: Tensor, last: nn.Linear) -> Tensor:
    """Margin ``0.1 - relu(0.6 - x)``, at x = 0.55 -0.05 in the ball."""
    h = F.avg_pool2d(x, 1, divisor_override=-1).flatten(1)[:, :1]
    return F.linear(F.relu(h + 0.6), h.new_tensor([[-1.0], [0.0]]), h.new_tensor([0.1, 0.0]))


def with_factor(draw: Callable[[Tensor], Any]) -> Callable[[Tensor, nn.Linear], Tensor]:
    """Margin ``1 - c relu(x - 0.6)`` for a random c of -100 to 100, so nothing random shows at x = 0.55."""

    def f(x: Tensor, last: nn.Linear) -> Tensor:
        h = F.relu(x.flatten(1)[:, :1] - 0.6) * draw(x)
        return F.linear(h, h.new_tensor([[-1.0], [0.0]]), h.new_tensor([1.0, 0.0]))

    return f


def rounding(x: Tensor, last: nn.Linear) -> Tensor:
    """Margin ``1.003 x - 0.4505``, at x = 0.45 more than 0, but less than that in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = F.linear(x.flatten(1)[:, :1], x.new_tensor([[1.003], [0.0]]), x.new_tensor([-0.4505, 0.0]))
    return z if z.dtype == x.dtype else z.float()


FALSE_PROOFS: dict[str, tuple[str, Callable[[Tensor, nn.Linear], Tensor]]] = {
    "view in place": ("a change in place of a view or alias is lost in the graph", view_in_place),
    "negative divisor": ("the reach of an average pooling with a negative divisor is negative", negative_divisor),
    "uniform_": (
        "noise drawn in place of a new tensor is taken for a constant",
        with_factor(lambda x: torch.empty(1, dtype=x.dtype).uniform_(-100, 100)),
    ),
    "random of Python": (
        "numbers drawn outside torch are taken for constants, where they do not show on the clean input",
        with_factor(lambda x: random.uniform(-100, 100)),
    ),
    "autocast": ("autocast leaves float64 alone, so the graph is more exact than the network", rounding),
}


def adversarial(net: nn.Module) -> bool:
    """Whether any of many evaluations errs at an end of the ball around 0.55."""
    ends = torch.tensor([-0.1, 0.1]).view(2, 1, 1, 1) + torch.full((2, 1, 3, 3), 0.55)
    return any(bool((logits[:, 0] < logits[:, 1]).any()) for logits in (net(ends.clone()) for _ in range(30)))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=reason)) if "Python" in name else name
        for name, (reason, _) in FALSE_PROOFS.items()
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_errs_in_the_ball_is_never_proved(name: str, case: str) -> None:
    net, x, y = Net(FALSE_PROOFS[case][1]).eval(), torch.full((1, 1, 3, 3), 0.55), torch.zeros(1, dtype=torch.long)
    if not adversarial(net):
        pytest.fail("the case is not what it says")
    for _ in range(12):
        (answer,) = certified(CERTIFIERS.build(name, {}), net, x, y)
        assert not answer.proved


def test_bare_networks_of_low_precision_are_refused() -> None:
    net = Net(after(lambda z: z)).bfloat16()
    (answer,) = certified(CERTIFIERS.build("crown", {}), net, images(1), torch.zeros(1, dtype=torch.long))
    assert not answer.proved


@pytest.mark.parametrize("count", [1, 2])
def test_samples_repeated_along_a_new_first_dimension_are_refused(count: int) -> None:
    net = Net(after(lambda z: z.expand(len(z), len(z), 9).mean(1)))
    answers = certified(CERTIFIERS.build("crown", {}), net.eval(), images(count), torch.zeros(count, dtype=torch.long))
    assert not any(answer.proved for answer in answers)


class Scripted(nn.Module):
    """A layer behind a module that TorchScript compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(nn.Sequential(nn.Flatten(), Net(after(lambda z: z)).last))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits


CRASHES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "a lock": (
        "deepcopy is outside the try of trace",
        lambda: Net(after(lambda z: z), lock=threading.Lock()),
    ),
    "a tensor with a gradient": (
        "deepcopy is outside the try of trace",
        lambda: Net(after(lambda z: z), cache=torch.ones(2, requires_grad=True) * 2),
    ),
    "TorchScript": ("requires_grad_ is outside the try of trace", Scripted),
    "zeros of the batch's size": (
        "a constant of the batch's size passes the check on two samples, then fails in the adjoint",
        lambda: Net(after(lambda z: z + torch.zeros(len(z), 1, dtype=z.dtype))),
    ),
    "padding of the batch's size": (
        "a constant of the batch's size passes the check on two samples, then fails in the adjoint",
        lambda: Net(after(lambda z: torch.cat([z[:, :5], torch.zeros(len(z), 4, dtype=z.dtype)], 1))),
    ),
    "max pooling of three dimensions": (
        "max_pool reads a channel that is not there",
        lambda: Net(lambda x, last: last(F.max_pool2d(x[:, 0], 3, 1, 1).flatten(1))),
    ),
}


@pytest.mark.parametrize("case", CRASHES)
def test_odd_networks_are_bounded_or_refused_but_stop_no_run(case: str) -> None:
    for count in (1, 2, 3):
        x, y = images(count), torch.zeros(count, dtype=torch.long)
        answers = certified(CERTIFIERS.build("crown", {}), CRASHES[case][1]().eval(), x, y)
        assert all(answer.proved or answer.reason.startswith("unsupported") for answer in answers)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ibp"])
def test_too_little_memory_is_a_reason(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4096, 2)).eval()
    x, y = torch.rand(2, 1, 64, 64), torch.zeros(2, dtype=torch.long)
    answers = certified(CERTIFIERS.build(name, {"memory": 1}), net, x, y)
    assert [(answer.proved, answer.reason.split(":")[0]) for answer in answers] == [(False, "memory")] * 2


@pytest.mark.parametrize(("name", "norm"), product(NAMES, ["Linf", "L2", "L1"]))
def test_samples_do_not_depend_on_their_company(name: str, norm: str) -> None:
    _, net, _ = random_net(4)
    net = net.float()
    x = torch.rand(40, *random_net(4)[2].shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net(x.clone()).argmax(1)
    threat, certifier = ThreatModel.parse(norm, "0.02"), CERTIFIERS.build(name, {})
    together = certified(certifier, net, x, y, threat)
    for i in (0, 31, 32, 39):
        assert certified(certifier, net, x[i : i + 1], y[i : i + 1], threat) == [together[i]]
    assert sum(answer.proved for answer in together) > 0


@pytest.mark.parametrize("name", NAMES)
def test_linear_classifiers_are_proved_exactly_where_they_are_robust(name: str) -> None:
    model, x, y = samples(100)
    proved = [answer.proved for answer in certified(CERTIFIERS.build(name, {}), model, x, y, THREAT)]
    assert proved == model.exactly_robust(x, y).tolist()
    assert 10 < sum(proved) < 90


@pytest.mark.parametrize(
    ("margins", "proved"),
    [([1.0, 1.0], True), ([1.0, math.nan], False), ([math.nan] * 2, False), ([1.0, -1.0], False), ([1.0, 1e-6], False)],
)
def test_every_margin_must_clear_the_rounding_of_float32(margins: list[float], proved: bool) -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).eval(), images(2)
    bound = torch.tensor([margins, [1.0, 1.0]], dtype=torch.float64)
    problem = Problem(trace(net, x.double()), Ball.around(x.double(), Norm.LINF, 0.1), torch.zeros(2, dtype=torch.long))
    first, second = judged(problem, bound)
    assert (first.proved, second.proved) == (proved, True)


def test_the_ball_that_is_bounded_holds_all_that_the_harness_accepts() -> None:
    """A candidate may be 1e-6 further away than eps; a network can be made that errs there and nowhere nearer."""
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).double(), torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1e4], [0.0]]))
        net[1].bias.copy_(torch.tensor([-1e4 * (0.499 - 5e-7), 0.0]))
    for eps, proved in (("0.001", False), ("0.0009", True)):
        threat = ThreatModel.parse("Linf", eps)
        (answer,) = certified(CERTIFIERS.build("crown", {}), net, x, torch.zeros(1, dtype=torch.long), threat)
        assert answer.proved is proved
    x_adv = x - 0.001 - 9e-7
    assert ThreatModel.parse("Linf", "0.001").contains(x, x_adv).all()
    assert net(x_adv).argmax(1).tolist() == [1]


# A counter-example that gradients do not lead to

SIDE = 4
SIGNS = (-1.0) ** torch.arange(SIDE * SIDE)
START, WIDTH, SLOPE, DECOY = 1.5, 0.05, 60.0, 0.3
REACH = (1 + SLOPE * START) / (SLOPE - DECOY)
"""Where the margin is 0: ``1 + DECOY s - SLOPE relu(s - START)``, s being how far the input went along `SIGNS`."""

DISTANCE = {"Linf": REACH / SIDE**2, "L2": REACH / SIDE, "L1": REACH}


def planted() -> nn.Module:
    """Return a network whose margin dips in a corner of the ball, between s = START and START + 2 WIDTH.

    Elsewhere it grows towards that corner, so that gradients lead away from it.
    """
    first, last = nn.Linear(SIDE * SIDE, 4), nn.Linear(4, 2)
    far = torch.tensor([START, START + WIDTH, START + 2 * WIDTH, -10.0])
    with torch.no_grad():
        first.weight.copy_(SIGNS.expand(4, -1))
        first.bias.copy_(-far - 0.5 * SIGNS.sum())
        last.weight.copy_(torch.tensor([[-SLOPE, 2 * SLOPE, -SLOPE, DECOY], [0.0, 0.0, 0.0, 0.0]]))
        last.bias.copy_(torch.tensor([1 - 10 * DECOY, 0.0]))
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()


def at_distance(norm: str, factor: float) -> ThreatModel:
    return ThreatModel.parse(norm, f"{factor * DISTANCE[norm]:.6f}")


def centre() -> tuple[Tensor, Tensor]:
    return torch.full((1, 1, SIDE, SIDE), 0.5), torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize("norm", DISTANCE)
def test_the_planted_counter_example_is_there_and_gradients_miss_it(norm: str) -> None:
    (x, y), net, threat = centre(), planted(), at_distance(norm, 1.01)
    x_adv = x + SIGNS.view_as(x) * 1.005 * REACH / SIDE**2
    assert threat.contains(x, x_adv).all()
    assert net(x_adv).argmax(1).tolist() == [1]
    found = PGD(steps=50, restarts=5)(net, x, y, threat, SampleRng(0, (0,), 0)).candidates
    assert net(found).argmax(1).tolist() == [0]


@pytest.mark.parametrize(("name", "norm"), product(NAMES, DISTANCE))
def test_the_planted_counter_example_is_never_proved_away(name: str, norm: str) -> None:
    x, y = centre()
    net, certifier = planted(), CERTIFIERS.build(name, {})
    for factor in (1.0001, 1.001, 1.01, 1.05, 1.2, 2.0):
        assert not certified(certifier, net, x, y, at_distance(norm, factor))[0].proved
    provable = 0.99 if name == "ibp" else 0.999
    assert certified(certifier, net, x, y, at_distance(norm, provable))[0].proved


# The harness


@pytest.mark.parametrize("seed", range(24))
def test_no_attack_contradicts_a_proof(seed: int) -> None:
    """In float32 and with attacks on proved samples, as an evaluation would do it."""
    _, net, x = random_net(1000 + seed)
    for layer in net.modules():
        if hasattr(layer, "inplace"):
            layer.inplace = False  # two in a row, and there is no gradient to attack with
    net, x = net.float().eval(), torch.rand(12, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = net(x.clone()).argmax(1)
    norm = ("Linf", "L2", "L1")[seed % 3]
    threat = ThreatModel.parse(norm, {"Linf": "0.03", "L2": "0.1", "L1": "0.3"}[norm])
    stages = [Stage("crown", "certifier", CERTIFIERS.build("crown", {})), Stage("pgd", "attack", PGD(steps=20))]
    judged = judge(Probe(net, 100), x, y, torch.arange(12), threat, stages, SampleRng(0, tuple(range(12)), 0))
    assert {row.verdict for row in judged.rows} <= {Verdict.CERTIFIED, Verdict.BROKEN, Verdict.UNKNOWN}


def finish(folder: Path, **settings: Any) -> Report:
    config = {"dataset": "digits", "workers": 1, "chunk_size": 40, "limit": 60, **settings}
    report = evaluate(prepare(EvalConfig.model_validate(config)), RunDir(folder))
    seal(folder)
    assert validate(folder) == []
    return report


@pytest.mark.parametrize(("norm", "eps"), [("Linf", "0.02"), ("L2", "0.1"), ("L1", "0.4")])
def test_the_certified_suite_brackets_the_truth(model_folder: Path, tmp_path: Path, norm: str, eps: str) -> None:
    results = finish(tmp_path / "run", model=str(model_folder), suite="certified", norm=norm, eps=eps).results
    assert results.certified is not None
    assert 0 < results.certified.count <= results.empirical.count <= results.clean.count
    assert results.certified.count == results.verdicts[Verdict.CERTIFIED]


def test_certified_accuracy_falls_along_a_curve(model_folder: Path, tmp_path: Path) -> None:
    report = finish(tmp_path / "run", model=str(model_folder), suite="certified", norm="Linf", eps="0.005,0.02,0.05")
    counts = [(p.results.certified.count, p.results.empirical.count) for p in report.curve if p.results.certified]
    assert len(counts) == 3
    assert all(certified_ <= empirical for certified_, empirical in counts)
    assert counts[0][0] > counts[1][0] > counts[2][0]
    assert read_report(tmp_path / "run").results.certified == report.curve[-1].results.certified
    rows = [SampleRow.model_validate_json(line) for line in (tmp_path / "run" / SAMPLES).read_text().splitlines()]
    for forged, said in (*elsewhere(rows), *by_a_proof(rows)):
        problems = list(_check_levels(forged, report, _able(report)))
        assert any(said in problem for problem in problems), (forged, problems)


def elsewhere(rows: list[SampleRow]) -> Iterator[tuple[SampleRow, str]]:
    """Yield forged rows whose proof at the smallest eps is said to hold at all of them."""
    for row in rows:
        if row.verdict is Verdict.CERTIFIED:
            yield row.model_copy(update={"stages": (row.stages[0],) * 3, "stage": row.stages[0]}), "about another"


def by_a_proof(rows: list[SampleRow]) -> Iterator[tuple[SampleRow, str]]:
    """Yield forged rows whose witness is said to be the find of a certifier that looks for none."""
    for row in rows:
        if row.verdict is Verdict.BROKEN and row.stage and "apgd" in row.stage:
            stages = tuple(stage and stage.replace("apgd", "ibp") for stage in row.stages)
            yield row.model_copy(update={"stages": stages, "stage": stages[-1]}), "is broken at eps"


SUITE = "title = 'proofs, then attacks on them'\n" + "".join(
    f"[[stages]]\nname = '{name}'\n{kind} = '{name}'\n"
    for kind, name in [*(("certifier", name) for name in NAMES), ("attack", "apgd"), ("attack", "pgd")]
)


def test_attacks_on_proved_samples_find_nothing(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_text(SUITE)
    settings = {"model": str(model_folder), "suite": str(tmp_path / "suite.toml"), "norm": "Linf", "eps": "0.02"}
    report = finish(tmp_path / "run", limit=40, **settings)
    assert report.results.certified is not None
    assert report.results.certified.count > 5
    tried, searched = report.stages[len(NAMES)], report.stages[: len(NAMES)]
    left = report.results.clean.count - sum(stage.broken for stage in searched)
    assert (tried.name, tried.entered) == ("apgd", left), "certificates spare no sample the attack in this suite"


def rough(count: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
    """A net of three hidden layers, inputs and the classes it gives them."""
    torch.manual_seed(1)
    layers = [nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU()]
    net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(40, 4)).eval().requires_grad_(False)
    x = torch.rand(count, 1, 5, 6)
    return net, x, net(x).argmax(1)


def test_crown_goes_through_its_shares_until_one_is_enough() -> None:
    """Fewer passes prove less, and what they prove is what all of them prove; what is left over is tried again."""
    net, x, y = rough()
    threat = ThreatModel.parse("Linf", "0.05")
    few, full, both = (
        [one.proved for one in certified(Crown(shares=shares), net, x, y, threat)]
        for shares in ((0.1,), (1.0,), (0.1, 1.0))
    )
    assert both == full
    assert 0 < sum(few) < sum(full)
    assert not any(a and not b for a, b in zip(few, full, strict=True))


def test_crown_gives_up_where_it_is_told_to_and_only_there() -> None:
    net, x, y = rough()
    threat = ThreatModel.parse("Linf", "0.08")
    full = certified(Crown(), net, x, y, threat)
    proved: list[int] = []
    for reach in (1.0, 3.0, 1e6):
        found = certified(Crown(reach=reach), net, x, y, threat)
        assert all(b.proved for a, b in zip(found, full, strict=True) if a.proved)
        assert all(one.reason for one in found if not one.proved)
        proved.append(sum(one.proved for one in found))
    assert 0 < proved[0] < proved[1] < proved[2] == sum(one.proved for one in full)


@pytest.mark.parametrize("params", [{"shares": ()}, {"shares": (0.5, 0.2)}, {"shares": (0.0,)}, {"reach": -1.0}])
def test_crown_refuses_what_makes_no_sense(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="crown"):
        Crown(**params)


def test_crown_is_short_of_memory_for_all_or_none() -> None:
    net, x, y = rough()
    few = Crown(memory=0)
    assert not any(one.proved for one in certified(few, net, x, y, ThreatModel.parse("Linf", "0.0001")))
    assert not any(one.proved for one in certified(few, net, x[:1], y[:1], ThreatModel.parse("Linf", "0.0001")))


def test_margins_of_two_shares_are_not_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither share proves the sample, so no evidence would, though each margin is positive in one of them."""
    net, x, y = rough(1)
    found = iter([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    monkeypatch.setattr(
        "robusteval.certifiers.crown.linear_margins", lambda problem, bounds: torch.tensor([next(found)]).double()
    )
    threat = ThreatModel.parse("Linf", "0.5")
    assert [one.proved for one in certified(Crown(shares=(0.2, 1.0)), net, x, y, threat)] == [False]
    assert [one.proved for one in certified(Crown(shares=(0.2,)), net, x, y, threat)] == [True]
