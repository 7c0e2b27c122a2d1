"""The whole test set as an attack left it: adversarial where a sample was broken, clean elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from robusteval.datasets.base import Split
from robusteval.errors import RobustevalError, UsageError
from robusteval.exports.base import Evaluation
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict


def adversarial_images(run: Evaluation, split: Split) -> Tensor:
    """Return (N, C, H, W) float32: the witness where the headline's verdict is broken, else the clean image.

    ``split`` holds the evaluated samples in order. Raises `UsageError` if it holds others, `RobustevalError` if a
    broken sample has no witness within eps of its image.
    """
    if split.content_hash != run.report.data.sha256:
        raise UsageError(f"the images of {split.info.title} found there are not the samples of the report.")
    threat = ThreatModel.parse(run.report.threat.norm, run.report.threat.eps)
    place = {number: row for row, number in enumerate(split.ids.tolist())}
    broken = {row.id for row in run.rows if row.verdict is Verdict.BROKEN}
    images = split.images(slice(None)).clone()
    for ids, x_adv in run.witnesses():
        # a run for several eps also keeps witnesses that lie beyond the headline's
        used = [number for number, sample in enumerate(ids) if sample in broken]
        rows = torch.tensor([place[ids[number]] for number in used], dtype=torch.int64)
        if not bool(threat.contains(images[rows], x_adv[used], run.report.threat.tolerance).all()):
            raise RobustevalError(f"a witness is not within {threat} of its clean image.")
        images[rows] = x_adv[used]
        broken -= {ids[number] for number in used}
    if broken:
        raise RobustevalError(f"sample {min(broken)} is broken, but no witness of it is stored.")
    return images
