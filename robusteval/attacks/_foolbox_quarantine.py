"""Attacks of Foolbox that do not do what their name says: `quarantine.toml`, read and applied."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from robusteval.errors import UsageError
from robusteval.settings import Settings

FILE = Path(__file__).with_name("quarantine.toml")


class Fault(Settings):
    """One entry: what is wrong with some attacks, in one sentence, and what to do about it.

    ``impossible`` cannot be run here at all, ``refuse`` only on the suite author's word (`quarantined = true`),
    ``warn`` runs and says so in the report, ``alone`` runs sample by sample and ``mended`` is put right on the way.
    The entry holds where every one of ``params`` has the value given, and where the module ``without`` is missing.
    """

    fault: str
    attacks: tuple[str, ...]
    action: Literal["impossible", "refuse", "warn", "alone", "mended"]
    reason: str
    instead: str = ""
    params: dict[str, Any] = Field(default_factory=dict)
    without: str = ""
    versions: tuple[str, ...]

    def applies(self, attack: str, settings: Mapping[str, Any]) -> bool:
        """Say whether the entry holds for a class name and its full settings."""
        missing = not self.without or importlib.util.find_spec(self.without) is None
        return attack in self.attacks and missing and all(settings.get(k) == v for k, v in self.params.items())

    def sentence(self, attack: str) -> str:
        """Say what is wrong with ``attack``."""
        return f"Foolbox's {attack} {self.reason} (seen in Foolbox {', '.join(self.versions)})."


@cache
def quarantine() -> tuple[Fault, ...]:
    """Return every known fault."""
    return tuple(Fault.model_validate(entry) for entry in tomllib.loads(FILE.read_text(encoding="utf-8"))["faults"])


def faults_of(attack: str, settings: Mapping[str, Any]) -> list[Fault]:
    """Return the faults of a Foolbox attack with these settings."""
    return [fault for fault in quarantine() if fault.applies(attack, settings)]


def refuse(attack: str, faults: list[Fault], quarantined: bool) -> None:
    """Raise `UsageError` for a fault that forbids the attack, with the reason and what to use instead."""
    for fault in faults:
        if fault.action == "impossible" or (fault.action == "refuse" and not quarantined):
            instead = f" Use {fault.instead} instead." if fault.instead else ""
            override = " To run it all the same, set quarantined = true." if fault.action == "refuse" else ""
            raise UsageError(f"{fault.sentence(attack)}{instead}{override}")


def warnings_of(attack: str, faults: list[Fault]) -> list[str]:
    """Return what a report has to say about running the attack."""
    return [fault.sentence(attack) for fault in faults if fault.action in ("refuse", "warn")]
