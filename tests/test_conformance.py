"""The published conformance suites: every plug-in passes them, by enumeration, and wrong ones are caught."""

from __future__ import annotations

import copy
import gzip
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image
from torch import Tensor, nn

from robusteval.attacks.base import AttackResult
from robusteval.attacks.pgd import PGD
from robusteval.catalog import Catalog
from robusteval.datasets.base import Split, TensorPixels
from robusteval.datasets.open import DATASETS, open_dataset
from robusteval.evaluation.suite import ATTACKS, CERTIFIERS
from robusteval.models.base import Shape
from robusteval.models.io import ARCHITECTURES
from robusteval.rng import SampleRng
from robusteval.testing import examples
from robusteval.testing.architectures import check_architecture
from robusteval.testing.attacks import check_attack
from robusteval.testing.certifiers import check_certifier
from robusteval.testing.datasets import check_dataset
from robusteval.testing.objectives import check_objective
from robusteval.threat import Norm, ThreatModel
from robusteval.training.objective import OBJECTIVES, Loss, StepContext
from robusteval.verdict import Certificate

SMALL: dict[str, dict[str, Any]] = {
    "cnn7": {"width": 4, "hidden": 16},
    "preact_resnet18": {"width": 4},
    "resnet18": {"width": 4},
    "wide_resnet": {"depth": 10, "width": 1},
}
"""Small instances of architectures whose defaults take too long here."""


def every(catalog: Catalog, small: Mapping[str, Mapping[str, Any]] | None = None) -> pytest.MarkDecorator:
    """Parametrize a test with the name and the example parameters of every plug-in of a catalog."""
    cases = [
        pytest.param(name, params, id="-".join([name, *map(str, params.values())]))
        for name in catalog.names()
        for params in ([small[name]] if small and name in small else examples(catalog, name))
    ]
    return pytest.mark.parametrize(("name", "params"), cases)


@every(ATTACKS)
def test_attack(name: str, params: Mapping[str, Any]) -> None:
    check_attack(ATTACKS.build(name, params))


@every(CERTIFIERS)
def test_certifier(name: str, params: Mapping[str, Any]) -> None:
    check_certifier(CERTIFIERS.build(name, params))


@every(OBJECTIVES)
def test_objective(name: str, params: Mapping[str, Any]) -> None:
    check_objective(OBJECTIVES.build(name, params))


@every(ARCHITECTURES, SMALL)
def test_architecture(name: str, params: Mapping[str, Any]) -> None:
    check_architecture(ARCHITECTURES.build(name, params))


# Datasets: most need files, which are made up here, or published ones, which stand beside the checkout.


def write_mnist(folder: Path) -> None:
    for prefix, count in (("train", 30), ("t10k", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 3)):
        for label in ("ant", "bee", "cat"):
            (folder / part / label).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{k}.png")


def write_npz(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", image=pixels, label=np.arange(12) % 3)


class FakeTorchvision:
    """Stands in for a torchvision dataset, whose files are too large to make up: every class twice."""

    def __init__(self, root: str, **arguments: object) -> None:
        count = 20 if "split" in arguments or arguments.get("classes") == 10 else 200
        pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.data = pixels.transpose(0, 3, 1, 2) if "split" in arguments else pixels
        self.targets, self.classes = (np.arange(count) % (count // 2)).tolist(), [f"class {k}" for k in range(100)]
        self.labels = np.array(self.targets)


class FakeCifar10(FakeTorchvision):
    def __init__(self, root: str, **arguments: object) -> None:
        super().__init__(root, classes=10, **arguments)


FAKES = {
    "cifar10": ("CIFAR10", FakeCifar10),
    "cifar100": ("CIFAR100", FakeTorchvision),
    "svhn": ("SVHN", FakeTorchvision),
}
WRITTEN = {"mnist": write_mnist, "imagefolder": write_images, "npz": write_npz}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", DATASETS.names())
def test_dataset(name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (name, part) == ("npz", "test"):
        pytest.skip("generated images are for training only")
    places: dict[str, Any] = {}
    if name in FAKES:
        source, fake = FAKES[name]
        monkeypatch.setattr(f"torchvision.datasets.{source}", fake)
        places = {"data_dir": str(tmp_path), "download": True}
    elif name in WRITTEN:
        WRITTEN[name](tmp_path)
        places = {"data_dir": str(tmp_path / "images.npz" if name == "npz" else tmp_path)}
    elif name == "fashion_mnist":
        places = {"data_dir": str(shared("fashion-mnist"))}
    for params in examples(DATASETS, name):
        check_dataset(DATASETS.build(name, {**params, **places}), part)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "test"])
def test_the_real_cifar10(part: str) -> None:
    check_dataset(open_dataset("cifar10", str(shared("cifar10-jpeg.tar.xz"))), part)  # type: ignore[arg-type]


# Plug-ins that break a rule, each in one way.

Attacked = Callable[[nn.Module, Tensor, Tensor, ThreatModel, SampleRng], Tensor]


@dataclass(frozen=True)
class Wrong:
    """An attack made of a function; the right candidates are PGD's."""

    attack: Attacked

    def supports(self, threat: ThreatModel) -> bool:
        return threat.convex

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        return AttackResult(self.attack(model, x, y, threat, rng))


def pgd(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> Tensor:
    return PGD()(model, x, y, threat, rng).candidates


def doing(act: Callable[[nn.Module, Tensor, Tensor], object]) -> Attacked:
    """Return PGD that does something improper first."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> Tensor:
        candidates = pgd(model, x, y, threat, rng)
        act(model, x, y)
        return candidates

    return attack


def seeded(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> Tensor:
    state = torch.get_rng_state()
    moved = threat.project(x, pgd(model, x, y, threat, rng) + 1e-3 * torch.randn_like(x))
    torch.set_rng_state(state)
    return moved


def greedy(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> Tensor:
    return pgd(model, x, y, replace(threat, eps=threat.eps * 3), rng)


def outside_the_box(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> Tensor:
    return x + 3 * (pgd(model, x, y, replace(threat, eps=threat.eps / 3), rng) - x) + 0.9 * threat.radius


def through_a_clamp(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> Tensor:
    """PGD that starts at random and lets the gradient pass through the clipping to [0,1]."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(rng.batch)) * 2 - 1
    point = x + threat.radius * noise
    for _ in range(40):
        point.requires_grad_()
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(model(point.clamp(0, 1)), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
        point = (point.detach() + threat.radius / 4 * gradient.sign()).clamp(x - threat.radius, x + threat.radius)
    return threat.project(x, point)


def crash_on_one(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> Tensor:
    return pgd(model, x, y, threat, rng).squeeze(0)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", "8/255"), ("L2", "3"), ("L1", "12"), ("L1", "0.4")])
@pytest.mark.parametrize("excess", [1 + 1e-6, 1.3])
def test_held_candidates_are_inside_without_any_tolerance(norm: str, eps: str, excess: float) -> None:
    threat, rng = ThreatModel.parse(norm, eps), torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(8, 3, 32, 32, generator=rng)
    delta = torch.randn(x.shape, generator=rng)
    length = (excess * threat.radius / threat.distance(x, x + delta)).float().view(-1, 1, 1, 1)
    candidates = torch.where(torch.arange(8).view(-1, 1, 1, 1) < 4, x + delta * length, x + 0.5 * delta * length)
    inside = threat.contains(x, candidates)
    kept = threat.hold(x, candidates)
    assert threat.contains(x[~inside], kept[~inside], tolerance=0).all()
    assert torch.equal(kept[inside], candidates[inside])
    assert (threat.distance(x, kept)[:4] > threat.radius * 0.999).all(), "held, not thrown away"
    assert inside[4:].all()


def with_hook(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.register_forward_hook(lambda *_: None)


def with_gradient(model: nn.Module, x: Tensor, y: Tensor) -> None:
    next(model.parameters()).grad = None


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (doing(lambda *_: torch.rand(1)), "torch's global generator"),
        (doing(lambda *_: np.random.random()), "numpy's global generator"),
        (doing(lambda model, *_: model.train()), "the model's mode"),
        (doing(lambda model, *_: model.requires_grad_(True)), "requires_grad"),
        (doing(with_hook), "the model's hooks"),
        (doing(with_gradient), "the parameters' gradients"),
        (doing(lambda model, x, y: model.train()(x) is model.eval()), "the model's buffers"),
        (doing(lambda model, x, y: x.add_(0.01)), "its inputs"),
        (doing(lambda model, x, y: x.requires_grad_()), "its inputs' requires_grad"),
        (doing(lambda model, x, y: y.add_(1)), "its inputs"),
        (seeded, "differs when called again"),
        (greedy, "leaves Linf 0.05"),
        (outside_the_box, "leaves Linf 0.05 or the box"),
        (through_a_clamp, r"breaks \d of 8 black-and-white inputs"),
        (lambda model, x, y, threat, rng: x.clone(), "breaks 0 of"),
        (lambda *all: pgd(*all).double(), "returns torch.float64"),
        (lambda *all: pgd(*all).mul(float("nan")), "NaN or infinite"),
        (crash_on_one, "returns shape"),
    ],
)
def test_a_wrong_attack_is_caught(attack: Attacked, said: str) -> None:
    state = torch.get_rng_state()
    try:
        with pytest.raises(AssertionError, match=said):
            check_attack(Wrong(attack))
    finally:
        torch.set_rng_state(state)


def test_a_right_attack_made_the_same_way_is_not() -> None:
    check_attack(Wrong(pgd))


@dataclass(frozen=True)
class Interval:
    """Interval bound propagation through flatten, linear, convolution and ReLU; ``radius`` scales eps."""

    radius: float = 1.0
    slack: float = 1e-5

    def supports(self, threat: ThreatModel) -> bool:
        return threat.norm is not Norm.L1

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        low, high = x - self.radius * threat.radius, x + self.radius * threat.radius
        low, high = ((bound - model.mean) / model.std for bound in (low, high))
        with torch.no_grad():
            for layer in model.backbone:  # type: ignore[union-attr]
                low, high = self.through(layer, low, high)
        own = low.gather(1, y[:, None]).squeeze(1)
        proved = own > high.scatter(1, y[:, None], -torch.inf).max(1).values + self.slack
        return [Certificate(bool(ok), "" if ok else "bounds overlap") for ok in proved]

    @staticmethod
    def through(layer: nn.Module, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            return layer(low), layer(high)
        spread = copy.deepcopy(layer)
        spread.weight.data.abs_()
        spread.bias.data.zero_()
        middle, width = layer((low + high) / 2), spread((high - low) / 2)
        return middle - width, middle + width


@dataclass(frozen=True)
class WrongProof:
    """A certifier made of a function that says which samples are proved."""

    proved: Callable[[nn.Module, Tensor, Tensor, ThreatModel], Tensor]
    reason: str = "no bound"

    def supports(self, threat: ThreatModel) -> bool:
        return True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        return [Certificate(bool(ok), self.reason) for ok in self.proved(model, x, y, threat)]


def lipschitz(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    """Take the gradient's L2 norm for the Lipschitz constant, whatever the threat's norm and the net."""
    point = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        top = logits.scatter(1, y[:, None], -torch.inf).max(1).values
        margin = logits.gather(1, y[:, None]).squeeze(1) - top
    (gradient,) = torch.autograd.grad(margin.sum(), point)
    return margin.detach() > threat.radius * gradient.flatten(1).norm(dim=1)


def everything(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    return torch.ones(len(x))


def nothing(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    return torch.zeros(len(x))


def drawing(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    return torch.rand(len(x)) > 2


def test_a_sound_certifier_passes() -> None:
    check_certifier(Interval())


class OnlyOnNets(Interval):
    """Right for linear models, as it is told by their layers; unsound on nets with a hidden layer."""

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng
    ) -> list[Certificate]:
        hidden = any(isinstance(part, nn.ReLU) for part in model.modules())
        return Interval(0.01 if hidden else 1.0)(model, x, y, threat, rng)


@pytest.mark.parametrize(
    ("certifier", "said"),
    [
        (WrongProof(everything), r"proves samples \[.*\] robust to Linf 0.05, which the closed form refutes"),
        (WrongProof(lipschitz), "which the closed form refutes"),
        (Interval(radius=0.1), "which the closed form refutes"),
        (OnlyOnNets(), "which PGD refutes"),
        (WrongProof(nothing), "proves 0 of 4 linear samples"),
        (WrongProof(nothing, reason=" "), "without a reason"),
        (WrongProof(drawing), "torch's global generator"),
        (WrongProof(lambda model, x, y, threat: torch.zeros(1)), "returns 1 certificates for 9 inputs"),
    ],
)
def test_a_wrong_certifier_is_caught(certifier: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_certifier(certifier)


def cross_entropy(ctx: StepContext) -> Loss:
    logits = ctx.model(ctx.x)
    return Loss(ctx.cross_entropy(logits).mean(), logits)


def changed(change: Callable[[StepContext, Loss], Loss]) -> Callable[[StepContext], Loss]:
    return lambda ctx: change(ctx, cross_entropy(ctx))


def drops_gradients(ctx: StepContext) -> Loss:
    ctx.model.zero_grad()
    return cross_entropy(ctx)


def unstable(ctx: StepContext) -> Loss:
    logits = ctx.model(ctx.x)
    return Loss(-logits.softmax(1).gather(1, ctx.y[:, None]).log().mean(), logits)


def by_position(ctx: StepContext) -> Loss:
    loss = cross_entropy(ctx)
    ctx.per_sample("seen", 0.0)[: len(ctx.x)] = ctx.cross_entropy(loss.logits.detach())
    return loss


def first_half(ctx: StepContext) -> Loss:
    logits = ctx.model(ctx.x)
    return Loss(ctx.cross_entropy(logits)[: len(ctx.x) // 2].mean(), logits)


def backwards(ctx: StepContext) -> Loss:
    logits = ctx.model(ctx.x)
    return Loss(-ctx.cross_entropy(logits).mean(), logits)


def drops_out(ctx: StepContext) -> Loss:
    state = torch.get_rng_state()
    logits = ctx.model(nn.functional.dropout(ctx.x))
    torch.set_rng_state(state)
    return Loss(ctx.cross_entropy(logits).mean(), logits)


def in_eval_mode(ctx: StepContext) -> Loss:
    ctx.model.eval()
    return cross_entropy(ctx)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (drops_gradients, "the parameters' gradients"),
        (in_eval_mode, "the model's mode"),
        (drops_out, "not a function of its context"),
        (unstable, r"returns the loss inf"),
        (by_position, "by position in the batch"),
        (first_half, "depends on the order of the batch"),
        (lambda ctx: replace(cross_entropy(ctx), value=-cross_entropy(ctx).value), "when descended on one batch"),
        (changed(lambda ctx, loss: replace(loss, value=loss.value.detach())), "without a graph"),
        (changed(lambda ctx, loss: replace(loss, value=loss.value * torch.ones(3))), r"shape \(3,\)"),
        (changed(lambda ctx, loss: replace(loss, logits=loss.logits.flip(0))), "in another order than the batch"),
        (changed(lambda ctx, loss: replace(loss, logits=loss.logits[:1])), r"logits \(1, 3\) for 24 inputs"),
        (changed(lambda ctx, loss: replace(loss, metrics={"a": loss.value})), "metrics that are no finite floats: a"),
    ],
)
def test_a_wrong_objective_is_caught(objective: Callable[[StepContext], Loss], said: str) -> None:
    check_objective(cross_entropy)
    with pytest.raises(AssertionError, match=said):
        check_objective(objective)


@dataclass(frozen=True)
class Altered:
    """Digits with something wrong."""

    change: Callable[[Split], Split]

    def load(self, part: Any) -> Split:
        return self.change(open_dataset("digits").load(part))


class Unsteady(TensorPixels):
    def read(self, rows: Tensor) -> Tensor:
        return super().read(rows) * torch.rand(1)


def described(**changes: Any) -> Callable[[Split], Split]:
    return lambda split: replace(split, info=replace(split.info, **changes))


def pictured(change: Callable[[Tensor], Tensor]) -> Callable[[Split], Split]:
    return lambda split: replace(split, pixels=TensorPixels(change(split.images(slice(None)))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda split: split.take(split.labels.argsort()), "ids of a whole part"),
        (lambda split: replace(split, labels=split.labels.sort().values), "are one class"),
        (lambda split: replace(split, labels=split.labels.clamp(max=8)), r"of the classes \[9\]"),
        (lambda split: replace(split, labels=split.labels + 1), r"not all in 0\.\.9"),
        (lambda split: replace(split, labels=split.labels.int()), "labels are torch.int32"),
        (lambda split: replace(split, part="train"), "calls its part 'test' 'train'"),
        (described(mean=(0.1, 0.2)), "is not one value for each of 1 channels"),
        (described(std=(0.0,)), "divides by zero"),
        (described(classes=("a",) * 10), "have one name"),
        (described(shape=(1, 8, 9)), r"not \(256, 1, 8, 9\)"),
        (pictured(lambda x: x * 255), "not within"),
        (pictured(torch.Tensor.double), "torch.float64"),
        (pictured(torch.zeros_like), "all pixels are equal"),
        (lambda split: replace(split, pixels=Unsteady(split.images(slice(None)))), "different pixels"),
        (pictured(lambda x: x * torch.rand(1)), "two content hashes"),
    ],
)
def test_a_wrong_dataset_is_caught(change: Callable[[Split], Split], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_dataset(Altered(change), "test")


class Net(nn.Module):
    """A linear net that can be spoilt by a function on its inputs."""

    def __init__(self, shape: Shape, num_classes: int, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.flat, self.spoil = nn.Linear(int(np.prod(shape)), num_classes), spoil

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.spoil(x).flatten(1))


@dataclass(frozen=True)
class Spoilt:
    spoil: Callable[[Tensor], Tensor]

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        return Net(shape, num_classes, self.spoil)


class Once(Spoilt):
    """Builds one network for ever."""

    nets: dict[object, nn.Module] = {}  # noqa: RUF012

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        return self.nets.setdefault((shape, num_classes), super().build(shape, num_classes))


class Unseeded(Spoilt):
    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        net = super().build(shape, num_classes)
        nn.init.normal_(net.flat.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(net.flat.bias)
        return net


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        (Spoilt(lambda x: x - x.mean(0)), "other images of a batch"),
        (Spoilt(nn.functional.dropout), "torch's global generator"),
        (Spoilt(lambda x: x * torch.tensor([1.0, 0.0, 1.0]).view(-1, 1, 1) if x.shape[1] == 3 else x), "input channel"),
        (Once(lambda x: x), "ignores the seed"),
        (Unseeded(lambda x: x), "ignores the seed"),
    ],
)
def test_a_wrong_architecture_is_caught(architecture: Spoilt, said: str) -> None:
    check_architecture(Spoilt(lambda x: x))
    with pytest.raises(AssertionError, match=said):
        check_architecture(architecture)


def test_examples_are_the_class_attribute_or_the_defaults() -> None:
    assert [params["component"] for params in examples(ATTACKS, "autoattack")] == [
        "apgd-ce",
        "apgd-dlr",
        "apgd-t",
        "fab",
        "fab-t",
        "square",
    ]
    assert examples(ATTACKS, "pgd") == ({},)
