"""What an evaluation takes for granted: the newest run, and the data and threat model it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robusteval.errors import UsageError
from robusteval.evaluation.config import EvalConfig
from robusteval.runs import LAUNCH, read_json

LATEST = Path("runs") / "latest"


def fill_in(config: EvalConfig) -> EvalConfig:
    """Return ``config`` with model, dataset and norm decided; eps stays None unless the model's training says it.

    What the user gave stands. A model from a training run brings its dataset, where the files lay, its norm and eps;
    a dataset or norm given by the user drops what depends on it.
    """
    model = config.model or _newest_run()
    trained = _training(Path(model).expanduser())
    given = config.model_dump(exclude_none=True, exclude_defaults=True)
    found: dict[str, Any] = {"dataset": "digits", "norm": "Linf", "model": model}
    if trained.get("dataset") == given.get("dataset", trained.get("dataset")):
        found |= {key: trained[key] for key in ("dataset", "data_dir") if key in trained}
    if trained.get("norm") == given.get("norm", trained.get("norm")) and "dataset" in found:
        found |= {key: trained[key] for key in ("norm", "eps") if key in trained}
    return config.model_copy(update={key: value for key, value in found.items() if key not in given})


def _newest_run() -> str:
    if not LATEST.exists():
        raise UsageError(f"no --model given and no '{LATEST}' here; train a model first or name one.")
    return str(LATEST.parent / LATEST.resolve().name)


def _training(folder: Path) -> Mapping[str, Any]:
    """Return what a model folder or run folder says about its training; empty for any other model."""
    for candidate in (folder / "best" / "config.json", folder / "config.json"):
        if (candidate.parent / "model.safetensors").is_file() and candidate.is_file():
            card = read_json(candidate)
            training = card.get("training") if isinstance(card, dict) else None
            launch = folder / LAUNCH
            places = read_json(launch) if launch.is_file() else {}
            return {**(training if isinstance(training, dict) else {}), **places}
    return {}
