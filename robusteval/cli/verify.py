"""`verify`: replay the evidence of a report with the model and the data."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robusteval.cli import _console
from robusteval.cli._options import source_of, source_options
from robusteval.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from robusteval.evaluation.audit import Audit
    from robusteval.evaluation.verify import Source, Verification

SHOWN = 20


@click.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@source_options
@click.option("--attack", "count", type=int, metavar="N", help="Attack N random samples that are called robust.")
@click.option("--suite", help="Whose attacks do that.  [default: those of the report's suite]")
@click.option(
    "--tolerance", type=float, default=0.5, show_default=True, metavar="POINTS",
    help="How much the robust accuracy may be overstated, shown with 95 % confidence.",
)  # fmt: skip
@click.option("--seed", type=int, help="Seed of the attack.  [default: one that nobody could foresee]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON record on stdout.")
def command(
    path: Path, count: int | None, suite: str | None, tolerance: float, seed: int | None, as_json: bool, **where: Any
) -> None:
    """Check the evidence in folder PATH with the model and the data: predictions, witnesses, proofs, votes, arithmetic.

    Nothing is searched for, so it takes a small part of the run's time. What no evidence can tell stays a claim:
    seconds, passes, versions, and how hard the attacks tried; --attack N puts the last to the test. A model that is
    code is run only if --model names it. Exit code 3 if anything is wrong.
    """
    from robusteval.evaluation.validate import read_report
    from robusteval.evaluation.verify import verify
    from robusteval.render.documents import unfaithful

    if count is not None and count < 1:
        raise UsageError(f"--attack {count} attacks no sample; give at least 1.")
    folder = path.parent if path.name == "report.json" else path
    source = source_of(**where)
    with _console.err.status("verifying"):
        found = verify(folder, source)
        if not found.problems:
            found = replace(found, problems=tuple(unfaithful(read_report(folder), folder)))
    audited = None
    if count and not found.problems:
        audited = _audit(folder, source, count, suite, secrets.randbits(31) if seed is None else seed)
    _show(folder, found, audited, as_json)
    if found.problems:
        raise CheckFailed(f"the report in '{folder}' is refuted: {len(found.problems)} problem(s).")
    if audited and audited.refutes(tolerance):
        raise CheckFailed(f"the robust accuracy in '{folder}' is refuted, beyond {tolerance:g} points.")


def _audit(folder: Path, source: Source, count: int, suite: str | None, seed: int) -> Audit:
    from robusteval.evaluation.audit import audit, with_attacks_of
    from robusteval.evaluation.verify import subject

    plan = subject(folder, source)
    if suite:
        plan = with_attacks_of(plan, suite)
    with _console.progress() as bar:
        task = bar.add_task("attacking", total=count, status="")
        return audit(plan, folder, count, seed, lambda done: bar.advance(task, done))


def _show(folder: Path, found: Verification, audited: Audit | None, as_json: bool) -> None:
    for problem in found.problems[:SHOWN]:
        _console.say(f"wrong: {problem}")
    if len(found.problems) > SHOWN:
        _console.say(f"... and {len(found.problems) - SHOWN} more")
    if as_json:
        import json

        click.echo(json.dumps(_record(found, audited)))
        return
    if not found.problems:
        click.echo(f"verified: {found.replayed}")
        click.echo(f"{found.seconds:.1f} s; the run took {found.run_seconds:.1f} s of its workers")
    if audited:
        low, high = audited.overstated
        click.echo(
            f"audit, seed {audited.seed}: {len(audited.broken)} of {audited.sampled} samples called robust were broken"
        )
        click.echo(f"with 95 % confidence each, robust accuracy is overstated by {low:.2f} points at least and")
        click.echo(f"{high:.2f} at most, as far as this attack can tell")
        for sample in audited.certified:
            _console.say(f"wrong: sample {sample} is called certified and was broken")
    click.echo(f"report: {folder}")


def _record(found: Verification, audited: Audit | None) -> dict[str, Any]:
    record: dict[str, Any] = {"problems": found.problems, "seconds": found.seconds, "run_seconds": found.run_seconds}
    record["replayed"] = {key: value for key, value in vars(found.replayed).items() if key != "problems"}
    if audited:
        broken = {"broken": sorted(audited.broken), "certified_broken": audited.certified}
        low, high = audited.overstated
        bounds = {"overstated_at_least": low, "overstated_at_most": high, "confidence": 0.95}
        counts = {key: getattr(audited, key) for key in ("seed", "total", "robust", "sampled")}
        record["audit"] = {**counts, **broken, **bounds}
    return record
