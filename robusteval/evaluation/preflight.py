"""Checks before the first attack: ours and AutoAttack's, returned as data.

A finding of severity "error" means that the numbers would be doubtful: the run stops unless it is allowed by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robusteval.attacks._losses import cross_entropy, margin_loss
from robusteval.errors import RobustevalError, unknown
from robusteval.evaluation.flags import autoattack_checks
from robusteval.evaluation.reliability import signs
from robusteval.report import Finding
from robusteval.rng import generator
from robusteval.threat import ThreatModel

STOPPING = (
    "batch-dependent", "no-gradient", "non-finite-candidates", "non-finite-gradients", "probabilities", "randomised",
)  # fmt: skip
"""Findings that stop a run unless they are allowed."""

SAMPLES, MAX_ALARMS = 64, 5
AGREEMENT = 1e-4
"""Largest difference between logits, relative to their norm, put down to rounding."""


def _ours(name: str, severity: str, message: str, advice: str) -> Finding:
    return Finding.model_validate(
        {"name": name, "severity": severity, "origin": "robusteval", "message": message, "advice": advice}
    )


def inspect(
    model: nn.Module, x: Tensor, y: Tensor, num_classes: int, found_training: bool, threat: ThreatModel
) -> list[Finding]:
    """Run every check on at most `SAMPLES` inputs ``x`` (N, C, H, W) with labels ``y``.

    ``model`` is in eval mode with frozen parameters. Raises `RobustevalError` where no attack could mean
    anything: inputs outside [0,1], wrong output shape, NaN logits, labels out of range.
    """
    x, y = x[:SAMPLES], y[:SAMPLES]
    with torch.no_grad():
        logits = model(x)
    _refuse_impossible(x, y, logits, num_classes)
    found = [*_train_mode(found_training), *_probabilities(logits)]
    randomised = list(_randomness(model, x, logits))
    found += randomised or _batch_dependence(model, x, logits)  # draws differ anyway
    nearby = threat.sample(x, generator(0, "preflight"))
    slopes = [*_input_gradient(model, x, y), *_input_gradient(model, nearby, y)]
    found += {finding.name: finding for finding in reversed(slopes)}.values()
    if not randomised and not any(finding.name == "no-gradient" for finding in slopes):
        found += signs(model, x, y, threat)
    return found + autoattack_checks(model, x, y)


def _refuse_impossible(x: Tensor, y: Tensor, logits: object, num_classes: int) -> None:
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (len(x), num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RobustevalError(f"the model returns {got} for {len(x)} inputs; expected ({len(x)}, {num_classes}).")
    if not logits.isfinite().all():
        count = int((~logits.isfinite().all(1)).sum())
        raise RobustevalError(f"the model returns NaN or infinite logits on {count} of the first {len(x)} samples.")
    if x.min() < 0 or x.max() > 1:
        raise RobustevalError(f"inputs span [{x.min():.3g}, {x.max():.3g}]; they must lie in [0, 1].")
    if y.min() < 0 or y.max() >= num_classes:
        raise RobustevalError(f"labels span {int(y.min())}..{int(y.max())}; expected 0..{num_classes - 1}.")


def _train_mode(found_training: bool) -> Iterable[Finding]:
    if found_training:
        yield _ours("train-mode", "info", "The model came in training mode.", "It was evaluated in eval mode.")


def _probabilities(logits: Tensor) -> Iterable[Finding]:
    rows = logits.double()
    proportions = rows.min() >= 0 and bool(((rows.sum(1) - 1).abs() < 1e-2).all())
    log_proportions = rows.max() <= 0 and bool((rows.logsumexp(1).abs() < 1e-2).all())
    if proportions:
        yield _ours(
            "probabilities",
            "error",
            "The model returns probabilities, not logits; losses on them saturate and hide weaknesses.",
            "Remove the final softmax.",
        )
    elif log_proportions:
        yield _ours(
            "log-probabilities",
            "info",
            "The model returns log-probabilities; they are logits of the same classifier.",
            "Nothing needs to be done.",
        )


def _spread(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=1) / (a.norm(dim=1) + 1e-10)).max())


def _randomness(model: nn.Module, x: Tensor, logits: Tensor) -> Iterable[Finding]:
    with torch.no_grad():
        spread = max(_spread(logits, model(x)) for _ in range(4))
    if spread > AGREEMENT:
        yield _ours(
            "randomised",
            "error",
            f"Repeated calls on the same inputs differ by up to {spread:.2g} of the logits' norm.",
            "A lucky draw would count as a break or as robustness; make inference deterministic.",
        )


def _batch_dependence(model: nn.Module, x: Tensor, logits: Tensor) -> Iterable[Finding]:
    with torch.no_grad():
        alone = torch.cat([model(row) for row in torch.tensor_split(x[:8], len(x[:8]))])
    spread = _spread(logits[:8], alone)
    if spread > AGREEMENT:
        yield _ours(
            "batch-dependent",
            "error",
            f"A sample's logits change by up to {spread:.2g} of their norm with the rest of the batch.",
            "Such a model has no prediction of its own for an input; use stored statistics in eval mode.",
        )


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Iterable[Finding]:
    size, saturated = _slope(model, x, y, margin_loss), _slope(model, x, y, cross_entropy)
    if size is None or saturated is None:
        yield _ours(
            "no-gradient",
            "error",
            "The model's output has no gradient with respect to its input (detached, no_grad or not in torch).",
            "Gradient attacks would prove nothing; use a suite of score- or decision-based ones.",
        )
        return
    if not size.isfinite().all():
        count = int((~size.isfinite()).sum())
        yield _ours(
            "non-finite-gradients",
            "error",
            f"The input gradient is NaN or infinite on {count} of {len(x)} samples.",
            "Gradient attacks cannot move there; make the model differentiable or use score-based attacks.",
        )
    zero = int((size == 0).sum())
    if zero:
        yield _ours(
            "zero-gradients",
            "warning",
            f"The input gradient is exactly zero on {zero} of {len(x)} samples.",
            "Robustness may be an artefact of vanishing gradients (Carlini et al. 2019, arXiv 1902.06705).",
        )
    flat = int(((saturated == 0) & (size != 0)).sum())
    if flat:
        yield _ours(
            "saturated-loss",
            "info",
            f"The gradient of cross-entropy vanishes in float32 on {flat} of {len(x)} samples, that of the margin not.",
            "Attacks on cross-entropy stand still there; those on margins or DLR do not.",
        )


def _slope(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """Return the L1 norms (N,) of the gradients of ``loss`` at ``x``, None where there is no gradient to take."""
    point = x.clone().requires_grad_()
    with torch.enable_grad():
        value = loss(model(point), y).sum()
    grad = torch.autograd.grad(value, point, allow_unused=True)[0] if value.requires_grad else None
    return None if grad is None else grad.flatten(1).abs().sum(1)


def training_alarms(training: Mapping[str, Any]) -> list[Finding]:
    """Return a finding for what went wrong while the model was trained, by the facts that its card states."""
    stated = training.get("alarms")
    told = [alarm[:300] for alarm in stated[:MAX_ALARMS] if isinstance(alarm, str)] if isinstance(stated, list) else []
    advice = "See the training run's history; a checkpoint from before the collapse may still be sound."
    return [_ours("training-alarm", "warning", f"Its training raised an alarm: {alarm}.", advice) for alarm in told]


def foreseen(findings: Iterable[Finding], repeated: bool, gradient_free: bool) -> list[Finding]:
    """Return the findings, those as mere information that the suite is made for.

    A suite that decides by ``repeated`` evaluations is for randomised models, a ``gradient_free`` one for those without
    a gradient.
    """
    answers = {}
    if repeated:
        answers["randomised"] = "The suite decides every sample by repeated fresh evaluations."
    if gradient_free:
        answers["no-gradient"] = "No attack of the suite needs it."
    return [
        finding.model_copy(update={"severity": "info", "advice": answers[finding.name]})
        if finding.name in answers
        else finding
        for finding in findings
    ]


def check_allowed(names: Sequence[str]) -> None:
    """Raise `UsageError` for a name that no finding which stops a run has."""
    for name in names:
        if name not in STOPPING:
            raise unknown("finding", name, STOPPING)


def refuse_unless_allowed(findings: Sequence[Finding], allowed: Sequence[str]) -> None:
    """Raise `RobustevalError` for the first finding of severity "error" that is not in ``allowed``."""
    for finding in findings:
        if finding.severity == "error" and finding.name not in allowed:
            raise RobustevalError(
                f"{finding.message} {finding.advice} To go on and have it in the report: --allow {finding.name}."
            )
