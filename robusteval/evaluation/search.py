"""How attacks run the model while they search; what they find is decided in float32 by the model as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robusteval.report import Search


class Searched(nn.Module):
    """``model`` under autocast to bfloat16, compiled, or both."""

    def __init__(self, model: nn.Module, how: Search) -> None:
        super().__init__()
        self.low = how.precision == "bfloat16"
        self.model: Any = torch.compile(model, dynamic=True) if how.compiled else model
        self.eval()

    def forward(self, x: Tensor) -> Any:
        """Return the model's logits for images (N, C, H, W) in [0,1], in whatever precision they come."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.low):
            return self.model(x)


def searched(model: nn.Module, how: Search) -> nn.Module:
    """Return ``model`` as attacks see it."""
    return model if how == Search() else Searched(model, how)
