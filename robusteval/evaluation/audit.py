"""Attack some of the samples that a report calls robust, and say by how much its robust accuracy may be overstated."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from scipy.stats import hypergeom

from robusteval.attacks.transfer import Transfer
from robusteval.errors import UsageError
from robusteval.evaluation.assemble import SAMPLES
from robusteval.evaluation.plan import Plan, judge_samples
from robusteval.evaluation.suite import Stage, load_suite
from robusteval.report import CONFIDENCE, SampleRow, Search
from robusteval.rng import SampleRng, derive_seed
from robusteval.verdict import ROBUST, Verdict, Witness


@dataclass(frozen=True)
class Audit:
    """Of ``robust`` samples called so, among ``total``, ``sampled`` were attacked; ``broken`` by id.

    ``certified`` are the broken ones that the report calls certified.

    ``least`` and ``most`` samples of all that are called robust would fall to this attack, each with confidence 95 %.
    """

    seed: int
    total: int
    robust: int
    sampled: int
    broken: dict[int, Witness]
    certified: tuple[int, ...]
    least: int
    most: int

    @property
    def overstated(self) -> tuple[float, float]:
        """By how much, in points, the robust accuracy is at least and at most overstated against this attack."""
        return 100 * self.least / self.total, 100 * self.most / self.total

    def refutes(self, tolerance: float) -> bool:
        """Say whether the accuracy is overstated by more than ``tolerance`` points, or a certificate is false."""
        return bool(self.certified) or self.overstated[0] > tolerance


def audit(plan: Plan, folder: Path, count: int, seed: int, told: Callable[[int], None] = lambda done: None) -> Audit:
    """Attack ``count`` random samples that the report in ``folder`` calls robust with the attacks of ``plan``'s suite.

    ``seed`` chooses the samples and all that the attacks draw, so it should be one that nobody could foresee. ``told``
    hears how many are done. Raises `UsageError` where the suite has no attack.
    """
    lines = (folder / SAMPLES).read_text(encoding="utf-8").splitlines()
    verdicts = {row.id: row.verdict for row in map(SampleRow.model_validate_json, lines)}
    claimed = sorted(sample for sample, verdict in verdicts.items() if verdict in ROBUST)
    chosen = sorted(random.Random(derive_seed(seed, "audit")).sample(claimed, min(count, len(claimed))))
    exact = plan.config.model_copy(update=Search().model_dump())
    plan, stages, size = replace(plan, config=exact, budgets=(plan.threat,)), attacks(plan), plan.config.chunk_size
    broken: dict[int, Witness] = {}
    for part in (chosen[first : first + size] for first in range(0, len(chosen), size)):
        rng = SampleRng(seed, tuple(part), derive_seed(seed, "audit", *part))
        broken |= judge_samples(plan, torch.tensor(part), rng, stages=stages).witnesses
        told(len(part))
    least, most = hidden(len(claimed), len(chosen), len(broken), 1 - CONFIDENCE)
    false = tuple(sample for sample in broken if verdicts[sample] is Verdict.CERTIFIED)
    return Audit(seed, len(lines), len(claimed), len(chosen), broken, false, least, most)


def with_attacks_of(plan: Plan, name: str) -> Plan:
    """Return ``plan`` with the stages of the suite called ``name``; what decides a sample stays as it is.

    Raises `UsageError` where these attack the network and the plan is about its smoothed classifier, or vice versa.
    """
    other, own = load_suite(name, plan.threat), plan.suite
    if (other.smoothing is None) != (own.smoothing is None):
        about = "the network itself" if own.smoothing else "a smoothed classifier"
        raise UsageError(f"suite '{name}' is about {about}, the report is not.")
    return replace(plan, suite=replace(other, repeat=own.repeat, smoothing=own.smoothing))


def attacks(plan: Plan) -> list[Stage]:
    """Return the attacks of a suite that need nothing but the model."""
    found = [stage for stage in plan.suite.stages() if stage.kind == "attack" and not isinstance(stage.run, Transfer)]
    if not found:
        raise UsageError(f"suite '{plan.suite.name}' has no attack to audit with; name one with --suite.")
    return found


def hidden(population: int, sampled: int, found: int, alpha: float) -> tuple[int, int]:
    """Bound how many of a ``population`` are of a kind of which ``found`` were among ``sampled`` without replacement.

    Each of the two bounds is wrong with probability at most ``alpha``: the test of the hypergeometric distribution is
    inverted (Buonaccorsi 1987, The American Statistician 41(3)).
    """
    if population == 0:
        return 0, 0
    sizes = numpy.arange(found, population - (sampled - found) + 1)
    at_least = sizes[hypergeom.sf(found - 1, population, sizes, sampled) > alpha]
    at_most = sizes[hypergeom.cdf(found, population, sizes, sampled) > alpha]
    return int(at_least.min()), int(at_most.max())
