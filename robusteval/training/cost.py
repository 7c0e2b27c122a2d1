"""What one training step costs, counted rather than declared, so that any objective can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robusteval.rng import generator
from robusteval.training.objective import StepContext
from robusteval.training.plan import Plan

SAMPLES = 8


@dataclass
class Passes:
    """Network passes of a batch: ``forward`` ones, and ``backward`` ones through the whole network."""

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
    """Take one step's loss and gradient on a few training samples with fresh weights, and count the passes."""
    passes, model = Passes(), plan.build_model().train()
    rows = torch.arange(min(SAMPLES, len(plan.train)))
    x = plan.train.images(rows).to(plan.device)
    attack = plan.config.adversary.bind(model, x, plan.threat, generator(0, "cost"))
    with torch.random.fork_rng(devices=[plan.device] if plan.device.type == "cuda" else []):
        hook = model.register_forward_hook(passes.watch)
        loss = plan.objective(
            StepContext(
                model=model,
                x=x,
                y=plan.train.labels[rows].to(plan.device),
                ids=plan.train.ids[rows].to(plan.device),
                threat=plan.threat,
                attack=attack,
                rng=generator(0, "cost objective"),
                progress=0.5,
                population=plan.population,
            )
        )
        loss.value.backward()  # type: ignore[no-untyped-call]
        hook.remove()
    return passes
