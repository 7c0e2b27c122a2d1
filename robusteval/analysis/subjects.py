"""What an analysis looks at: some models, the data they share, and one threat model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from robusteval.datasets.base import Cut, DataInfo, Dataset, Part, Split
from robusteval.datasets.open import open_dataset
from robusteval.errors import UsageError
from robusteval.evaluation.config import EvalConfig, check_seed
from robusteval.evaluation.defaults import fill_in, trained_on
from robusteval.models._card import BEST, WEIGHTS
from robusteval.models.base import LoadedModel, check_fit
from robusteval.models.io import load_model, weights_digest
from robusteval.provenance import pick_device
from robusteval.settings import Settings
from robusteval.threat import Norm, ThreatModel


class Request(Settings):
    """What the user asked for. None is what the models' training says; ``limit`` is the first N of each part."""

    models: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    dataset: str | None = None
    data_dir: str | None = None
    download: bool = False
    norm: str | None = None
    eps: str | None = None
    limit: int | None = None
    steps: int = 20
    seed: int = 0
    batch_size: int = 256
    device: str = "auto"


@dataclass(frozen=True)
class Subjects:
    """Models by label, in eval mode and on their device, with the data and the threat model they are for.

    ``cut`` says which training samples they were trained on, None where they differ or do not say.
    """

    models: dict[str, LoadedModel]
    dataset: str
    data: Dataset
    info: DataInfo
    threat: ThreatModel
    request: Request
    cut: Cut | None = None

    def split(self, part: Part) -> Split:
        """Return ``part``, of the training part only what the models were trained on, cut to the request's limit."""
        whole = self.data.load(part)
        if part == "train" and self.cut:
            whole, _ = self.cut(whole)
        return whole.take(slice(0, self.request.limit)) if self.request.limit else whole

    @property
    def search(self) -> dict[str, int]:
        """What `measure` takes beside model, split and threat model."""
        return {"steps": self.request.steps, "seed": self.request.seed, "batch": self.request.batch_size}

    @property
    def title(self) -> str:
        """Data, budget and attack, as a figure's title states them."""
        return f"{self.info.title}, {self.threat.norm.value} eps {self.threat.label}, PGD-{self.request.steps}"

    def facts(self) -> dict[str, Any]:
        """Return what the numbers depend on, as JSON."""
        return {
            "dataset": self.dataset,
            "title": self.info.title,
            "norm": self.threat.norm.value,
            "eps": self.threat.label,
            **self.request.model_dump(include={"limit", "steps", "seed"}),
            "training_cut": self.cut.model_dump() if self.cut else None,
            "models": {
                label: {"source": model.source, "weights_sha256": weights_digest(model.module)}
                for label, model in self.models.items()
            },
        }


def gather(request: Request) -> Subjects:
    """Load the models, by default the newest run; raise `UsageError` naming those that do not fit together."""
    _check(request)
    device = pick_device(request.device)
    configs = {str(config.model): config for config in (_config(request, model) for model in request.models or [None])}
    _agree("dataset", {model: str(config.dataset) for model, config in configs.items()})
    chosen = next(iter(configs.values()))
    folder = next((config.data_dir for config in configs.values() if config.data_dir), None)
    data = open_dataset(str(chosen.dataset), folder, request.download)
    info = data.load("test").info
    threat = _threat(configs, info)
    loaded = {model: load_model(model, None, info.shape, info.num_classes, device=device) for model in configs}
    for model in loaded.values():
        check_fit(model.module, info.shape, info.num_classes, f"model '{model.name}'")
    named, dataset = _labelled(loaded, request.labels), str(chosen.dataset)
    return Subjects(named, dataset, data, info, threat, request, _cut(loaded.values(), dataset))


def _cut(models: Collection[LoadedModel], dataset: str) -> Cut | None:
    """Return how all ``models`` say that they cut ``dataset``; anything else in a stranger's card is None."""
    said = [model.training.get("cut") for model in models if model.training.get("dataset") == dataset]
    try:
        cuts = [Cut.model_validate(one) for one in said]
    except ValidationError:
        return None
    return cuts[0] if len(cuts) == len(models) and len(set(cuts)) == 1 else None


def _check(request: Request) -> None:
    """Raise `UsageError` for what is wrong whatever the models and the data are, before any file is read."""
    check_seed(request.seed)
    for name in ("limit", "steps", "batch_size"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is too small; give at least 1.")
    if not ThreatModel.parse(request.norm or Norm.LINF.value, request.eps or "1").convex:
        raise UsageError(f"norm '{request.norm}' cannot be analysed: PGD needs a convex ball; use Linf, L2 or L1.")
    labels, models = request.labels, request.models
    if labels and len(labels) != max(1, len(models)):
        raise UsageError(f"{len(labels)} --label for {max(1, len(models))} models; give one for each, in their order.")
    for kind, names in (("label", labels), ("model", models)):
        repeated = [name for i, name in enumerate(names) if name in names[:i]]
        if repeated:
            raise UsageError(f"the {kind} '{repeated[0]}' is given twice.")


def _config(request: Request, model: str | None) -> EvalConfig:
    """Return what `evaluate` would take for granted about ``model``, except that data is never guessed."""
    given = request.model_dump(include={"dataset", "data_dir", "norm", "eps"})
    config = fill_in(EvalConfig(model=model, **given))
    path = Path(str(config.model)).expanduser()
    exists = path.is_file() or ":" in str(config.model) or any((path / at / WEIGHTS).is_file() for at in ("", BEST))
    if request.dataset is None and exists and "dataset" not in trained_on(path):  # else `load_model` names the mistake
        raise UsageError(f"model '{config.model}' does not say which data it is for; name them with --dataset.")
    return config


def _threat(configs: Mapping[str, EvalConfig], info: DataInfo) -> ThreatModel:
    threats = {}
    for model, config in configs.items():
        norm = Norm.parse(str(config.norm)).value
        threats[model] = ThreatModel.parse(norm, config.eps or info.customary_eps(norm))
    _agree("norm", {model: threat.norm.value for model, threat in threats.items()})
    if len({threat.eps for threat in threats.values()}) > 1:
        _agree("eps", {model: threat.label for model, threat in threats.items()})
    return next(iter(threats.values()))


def _agree(what: str, values: Mapping[str, str]) -> None:
    if len(set(values.values())) > 1:
        listed = ", ".join(f"'{model}': {value}" for model, value in values.items())
        raise UsageError(f"the models are for different {what} ({listed}); analyse them apart, or give --{what}.")


def _labelled(models: Mapping[str, LoadedModel], labels: Sequence[str]) -> dict[str, LoadedModel]:
    """Name the models: as the user says, else by their own names, else, where two are alike, as they were given."""
    names = list(labels) or [model.name for model in models.values()]
    if len(set(names)) < len(names):
        names = list(models)
    return dict(zip(names, models.values(), strict=True))
