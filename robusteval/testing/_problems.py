"""Tiny seeded classifiers whose robustness is known in closed form, or that are at least quick to attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusteval.models.base import Classifier, frozen
from robusteval.rng import SampleRng, derive_seed, generator
from robusteval.threat import Norm, ThreatModel

SHAPE = (3, 8, 8)
THREATS = tuple(
    ThreatModel.parse(norm, eps) for norm, eps in (("Linf", "0.05"), ("L2", "0.4"), ("L1", "0.4"), ("L0", "10"))
)
_DUAL = {Norm.LINF: 1.0, Norm.L2: 2.0, Norm.L1: math.inf}


@dataclass(frozen=True)
class Problem:
    """A frozen model in eval mode with inputs that it classifies as ``y``."""

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: ThreatModel

    @property
    def rng(self) -> SampleRng:
        """The randomness a harness would give; the same at each call."""
        return SampleRng(0, tuple(range(100, 100 + len(self.x))), derive_seed(0, "batch"))

    def first(self, count: int) -> Problem:
        """Return the problem of the first ``count`` samples."""
        return Problem(self.model, self.x[:count], self.y[:count], self.threat)

    def predict(self, x: Tensor) -> Tensor:
        """Return the predicted classes (N,)."""
        with torch.no_grad():
            prediction: Tensor = self.model(x).argmax(1)
        return prediction


def classifier(weight: Tensor, bias: Tensor | None = None) -> Classifier:
    """Return ``z(x) = weight (x - 1/2) + bias`` for images of `SHAPE`, frozen."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias.clone(), requires_grad=False)
    return Classifier(nn.Sequential(nn.Flatten(), layer), (0.5,) * 3, (1.0,) * 3).eval()


def _blocks(count: int, rng: torch.Generator) -> Tensor:
    """Draw sign patterns (count, C*H*W), constant on 4x4 blocks so that random search finds its way too."""
    signs = torch.randint(0, 2, (count, SHAPE[0], 2, 2), generator=rng) * 2.0 - 1
    return signs.repeat_interleave(4, 2).repeat_interleave(4, 3).flatten(1)


def linear(threat: ThreatModel, classes: int, factors: Sequence[float]) -> Problem:
    """Return a linear classifier and inputs whose distance to its decision boundary is ``factors`` times eps.

    All logits are equal at the grey image, so distances grow in proportion with the distance from it. The box is
    out of reach, except in L0, where it alone bounds what a changed value can do.
    """
    rng = generator(0, "linear problem", classes)
    patterns = _blocks(classes, rng)
    weight = patterns * (0.8 + 0.4 * torch.rand(patterns.shape, generator=rng))
    model, y = classifier(weight), torch.arange(len(factors)) % classes
    ray = 0.2 * weight[y] + 0.05 * torch.rand(len(y), weight.shape[1], generator=rng)
    wanted = torch.tensor(factors, dtype=torch.float64) * threat.radius
    if threat.norm is Norm.L0:
        length = _l0_lengths(model, ray, y, wanted.ceil())
    else:
        unit = boundary_distance(model, 0.5 + ray.view(-1, *SHAPE), y, threat.norm)
        length = (wanted / unit).float()
    return Problem(model, (0.5 + ray * length[:, None]).view(-1, *SHAPE), y, threat)


def _l0_lengths(model: Classifier, ray: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
    """Return how far along ``ray`` (N, D) the L0 distance to the boundary becomes ``wanted`` (N,)."""
    low, high = torch.zeros(len(y)), torch.full((len(y),), 2.0)
    for _ in range(30):
        middle = (low + high) / 2
        x = (0.5 + ray * middle[:, None]).view(-1, *SHAPE)
        short = fewest_changes(model, x, y) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return high


def fewest_changes(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """Return how many values must at least change within [0,1] for a linear model to err, (N,); inf where none do."""
    weight, flat = next(model.backbone.parameters()).double(), x.double().flatten(1)
    logits = (flat - 0.5) @ weight.T
    gap = logits.gather(1, y[:, None]) - logits
    slope = weight[None] - weight[y][:, None]
    gains = torch.where(slope > 0, slope * (1 - flat)[:, None], -slope * flat[:, None])
    reached = gains.sort(dim=2, descending=True).values.cumsum(2) > gap[..., None]
    counts = torch.where(reached.any(2), (~reached).sum(2) + 1.0, torch.inf)
    fewest: Tensor = counts.scatter(1, y[:, None], torch.inf).min(1).values.double()
    return fewest


def boundary_distance(model: Classifier, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """Return ``min_k (z_y - z_k) / ||w_y - w_k||_q`` (N,), float64: a linear model's exact robustness off the box."""
    weight = next(model.backbone.parameters()).double()
    logits = (x.double().flatten(1) - 0.5) @ weight.T
    gap = logits.gather(1, y[:, None]) - logits
    slope = torch.linalg.vector_norm(weight[y][:, None] - weight[None], ord=_DUAL[norm], dim=2)
    nearest: Tensor = (gap / slope).scatter(1, y[:, None], torch.inf).min(1).values
    return nearest


def corner(threat: ThreatModel, factor: float, count: int = 8) -> Problem:
    """Return black-and-white inputs at ``factor`` times eps from the boundary, within the box.

    Class 0 beats class 1 by ``s (x - 1/2) - b`` with signs s. Seven eighths of the pixels (m) sit on the side of the
    box that favours class 0, so the adversary can lower it by eps m, eps sqrt(m) or eps (Linf, L2, L1 and L0) and no
    more.
    """
    rng = generator(0, "corner problem")
    signs = _blocks(1, rng)[0]
    size = len(signs)
    against = torch.stack([torch.randperm(size, generator=rng) < size // 8 for _ in range(count)])
    x = torch.where(against, -signs, signs).add(1).div(2).view(-1, *SHAPE)
    free = size - size // 8
    reach = threat.radius * {Norm.LINF: free, Norm.L2: math.sqrt(free), Norm.L1: 1.0, Norm.L0: 1.0}[threat.norm]
    gap = free / 2 - (size - free) / 2
    weight = torch.stack([signs / 2, -signs / 2, torch.zeros(size)])
    bias = torch.tensor([factor * reach - gap, 0.0, -100.0])
    return Problem(classifier(weight, bias), x, torch.zeros(count, dtype=torch.long), threat)


def relu_net(threat: ThreatModel, count: int = 32) -> Problem:
    """Return a random convolutional ReLU net with the classes it predicts for random inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(0, "relu net"))
        layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    model = Classifier(layers, (0.5,) * 3, (0.25,) * 3).eval().requires_grad_(False)
    x = torch.rand(count, *SHAPE, generator=generator(0, "relu net inputs"))
    with torch.no_grad(), frozen(model):
        y = model(x).argmax(1)
    return Problem(model, x, y, threat)
