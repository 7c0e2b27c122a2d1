"""Attacks that may leave much nearer adversarial inputs unfound: the `loose` entries of `quarantine.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from robusteval.settings import Settings
from robusteval.threat import Norm

FILE = Path(__file__).with_name("quarantine.toml")


class Limit(Settings):
    """What an attack was measured to do on random linear classifiers, whose smallest perturbations are known.

    It breaks what is nearer than ``reach`` times eps. Where it looks for the smallest perturbation, it finds one of at
    most ``excess`` times that, in L0 of at most ``spare`` more values.
    """

    reach: float = 0.98
    excess: float = 1.02
    spare: int = 0


TIGHT = Limit()
"""What every attack does that no entry names."""


class Loose(Settings):
    """One entry: a plug-in, or the ``attacks`` named of one that wraps a library, and its limit in some norms.

    It is allowed, and good company, but a suite of nothing else says little; then the report carries a finding.
    """

    loose: str
    plugin: str
    attacks: tuple[str, ...] = ()
    norms: dict[Norm, Limit]
    reason: str
    versions: tuple[str, ...] = ()

    def covers(self, plugin: str, params: Mapping[str, Any], norm: Norm) -> bool:
        """Say whether the entry is about a plug-in with these parameters in ``norm``."""
        named = params.get("attack") or params.get("component")
        return plugin == self.plugin and norm in self.norms and (not self.attacks or named in self.attacks)


@cache
def loose_entries() -> tuple[Loose, ...]:
    """Return all entries."""
    return tuple(Loose.model_validate(entry) for entry in tomllib.loads(FILE.read_text(encoding="utf-8"))["loose"])


def looseness(plugin: str, params: Mapping[str, Any], norm: Norm) -> Loose | None:
    """Return the entry about a plug-in with these parameters in ``norm``, None where it is tight."""
    return next((entry for entry in loose_entries() if entry.covers(plugin, params, norm)), None)
