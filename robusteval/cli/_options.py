"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from robusteval.evaluation.verify import Source

Command = TypeVar("Command", bound=Callable[..., Any])


def stack(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


config_options = stack(
    click.option("--config", type=click.Path(path_type=Path), help="TOML file with settings."),
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set any setting, e.g. seed=1."),
)
data_options = stack(
    click.option("--dataset", help="Dataset name, or imagefolder:PATH.  [default: digits, or the model's own]"),
    click.option("--data-dir", help="Folder (or archive) where the dataset's files lie."),
    click.option("--download", is_flag=True, default=None, help="Fetch the dataset if it is not there."),
)
threat_options = stack(
    click.option("--norm", help="Linf, L2, L1 or L0.  [default: Linf, or the model's own]"),
    click.option("--eps", help="Budget, as in 8/255 or 0.5.  [default: the dataset's customary one]"),
)
run_options = stack(
    click.option("--seed", type=int, help="Seed of everything random.  [default: 0]"),
    click.option("--device", help="cpu, cuda, cuda:1 or auto.  [default: auto]"),
    click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: a new one under runs/]"),
    click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON record on stdout."),
)
source_options = stack(
    click.option("--model", help="Where the model is.  [default: the file or folder that the run names]"),
    click.option("--architecture", help="Architecture of a weights file, e.g. small_cnn."),
    click.option("--dataset", help="Where the samples are, if under another name.  [default: as the report says]"),
    click.option("--data-dir", help="Folder (or archive) where the dataset's files lie."),
    click.option("--batch-size", type=int, help="How many images the device holds at once.  [default: by the device]"),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:1."),
)


def source_of(
    model: str | None,
    architecture: str | None,
    dataset: str | None,
    data_dir: str | None,
    batch_size: int | None,
    device: str,
) -> Source:
    """Return what `source_options` say."""
    from robusteval.evaluation.verify import Source
    from robusteval.settings import PluginSpec

    spec = PluginSpec(name=architecture) if architecture else None
    return Source(model, spec, dataset, data_dir, device, batch_size)
