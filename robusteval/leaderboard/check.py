"""Whether the model that came with a report does what the report says: its evidence is replayed, as `verify` does."""

from __future__ import annotations

from pathlib import Path

from robusteval.datasets.open import DATASETS, open_dataset
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.validate import read_report
from robusteval.evaluation.verify import Source, verify
from robusteval.leaderboard.bundle import MODEL, Refused, limits_of, unpack

BATCH = 64
"""Images at once, within what a worker may take."""


def checked(folder: Path, data_dir: str | None) -> tuple[str, str]:
    """Return ``checked``, ``refuted`` or, where nothing could be decided here, ``claimed``; and the reason.

    ``folder`` is a report with its model in ``model/``; ``data_dir`` has the data sets, each in a folder of its name
    or all in one.
    """
    name = read_report(folder).data.name
    try:
        model, place = str(folder / MODEL), _place(name, data_dir)
        source = Source(model, dataset=name, data_dir=place, device="cpu", batch_size=BATCH, votes=1.0)
        found = verify(folder, source)
    except UsageError as error:
        return "claimed", f"It cannot be run here: {error}"
    except RobustevalError as error:
        return "refuted", f"The model that came along is damaged, or fails: {error}"
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        return "refuted", f"{found.problems[0]}{more}"
    return "checked", f"Replayed: {found.replayed}."


def _place(name: str, data_dir: str | None) -> str | None:
    """Return where the data set lies here; raise `UsageError` if nowhere, or if its name is a path."""
    missing = f"this server does not have the data set '{name}'."
    if name not in DATASETS.names() or "path" in getattr(DATASETS.get(name), "__dataclass_fields__", {}):
        raise UsageError(missing)
    own = Path(data_dir) / name if data_dir else None
    place = str(own) if own and own.is_dir() else data_dir
    try:
        open_dataset(name, place).load("test")
    except RobustevalError as error:
        raise UsageError(missing) from error
    return place


def replay(bundle: str, folder: str, data_dir: str | None, limits: dict[str, int]) -> tuple[str, str]:
    """Unpack a stored bundle and check it; runs in a cage."""
    try:
        unpack(Path(bundle), Path(folder), limits_of(limits))
    except Refused as refused:
        return "claimed", f"The bundle cannot be read any more: {refused}"
    return checked(Path(folder), data_dir)
