"""Max-margin adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusteval.errors import UsageError
from robusteval.threat import Norm
from robusteval.training.objective import Loss, StepContext

from ._anpgd import Crossing, bisect, climb
from ._checks import require_fraction, require_positive, require_steps
from ._losses import soft_margin


@dataclass(frozen=True)
class MMA:
    """MMA: cross-entropy on each sample's own decision boundary (Ding et al., ICLR 2020, arXiv 1812.02637).

    With the soft margin ``slm = logsumexp_{k != y} z_k - z_y`` and ``d`` the distance to where it is 0::

        loss = mean_B [ c CE(x) + (1 - c) * { CE(x + d u)  if slm(x) < 0 and d < d_max
                                              0            if slm(x) < 0 and d >= d_max
                                              CE(x)        else } ]

    AN-PGD finds ``u`` and ``d``: ``steps`` steps of projected ascent on slm within the distance found in the last
    epoch (at least ``d_min``, which it is in the first) give the direction, and ``halvings`` of [0, 1.05 d_max]
    the crossing on that ray, clipped to [0,1]. Whether slm(x) < 0 is judged in training mode; the search is in the
    attack's mode and is a constant. The adversary's start, steps and step size do not apply. Linf and L2 only.

    ``d_max`` and ``d_min`` are in units of eps: the official 32/255 and 0.005 at 8/255. c, steps and halvings are
    official. The state ``eps`` holds each sample's last distance, found on another crop where training augments.
    Unlike the official code, the search also runs on samples that are wrong at x, and no statistics of BatchNorm move
    during it unless adversary.bn_mode is "train".

    NOT confirmed: the radius of the first epoch, the distance kept for samples that are wrong, and which end of the
    last bracket is d (here the far one).
    """

    d_max: float = 4.0
    d_min: float = 0.16
    c: float = 1 / 3
    steps: int = 10
    halvings: int = 10

    def __post_init__(self) -> None:
        require_positive("d_max", self.d_max)
        require_positive("d_min", self.d_min)
        require_fraction("c", self.c)
        require_steps("steps", self.steps)
        require_steps("halvings", self.halvings)

    def __call__(self, ctx: StepContext) -> Loss:
        """Return the loss of one batch; ``distance`` is the mean distance found, in units of eps."""
        if ctx.threat.norm is Norm.L1:
            raise UsageError(f"objective 'mma' finds margins in Linf and L2, not in {ctx.threat.norm.value}.")
        stored = ctx.per_sample("eps", 0.0)
        found = ctx.attack.run(lambda model: self._search(ctx, model, stored[ctx.ids]))
        stored[ctx.gather(ctx.ids)] = ctx.gather(found.distance).to(stored.dtype)
        clean, logits = ctx.model(ctx.x), ctx.model(found.points)
        return self._loss(ctx, clean, logits, found.distance)

    def _search(self, ctx: StepContext, model: nn.Module, last: Tensor) -> Crossing:
        threat, x = ctx.threat, ctx.x

        def margin(point: Tensor) -> Tensor:
            return soft_margin(model(point), ctx.y)

        radius = last.to(x.dtype).clamp_min(self.d_min * threat.radius)
        scale = (radius / threat.radius).view(-1, *[1] * (x.dim() - 1))
        start = (x + scale * (ctx.draw(threat.sample) - x)).clamp(0.0, 1.0)  # uniform, up to the clipping at eps
        towards = climb(margin, x, start, threat, radius, self.steps)
        return bisect(margin, x, towards, threat, 1.05 * self.d_max * threat.radius, self.halvings)

    def _loss(self, ctx: StepContext, clean: Tensor, logits: Tensor, distance: Tensor) -> Loss:
        right = soft_margin(clean.detach(), ctx.y) < 0
        near = distance < self.d_max * ctx.threat.radius
        outside = ctx.fit(clean)
        inside = torch.where(right, near * ctx.fit(logits), outside)
        metrics = {
            "distance": float(ctx.gather(distance).mean()) / ctx.threat.radius,
            "near": float(ctx.gather((right & near).to(distance.dtype)).mean()),
        }
        return Loss((self.c * outside + (1 - self.c) * inside).mean(), logits, metrics)
