"""The model as attacks see it: counted, split to fit the device, float32 in and out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robusteval.errors import RobustevalError
from robusteval.evaluation.config import MIN_BATCH
from robusteval.evaluation.search import searched
from robusteval.models.base import summary
from robusteval.report import Search

EXACT = Search()


class OutOfMemoryError(RobustevalError):
    """The device has too little memory for what was asked of it."""


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Turn any error of foreign code (a model, an attack library) into one sentence about ``what``."""
    try:
        yield
    except RobustevalError:
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"{what} ran out of memory; try a smaller --batch-size.") from error
    except Exception as error:
        raise RobustevalError(f"{what} failed: {summary(error)}") from error


def pieces(x: Tensor, size: int) -> Sequence[Tensor]:
    """Return images ``x`` (N, ...), N > 0, in nearly equal pieces of at most ``size``."""
    return torch.tensor_split(x, -(-len(x) // size))


@dataclass(frozen=True)
class Passes:
    """Images sent forward and backward through the network so far.

    ``zero`` and ``non_finite`` of the backward ones came back with an input gradient of zero, though that of the logits
    was none, or of NaN or infinity.
    """

    forward: int = 0
    backward: int = 0
    zero: int = 0
    non_finite: int = 0


class Probe(nn.Module):
    """Wraps a model; one image through it counts one forward pass, one gradient one backward pass.

    A batch above ``batch_size`` is run in equal pieces that are recomputed in the backward pass, so that
    memory stays bounded. What is less than `MIN_BATCH` is filled up, uncounted, so that neither ``batch_size`` nor
    how many samples are still under attack can change a logit; not so for a black box, which is asked nothing in vain.
    Within `searching` it is asked as ``how`` says; ``exact`` is whether that makes no difference.
    """

    def __init__(self, model: nn.Module, batch_size: int, how: Search = EXACT) -> None:
        super().__init__()
        self.model, self.exact = model, how == EXACT
        self._asked, self._search = model, searched(model, how)
        self.batch_size = batch_size
        self._forward = self._backward = 0
        self._odd: Tensor | None = None  # gradients that are zero or not finite, counted on the device
        self.eval()

    @property
    def passes(self) -> Passes:
        """What went through so far; waits for the device, so not to be read at every step."""
        zero, non_finite = (0, 0) if self._odd is None else self._odd.tolist()
        return Passes(self._forward, self._backward, zero, non_finite)

    @contextmanager
    def searching(self) -> Iterator[Probe]:
        """Answer as attacks are to see the model."""
        self._asked = self._search
        try:
            yield self
        finally:
            self._asked = self.model

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 logits (N, K) for images (N, C, H, W) in [0,1]."""
        self._forward += len(x)
        asked: list[Tensor] = []
        if x.requires_grad:
            x = x.view_as(x)  # a hook on the caller's own tensor would outlive this call
            x.register_hook(lambda grad: self._look_at(grad, asked))  # type: ignore[no-untyped-call]
        logits = self._split(x) if len(x) > self.batch_size else self._filled(x)
        if logits.requires_grad:
            logits.register_hook(lambda grad: self._count_backward(grad, asked))  # type: ignore[no-untyped-call]
        return logits

    def _count_backward(self, grad: Tensor, asked: list[Tensor]) -> None:
        self._backward += len(grad)
        asked.append(grad.detach().abs().amax(1) > 0)

    def _look_at(self, grad: Tensor | None, asked: list[Tensor]) -> None:
        """Count what came back; a loss that asks nothing of the logits gets nothing from the model."""
        if grad is None:  # the model's own backward says so, and whoever asked for the gradient sees it
            return
        size = grad.detach().flatten(1).abs().amax(1)
        odd = torch.stack([(size == 0) & asked.pop(), ~size.isfinite()]).sum(1)
        self._odd = odd if self._odd is None else self._odd + odd

    def _call(self, x: Tensor) -> Tensor:
        logits: Any = self._asked(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise RobustevalError(f"the model returns {shape} for {len(x)} inputs; expected ({len(x)}, classes).")
        return logits.float()

    def _filled(self, x: Tensor) -> Tensor:
        missing = MIN_BATCH - len(x)
        if missing <= 0 or len(x) == 0 or not getattr(self.model, "batched", True):
            return self._call(x)
        return self._call(torch.cat([x, x[:1].detach().expand(missing, *x.shape[1:])]))[: len(x)]

    def _split(self, x: Tensor) -> Tensor:
        return torch.cat([self._piece(piece) for piece in pieces(x, self.batch_size)])

    def _piece(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            logits: Tensor = checkpoint(self._filled, x, use_reentrant=False, preserve_rng_state=False)
            return logits
        return self._filled(x)
