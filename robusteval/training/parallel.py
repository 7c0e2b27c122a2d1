"""Data-parallel training under `torchrun`: every process works on its share of each batch.

Gradients are averaged by one plain all-reduce per step rather than by wrapping the model: ten of eleven passes belong
to the inner attack and need no communication, there is nothing to overlap, and an objective may call the model as
often as it likes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Its functions take the group of the moment when it is imported for a default. The first optimizer imports it, so it
# must come before any group: else the group outlives its end, and a thread of it can abort the process at its exit.
import torch.distributed.nn.functional
from torch import Tensor, nn

from robusteval.training.share import Share


@dataclass(frozen=True)
class Team:
    """The processes of a run; ``rank`` 0 leads: it alone writes files and talks."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, total: int) -> Share:
        """Return this process's part of a batch of ``total`` samples."""
        return Share(self.rank, self.size, total)

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean over the processes of each tensor, the same bits in all of them."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = torch.split_with_sizes(flat / self.size, [tensor.numel() for tensor in tensors])
        return [mean.view_as(tensor) for mean, tensor in zip(means, tensors, strict=True)]

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every parameter's gradient by its mean over the processes."""
        if self.size > 1:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            for gradient, mean in zip(gradients, self.average(gradients), strict=True):
                gradient.copy_(mean)

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Return the sums over the processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def agree(self, *models: nn.Module | None) -> None:
        """Give every process the leader's buffers, as BatchNorm's statistics differ between shares."""
        if self.size > 1:
            for buffer in (buffer for model in models if model is not None for buffer in model.buffers()):
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()


ALONE = Team()


def launched_team() -> Team:
    """Return the team that `torchrun` launched this process in, or a team of one."""
    if not dist.is_torchelastic_launched():
        return ALONE
    return Team(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def own_device(device: torch.device) -> torch.device:
    """Return this process's accelerator where ``device`` names no particular one."""
    if device.type != "cuda" or device.index is not None or not dist.is_torchelastic_launched():
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def connected(team: Team, device: torch.device) -> Iterator[None]:
    """Let the processes of ``team`` talk to each other; NCCL between GPUs, gloo between CPUs."""
    if team.size == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=team.rank, world_size=team.size)
    try:
        yield
    finally:
        dist.destroy_process_group()
