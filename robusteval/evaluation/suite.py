"""Suites: ordered stages, read from a TOML file, hashed into the report."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from robusteval.attacks.base import Attack
from robusteval.attacks.transfer import Transfer, witnesses_digest
from robusteval.catalog import Catalog, first_problem, parameters
from robusteval.certifiers.base import Certifier
from robusteval.errors import UsageError, unknown
from robusteval.evaluation.config import SmoothingChanges
from robusteval.report import Repeat, Smoothing, StageSpec, SuiteFacts
from robusteval.runs import digest
from robusteval.settings import Settings
from robusteval.suites import suite_files
from robusteval.threat import Norm, ThreatModel

TRANSFER, JOIN = "transfer", "+"
ATTACKS = Catalog("attack", "attacks")
CERTIFIERS = Catalog("certifier", "certifiers")


class _StageEntry(Settings):
    name: str
    attack: str | None = None
    certifier: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    norms: tuple[Norm, ...] = tuple(Norm)
    near: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_plugin(self) -> _StageEntry:
        if (self.attack is None) == (self.certifier is None):
            raise ValueError(f"stage '{self.name}' must name one attack or one certifier")
        if self.near and self.certifier:
            raise ValueError(f"stage '{self.name}' is a certifier, to which 'near' does not apply")
        return self

    def spec(self, smoothing: Smoothing | None) -> StageSpec:
        """Return the stage with every hyper-parameter spelled out, so that the suite's hash covers defaults.

        Those that it shares with ``smoothing`` come from there. Raises `UsageError` for a stage of the other track.
        """
        kind: Literal["attack", "certifier"] = "attack" if self.attack else "certifier"
        name = self.attack or self.certifier or ""
        params = {**self.params, **self._shared(kind, name, smoothing)}
        spec = StageSpec(name=self.name, kind=kind, plugin=name, params=params, near=self.near)
        plugin = _build(spec)
        said = {"minimal": is_minimal(Stage(self.name, kind, plugin)), "refutes": refutes(plugin)}
        return spec.model_copy(update={"params": parameters(plugin), **said})

    def _shared(self, kind: str, name: str, smoothing: Smoothing | None) -> dict[str, Any]:
        plugin = (ATTACKS if kind == "attack" else CERTIFIERS).get(name)
        if is_smoothed(plugin) != (smoothing is not None):
            about, has = ("the network itself", "has a") if smoothing else ("a smoothed classifier", "has no")
            raise UsageError(f"stage '{self.name}': {kind} '{name}' is about {about}; the suite {has} [smoothing].")
        if smoothing is None:
            return {}
        shared = {field.name for field in fields(plugin)} & set(Smoothing.model_fields)
        if twice := sorted(shared & set(self.params)):
            raise UsageError(f"stage '{self.name}' sets '{twice[0]}', which the suite's [smoothing] does for all.")
        return {key: getattr(smoothing, key) for key in shared}


class _SuiteFile(Settings):
    title: str
    reference: str = ""
    about: str = ""
    skip_certified: bool = False
    repeat: Repeat | None = None
    smoothing: Smoothing | None = None
    include: tuple[str, ...] = ()
    stages: tuple[_StageEntry, ...] = ()

    @model_validator(mode="after")
    def _distinct_names(self) -> _SuiteFile:
        names = [stage.name for stage in self.stages]
        repeated = {name for name in names if names.count(name) > 1 or name in ("", "clean")}
        if repeated:
            raise ValueError(f"stage name '{repeated.pop()}' is repeated, empty or reserved")
        if any("@" in name for name in names):
            raise ValueError("a stage name has '@', which names its run at one of several eps")
        if self.repeat and self.repeat.needed > self.repeat.evaluations:
            raise ValueError(f"{self.repeat.evaluations} evaluations cannot give confidence {self.repeat.confidence}")
        if self.repeat and any(stage.certifier for stage in self.stages):
            raise ValueError("a certifier proves nothing about a randomised model; take 'repeat' or the certifier out")
        if self.repeat and self.smoothing:
            raise ValueError("'repeat' is for randomised models, 'smoothing' for others; take one out")
        if self.smoothing and not self.skip_certified:
            raise ValueError("proofs by sampling may be false, so breaks cannot test them; set skip_certified = true")
        return self


@dataclass(frozen=True)
class Stage:
    """One step of a suite, ready to run; see `StageSpec`."""

    name: str
    kind: Literal["attack", "certifier"]
    run: Attack | Certifier
    near: float | None = None


def is_gradient_free(stage: Stage) -> bool:
    """Say whether a stage is an attack that takes no gradient of the model."""
    return bool(getattr(stage.run, "gradient_free", False))


def is_minimal(stage: Stage) -> bool:
    """Say whether a stage looks for the nearest adversarial input, so that one run serves every eps."""
    return bool(getattr(stage.run, "minimal", False))


def refutes(plugin: object) -> bool:
    """Say whether a plug-in is a certifier that may end in an adversarial input instead of a proof."""
    return bool(getattr(plugin, "refutes", False))


def is_smoothed(plugin: object) -> bool:
    """Say whether a plug-in, or its class, is about the smoothed classifier instead of the network."""
    return bool(getattr(plugin, "smoothed", False))


@dataclass(frozen=True)
class Suite:
    """Ordered stages for one threat model.

    With ``skip_certified`` a proved sample is not attacked; otherwise
    attacks also run on proved samples, and a break there is a soundness contradiction. ``repeat`` decides samples by
    repeated evaluations, for randomised models. With ``smoothing`` the model under test is the smoothed classifier.
    """

    name: str
    title: str
    reference: str
    skip_certified: bool
    specs: tuple[StageSpec, ...]
    repeat: Repeat | None = None
    smoothing: Smoothing | None = None

    @classmethod
    def of(cls, facts: SuiteFacts) -> Suite:
        """Return the suite that a report describes."""
        named = (facts.name, facts.title, facts.reference, facts.skip_certified)
        return cls(*named, specs=facts.stages, repeat=facts.repeat, smoothing=facts.smoothing)

    @property
    def certifying(self) -> bool:
        """Whether any stage can prove robustness."""
        return any(spec.kind == "certifier" for spec in self.specs)

    @property
    def gradient_free(self) -> bool:
        """Whether no attack needs the model's gradient."""
        return all(is_gradient_free(stage) for stage in self.stages() if stage.kind == "attack")

    @property
    def sha256(self) -> str:
        """Hash of everything that decides what runs."""
        return suite_digest(self.specs, self.skip_certified, self.repeat, self.smoothing)

    def stages(self) -> list[Stage]:
        """Build the plug-ins."""
        return [Stage(spec.name, spec.kind, _build(spec), spec.near) for spec in self.specs]

    def after_transfer(self, run: str) -> Suite:
        """Return the suite that first tries the witnesses in the folder ``run`` of another evaluation."""
        params = {"run": run, "sha256": witnesses_digest(run)}
        _build(spec := StageSpec(name=TRANSFER, kind="attack", plugin=TRANSFER, params=params))
        return replace(self, name=f"{self.name}{JOIN}{TRANSFER}", specs=(spec, *self.specs))

    def facts(self, adaptations: Iterable[str]) -> SuiteFacts:
        """Describe the suite in a report."""
        return SuiteFacts(
            name=self.name,
            title=self.title,
            reference=self.reference,
            sha256=self.sha256,
            stages=self.specs,
            skip_certified=self.skip_certified,
            repeat=self.repeat,
            smoothing=self.smoothing,
            adaptations=tuple(adaptations),
        )


def suite_digest(
    specs: Iterable[StageSpec], skip_certified: bool, repeat: Repeat | None, smoothing: Smoothing | None
) -> str:
    """Return the SHA-256 that identifies a suite; ``near``, which older reports do not have, counts where it is set."""
    ruling = {"repeat": repeat, "smoothing": smoothing}
    decided = {name: rule.model_dump() for name, rule in ruling.items() if rule}
    stages = [spec.model_dump(exclude={"near"} if spec.near is None else None) for spec in specs]
    return digest({"stages": stages, "skip_certified": skip_certified, **decided})


def _build(spec: StageSpec) -> Attack | Certifier:
    catalog = ATTACKS if spec.kind == "attack" else CERTIFIERS
    plugin: Attack | Certifier = catalog.build(spec.plugin, spec.params)
    return plugin


def _read(path: Path) -> _SuiteFile:
    try:
        return _SuiteFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"suite file '{path}' cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"suite file '{path}' is not TOML: {error}.") from error
    except ValidationError as error:
        raise UsageError(f"suite file '{path}': {first_problem(error)}") from error


def load_suite(name: str, threat: ThreatModel, smoothing: SmoothingChanges | None = None) -> Suite:
    """Read the suite called ``name``, or the TOML file of that path; keep the stages meant for ``threat``.

    "standard+certified" is both, what proves first. ``smoothing`` is what the user has changed of its [smoothing].
    Raises `UsageError` for unknown suites and plug-ins, and for stages not defined for the threat model.
    """
    contents = [_content(part) for part in parts_of(name)]
    suite = _joined(name, [_changed(name, part, smoothing) for part in contents] if smoothing else contents, threat)
    if not suite.specs:
        raise UsageError(f"suite '{name}' has no stage for {threat.norm.value}.")
    for stage in suite.stages():
        if not stage.run.supports(threat):
            raise UsageError(f"suite '{name}': stage '{stage.name}' is not defined for {threat}.")
        if isinstance(stage.run, Transfer):
            stage.run.check()
    return suite


def parts_of(name: str) -> list[str]:
    """Return the suites that ``name`` joins by "+"."""
    return [name] if name.endswith(".toml") and Path(name).exists() else name.split(JOIN)


def _content(name: str, included: bool = False) -> _SuiteFile:
    """Read a suite with what it includes."""
    shipped = suite_files()
    path = Path(name) if name.endswith(".toml") else shipped.get(name)
    if path is None:
        raise unknown("suite", name, shipped)
    content = _read(path)
    if content.include and included:
        raise UsageError(f"suite '{name}' is included and includes others; one level is allowed.")
    stages = (stage for part in content.include for stage in _content(part, included=True).stages)
    return content.model_copy(update={"stages": (*stages, *content.stages)})


def _changed(name: str, content: _SuiteFile, changes: SmoothingChanges) -> _SuiteFile:
    if content.smoothing is None:
        raise UsageError(f"suite '{name}' has no [smoothing], so there is nothing to change in it.")
    changed = {**content.smoothing.model_dump(), **changes.model_dump(exclude_none=True)}
    try:
        return content.model_copy(update={"smoothing": Smoothing.model_validate(changed)})
    except ValidationError as error:
        raise UsageError(f"suite '{name}', [smoothing]: {first_problem(error)}") from error


def _joined(name: str, parts: list[_SuiteFile], threat: ThreatModel) -> Suite:
    if any((part.repeat, part.smoothing) != (parts[0].repeat, parts[0].smoothing) for part in parts):
        raise UsageError(f"suite '{name}' joins suites that decide samples in different ways.")
    proving = sorted(parts, key=lambda part: not any(stage.certifier for stage in part.stages))
    specs: dict[str, StageSpec] = {}
    for spec in (entry.spec(part.smoothing) for part in proving for entry in part.stages if threat.norm in entry.norms):
        if specs.setdefault(spec.name, spec) != spec:
            raise UsageError(f"suite '{name}' has two different stages called '{spec.name}'.")
    return Suite(
        name=name,
        title=" + ".join(part.title for part in parts),
        reference="; ".join(dict.fromkeys(part.reference for part in parts if part.reference)),
        skip_certified=any(part.skip_certified for part in parts),
        specs=tuple(specs.values()),
        repeat=parts[0].repeat,
        smoothing=parts[0].smoothing,
    )
