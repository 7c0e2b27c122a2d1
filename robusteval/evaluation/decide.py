"""What the model says of a sample: its one answer, or for a randomised model that of many fresh evaluations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robusteval.attacks._losses import margin_loss
from robusteval.errors import RobustevalError
from robusteval.evaluation.probe import Probe, failures
from robusteval.report import Poll, Repeat
from robusteval.rng import seeded


@dataclass(frozen=True)
class Decision:
    """Per sample (N,): predicted class, margin, and whether it is misclassified beyond doubt.

    ``margin`` is ``z_y - max_{k != y} z_k``; over repeated evaluations it is the share of right ones minus that of
    wrong ones. ``polls`` are the votes where the smoothed classifier decides, ``logits`` (N, K) what else decided.
    """

    prediction: Tensor
    margin: Tensor
    wrong: Tensor
    polls: tuple[Poll, ...] = ()
    logits: Tensor | None = None


def decide(probe: Probe, x: Tensor, y: Tensor, ids: Tensor, repeat: Repeat | None, seed: int) -> Decision:
    """Evaluate ``x`` (N, C, H, W) with labels ``y`` once, or as often as ``repeat`` says with fresh randomness.

    Repeated, the prediction is the label where most evaluations give it, else the most frequent other class, and a
    sample is wrong beyond doubt only if, with ``repeat.confidence``, more than half of all evaluations would err.
    ``seed`` is for models that draw from torch's global generator. Raises `RobustevalError` on non-finite logits.
    """
    with failures("the model"), torch.no_grad(), seeded(seed, x.device):
        logits = _finite(probe(x), ids)
        if repeat is None:
            prediction = logits.argmax(1)
            return Decision(prediction, -margin_loss(logits, y), prediction != y, logits=logits)
        votes = _vote(logits)
        for _ in range(repeat.evaluations - 1):
            votes += _vote(_finite(probe(x), ids))
    right = votes.gather(1, y[:, None]).squeeze(1)
    others = votes.scatter(1, y[:, None], -1).argmax(1)
    prediction = torch.where(2 * right > repeat.evaluations, y, others)
    margin = 2 * right.double() / repeat.evaluations - 1
    return Decision(prediction, margin, repeat.evaluations - right >= repeat.needed)


def _vote(logits: Tensor) -> Tensor:
    return F.one_hot(logits.argmax(1), logits.shape[1])


def _finite(logits: Tensor, ids: Tensor) -> Tensor:
    bad = ~logits.isfinite().all(1)
    if bad.any():
        sample = int(ids[bad.nonzero()[0, 0]])
        raise RobustevalError(f"the model returns NaN or infinite logits on sample {sample} or a perturbation of it.")
    return logits
