"""Input-gradient norms, clean and under attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.analysis._points import Told, Values, nobody, walk
from robusteval.attacks._losses import margin_loss
from robusteval.datasets.base import Split
from robusteval.threat import Norm, ThreatModel

NORMS = ("ce_l1", "ce_l2", "margin_l1", "margin_l2")
FIELDS = ("margin", *NORMS)


@dataclass(frozen=True)
class Slopes:
    """How steep a model is at one point per sample; all (N,), float32 on the CPU, norms per unit of pixel value.

    ``margin`` is the logit margin there; ``ce_l1`` and ``ce_l2`` are norms of d CE / dx, ``margin_l1`` and
    ``margin_l2`` of d margin / dx.
    """

    margin: Tensor
    ce_l1: Tensor
    ce_l2: Tensor
    margin_l1: Tensor
    margin_l2: Tensor

    def distance(self, norm: Norm) -> Tensor | None:
        """(N,) pixel units: ``margin / ||d margin / dx||_dual``, where the boundary would be if the margin were linear.

        Negative for misclassified points; None for L1, whose dual norm is not measured.
        """
        dual = {Norm.LINF: self.margin_l1, Norm.L2: self.margin_l2}.get(norm)
        return None if dual is None else self.margin / dual.clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Gradients:
    """The slopes of one split's samples (ids and labels (N,) int64) at the clean inputs and at the PGD points."""

    ids: Tensor
    labels: Tensor
    clean: Slopes
    adversarial: Slopes


def measure(
    model: nn.Module,
    split: Split,
    threat: ThreatModel,
    *,
    steps: int = 20,
    seed: int = 0,
    batch: int = 256,
    told: Told = nobody,
) -> Gradients:
    """Return the input-gradient norms of ``model`` (inputs in [0,1], any device) on ``split``.

    The PGD points are those of `margins.measure` with the same arguments. The model's flags are left as found.
    """
    values = walk(model, split, threat, _look, steps, seed, batch, told)
    half = len(values) // 2
    return Gradients(split.ids, split.labels, Slopes(*values[:half]), Slopes(*values[half:]))


def slopes(model: nn.Module, x: Tensor, y: Tensor) -> Slopes:
    """Return margin and gradient norms at ``x`` (N, C, H, W) in [0,1] for labels ``y`` (N,)."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point).float()
        losses = (F.cross_entropy(logits, y, reduction="sum"), margin_loss(logits, y).sum())
    grads = [torch.autograd.grad(loss, point, retain_graph=True)[0].flatten(1) for loss in losses]
    norms = [torch.linalg.vector_norm(grad, ord=order, dim=1) for grad in grads for order in (1, 2)]
    return Slopes(-margin_loss(logits.detach(), y), *norms)


def _look(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Values:
    return tuple(getattr(at, name) for at in (slopes(model, x, y), slopes(model, x_adv, y)) for name in FIELDS)
