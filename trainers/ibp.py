"""Training on interval bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from robusteval.training.objective import StepContext

from ._checks import require_fraction
from ._ramped import Bounded, Ramped, between


@dataclass(frozen=True)
class IBP(Ramped):
    """IBP: cross-entropy on the worst logits that interval bounds allow (Gowal et al. 2018, arXiv 1810.12715).

    ``loss = mean_B [ kappa CE(z(x), y) + (1 - kappa) CE(worst, y) ]``, with worst logits as in
    `robusteval.training.bounds.Region`: the second term is an upper bound of the adversarial loss. kappa goes from
    ``kappa_start`` to ``kappa_end`` as the ball grows. Before it, clean cross-entropy is all there is.

    kappa from 1 to 1/2 are Gowal et al.'s; Shi et al. (2021, arXiv 2103.17268) set both to 0, with regularisation 0.5
    and the run's init "ibp", on networks with BatchNorm, and so train in a tenth of the epochs.
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"ramp": 0.9, "regularisation": 0.5, "l1": 1e-4})

    kappa_start: float = 1.0
    kappa_end: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("kappa_start", self.kappa_start)
        require_fraction("kappa_end", self.kappa_end)

    def robust(self, ctx: StepContext, clean: Tensor, radius: float, reached: float) -> Bounded:
        """Return the loss, and the worst logits: training accuracy is what intervals certify."""
        region, kappa = ctx.bounds(radius), between(self.kappa_start, self.kappa_end, reached)
        worst = region.by_intervals
        return Bounded(kappa * ctx.fit(clean) + (1 - kappa) * ctx.fit(worst), worst, region)
