"""`submit`: send a report to a leaderboard, or show what would be sent."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robusteval.cli import _console
from robusteval.cli._options import config_options
from robusteval.cli.export import allowed, beside, build, checked
from robusteval.errors import UsageError, unknown

if TYPE_CHECKING:
    from robusteval.exports.base import Evaluation
    from robusteval.submission.bundle import FileToSend

HUB, BY_HAND = "huggingface", "robustbench"


@click.command("submit")
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, help="robustbench, huggingface, or the URL of a leaderboard server.")
@click.option("--dry-run", is_flag=True, help="Show everything that would be sent; send nothing, need no token.")
@click.option("--weights", type=click.Path(path_type=Path), help="Send the model too, from this run or model folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of what is made.  [default: beside RUN]")
@click.option("--repo", metavar="USER/NAME", help="Repository on the Hub; it is made if it is not there.")
@click.option("--endpoint", help="Address of the Hub.  [default: $HF_ENDPOINT, or the public one]")
@click.option("--private", is_flag=True, help="Make the repository private if it is not there.")
@click.option("--pull-request", is_flag=True, help="Propose the files on the Hub instead of committing them.")
@click.option("--replace-card", is_flag=True, help="Replace the repository's model card if it has another.")
@config_options
def command(
    path: Path,
    target: str,
    dry_run: bool,
    weights: Path | None,
    out: Path | None,
    config: Path | None,
    assignments: tuple[str, ...],
    repo: str | None,
    endpoint: str | None,
    **how: bool,
) -> None:
    """Send the report in folder RUN to a leaderboard server, to the Hugging Face Hub, or prepare it for RobustBench.

    The token comes from the environment (ROBUSTEVAL_TOKEN for a server, HF_TOKEN for the Hub) or from the system's
    keyring. What is there already with the same content is not sent again, and an interrupted upload is resumed by the
    same command. RobustBench takes submissions by issue form only: the texts are written, and the forms named.
    """
    if target.startswith(("http://", "https://")):
        _refuse({"--repo": repo, "--endpoint": endpoint, "--config": config, "--set": assignments, **_flags(how)})
        _to_server(path, target, out, weights, dry_run)
    elif target == HUB:
        _to_hub(path, (config, assignments), out, weights, dry_run, (repo, endpoint), how)
    elif target == BY_HAND:
        _refuse({"--repo": repo, "--endpoint": endpoint, "--weights": weights, **_flags(how)})
        _by_hand(path, (config, assignments), out, dry_run)
    else:
        raise unknown("place to submit to", target, [HUB, BY_HAND, "https://..."])


def _flags(how: Mapping[str, bool]) -> dict[str, bool]:
    return {f"--{name.replace('_', '-')}": given for name, given in how.items()}


def _refuse(given: Mapping[str, object]) -> None:
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag} means nothing for this target.")


def _to_server(path: Path, url: str, out: Path | None, weights: Path | None, dry_run: bool) -> None:
    from robusteval.submission.bundle import measure, model_files, report_files, write_zip
    from robusteval.submission.endpoint import check_endpoint, find_token
    from robusteval.submission.server import Server, address

    endpoint = check_endpoint(url)
    server = None if dry_run else Server(endpoint, find_token("ROBUSTEVAL_TOKEN", endpoint), told=_console.warn)
    run = checked(path)
    files = report_files(run.folder) | (model_files(weights, run.report) if weights else {})
    bundle = write_zip(files, (out or beside(run.folder, "submission")) / "bundle.zip")
    click.echo(f"bundle: {shlex.quote(str(bundle.path))}, {bundle.bytes} bytes, SHA-256 {bundle.sha256}")
    if server is None:
        _show(run, f"PUT {address(endpoint, bundle.sha256)}", measure(files))
        return
    answer, sent = server.submit(bundle)
    click.echo(f"{'sent' if sent else 'there already'}: {answer.status}" + (f", {answer.url}" if answer.url else ""))


def _to_hub(
    path: Path,
    options: tuple[Path | None, tuple[str, ...]],
    out: Path | None,
    weights: Path | None,
    dry_run: bool,
    place: tuple[str | None, str | None],
    how: Mapping[str, bool],
) -> None:
    from robusteval.exports.base import write_files
    from robusteval.exports.huggingface import ORIGINAL
    from robusteval.submission.bundle import measure, model_files, report_files
    from robusteval.submission.endpoint import check_endpoint, find_token
    from robusteval.submission.hub import ENDPOINT, Hub

    repo, endpoint = place[0], check_endpoint(place[1] or os.environ.get("HF_ENDPOINT") or ENDPOINT)
    if not repo:
        raise UsageError("--to huggingface needs --repo USER/NAME.")
    hub = None if dry_run else Hub(endpoint, repo, find_token("HF_TOKEN", endpoint), **how)
    exporter, run = build(HUB, *options), checked(path)
    made = allowed(exporter(run), HUB)
    files = write_files(made.files, out or beside(run.folder, HUB))
    files |= {f"{ORIGINAL}/{name}": path for name, path in report_files(run.folder).items()}
    files |= model_files(weights, run.report, prefix="") if weights else {}
    for note in made.notes:
        _console.say(f"note: {note}")
    if hub is None:
        chosen = "".join(f" {flag}" for flag, given in _flags(how).items() if given)
        _show(run, f"repository {repo} at {endpoint}{chosen}", measure(files))
        return
    commit, sent = hub.submit(measure(files), f"Robustness report {run.report.created[:10]}")
    click.echo(f"{'sent' if sent else 'there already'}: {commit}")


def _by_hand(path: Path, options: tuple[Path | None, tuple[str, ...]], out: Path | None, dry_run: bool) -> None:
    from robusteval.exports.base import write_files
    from robusteval.submission.bundle import measure

    exporter, run = build(BY_HAND, *options), checked(path)
    made = allowed(exporter(run), BY_HAND)
    files = write_files(made.files, out or beside(run.folder, BY_HAND))
    if dry_run:
        _show(run, "nothing; these files are for you to attach", measure(files))
    for written in files.values():
        click.echo(f"wrote {shlex.quote(str(written))}")
    for note in made.notes:
        click.echo(note)


def _show(run: Evaluation, where: str, files: list[FileToSend]) -> None:
    """Print what would be sent, and what the report tells about its author's machine."""
    report = run.report
    click.echo(f"dry run, nothing is sent: {where}")
    for file in files:
        click.echo(f"{file.bytes:>12}  {file.sha256}  {file.name}")
    click.echo(f"{sum(file.bytes for file in files):>12}  bytes in {len(files)} files")
    told = {
        "model": report.model.name,
        "its source": report.model.source,
        "data": report.data.name,
        "command": report.command,
        "platform": f"{report.environment.platform}, {report.environment.device} {report.environment.device_name}",
    }
    for name, value in told.items():
        click.echo(f"the report tells {name}: {_console.printable(value)}")
