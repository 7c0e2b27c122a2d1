"""The projected-gradient loop that both the PGD attack and adversarial training run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robusteval.threat import Norm, ThreatModel

Objective = Callable[[Tensor], Tensor]
"""Perturbed inputs (N, ...) -> the value to ascend, (N,)."""


def steepest(grad: Tensor, point: Tensor, threat: ThreatModel) -> Tensor:
    """Return the direction of length 1 in the threat's norm that ascends ``grad`` fastest.

    L1 moves equally the 5 % of coordinates with the largest gradient among those that the box [0,1] lets move
    (Tramer & Boneh 2019, arXiv 1904.13000).
    """
    if threat.norm is Norm.LINF:
        return grad.sign()
    flat = grad.flatten(1)
    if threat.norm is Norm.L2:
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp_min(1e-12)
        unit: Tensor = flat / length
        return unit.view_as(grad)
    count = max(1, flat.shape[1] // 20)
    stuck = ((point <= 0) & (grad < 0)) | ((point >= 1) & (grad > 0))
    flat = flat.masked_fill(stuck.flatten(1), 0.0)
    top = flat.abs().topk(count, dim=1).indices
    direction = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign())
    return (direction / count).view_as(grad)


def ascend(objective: Objective, x: Tensor, start: Tensor, threat: ThreatModel, steps: int, size: float) -> Tensor:
    """Take ``steps`` projected steepest-ascent steps of length ``size`` from ``start``; return the last point.

    Only the gradient with respect to the input is taken; clipping happens outside the graph.
    """
    point, project = start.detach(), threat.projector(x)
    for _ in range(steps):
        point = point.requires_grad_()
        with torch.enable_grad():
            value = objective(point).sum()
        (grad,) = torch.autograd.grad(value, point)
        point = point.detach()
        point = project(torch.add(point, steepest(grad, point, threat), alpha=size))
    return point
