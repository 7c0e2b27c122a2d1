"""The command line: a click group that imports a command only when it is called."""

from __future__ import annotations

import importlib
import os
import sys

import click

from robusteval.errors import RobustevalError, nearest

COMMANDS = {
    "train": "Train a robust classifier (SOVR on digits unless told otherwise).",
    "evaluate": "Attack a model, bracket its robust accuracy and write a report.",
    "compare": "Train and attack several objectives under one recipe, and write one table.",
    "diff": "Compare two evaluations: what differs, a paired test, changed verdicts.",
    "analyze": "Explain a result: logit margins, input gradients, the CE-vs-OVR trajectory.",
    "render": "Write report.html, report.md and the curve of an evaluation's folder again.",
    "validate": "Check a report against its schema and against itself.",
    "verify": "Replay the evidence of a report with the model and the data; --attack N audits it.",
    "calibrate": "Compare a run's suite with another, say `standard`, on a random part of its samples.",
    "export": "Write a report in the form of RobustBench, the Hugging Face Hub, or CSV.",
    "submit": "Send a report to a leaderboard or to the Hugging Face Hub, or show what would be sent.",
    "leaderboard": "Run a leaderboard for reports, or write one as static files.",
    "list": "Name every plug-in: attacks, objectives, datasets, models, suites.",
}
INTERRUPTED = 130


class LazyGroup(click.Group):
    """Commands live in `robusteval/cli/<name>.py`, as the function `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the command; suggest the nearest name if there is none."""
        if name not in COMMANDS:
            ctx.fail(f"no command '{name}'.{nearest(name, COMMANDS)} Commands: {', '.join(COMMANDS)}.")
        module = importlib.import_module(f"robusteval.cli.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="robusteval")
def group() -> None:
    """Train robust image classifiers and measure, from both sides, how robust they really are."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 usage, 3 a check failed, 130 interrupted."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS; read when CUDA starts
    try:
        group.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except RobustevalError as error:
        from robusteval.cli._console import printable  # imports what no command needs that only lists

        click.echo("\n".join(map(printable, f"error: {error}".splitlines())), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the same command resumes a run where it stopped.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away, as in `| head`; not an error
        sys.exit(0)
