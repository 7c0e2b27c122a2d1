"""Minimal-norm attacks against closed-form distances, against Foolbox, and alone against in company."""

from __future__ import annotations

from typing import Any

import foolbox
import pytest
import torch
from torch import Tensor, nn

from robusteval.attacks.ddn import DDN
from robusteval.attacks.fmn import FMN
from robusteval.attacks.sigma_zero import SigmaZero
from robusteval.rng import SampleRng
from robusteval.threat import Norm, ThreatModel

SHAPES = ((1, 1, 7), (3, 4, 4), (1, 8, 8))
DUAL = {"Linf": 1.0, "L2": 2.0, "L1": float("inf")}
CONVEX = [(FMN(), "Linf"), (FMN(), "L2"), (FMN(), "L1"), (DDN(), "L2")]
COUNTING = [FMN(), SigmaZero(steps=100)]
ALL = [*CONVEX, *((attack, "L0") for attack in COUNTING)]


class Rows(nn.Module):
    """``z(x) = scale (W x + b)``, summed row by row: batched matrix products would round differently alone."""

    def __init__(self, weight: Tensor, bias: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = weight, bias, scale

    def forward(self, x: Tensor) -> Tensor:
        return ((x.flatten(1)[:, None] * self.weight).sum(2) + self.bias) * self.scale


def streams(count: int, first: int = 0) -> SampleRng:
    return SampleRng(0, tuple(range(first, first + count)), 0)


def gaps(model: Rows, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``z_y - z_k`` (N, K), inf for k = y, and ``w_y - w_k`` (N, K, D) in float64."""
    weight, bias = model.weight.double(), model.bias.double()
    logits = x.flatten(1).double() @ weight.T + bias
    gap = logits.gather(1, y[:, None]) - logits
    return gap.scatter(1, y[:, None], torch.inf), weight[y][:, None] - weight


def grey(shape: tuple[int, ...], count: int, norm: str, scale: float = 1.0) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """Return a random classifier of 5 classes, inputs near grey, labels and exact distances.

    At grey the other classes are 0.08 to 0.3 from class 0, so the box is far; the nearest is not the runner-up.
    """
    rng = torch.Generator().manual_seed(sum(shape) + count)
    size = torch.Size(shape).numel()
    weight = torch.randn(5, size, generator=rng) * torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0])[:, None]
    slope = torch.linalg.vector_norm((weight[0] - weight).double(), ord=DUAL[norm], dim=1).float()
    wanted = torch.tensor([0.0, 0.2, 0.08, 0.3, 0.12])
    bias = -(wanted * slope) - weight.sum(1) / 2
    x = 0.5 + 0.002 * (torch.rand(count, *shape, generator=rng) - 0.5)
    y = torch.zeros(count, dtype=torch.long)
    gap, difference = gaps(model := Rows(weight, bias, scale), x, y)
    exact = (gap / torch.linalg.vector_norm(difference, ord=DUAL[norm], dim=2)).min(1).values
    assert exact.min() > 0.02
    assert exact.max() < 0.2
    return model, x, y, exact


def sparse(shape: tuple[int, ...], count: int, scale: float = 1.0) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """Return a random classifier, uniform inputs, labels and, by greed, the least number of values to change."""
    rng = torch.Generator().manual_seed(sum(shape) + count)
    size = torch.Size(shape).numel()
    model = Rows(torch.randn(3, size, generator=rng), torch.zeros(3), scale)
    x = torch.rand(count, *shape, generator=rng)
    y = model(x).argmax(1)
    gap, difference = gaps(model, x, y)
    flat = x.flatten(1).double()[:, None]
    gains = torch.where(difference > 0, difference * flat, -difference * (1 - flat))
    needed = (gains.sort(dim=2, descending=True).values.cumsum(2) < gap[..., None]).sum(2) + 1
    return model, x, y, needed.min(1).values


@pytest.mark.parametrize(("attack", "norm"), CONVEX)
@pytest.mark.parametrize(("shape", "count"), [*zip(SHAPES, (1, 3, 8), strict=True), ((1, 1, 7), 8)])
def test_distances_of_linear_models_are_exact(attack: Any, norm: str, shape: tuple[int, ...], count: int) -> None:
    model, x, y, exact = grey(shape, count, norm)
    found = attack.search(model, x, y, Norm(norm), streams(count))
    ratio = found.distances / exact
    assert ratio.min() > 0.9999
    assert ratio.max() < 1.02
    assert torch.equal(found.distances, ThreatModel.parse(norm, "1").distance(x, found.points))
    assert (model(found.points).argmax(1) != y).all()


@pytest.mark.parametrize("attack", COUNTING)
@pytest.mark.parametrize(("shape", "count"), [*zip(SHAPES, (1, 3, 8), strict=True), ((1, 1, 7), 8)])
def test_counts_of_linear_models_are_exact_or_one_off(attack: Any, shape: tuple[int, ...], count: int) -> None:
    model, x, y, exact = sparse(shape, count)
    found = attack.search(model, x, y, Norm("L0"), streams(count))
    assert (found.distances >= exact).all()
    assert (found.distances <= exact + 1).all()
    assert torch.equal(found.distances, (found.points != x).flatten(1).sum(1).double())
    assert (model(found.points).argmax(1) != y).all()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize(("attack", "norm"), CONVEX)
def test_the_scale_of_the_logits_does_not_matter(attack: Any, norm: str, scale: float) -> None:
    model, x, y, exact = grey((3, 4, 4), 3, norm, scale)
    ratio = attack.search(model, x, y, Norm(norm), streams(3)).distances / exact
    assert ratio.max() < 1.02


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("attack", COUNTING)
def test_the_scale_of_the_logits_does_not_matter_to_counts(attack: Any, scale: float) -> None:
    model, x, y, exact = sparse((1, 8, 8), 8, scale)
    assert (attack.search(model, x, y, Norm("L0"), streams(8)).distances <= exact + 1).all()


@pytest.mark.parametrize(("attack", "norm"), ALL)
def test_company_changes_no_bit(attack: Any, norm: str) -> None:
    """Together, alone and shuffled; at the last sample all gradients vanish, so it leaves in a random direction."""
    model, x, y, _ = sparse((3, 4, 4), 5)
    net = nn.Sequential(model, nn.ReLU())
    x[4] = 0.0
    together = attack.search(net, x, y, Norm(norm), streams(5))
    assert together.distances[:4].isfinite().all()
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = attack.search(net, x[order], y[order], Norm(norm), streams(5).take(order))
    assert torch.equal(shuffled.points, together.points[order])
    for row in (0, 4):
        alone = attack.search(net, x[row : row + 1], y[row : row + 1], Norm(norm), streams(1, row))
        assert torch.equal(alone.points[0], together.points[row])


@pytest.mark.parametrize(("attack", "norm"), ALL)
def test_what_is_not_broken_within_eps_comes_back_untouched(attack: Any, norm: str) -> None:
    """Of three samples only the last is within reach of eps; with a larger bias, none is within reach of anything."""
    weight = torch.zeros(2, 12)
    weight[1] = torch.linspace(0.8, 1.2, 12)
    model, blocked = (Rows(weight, torch.tensor([bias, 0.0])) for bias in (5.0, 50.0))
    x = torch.tensor([0.0, 0.0, 0.41])[:, None].expand(3, 12).reshape(3, 3, 2, 2).contiguous()
    y = torch.zeros(3, dtype=torch.long)
    threat = ThreatModel.parse(norm, {"Linf": "0.1", "L2": "0.2", "L1": "0.5", "L0": "2"}[norm])
    candidates = attack(model, x, y, threat, streams(3)).candidates
    assert torch.equal(candidates[:2], x[:2])
    assert model(candidates).argmax(1).tolist() == [0, 0, 1]
    assert threat.contains(x, candidates).all()
    hopeless = attack.search(blocked, x, y, Norm(norm), streams(3))
    assert hopeless.distances.isinf().all()
    assert torch.equal(hopeless.points, x)


@pytest.mark.parametrize(("attack", "norm"), ALL)
def test_zero_gradients_give_no_nan(attack: Any, norm: str) -> None:
    model = Rows(torch.zeros(3, 12), torch.tensor([1.0, 0.0, 0.0]))
    x = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).round()
    found = attack.search(model, x, torch.zeros(2, dtype=torch.long), Norm(norm), streams(2))
    assert torch.equal(found.points, x)
    assert found.distances.isinf().all()


@pytest.fixture(scope="module")
def convnet() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten())
        model = nn.Sequential(*layers, nn.Linear(256, 6)).eval().requires_grad_(False)
    x = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize(
    ("attack", "norm", "theirs"),
    [
        (FMN(), "Linf", foolbox.attacks.LInfFMNAttack),
        (FMN(), "L1", foolbox.attacks.L1FMNAttack),
        (FMN(), "L2", foolbox.attacks.DDNAttack),
        (DDN(), "L2", foolbox.attacks.DDNAttack),
    ],
)
def test_as_near_as_foolbox(attack: Any, norm: str, theirs: Any, convnet: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = convnet
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, points, _ = theirs()(wrapped, x, y, epsilons=None)
    distances = ThreatModel.parse(norm, "1").distance(x, points)
    distances[model(points).argmax(1) == y] = torch.inf
    ours = attack.search(model, x, y, Norm(norm), streams(32)).distances
    assert ours.median() <= 1.02 * distances.median()
    assert ours.isfinite().all()


@pytest.mark.parametrize("change", [{"steps": 0}, {"step_size": 0.0}, {"step_size_end": 2.0}, {"classes": 0}])
@pytest.mark.parametrize("attack", [FMN, DDN])
def test_settings_are_checked(attack: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs"):
        attack(**change)


def test_attacks_for_one_norm_refuse_others() -> None:
    x, y = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="Linf"):
        DDN().search(nn.Flatten(), x, y, Norm.LINF, streams(1))
    with pytest.raises(ValueError, match="L2"):
        SigmaZero().search(nn.Flatten(), x, y, Norm.L2, streams(1))
    with pytest.raises(ValueError, match="tau"):
        SigmaZero(tau=1.0)
    for attack in (FMN, DDN, SigmaZero):
        assert attack.minimal
