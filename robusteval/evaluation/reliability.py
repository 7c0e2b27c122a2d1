"""Do the model's gradients exist, and do they lead anywhere? Short attacks whose outcome on an honest model is known.

Each sign by itself may have another cause; together they name a model whose robustness may be an artefact of masked
gradients (Athalye et al. 2018, arXiv 1802.00420; Carlini et al. 2019, arXiv 1902.06705).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from robusteval.attacks._losses import cross_entropy, margin_loss
from robusteval.attacks._steps import ascend
from robusteval.attacks.apgd import APGD
from robusteval.attacks.square import Square
from robusteval.evaluation.probe import OutOfMemoryError
from robusteval.models.base import summary
from robusteval.report import Finding, Severity
from robusteval.rng import SampleRng, generator
from robusteval.threat import Norm, ThreatModel

SAMPLES, STEPS, QUERIES, LARGER = 32, 20, 100, (10.0, 3.0)
FEW = 0.1
"""Share of an honest model's samples that may show a sign: PGD sticks in a local optimum now and then."""

LED_ASTRAY = "larger-balls-break-more"
"""No sign of a defence by itself: ordinary nets trained in Linf show it in L2 (docs/results/speed.md)."""

ADVICE = {
    "loss-does-not-increase": "Gradient attacks do not get going; look for quantisation, saturation or cut gradients.",
    "large-eps-survivors": "In so large a ball every input is adversarial for some sample; the search is led astray.",
    "rises-with-eps": "A larger ball holds the smaller one, so the attack fails in it; try more steps and restarts.",
    LED_ASTRAY: "AutoAttack begins within eps and may overstate it; add suite `rapid` in L2, `apgd` with `shrink`.",
    "black-box-beats-white-box": "What needs no gradients should not win; believe score- and decision-based attacks.",
    "masked-gradients": "Believe only attacks that do not follow its gradients, and adapt the attack to the defence.",
    "no-gradient": "Gradient attacks would prove nothing; use a suite of score- or decision-based ones.",
    "non-finite-gradients": "Gradient attacks cannot move there; make the model differentiable or use other attacks.",
    "zero-gradients": "Robustness may be an artefact of vanishing gradients (Carlini et al. 2019, arXiv 1902.06705).",
    "saturated-loss": "Attacks on cross-entropy stand still there; those on margins or DLR do not.",
}


def gradient_findings(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, randomised: bool) -> list[Finding]:
    """Return the findings on input gradients at ``x`` (N, C, H, W) and near by, and the `signs` that they are masked.

    Of a ``randomised`` model, whose outcomes are luck, there are no signs. A model that fails while a gradient is taken
    has none: attacks without gradients can still judge it.
    """
    found: dict[str, Finding] = {}
    try:
        for points in (x, threat.sample(x, generator(0, "preflight"))):
            for finding in _input_gradient(model, points, y):
                found.setdefault(finding.name, finding)
        if not randomised and "no-gradient" not in found:
            found |= {finding.name: finding for finding in signs(model, x, y, threat)}
    except _NoGradientError as error:
        found["no-gradient"] = _finding("no-gradient", f"The model's input gradient cannot be taken: {error}", "error")
    return list(found.values())


class _NoGradientError(Exception):
    """Taking a gradient failed."""


@contextmanager
def _differentiating() -> Iterator[None]:
    """Turn what a model or autograd raises where a gradient is taken into `_NoGradientError`; memory is another matter.

    Without a gradient the model has worked by then.
    """
    try:
        yield
    except (OutOfMemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _NoGradientError(summary(error)) from error


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Iterable[Finding]:
    size, saturated = _slope(model, x, y, margin_loss), _slope(model, x, y, cross_entropy)
    if size is None or saturated is None:
        message = "The model's output has no gradient with respect to its input (detached, no_grad or not in torch)."
        yield _finding("no-gradient", message, "error")
        return
    if not size.isfinite().all():
        count = int((~size.isfinite()).sum())
        message = f"The input gradient is NaN or infinite on {count} of {len(x)} samples."
        yield _finding("non-finite-gradients", message, "error")
    zero = int((size == 0).sum())
    if zero:
        yield _finding("zero-gradients", f"The input gradient is exactly zero on {zero} of {len(x)} samples.")
    flat = int(((saturated == 0) & (size != 0)).sum())
    if flat:
        lost = f"The gradient of cross-entropy vanishes in float32 on {flat} of {len(x)} samples"
        yield _finding("saturated-loss", f"{lost}, that of the margin not.", "info")


def _slope(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """Return the L1 norms (N,) of the gradients of ``loss`` at ``x``, None where there is no gradient to take."""
    point = x.clone().requires_grad_()
    with _differentiating(), torch.enable_grad():
        value = loss(model(point), y).sum()
        grad = torch.autograd.grad(value, point, allow_unused=True)[0] if value.requires_grad else None
    return None if grad is None else grad.flatten(1).abs().sum(1)


@dataclass(frozen=True)
class _Trial:
    """The samples that the model gets right, and how their margin losses fare."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self, point: Tensor) -> Tensor:
        value: Tensor = margin_loss(self.model(point), self.y)
        return value

    def climb(self, threat: ThreatModel, steps: int, size: float) -> Tensor:
        """Return the margin losses at the end of a PGD from the clean inputs, ``size`` in units of eps."""
        with _differentiating():
            end = ascend(self.loss, self.x, self.x, threat, steps, size * threat.radius)
        with torch.no_grad():
            return self.loss(threat.hold(self.x, end)).nan_to_num(nan=-torch.inf)  # NaN has led nowhere

    def apgd(self, threat: ThreatModel, shrink: tuple[float, ...] | bool) -> Tensor:
        """Return the margin losses at the end of an APGD of as many steps."""
        attack = APGD(STEPS, loss="margin", shrink=shrink)
        with _differentiating():
            found = attack(self.model, self.x, self.y, threat, _rng(len(self.x))).candidates
        with torch.no_grad():
            return self.loss(found).nan_to_num(nan=-torch.inf)

    def many(self, samples: Tensor) -> bool:
        """Whether a mask marks more samples than chance would: two standard deviations beyond a share of `FEW`."""
        expected = FEW * len(samples)
        return int(samples.sum()) > max(1.0, expected + 2 * math.sqrt(expected * (1 - FEW)))


def signs(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> list[Finding]:
    """Return a finding for every sign that attacks are led astray, and one that names a model that masks its gradients.

    ``x`` (N, C, H, W) and ``y`` (N,) are the first samples, of which up to `SAMPLES` that ``model`` gets right are
    tried. Needs input gradients and a convex ball; returns nothing where there are none.
    """
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:SAMPLES]
    if not threat.convex or not len(right):
        return []
    trial = _Trial(model, x[right], y[right])
    found = [_finding(name, message) for name, message in _signs(trial, threat)]
    masked = [finding for finding in found if finding.name != LED_ASTRAY]
    return [*found, _suspect(masked)] if masked else found


def _signs(trial: _Trial, threat: ThreatModel) -> Iterator[tuple[str, str]]:
    with torch.no_grad():
        before = trial.loss(trial.x)
    after = trial.climb(threat, STEPS, 0.25)
    count = len(trial.x)
    stuck = after <= before
    if trial.many(stuck):
        message = f"PGD on the margin does not raise the loss of {int(stuck.sum())} of {count} samples at all."
        yield "loss-does-not-increase", message
    whole = trial.climb(_whole_box(threat, trial.x), 2 * STEPS, 1 / STEPS)
    if trial.many(whole < 0):
        yield (
            "large-eps-survivors",
            f"PGD over the whole input range leaves {int((whole < 0).sum())} of {count} samples.",
        )
    wider = trial.climb(_times(threat, 4), STEPS, 0.25)
    if trial.many((wider < 0) & (after >= 0)):
        rises = int(((wider < 0) & (after >= 0)).sum())
        yield "rises-with-eps", f"PGD breaks {rises} of {count} samples at eps {threat.label} but not at 4 times that."
    if threat.norm in (Norm.LINF, Norm.L2):  # in L1 every APGD begins in larger balls
        inside, outside = (trial.apgd(threat, shrink) for shrink in (False, LARGER))
        only = (outside >= 0) & (inside < 0) & (after < 0)
        if trial.many(only):
            balls = " and ".join(f"{factor:g}" for factor in LARGER)
            found = f"APGD breaks {int(only.sum())} of {count} samples only if it begins in balls of {balls} times eps"
            yield LED_ASTRAY, f"{found}: gradients near the inputs mislead."
    searched = Square(queries=QUERIES)(trial.model, trial.x, trial.y, threat, _rng(count)).candidates
    with torch.no_grad():
        only = (trial.loss(searched) >= 0) & (after < 0)
    if trial.many(only):
        message = f"Square with {QUERIES} queries breaks {int(only.sum())} of {count} samples that PGD does not."
        yield "black-box-beats-white-box", message


def _rng(count: int) -> SampleRng:
    return SampleRng(0, tuple(range(count)), 0)


def _times(threat: ThreatModel, factor: int) -> ThreatModel:
    eps = threat.eps * factor
    return replace(threat, eps=min(eps, Fraction(1)) if threat.norm is Norm.LINF else eps)


def _whole_box(threat: ThreatModel, x: Tensor) -> ThreatModel:
    """Return the threat model whose ball around any input holds all of [0,1]^d."""
    size = x[0].numel()
    reach = {Norm.LINF: 1, Norm.L2: math.isqrt(size) + 1, Norm.L1: size}[threat.norm]
    return replace(threat, eps=Fraction(reach), label=str(reach))


def _finding(name: str, message: str, severity: Severity = "warning") -> Finding:
    return Finding(name=name, severity=severity, origin="robusteval", message=message, advice=ADVICE[name])


def _suspect(found: list[Finding]) -> Finding:
    names = ", ".join(finding.name for finding in found)
    message = f"SUSPECT: the model seems to mask its gradients ({names}); its robust accuracy may be an artefact."
    return _finding("masked-gradients", message)
