"""A model as training runs it: precision, memory format, compilation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robusteval.training.bounds import Running
from robusteval.training.config import TrainConfig


class Network(Running):
    """``model`` under the run's precision; logits come out in float32, or in float64 where the model is.

    With bfloat16 the layers run under autocast, while the weights, the loss, the softmax, rankings and the input
    gradients stay float32. bfloat16 has float32's range, so no gradient underflows and no loss is scaled.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, *, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.low = config.precision == "bfloat16"
        self.layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.run: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) for images (N, C, H, W) in [0,1]."""
        x = x.contiguous(memory_format=self.layout) if self.layout == torch.channels_last else x
        if not self.low:
            return self.run(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.run(x).float()


def prepared(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Convert the weights of ``model`` in place to the run's precision and memory format."""
    if config.precision == "float64":
        model.double()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return model
