"""What is done for one cell of a comparison: train, measure margins, evaluate."""

from __future__ import annotations

from pathlib import Path

from robusteval.analysis.margins import measure
from robusteval.comparison.cells import Cell, train_cell
from robusteval.comparison.config import CompareConfig
from robusteval.errors import UsageError
from robusteval.evaluation.plan import Plan, identity, prepare
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.suite import Suite, load_suite
from robusteval.evaluation.validate import MANIFEST, seal
from robusteval.models.base import LoadedModel
from robusteval.models.io import load_folder, weights_digest
from robusteval.render.curves import training_curves
from robusteval.render.documents import write_documents
from robusteval.runs import RunDir, canonical_json, read_json, write_atomic
from robusteval.threat import ThreatModel
from robusteval.training.plan import Plan as TrainPlan

CHECKPOINTS = ("best", "last")


def suite_of(config: CompareConfig, cell: Cell) -> str:
    """Return the suite that the cell's model is attacked with."""
    return config.full_suite if cell.seed < config.full_seeds else config.suite


def check_suites(config: CompareConfig, threat: ThreatModel) -> tuple[Suite, Suite]:
    """Return the shared and the full suite; raise `UsageError` if they cannot be used together."""
    shared, full = load_suite(config.suite, threat), load_suite(config.full_suite, threat)
    if config.full_seeds and full.specs[: len(shared.specs)] != shared.specs:
        raise UsageError(
            f"full_suite '{config.full_suite}' does not begin with the stages of suite '{config.suite}', "
            "so their results could not be compared; set another one, or full_seeds=0."
        )
    if config.suite != config.full_suite and Path(config.suite).stem == Path(config.full_suite).stem:
        raise UsageError(
            f"suite '{config.suite}' and full_suite '{config.full_suite}' are both called "
            f"'{Path(config.suite).stem}', which names a folder; rename one of the files."
        )
    return shared, full


def rehearse(config: CompareConfig, cell: Cell, plan: TrainPlan) -> None:
    """Prepare the evaluation of a cell with an untrained model; raise what would be raised once it is trained."""
    blank = LoadedModel(plan.build_model(), name=cell.name, source="", architecture=plan.config.model.name)
    _evaluation(config, cell, plan, blank)


def margins_path(cell: Cell, checkpoint: str) -> Path:
    """Where the margins of a checkpoint are."""
    return cell.folder / f"margins-{checkpoint}.json"


def evaluation_path(cell: Cell, suite: str) -> Path:
    """Where the evaluation with a suite is."""
    return cell.folder / f"evaluate-{Path(suite).stem}"


def is_done(config: CompareConfig, cell: Cell) -> bool:
    """Whether nothing is left to do for a cell: its evaluation, the last step, is sealed."""
    return (evaluation_path(cell, suite_of(config, cell)) / MANIFEST).is_file()


def work(config: CompareConfig, cell: Cell) -> None:
    """Train a cell, measure both checkpoints on the test samples, and evaluate the best one."""
    plan, result = train_cell(cell)
    training_curves(result.history, f"{cell.name}: {plan.info.title}, {plan.threat}", cell.run / "training.png")
    for checkpoint in CHECKPOINTS:
        _measure(config, cell, checkpoint, _loaded(config, cell, plan, checkpoint))
    _evaluate(_loaded(config, cell, plan, "best"), evaluation_path(cell, suite_of(config, cell)))


def _loaded(config: CompareConfig, cell: Cell, plan: TrainPlan, checkpoint: str) -> Plan:
    model = load_folder(cell.run / checkpoint, plan.info.shape, plan.info.num_classes)
    model.module.eval()
    return _evaluation(config, cell, plan, model)


def _evaluation(config: CompareConfig, cell: Cell, plan: TrainPlan, model: LoadedModel) -> Plan:
    """Return the evaluation of a model on the data and threat model that the cell is trained for."""
    train = plan.config
    places = {"dataset": train.dataset, "data_dir": train.data_dir, "download": train.download, "device": train.device}
    same = {"norm": train.norm, "eps": train.eps, "suite": suite_of(config, cell), "workers": 1}
    return prepare(config.evaluate.model_copy(update={**places, **same}), model)


def _measure(config: CompareConfig, cell: Cell, checkpoint: str, plan: Plan) -> None:
    path, weights = margins_path(cell, checkpoint), weights_digest(plan.model.module)
    if path.is_file() and read_json(path)["weights_sha256"] == weights:
        return
    steps, seed = config.margin_steps, plan.config.seed
    found = measure(plan.model.module, plan.split, plan.threat, steps=steps, seed=seed)
    record = {"weights_sha256": weights, "steps": steps, "seed": seed}
    for name in ("ids", "labels", "clean", "adversarial", "scaled"):
        record[name] = getattr(found, name).tolist()
    record |= {"clean_accuracy": found.clean_accuracy, "robust_accuracy": found.robust_accuracy}
    write_atomic(path, canonical_json(record).encode())


def _evaluate(plan: Plan, folder: Path) -> None:
    run = RunDir(folder)
    if (folder / MANIFEST).is_file():
        run.claim(identity(plan))
        return
    write_documents(evaluate(plan, run), folder, plan.split)
    seal(folder)
