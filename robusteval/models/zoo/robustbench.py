"""Models of the RobustBench zoo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from robusteval.errors import UsageError, unknown
from robusteval.models.base import LoadedModel, Shape
from robusteval.models.zoo._fetch import fetching, unknown_entry
from robusteval.models.zoo._robustbench_import import import_robustbench

_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
_THREATS = ("Linf", "L2", "corruptions")


@dataclass(frozen=True)
class RobustBench:
    """RobustBench model zoo, `robustbench:<Id>` or `robustbench:<dataset>/<threat>/<Id>`.

    Croce et al., 2021, arXiv 2010.09670. ``model_dir`` holds the checkpoints as RobustBench lays them out,
    `<dataset>/<threat>/<Id>.pt`; what is not there is downloaded into it. The dataset
    follows from the data's shape and classes when it is not given, the threat model is the first of Linf, L2 and
    corruptions that has the Id.
    """

    model_dir: str = "./models"

    def load(self, rest: str, shape: Shape, num_classes: int) -> LoadedModel:
        """Load an entry through robustbench's own loader.

        Raises `UsageError` for an unknown entry or other data, `RobustevalError` when the checkpoint cannot be
        downloaded, is damaged, or holds pickled code.
        """
        *path, name = rest.split("/")
        if len(path) not in (0, 2):
            raise UsageError(f"'robustbench:{rest}' is not of the form <Id> or <dataset>/<threat>/<Id>.")
        dataset = _dataset(path[0] if path else None, shape, num_classes)
        library = import_robustbench()
        threat = _threat(library, dataset, path[1] if path else None, name)
        with fetching(f"'robustbench:{dataset}/{threat}/{name}'"):
            module = library.load_model(name, Path(self.model_dir).expanduser(), dataset, threat)
        return LoadedModel(
            module,
            name=name,
            source=f"robustbench:{dataset}/{threat}/{name}",
            architecture=type(module).__name__,
            num_classes=num_classes,
            shape=shape if dataset != "imagenet" else None,
        )


def _dataset(named: str | None, shape: Shape, num_classes: int) -> str:
    if named is not None and named not in _CLASSES:
        raise unknown("RobustBench dataset", named, _CLASSES)
    fitting = [name for name, classes in _CLASSES.items() if classes == num_classes and _takes(name, shape)]
    if not fitting or named not in (None, *fitting):
        asked = f"'{named}'" if named else "any RobustBench dataset (cifar10, cifar100, imagenet)"
        raise UsageError(f"images of shape {shape} with {num_classes} classes are not those of {asked}.")
    return fitting[0]


def _takes(dataset: str, shape: Shape) -> bool:
    return shape[0] == 3 if dataset == "imagenet" else tuple(shape) == (3, 32, 32)


def _threat(library: ModuleType, dataset: str, named: str | None, name: str) -> str:
    zoo = library.all_models[library.BenchmarkDataset(dataset)]
    entries = {threat: list(zoo.get(library.ThreatModel(threat), ())) for threat in _THREATS}
    if named is not None and named not in entries:
        raise unknown("RobustBench threat model", named, _THREATS)
    searched = [named] if named is not None else list(_THREATS)
    found = [threat for threat in searched if name in entries[threat]]
    if len(found) > 1:
        choices = " or ".join(f"robustbench:{dataset}/{threat}/{name}" for threat in found)
        raise UsageError(f"RobustBench has '{name}' for several threat models; say which: {choices}.")
    if not found:
        known = [entry for threat in searched for entry in entries[threat]]
        raise unknown_entry(f"robustbench ({dataset}, {' or '.join(searched)})", name, known)
    return found[0]
