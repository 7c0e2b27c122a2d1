"""Where a robust accuracy would stand among RobustBench's entries, comparing like with like only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robusteval.threat import Norm, ThreatModel

_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}
_NEIGHBOURS = 2


@dataclass(frozen=True)
class Baseline:
    """One RobustBench entry (Croce et al. 2021, arXiv:2010.09670); accuracies in percent.

    ``threat`` is 'Linf', 'L2' or 'corruptions'; ``eps`` keeps RobustBench's spelling ("8/255", "0.031").
    ``external`` is the best accuracy of an outside evaluation where there is one; ``unreliable`` RobustBench's flag
    on AutoAttack's figure, None where it says nothing. ``additional_data`` counts real images only;
    ``says_synthetic`` tells that the footnote speaks of synthetic images, False that it does not, no more.
    """

    id: str
    dataset: str
    threat: str
    eps: str | None
    architecture: str
    clean_acc: float
    autoattack_acc: float | None
    external: float | None
    corruptions_acc: float | None
    unreliable: bool | None
    additional_data: bool
    says_synthetic: bool
    footnote: str | None
    name: str
    venue: str
    link: str

    @property
    def best_known(self) -> float:
        """Robust accuracy in percent by which RobustBench ranks: the external one, else AutoAttack's."""
        known = (self.external, self.autoattack_acc, self.corruptions_acc)
        return next(value for value in known if value is not None)


@dataclass(frozen=True)
class Placement:
    """A place among ``entries`` published models, or the ``reason`` why there is none.

    ``rank`` is 1 + the number of entries that are strictly better; ``best_rank`` and ``worst_rank`` are the ranks at
    the ends of the confidence interval. ``provisional`` means that only a part of the test set was evaluated.
    ``above`` and ``below`` are the nearest entries, better first; an equal entry is below. ``notes`` are sentences.
    """

    reason: str | None = None
    rank: int | None = None
    best_rank: int | None = None
    worst_rank: int | None = None
    entries: int = 0
    provisional: bool = False
    best: Baseline | None = None
    above: tuple[Baseline, ...] = ()
    below: tuple[Baseline, ...] = ()
    notes: tuple[str, ...] = ()


@cache
def _packaged() -> dict[str, Any]:
    text = files("robusteval.baselines").joinpath("robustbench.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def source() -> str:
    """Return where the figures come from: project, date, commit, licence."""
    return str(_packaged()["source"])


@cache
def load() -> tuple[Baseline, ...]:
    """Return all entries of the packaged snapshot."""
    return tuple(Baseline(**facts) for facts in _packaged()["entries"])


def comparable(benchmark: str | None, norm: Norm, eps: Fraction, extra_data: bool | None) -> list[Baseline]:
    """Return the entries of the same dataset, norm and eps (equal as fractions), the best known accuracy first.

    A model trained without extra data (False) is compared with entries that use none, one with extra data (True) or
    with unknown data (None) with all.
    """
    alike = [
        entry
        for entry in load()
        if entry.dataset == benchmark
        and entry.threat == norm.value
        and entry.eps is not None
        and Fraction(entry.eps) == eps
        and not (extra_data is False and entry.additional_data)
    ]
    return sorted(alike, key=lambda entry: (-entry.best_known, entry.id))


def place(
    title: str,
    benchmark: str | None,
    threat: ThreatModel,
    robust: float,
    interval: tuple[float, float],
    extra_data: bool | None,
    complete: bool,
) -> Placement:
    """Place a robust accuracy with its 95 % ``interval`` (low, high), fractions in 0..1, among published models.

    ``title`` and ``benchmark`` are the dataset's (see `DataInfo`); ``complete`` says whether the whole test set was
    evaluated. Raises `ValueError` unless 0 <= low <= robust <= high <= 1.
    """
    low, high = interval
    if not 0 <= low <= robust <= high <= 1:
        raise ValueError(f"robust accuracy {robust} with interval ({low}, {high}) is not ordered within 0..1.")
    reason = _why_not(title, benchmark, threat)
    if reason is not None:
        return Placement(reason=reason)
    rivals = comparable(benchmark, threat.norm, threat.eps, extra_data)
    better = _count_better(rivals, robust)
    return Placement(
        rank=better + 1,
        best_rank=_count_better(rivals, high) + 1,
        worst_rank=_count_better(rivals, low) + 1,
        entries=len(rivals),
        provisional=not complete,
        best=rivals[0],
        above=tuple(rivals[max(0, better - _NEIGHBOURS) : better]),
        below=tuple(rivals[better : better + _NEIGHBOURS]),
        notes=_notes(rivals, extra_data, complete),
    )


def _count_better(rivals: Sequence[Baseline], robust: float) -> int:
    percent = round(100 * robust, 9)  # 0.5554 is 55.54 %, not 55.53999...
    return sum(entry.best_known > percent for entry in rivals)


def _why_not(title: str, benchmark: str | None, threat: ThreatModel) -> str | None:
    if benchmark is None:
        original = next((known for known in _TITLES.values() if title.startswith(f"{known} (")), None)
        if original is not None:
            return f"{title} is a re-encoded {original}, so RobustBench's figures do not apply."
        return f"{title} is not a RobustBench dataset."
    if comparable(benchmark, threat.norm, threat.eps, None):
        return None
    name = _TITLES.get(benchmark, benchmark)
    known = {entry.eps for entry in load() if (entry.dataset, entry.threat) == (benchmark, threat.norm.value)}
    if not known:
        return f"RobustBench has no {threat.norm.value} entries for {name}."
    spelled = " and ".join(sorted(eps for eps in known if eps))
    return f"RobustBench has no {name} entry at {threat}; its {threat.norm.value} entries are at eps {spelled}."


def _notes(rivals: Sequence[Baseline], extra_data: bool | None, complete: bool) -> tuple[str, ...]:
    notes = []
    if not complete:
        notes.append("Only a part of the test set was evaluated, so the place is provisional.")
    if extra_data is None:
        notes.append("Whether extra training data was used is not known, so entries with and without it are compared.")
    synthetic = sum(entry.says_synthetic for entry in rivals)
    if extra_data is False and synthetic:
        notes.append(f"{synthetic} of these entries used synthetic images, which RobustBench does not count as extra.")
    flagged = sum(entry.unreliable is True for entry in rivals)
    if flagged:
        notes.append(f"RobustBench flags AutoAttack's figure as potentially unreliable for {flagged} of these entries.")
    return tuple(notes)
