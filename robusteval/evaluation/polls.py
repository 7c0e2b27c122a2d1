"""What the smoothed classifier says of a sample, as far as votes show it."""

from __future__ import annotations

import torch
from torch import Tensor

from robusteval.evaluation.decide import Decision
from robusteval.evaluation.probe import Probe, failures
from robusteval.report import Poll, Smoothing
from robusteval.rng import SampleRng
from robusteval.smoothing import votes


def poll(probe: Probe, x: Tensor, y: Tensor, rng: SampleRng, smoothing: Smoothing, *purpose: str) -> Decision:
    """Ask noisy copies of ``x`` (N, C, H, W) with labels ``y``: some name each label's rival, fresh ones judge the two.

    The prediction is the class with most votes, the label where it ties. A sample is wrong only if the rival beats the
    label: g is argmax, not majority, so a label below one half is right as long as no other class has more. Raises
    `RobustevalError` on non-finite logits.
    """
    with failures("the model"):
        first = votes(probe, x, smoothing.sigma, smoothing.n0, rng, *purpose, "choose")
        said = votes(probe, x, smoothing.sigma, smoothing.n, rng, *purpose, "test")
    rival = first.scatter(1, y[:, None], -1).argmax(1)
    other = said.scatter(1, y[:, None], -1).argmax(1)
    columns = (_pick(said, y), other, _pick(said, other), rival, _pick(said, rival))
    polls = tuple(
        Poll(n=smoothing.n, label_votes=a, other=b, other_votes=c, rival=d, rival_votes=e)
        for a, b, c, d, e in zip(*(column.tolist() for column in columns), strict=True)
    )
    margin = torch.tensor([each.margin for each in polls], dtype=torch.float64, device=x.device)
    wrong = torch.tensor([each.wrong(smoothing.alpha) for each in polls], dtype=torch.bool, device=x.device)
    return Decision(torch.where(margin < 0, other, y), margin, wrong, polls)


def _pick(votes: Tensor, label: Tensor) -> Tensor:
    return votes.gather(1, label[:, None]).squeeze(1)
