"""Checks before the first attack: ours and AutoAttack's, returned as data.

A finding of severity "error" means that the numbers would be doubtful: the run stops unless it is allowed by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robusteval.errors import RobustevalError, unknown
from robusteval.evaluation.flags import autoattack_checks
from robusteval.evaluation.probe import Probe, pieces
from robusteval.evaluation.reliability import gradient_findings
from robusteval.report import Finding
from robusteval.rng import seeded
from robusteval.threat import ThreatModel

STOPPING = (
    "batch-dependent", "no-gradient", "non-finite-candidates", "non-finite-gradients", "probabilities", "randomised",
)  # fmt: skip
"""Findings that stop a run unless they are allowed."""

SAMPLES, MAX_ALARMS = 64, 5
AGREEMENT = 1e-4
"""Largest difference between logits, relative to their norm, put down to rounding in float32."""

ROUNDINGS = 8
"""The same in units of the machine epsilon, for coarser precisions. All of the rounding in nets of up to 20 layers, of
which another batch size changes a part, came to at most 5.2 such units in bfloat16 and float16 alike."""


def _ours(name: str, severity: str, message: str, advice: str) -> Finding:
    return Finding.model_validate(
        {"name": name, "severity": severity, "origin": "robusteval", "message": message, "advice": advice}
    )


def inspect(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    num_classes: int,
    found_training: bool,
    threat: ThreatModel,
    batch_size: int = SAMPLES,
) -> list[Finding]:
    """Run every check on at most `SAMPLES` inputs ``x`` (N, C, H, W) with labels ``y``.

    ``model`` is in eval mode with frozen parameters, and is asked about ``batch_size`` images at once. Raises
    `RobustevalError` where no attack could mean anything: inputs outside [0,1], wrong output shape, NaN logits,
    labels out of range.
    """
    x, y = x[:SAMPLES], y[:SAMPLES]
    ask = partial(_ask, model, num_classes, batch_size)
    logits = ask(x)
    _refuse_impossible(x, y, logits, num_classes)
    found = [*_train_mode(found_training), *_probabilities(logits)]
    randomised = list(_randomness(ask, x, logits))
    found += randomised or _batch_dependence(model, x, logits)  # draws differ anyway
    graded = model if randomised else Probe(model, batch_size)  # what a randomised model draws depends on the split
    with seeded(0, x.device):
        found += gradient_findings(graded, x, y, threat, bool(randomised))
    return found + autoattack_checks(ask, x, y)


def _ask(model: nn.Module, num_classes: int, batch_size: int, x: Tensor) -> Tensor:
    """Return the logits (N, K) for ``x``, taken of ``batch_size`` images at once."""
    found = []
    for part in pieces(x, batch_size):
        with torch.no_grad():
            logits: object = model(part)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != (len(part), num_classes):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            expected = (len(part), num_classes)
            raise RobustevalError(f"the model returns {got} for {len(part)} inputs; expected {expected}.")
        found.append(logits)
    return torch.cat(found)


def _refuse_impossible(x: Tensor, y: Tensor, logits: Tensor, num_classes: int) -> None:
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


def _agreement(model: nn.Module, logits: Tensor) -> float:
    """Return the largest `_spread` put down to rounding, for the coarsest precision of weights or ``logits``."""
    kinds = {values.dtype for values in (*model.parameters(), logits) if values.is_floating_point()}
    return max([AGREEMENT, *(ROUNDINGS * torch.finfo(kind).eps for kind in kinds)])


def _randomness(ask: Callable[[Tensor], Tensor], x: Tensor, logits: Tensor) -> Iterable[Finding]:
    """Compare calls on one and the same batch, which round alike in any precision."""
    spread = max(_spread(logits, ask(x)) for _ in range(4))
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
    if spread > _agreement(model, logits):
        yield _ours(
            "batch-dependent",
            "error",
            f"A sample's logits change by up to {spread:.2g} of their norm with the rest of the batch.",
            "Such a model has no prediction of its own for an input; use stored statistics in eval mode.",
        )


def training_alarms(training: Mapping[str, Any]) -> list[Finding]:
    """Return a finding for what went wrong while the model was trained, by the facts that its card states."""
    stated = training.get("alarms")
    told = [alarm[:300] for alarm in stated[:MAX_ALARMS] if isinstance(alarm, str)] if isinstance(stated, list) else []
    advice = "See the training run's history; a checkpoint from before the collapse may still be sound."
    return [_ours("training-alarm", "warning", f"Its training raised an alarm: {alarm}.", advice) for alarm in told]


def noise_of_training(training: Mapping[str, Any], sigma: float) -> list[Finding]:
    """Return a finding where a model's card tells of other noise in its training than it is smoothed with."""
    objective = training.get("objective")
    params = objective.get("params") if isinstance(objective, Mapping) else None
    if not isinstance(params, Mapping) or params.get("sigma") == sigma:
        return []
    trained = f"with noise of sigma {params['sigma']}" if "sigma" in params else "without noise"
    message = f"The network was trained {trained}, and is smoothed with sigma {sigma:g}."
    advice = "Its predictions on such noise mean little; see --set smoothing.sigma, or the objective `gaussian`."
    return [_ours("other-noise", "warning", message[:300], advice)]


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
        answers["probabilities"] = "The suite's attacks follow no gradient that could vanish."
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
