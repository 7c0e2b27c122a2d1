"""What a reader of the comparison must know: how the numbers came about, and what may be concluded from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from robusteval.comparison.config import CompareConfig
from robusteval.comparison.table import Row, Table
from robusteval.training.plan import Plan

WHAT_P_MEANS = (
    "p is two-sided and exact, from the sign-flip permutation test over test samples on each sample's difference "
    "summed over the seeds (the chances of all sums are computed, none is drawn); p (Holm) is adjusted for the number "
    "of objectives. Samples are the units and the trained models are taken as given, so p says nothing about training "
    "again with other seeds: that is what the differences by seed are for, and their paired t test, which has little "
    "power with few seeds. "
    "A claim that one objective is better needs both: a small p (Holm) and a difference of the same sign in every "
    "seed, large against its spread."
)


def facts(config: CompareConfig, plan: Plan, command: str) -> dict[str, Any]:
    """Return how all runs of a comparison were made, as JSON values."""
    train = plan.config
    return {
        "dataset": plan.info.title,
        "norm": plan.threat.norm.value,
        "eps": plan.threat.label,
        "model": train.model.model_dump(mode="json"),
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "training_samples": len(plan.train),
        "validation_samples": len(plan.validation),
        "test_limit": config.evaluate.limit,
        "selection": f"validation PGD-{train.validation.steps} accuracy",
        "precision": train.precision,
        "seeds": list(range(config.seeds)),
        "train": config.identity()["train"],
        "evaluate": config.identity()["evaluate"],
        "command": command,
    }


def caption(table: Table) -> Iterator[str]:
    """Yield the paragraphs under the table."""
    known, config = table.facts, table.config
    reports = [result.report.data for row in table.rows for result in row.results]
    tested = f"{reports[0].evaluated} of {reports[0].total}" if reports else "no"
    seeds = ", ".join(map(str, known["seeds"]))
    yield (
        f"{known['dataset']}, {known['norm']} eps {known['eps']}, model {known['model']['name']}, "
        f"{known['epochs']} epochs on {known['training_samples']} training samples in batches of "
        f"{known['batch_size']}, {known['precision']} training precision; evaluated in float32 on the first {tested} "
        "test samples. "
        f"The best epoch is the one with the highest {known['selection']} on {known['validation_samples']} held-out "
        "training samples; `last` is the last epoch. Nothing was selected on test data."
    )
    yield (
        f"Accuracies in percent: mean ± standard deviation [lowest, highest] over the seeds {seeds}. PGD-"
        f"{config.margin_steps}: cross-entropy, one start, step eps / 4; it flatters some objectives. "
        f"{', '.join(table.shared)}: accuracy after each stage of the suite `{config.suite}`. "
        + _full(table)
        + "Margin: true logit minus the largest other, under PGD-"
        f"{config.margin_steps} on the same test samples; scaled: divided by the standard deviation of the sample's "
        "logits, as objectives change the scale of logits. Passes: forward + backward passes of the network per "
        "training step, counted. Training seconds: mean wall time of a run's epochs with their validation, with "
        f"{_at_once(table)} at once; not comparable across --jobs or machines."
    )
    yield f"Differences from `{config.reference}` in percentage points, after {table.shared[-1]}. {WHAT_P_MEANS}"
    for work in ("trained", "evaluated"):
        made = ("; ".join(known[f"{work}_{key}"]) or "nothing yet" for key in ("with", "on"))
        yield f"{work.capitalize()} with {', on '.join(made)}."
    yield f"Command: `{known['command']}`"


def _at_once(table: Table) -> str:
    counts = " or ".join(map(str, table.jobs)) or "an unknown number of"
    return f"{counts} run{'' if table.jobs == (1,) else 's'}"


def _full(table: Table) -> str:
    config, more = table.config, table.full[len(table.shared) :]
    if not more:
        return "That overstates robustness where it is not AutoAttack standard. "
    seeds = f"{config.full_seeds} seed" + ("s" if config.full_seeds > 1 else "")
    return f"{', '.join(more)}: the rest of the suite `{config.full_suite}`, run for {seeds} of each objective. "


def footnotes(rows: tuple[Row, ...]) -> Iterator[str]:
    """Yield notes on objectives, failures and training alarms."""
    for row in rows:
        if row.note:
            yield f"{row.label}: {row.note}"
        for seed, text in row.failures.items():
            yield f"{row.label}, seed {seed}: FAILED: {text}"
        for result in row.results:
            yield from (f"{row.label}, seed {result.cell.seed}: {alarm}." for alarm in result.alarms)
