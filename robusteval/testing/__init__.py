"""Conformance suites for plug-ins, to be called from the tests of whoever wrote one.

Each `check_*` takes a plug-in, ready to be used, and raises `AssertionError` saying which rule it breaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robusteval.catalog import Catalog


def examples(catalog: Catalog, name: str) -> tuple[Mapping[str, Any], ...]:
    """Return the parameters to try the plug-in ``name`` with: its class attribute `EXAMPLES`, else its defaults.

    A plug-in whose parameters have no defaults, or whose defaults are too large to be tried in seconds, says
    ``EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = ({"component": "apgd-ce"}, ...)``. It is None, and this
    returns nothing, for one that works only on files of the user and must have tests of its own.
    """
    found: tuple[Mapping[str, Any], ...] | None = getattr(catalog.get(name), "EXAMPLES", ({},))
    if found is None:
        return ()
    if not found:
        raise AssertionError(f"{catalog.kind} '{name}' has an empty EXAMPLES, so nothing of it would be checked")
    return found
