"""What the stages of a finished run say about how far its numbers can be believed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from robusteval.attacks._loose import looseness
from robusteval.evaluation.flags import square_check
from robusteval.evaluation.suite import Stage, Suite, is_gradient_free
from robusteval.report import Finding, Guarantee, Origin, Results, Severity, StageResult
from robusteval.threat import Norm

LIBRARIES: Mapping[str, Origin] = {"autoattack": "autoattack", "foolbox": "foolbox"}
"""Plug-in -> whose word its warnings are."""

FEW = 0.05
"""Share of samples, or of gradients, up to which a stage's oddity is put down to chance."""


def aftermath(
    results: Results, done: Sequence[StageResult], broken: Mapping[str, int], suite: Suite, classes: int, norm: Norm
) -> Iterator[Finding]:
    """Yield findings on a run over ``classes`` classes in ``norm`` whose stages did what ``done`` says.

    ``results`` and ``broken``, stage -> samples broken, are those at the run's own eps.
    """
    if results.clean.low <= 1 / classes:
        message = f"Clean accuracy {results.clean.rate:.1%} may be that of guessing among {classes} classes."
        advice = "Check normalisation (mean and std), class order, architecture and data."
        yield _finding("near-chance", "warning", message, advice)
    broke = [(_stage(turn), broken.get(turn.name, 0)) for turn in done if turn.kind == "attack"]
    yield from square_check(results.clean, broke)
    plugins = {spec.name: spec.plugin for spec in suite.specs}
    for turn in done:
        for text in turn.warnings:
            origin = LIBRARIES.get(plugins[_stage(turn)], "robusteval")
            yield Finding(name=turn.name, severity="warning", origin=origin, message=text, advice="")
        yield from _oddities(turn)
    yield from _without_gradients(done, broken, suite.stages())
    yield from _loose_alone(suite, norm)


def _stage(turn: StageResult) -> str:
    """Return the name of the stage whose run at one of several eps this is."""
    return turn.name.removesuffix(f"@{turn.eps}")


def _oddities(stage: StageResult) -> Iterator[Finding]:
    if stage.non_finite:
        message = f"{stage.name} ended at NaN or infinite inputs on {stage.non_finite} samples, left unbroken."
        advice = "The model's gradient is probably NaN near them, so their robustness is an artefact."
        yield _finding("non-finite-candidates", "error", message, advice)
    if stage.non_finite_gradients:
        message = f"{stage.name} met NaN or infinite input gradients in {stage.non_finite_gradients} backward passes."
        advice = "It could not move there; see which operation of the model is not differentiable."
        severity: Severity = "error" if stage.non_finite_gradients > FEW * stage.backward else "warning"
        yield _finding("non-finite-gradients", severity, message, advice)
    if stage.zero_gradients > FEW * stage.backward:
        share = stage.zero_gradients / stage.backward
        message = f"{share:.0%} of the input gradients that {stage.name} took are exactly zero."
        advice = "The attack stood still there, so robustness may be an artefact; try attacks without gradients."
        yield _finding("zero-gradients", "warning", message, advice)
    if stage.undecided:
        message = f"{stage.name} left {stage.undecided} samples with a candidate that seems to be misclassified."
        advice = "Chance is not ruled out, so they count as robust; more evaluations per input would decide."
        yield _finding("undecided", "warning", message, advice)
    if stage.rejected:
        message = f"{stage.name} returned {stage.rejected} misclassified inputs outside the threat model."
        yield _finding("rejected-candidates", "warning", message, "They were not counted as breaks.")


def _without_gradients(
    done: Sequence[StageResult], broken: Mapping[str, int], stages: Sequence[Stage]
) -> Iterator[Finding]:
    """Yield a finding where an attack without gradients breaks what attacks with them, run before, did not."""
    attacks = [stage for stage in stages if stage.kind == "attack"]
    first = next((place for place, stage in enumerate(attacks) if not is_gradient_free(stage)), len(attacks))
    late = {stage.name for stage in attacks[first:] if is_gradient_free(stage)}
    for turn in done:
        broke = max(turn.broken, broken.get(turn.name, 0))
        if _stage(turn) in late and broke > max(2, FEW * turn.entered):
            message = f"{turn.name} broke {broke} of {turn.entered} samples that gradient attacks had left."
            advice = "Gradients are probably masked, so the accuracy is an upper bound that adaptive attacks may lower."
            yield _finding("black-box-beats-white-box", "warning", message, advice)


def _loose_alone(suite: Suite, norm: Norm) -> Iterator[Finding]:
    """Yield a finding where every attack is one that `quarantine.toml` calls loose."""
    attacks = [spec for spec in suite.specs if spec.kind == "attack"]
    if attacks and all(looseness(spec.plugin, spec.params, norm) for spec in attacks):
        names = ", ".join(spec.name for spec in attacks)
        message = f"Each attack of the suite is known to miss adversarial inputs well within {norm.value} eps: {names}."
        advice = "The true accuracy may be far lower; attacks/quarantine.toml says why. Add others where you can."
        yield _finding("loose-attacks-alone", "warning", message, advice)


def abstentions(guarantee: Guarantee, samples: int) -> Iterator[Finding]:
    """Yield a finding where a smoothed classifier leaves many of the ``samples`` undecided."""
    if guarantee.abstained > FEW * samples:
        message = f"The smoothed classifier abstains on {guarantee.abstained} of {samples} clean inputs."
        advice = "They count as not wrong; Cohen et al. count them as wrong. A smaller sigma or more votes decide more."
        yield _finding("abstentions", "warning", message, advice)


def _finding(name: str, severity: Severity, message: str, advice: str) -> Finding:
    return Finding(name=name, severity=severity, origin="robusteval", message=message, advice=advice)
