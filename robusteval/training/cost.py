"""What one training step costs, counted rather than declared, so that any objective can be asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robusteval.training.loop import begin
from robusteval.training.parallel import ALONE
from robusteval.training.plan import Plan
from robusteval.training.step import train_step

SAMPLES = 8


@dataclass
class Passes:
    """Network passes of a batch: ``forward`` ones, and ``backward`` ones through the whole network.

    Bounds are none: intervals cost about as much as two, and finding BatchNorm's statistics for them one more.
    """

    forward: int = 0
    backward: int = 0

    def watch(self, module: nn.Module, inputs: Any, logits: Tensor) -> None:
        """Count a forward pass, and later its backward pass (a forward hook)."""
        self.forward += 1
        if logits.requires_grad:
            logits.register_hook(self._back)  # type: ignore[no-untyped-call]

    def _back(self, grad: Tensor) -> None:
        self.backward += 1


def passes_per_step(plan: Plan) -> Passes:
    """Take the first step of the last epoch on a few samples with fresh weights, and count its passes."""
    alone = replace(plan, team=ALONE, config=plan.config.model_copy(update={"compile": False}))
    passes, state = Passes(), begin(alone)
    state.history = [{}] * (plan.config.epochs - 1)
    with torch.random.fork_rng(devices=[plan.device] if plan.device.type == "cuda" else []):
        for network in filter(None, (state.network, state.proxy)):
            network.register_forward_hook(passes.watch)
        state.model.train()
        train_step(alone, state, 0, torch.arange(min(SAMPLES, len(plan.train))))
    return passes
