"""What is done for one cell of a comparison: train, measure margins, evaluate."""

from __future__ import annotations

from pathlib import Path

from robusteval.analysis.margins import measure
from robusteval.comparison.cells import Cell, train_cell
from robusteval.comparison.config import CompareConfig
from robusteval.errors import UsageError
from robusteval.evaluation.plan import Plan, identity, prepare
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.suite import load_suite
from robusteval.evaluation.validate import MANIFEST, seal
from robusteval.models.io import load_folder, weights_digest
from robusteval.render.curves import training_curves
from robusteval.render.markdown import render
from robusteval.runs import RunDir, canonical_json, read_json, write_atomic
from robusteval.threat import ThreatModel
from robusteval.training.plan import Plan as TrainPlan

CHECKPOINTS = ("best", "last")


def suite_of(config: CompareConfig, cell: Cell) -> str:
    """Return the suite that the cell's model is attacked with."""
    return config.full_suite if cell.seed < config.full_seeds else config.suite


def check_suites(config: CompareConfig, threat: ThreatModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the stages of the shared and of the full suite; raise `UsageError` if one does not begin the other."""
    shared = load_suite(config.suite, threat).specs
    full = load_suite(config.full_suite, threat).specs if config.full_seeds else shared
    if full[: len(shared)] != shared:
        raise UsageError(
            f"full_suite '{config.full_suite}' does not begin with the stages of suite '{config.suite}', "
            "so their results could not be compared; set another one, or full_seeds=0."
        )
    return tuple(stage.name for stage in shared), tuple(stage.name for stage in full)


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
    """Return the evaluation of a checkpoint on the data and threat model it was trained for."""
    train, info = plan.config, plan.info
    places = {"dataset": train.dataset, "data_dir": train.data_dir, "download": train.download, "device": train.device}
    same = {"norm": train.norm, "eps": train.eps, "suite": suite_of(config, cell), "workers": 1}
    model = load_folder(cell.run / checkpoint, info.shape, info.num_classes)
    model.module.eval()
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
    report = evaluate(plan, run)
    write_atomic(folder / "report.md", render(report).encode())
    seal(folder)
