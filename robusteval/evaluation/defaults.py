"""What an evaluation takes for granted: the newest run, and the data and threat model it was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robusteval.errors import UsageError
from robusteval.evaluation.config import EvalConfig
from robusteval.runs import LAUNCH, read_json
from robusteval.threat import Norm

LATEST = Path("runs") / "latest"


def fill_in(config: EvalConfig) -> EvalConfig:
    """Return ``config`` with model, dataset and norm decided; eps stays None unless the model's training says it.

    What the user gave stands. A model from a training run brings its dataset, where the files lay, its norm and eps;
    a dataset or norm given by the user drops what depends on it.
    """
    model = config.model or _newest_run()
    trained = trained_on(Path(model).expanduser())
    same_data = config.dataset in (None, trained.get("dataset"))
    same_norm = config.norm is None or Norm.parse(config.norm).value == trained.get("norm")
    found = {"model": model, "dataset": "digits", "norm": Norm.LINF.value}
    if same_data:
        found |= {key: trained[key] for key in ("dataset", "data_dir", "norm") if key in trained}
    if same_data and same_norm and "eps" in trained:
        found["eps"] = trained["eps"]
    given = config.model_dump(exclude_none=True)
    return config.model_copy(update={key: value for key, value in found.items() if key not in given})


def _newest_run() -> str:
    if not LATEST.exists():
        raise UsageError(f"no --model given and no '{LATEST}' here; train a model first or name one.")
    return str(LATEST.parent / LATEST.resolve().name)


def trained_on(folder: Path) -> dict[str, str]:
    """Return dataset, norm and eps that a model folder or run folder says it was trained for, and where the data lay.

    What the card says is a stranger's word: only text is taken, and it is checked like a user's.
    """
    for candidate in (folder / "best" / "config.json", folder / "config.json"):
        if (candidate.parent / "model.safetensors").is_file() and candidate.is_file():
            card = _texts(read_json(candidate), "training", ("dataset", "norm", "eps"))
            launch = folder / LAUNCH
            return card | (_texts({"launch": read_json(launch)}, "launch", ("data_dir",)) if launch.is_file() else {})
    return {}


def _texts(record: Any, part: str, keys: tuple[str, ...]) -> dict[str, str]:
    section = record.get(part) if isinstance(record, dict) else None
    if not isinstance(section, dict):
        return {}
    return {key: section[key] for key in keys if isinstance(section.get(key), str)}
