"""Bounds of the network that is being trained, with gradients to its parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from robusteval.bounds.ball import Ball
from robusteval.bounds.interval import Bounds, intervals
from robusteval.bounds.live import LiveTrace, owned, trace_live
from robusteval.bounds.margins import Problem, interval_margins, linear_margins
from robusteval.bounds.nodes import UnsupportedError
from robusteval.errors import UsageError


class Running(nn.Module):
    """A network that runs another, ``model``, in a way of its own; bounds are found of that one itself."""

    model: nn.Module


@dataclass(frozen=True)
class Region:
    """What a network can output over a ball; everything is attached to the graph of its parameters.

    *Worst logits* (N, K) are 0 for the label and an upper bound of ``z_k - z_y`` for every other class, so that their
    cross-entropy is an upper bound of the cross-entropy of every input in the ball.
    """

    problem: Problem

    @cached_property
    def bounds(self) -> list[Bounds]:
        """Bounds (N, *shape) of every node of the graph, by intervals."""
        return intervals(self.problem.graph, self.problem.ball)

    @cached_property
    def by_intervals(self) -> Tensor:
        """Worst logits by intervals, the last affine maps folded into the margins."""
        return self._worst(interval_margins(self.problem, self.bounds))

    @cached_property
    def by_planes(self) -> Tensor:
        """Worst logits by a pass backwards on planes that the interval bounds give."""
        return self._worst(linear_margins(self.problem, self.bounds))

    def _worst(self, margins: Tensor) -> Tensor:
        y = self.problem.y[:, None]
        classes = torch.arange(margins.shape[1] + 1, device=y.device).expand(len(y), -1)
        rivals = classes[classes != y].view(margins.shape)
        return margins.new_zeros(classes.shape).scatter(1, rivals, -margins)


@dataclass(frozen=True)
class Traces:
    """The traces of the networks of a run: a network is traced once, and only its weights change."""

    kept: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], LiveTrace]] = field(default_factory=WeakKeyDictionary)

    def region(self, model: nn.Module, ball: Ball, y: Tensor, clean: Tensor) -> Region:
        """Return what ``model`` can output over ``ball``, of labels ``y`` (N,).

        It is bounded in the precision of its weights, outside autocast, and in eval mode, but for each BatchNorm in
        training mode, which normalises by its statistics on the batch ``clean`` (M, C, H, W).
        """
        network = model.model if isinstance(model, Running) else model
        values = {**owned(network), **batch_statistics(network, clean)}
        graph = self._trace(network, ball.x).bind(values, ball.x.dtype)
        return Region(Problem(graph, ball, y))

    def _trace(self, network: nn.Module, x: Tensor) -> LiveTrace:
        like = (x.shape[1:], x.dtype, x.device)
        found = self.kept.get(network)
        if found is None or found[0] != like:
            try:
                found = self.kept[network] = (like, trace_live(network, x))
            except UnsupportedError as error:
                raise UsageError(f"this network cannot be trained on bounds: {error}.") from error
        return found[1]


def batch_statistics(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the mean and variance over ``x`` of each BatchNorm in training mode, by the name of the running one.

    They are attached to the graph of the parameters. Nothing of ``network`` changes, and other modules run in eval
    mode. Raises `UsageError` where a statistic would not be that of the batch.
    """
    norms = {name: part for name, part in network.named_modules() if isinstance(part, _BatchNorm) and part.training}
    found: dict[str, Tensor] = {}
    if not norms:
        return found
    if any(isinstance(part, nn.SyncBatchNorm) for part in norms.values()):
        raise UsageError("bounds in training do not know synchronised BatchNorm; train this objective on one GPU.")
    hooks = [part.register_forward_pre_hook(_Listener(name, found)) for name, part in norms.items()]
    try:
        with _only_training(network, set(norms.values())):
            functional_call(network, {name: buffer.clone() for name, buffer in network.named_buffers()}, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@dataclass(frozen=True)
class _Listener:
    """A hook that notes the statistics of what a BatchNorm is given."""

    name: str
    found: dict[str, Tensor]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        key = f"{self.name}." if self.name else ""
        if f"{key}running_mean" in self.found:
            raise UsageError(f"bounds in training need each BatchNorm to be used once; '{self.name}' is used twice.")
        dims = [dim for dim in range(inputs[0].dim()) if dim != 1]
        self.found[f"{key}running_mean"] = inputs[0].mean(dims)
        self.found[f"{key}running_var"] = inputs[0].var(dims, correction=0)


@contextmanager
def _only_training(network: nn.Module, chosen: Collection[nn.Module]) -> Iterator[None]:
    """Put all of ``network`` in eval mode but the modules ``chosen``; restore every flag."""
    modes = {part: part.training for part in network.modules()}
    for part in modes:
        part.training = part in chosen
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
