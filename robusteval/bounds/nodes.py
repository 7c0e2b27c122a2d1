"""What a network's graph consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robusteval.bounds.activations import Activation
from robusteval.bounds.pooling import MaxPool
from robusteval.errors import RobustevalError

TRACED = 107
"""The batch size of a trace: one that no other dimension is likely to have, so that the batch is known by it."""


class UnsupportedError(RobustevalError):
    """The network does something that no bound is known for."""


@dataclass(frozen=True)
class Affine:
    """A map affine in all its inputs together, ``f(x) = W x + b``; ``magnitude`` computes ``|W| r``.

    ``adjoint`` computes ``W^T a`` for each input, given the shapes of the inputs for one sample.
    It is ``mixing`` if a value of the result may depend on several values of an input.
    """

    f: Callable[..., Tensor]
    magnitude: Callable[..., Tensor]
    adjoint: Callable[[Tensor, list[tuple[int, ...]]], tuple[Tensor, ...]]
    mixing: bool


@dataclass(frozen=True)
class Node:
    """A value of shape (N, *shape): the input, or what ``op`` makes of the nodes ``inputs``."""

    op: Affine | Activation | MaxPool | None
    inputs: tuple[int, ...]
    shape: tuple[int, ...]

    @cached_property
    def size(self) -> int:
        """Values per sample."""
        return torch.Size(self.shape).numel()

    @property
    def nonlinear(self) -> bool:
        """Whether the value is not affine in its inputs."""
        return isinstance(self.op, Activation | MaxPool)


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which each follows its inputs; the first is the input, the last the logits."""

    nodes: tuple[Node, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) that the graph computes, in the precision of ``x`` and its constants."""
        return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """Return the value of every node."""
        values: list[Tensor] = []
        for node in self.nodes:
            values.append(x if node.op is None else node.op.f(*(values[i] for i in node.inputs)))
        return values
