"""Errors a user can act on: one sentence, one exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RobustevalError(Exception):
    """The work could not be done; the message says which value was wrong and what was allowed."""

    exit_code = 1


class UsageError(RobustevalError):
    """The request itself was wrong: an unknown name, an impossible value, contradictory settings."""

    exit_code = 2


class CheckFailed(RobustevalError):  # noqa: N818, it is an outcome
    """A check that the user asked for did not hold (`validate`, `--fail-under`)."""

    exit_code = 3


class SoundnessContradiction(RobustevalError):  # noqa: N818, it is an outcome
    """A sample was both proved robust and broken: the attack check or the proof is wrong."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Build the error for a name that no ``kind`` has, naming the nearest match and the choices."""
    choices = sorted(known)
    listed = ", ".join(choices) or "none"
    return UsageError(f"unknown {kind} '{name}'.{nearest(name, choices)} Known: {listed}.")
