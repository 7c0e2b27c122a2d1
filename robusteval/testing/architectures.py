"""The conformance suite of architectures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robusteval.errors import UsageError
from robusteval.models.base import Architecture, Classifier, Shape, check_fit
from robusteval.rng import generator
from robusteval.testing._purity import bits, require, untouched

USUAL: Shape = (3, 32, 32)
OTHERS: tuple[tuple[Shape, int], ...] = (((1, 8, 8), 10), ((1, 28, 28), 2), ((3, 64, 48), 5))


def check_architecture(architecture: Architecture) -> None:
    """Raise `AssertionError` unless ``architecture`` keeps the contract of `robusteval.models.base.Architecture`.

    Images of 3x32x32 it must take; other shapes it may refuse with a `UsageError`. Give it a small instance: a dozen
    networks are built and run.
    """
    _check_fits(architecture, USUAL, 10)
    for shape, classes in OTHERS:
        try:
            architecture.build(shape, classes)
        except UsageError:
            continue
        _check_fits(architecture, shape, classes)
    _check_weights(architecture)
    _check_eval(architecture)


def _build(architecture: Architecture, shape: Shape = USUAL, classes: int = 10, seed: int = 0) -> Classifier:
    mean, std = (0.4, 0.5, 0.45)[: shape[0]], (0.2, 0.25, 0.3)[: shape[0]]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Classifier(architecture.build(shape, classes), mean, std)


def _images(shape: Shape, count: int) -> Tensor:
    return torch.rand(count, *shape, generator=generator(0, "architecture"))


def _check_fits(architecture: Architecture, shape: Shape, classes: int) -> None:
    model = _build(architecture, shape, classes)
    check_fit(model, shape, classes, str(architecture))
    logits = model.train()(_images(shape, 3))
    require(logits.shape == (3, classes), f"{architecture} returns {tuple(logits.shape)} in training mode")
    require(logits.isfinite().all(), f"{architecture} returns NaN or infinite logits in training mode")


def _digest(module: nn.Module) -> list[tuple[str, bytes | None]]:
    return [(name, bits(value)) for name, value in module.state_dict().items()]


def _check_weights(architecture: Architecture) -> None:
    """Require that weights are fresh, drawn from the global generator alone, and absent on the meta device."""
    model = _build(architecture)
    require(sum(parameter.numel() for parameter in model.parameters()), f"{architecture} has no parameters")
    require(all(parameter.requires_grad for parameter in model.parameters()), f"{architecture} freezes parameters")
    require(_digest(model) == _digest(_build(architecture)), f"{architecture} draws other weights for the same seed")
    require(_digest(model) != _digest(_build(architecture, seed=1)), f"{architecture} ignores the seed")
    shared = {id(parameter) for parameter in model.parameters()} & {id(p) for p in _build(architecture).parameters()}
    require(not shared, f"{architecture} shares parameters between the networks it builds")
    with torch.device("meta"):
        skeleton = architecture.build(USUAL, 10)
    state = {name: (value.shape, value.dtype) for name, value in model.backbone.state_dict().items()}
    found = {name: (value.shape, value.dtype) for name, value in skeleton.state_dict().items()}
    require(found == state, f"{architecture} builds another network on the meta device")
    real = [name for name, value in skeleton.state_dict().items() if not value.is_meta]
    require(not real, f"{architecture} takes memory on the meta device: {real[:3]}")


def _check_eval(architecture: Architecture) -> None:
    """Require that, in eval mode, logits are a differentiable function of each image alone."""
    model, x = _build(architecture), _images(USUAL, 8)
    model.train()(x)  # BatchNorm statistics other than the initial ones
    model.eval()
    with untouched(str(architecture), model, x):
        logits = model(x).detach()
    require(torch.equal(logits, model(x)), f"{architecture} gives other logits the second time in eval mode")
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(point).logsumexp(1).sum(), point)
    require((gradient.abs().amax(dim=(2, 3)) > 0).all(), f"{architecture} hides an input channel from the gradient")
    double = model.double()(x.double()).detach()
    require(double.dtype == torch.float64, f"{architecture} returns {double.dtype} for float64 inputs")
    close = torch.allclose(logits.double(), double, rtol=1e-3, atol=1e-3)
    require(close, f"{architecture} disagrees with itself in float64 by {float((logits - double).abs().max()):.2g}")
    alone = torch.allclose(model(x[:1].double()), double[:1], rtol=1e-9, atol=1e-9)
    require(alone, f"{architecture} lets the other images of a batch change a sample's logits")
