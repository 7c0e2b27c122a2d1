"""What a model is: a classifier on inputs in [0,1] that owns its normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robusteval.errors import RobustevalError

Shape = tuple[int, int, int]


class Architecture(Protocol):
    """An architecture plug-in: a frozen dataclass of hyper-parameters that builds networks."""

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        """Return a fresh network from normalised images (N, *shape) to logits (N, num_classes).

        Raises `UsageError` when the architecture cannot take inputs of this shape. It must also work under
        ``torch.device("meta")``: stored weights are compared with the meta network before memory is taken.
        """
        ...


class Classifier(nn.Module):
    """``x in [0,1] -> backbone((x - mean) / std)``; mean and std are buffers, saved with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) for images (N, C, H, W) in [0,1]."""
        logits: Tensor = self.backbone((x - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be evaluated, with the facts a report states about it.

    ``module`` maps (N, C, H, W) in [0,1] to logits. ``num_classes`` and ``shape`` are None when the source
    does not say. ``training`` holds the facts of the training run, where there was one.
    """

    module: nn.Module
    name: str
    source: str
    architecture: str
    num_classes: int | None = None
    shape: Shape | None = None
    extra_data: bool | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


class Loader(Protocol):
    """A zoo plug-in, for specs ``<file name>:<rest>``: a frozen dataclass."""

    def load(self, rest: str, shape: Shape, num_classes: int) -> LoadedModel:
        """Load the model called ``rest``; raise `UsageError` or `RobustevalError` when it cannot."""
        ...


class _InFloat32(nn.Module):
    """A module of another precision as one that takes and returns float32."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x: Tensor) -> Any:
        """Return the module's logits; whatever else it returns is passed on."""
        logits = self.module(x.to(self.dtype))
        return logits.float() if isinstance(logits, Tensor) else logits


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Put ``module`` in eval mode with no parameter gradients; afterwards every flag is as it was found.

    A module whose weights have another precision than float32 is yielded as one that takes and returns float32.
    """
    modes = {part: part.training for part in module.modules()}
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    dtype = next((flag.dtype for flag in flags if flag.is_floating_point()), torch.float32)
    module.eval()
    for parameter in flags:
        parameter.requires_grad_(False)
    try:
        yield module if dtype is torch.float32 else _InFloat32(module, dtype).eval()
    finally:
        for part, mode in modes.items():
            part.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def check_fit(module: nn.Module, shape: Shape, num_classes: int, what: str) -> None:
    """Raise `RobustevalError` unless ``module`` gives two grey images ``num_classes`` finite logits each."""
    reference = next(module.parameters(), torch.zeros(1))
    blank = torch.full((2, *shape), 0.5, device=reference.device)
    with torch.no_grad(), frozen(module) as network:
        try:
            logits = network(blank)
        except Exception as error:  # the module may be anybody's code
            raise RobustevalError(f"{what} does not accept inputs of shape {shape}: {summary(error)}") from error
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != (2, num_classes):
        raise RobustevalError(f"{what} returns {got} for 2 inputs of shape {shape}; expected (2, {num_classes}).")
    if not logits.isfinite().all():
        raise RobustevalError(f"{what} returns NaN or infinite logits for a grey image, so it cannot be evaluated.")


def summary(error: BaseException) -> str:
    """Return the kind and the first line of an error from code that is not ours, ending in a full stop."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}." if lines else f"{type(error).__name__}."
