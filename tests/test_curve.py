"""Several eps in one run: shared evidence, the bracket at each, and what a stranger can check of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import Cli, one_sentence
from torch import Tensor, nn

from robusteval.attacks.apgd import APGD
from robusteval.attacks.base import AttackResult
from robusteval.attacks.fmn import FMN
from robusteval.errors import SoundnessContradiction, UsageError
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.judge import Judgement, judge
from robusteval.evaluation.ladder import budgets
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.suite import Stage
from robusteval.evaluation.validate import read_report, seal, validate
from robusteval.render.eps_curve import COLUMNS, CURVE_PICTURE, CURVE_TABLE
from robusteval.rng import SampleRng
from robusteval.runs import RunDir
from robusteval.threat import ThreatModel
from robusteval.verdict import Certificate, Verdict

EPS = ("0.01", "0.02", "0.04")
BUDGETS = tuple(ThreatModel.parse("Linf", eps) for eps in EPS)
SUITE = """
title = "nearest first"
[[stages]]
name = "fmn"
attack = "fmn"
params = { steps = 30 }
[[stages]]
name = "apgd"
attack = "apgd"
params = { steps = 20 }
"""


class Linear(nn.Module):
    """A random linear classifier on 12 inputs, far from the box so that its exact robustness is closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 12, generator=torch.Generator().manual_seed(1)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.w.T

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Linf distance to the nearest boundary: ``min_k (z_y - z_k) / ||w_y - w_k||_1``."""
        logits, w = self(x).double(), self.w.double()
        gap = logits.gather(1, y[:, None]) - logits
        return (gap / (w[y][:, None] - w[None]).abs().sum(2)).nan_to_num(torch.inf).amin(1)


def samples() -> tuple[Linear, Tensor, Tensor]:
    model = Linear().eval()
    x = 0.3 + 0.4 * torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    return model, x, model(x).argmax(1)


def judged(*stages: Stage, asked: int = 2, skip: bool = False, told: Callable[[str], None] = print) -> Judgement:
    model, x, y = samples()
    rng = SampleRng(0, tuple(range(len(x))), 0)
    probe = Probe(model, 1000)
    return judge(probe, x, y, torch.arange(len(x)), BUDGETS[asked], stages, rng, skip, None, told, BUDGETS)


STAGES = {
    "apgd": Stage("apgd", "attack", APGD(loss="margin", targets=3, steps=40)),
    "fmn": Stage("fmn", "attack", FMN(steps=60)),
}


@pytest.mark.parametrize("names", [("apgd",), ("fmn",), ("fmn", "apgd")])
def test_every_budget_has_the_exact_robustness_of_a_linear_model(names: tuple[str, ...]) -> None:
    model, x, y = samples()
    exact = model.distance(x, y)
    rows = judged(*(STAGES[name] for name in names)).rows
    for level, budget in enumerate(BUDGETS):
        clear = (exact - budget.radius).abs() > 0.002 * budget.radius  # whom rounding does not decide
        broken = torch.tensor([row.stages[level] is not None for row in rows])
        assert torch.equal(broken[clear], (exact < budget.radius)[clear])
        assert 3 < int(broken.sum()) < 57


def test_an_attack_for_the_nearest_input_runs_once_and_the_others_on_what_is_left() -> None:
    told: list[str] = []
    turns = judged(STAGES["fmn"], STAGES["apgd"], told=told.append).stages
    assert told == [turn.name for turn in turns] == ["fmn", "apgd@0.01", "apgd@0.02", "apgd@0.04"]
    assert [turn.eps for turn in turns] == ["0.01", *EPS]
    entered = [turn.entered for turn in turns]
    assert entered[0] == 60 > entered[1] > entered[2] > entered[3] > 0


def test_the_nearest_witness_is_kept_and_decides_every_budget() -> None:
    judgement = judged(STAGES["apgd"], asked=0)
    _, x, _ = samples()
    for row in judgement.rows:
        witness = judgement.witnesses.get(row.id)
        reached = [row.adv_distance is not None and row.adv_distance <= budget.radius + 1e-6 for budget in BUDGETS]
        assert [closer is not None for closer in row.stages] == reached
        assert (row.verdict is Verdict.BROKEN) == reached[0]
        assert (witness is not None) == any(reached)
        if witness:
            assert float(BUDGETS[0].distance(x[row.id : row.id + 1], witness.x_adv[None])) == row.adv_distance
    assert any(row.verdict is Verdict.UNKNOWN and row.adv_distance for row in judgement.rows), "broken beyond eps only"


class UpTo:
    """A certifier that proves what is exactly robust at up to ``share`` of its budget's radius."""

    def __init__(self, share: float = 1.0) -> None:
        self.share, self.asked = share, []  # type: ignore[var-annotated]

    def supports(self, threat: ThreatModel) -> bool:
        return True

    def __call__(self, model: Any, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> list[Certificate]:
        self.asked.append((threat.label, rng.ids))
        return [Certificate(bool(far * self.share > threat.radius), "too near") for far in model.distance(x, y)]


def test_proving_goes_on_where_it_got_through_and_brackets_every_budget() -> None:
    model, x, y = samples()
    exact = model.distance(x, y)
    certifier = UpTo(0.5)
    rows = judged(Stage("proof", "certifier", certifier), STAGES["apgd"], skip=True).rows
    for level, budget in enumerate(BUDGETS):
        proved = [row.stages[level] == f"proof@{budget.label}" for row in rows]
        assert proved == (0.5 * exact > budget.radius).tolist()
        assert 0 < sum(proved) < 60
    (_, first), (_, second), (_, third) = certifier.asked
    assert len(first) == 60
    assert set(second) == {row.id for row in rows if row.stages[0] == "proof@0.01"}
    assert set(third) == {row.id for row in rows if row.stages[1] == "proof@0.02"}
    reasons = {row.reason for row in rows if row.verdict is Verdict.UNKNOWN}
    assert reasons <= {f"proof@{eps}: too near" for eps in EPS}


def test_a_break_within_a_proved_budget_is_a_contradiction_though_found_at_a_larger_one() -> None:
    """The attack is asked for 0.04 only after proofs at 0.01 and 0.02; a nearer witness refutes them."""
    liar = Stage("proof", "certifier", UpTo(1.6))
    with pytest.raises(SoundnessContradiction, match=r"certified by 'proof@0\.0\d' and broken by 'fmn'"):
        judged(liar, STAGES["fmn"])


def test_a_search_for_the_nearest_input_also_serves_samples_that_are_proved_at_small_eps_only() -> None:
    """With `skip_certified` it must not pass them over at the larger eps."""
    model, x, y = samples()
    exact = model.distance(x, y)
    rows = judged(Stage("proof", "certifier", UpTo(0.9)), STAGES["fmn"], skip=True).rows
    for row, far in zip(rows, exact.tolist(), strict=True):
        if abs(far - BUDGETS[2].radius) > 1e-4:
            assert (row.stages[2] == "fmn") == (far < BUDGETS[2].radius)
    assert any(row.stages[0] == "proof@0.01" and row.stages[2] == "fmn" for row in rows)


class Far:
    """An attack that goes as far as it may."""

    minimal: ClassVar[bool] = False

    def supports(self, threat: ThreatModel) -> bool:
        return True

    def __call__(self, model: Any, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        return AttackResult(threat.sample(x, torch.Generator().manual_seed(0)))


def test_fixed_attacks_never_reach_beyond_their_own_budget() -> None:
    judgement = judged(Stage("far", "attack", Far()))
    for row in judgement.rows:
        names = [closer for closer in row.stages if closer]
        assert not names or names[0].startswith("far@")
    assert all(turn.rejected == 0 for turn in judgement.stages)


@pytest.mark.parametrize(
    ("norm", "eps", "curve", "labels"),
    [
        ("Linf", "8/255", False, ["8/255"]),
        ("Linf", "8/255", True, ["2/255", "4/255", "8/255", "16/255", "32/255"]),
        ("Linf", "1/255", True, ["1/1020", "1/510", "1/255", "2/255", "4/255"]),
        ("Linf", "0.5", True, ["0.125", "0.25", "0.5", "1.0"]),
        ("L2", "0.5", True, ["0.125", "0.25", "0.5", "1.0", "2.0"]),
        ("L0", "10", True, ["3", "5", "10", "20", "40"]),
        ("L0", "1", True, ["1", "2", "4"]),
        ("L2", "0.5", ("1", "1/2", "0.25"), ["0.25", "0.5", "1"]),
    ],
)
def test_budgets(norm: str, eps: str, curve: bool | tuple[str, ...], labels: list[str]) -> None:
    found = budgets(ThreatModel.parse(norm, eps), curve)
    assert [float(budget.eps) for budget in found] == pytest.approx([float(Fraction(label)) for label in labels])
    assert [budget.label for budget in found] == labels
    assert ThreatModel.parse(norm, eps) in found


@pytest.mark.parametrize("given", ["2/255,4/255, 8/255", ["2/255", "8/255", "4/255"]])
def test_several_eps_are_a_curve_up_to_the_largest(given: object) -> None:
    config = EvalConfig.model_validate({"eps": given})
    assert config.eps == "8/255"
    assert set(config.curve if isinstance(config.curve, tuple) else ()) == {"2/255", "4/255", "8/255"}


def test_wrong_lists_are_refused() -> None:
    with pytest.raises(UsageError, match="eps '' is not a number"):
        EvalConfig.model_validate({"eps": "2/255,"})
    with pytest.raises(ValueError, match="curve already"):
        EvalConfig.model_validate({"eps": "1/255,2/255", "curve": True})
    with pytest.raises(ValueError, match="at least one"):
        EvalConfig.model_validate({"eps": []})
    with pytest.raises(UsageError, match="above 1"):
        budgets(BUDGETS[0], ("8",))


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curve")
    (folder / "suite.toml").write_text(SUITE)
    given = {"model": str(model_folder), "dataset": "digits", "limit": 60, "chunk_size": 25, "eps": "0.05,0.1,0.2"}
    plan = prepare(EvalConfig.model_validate({**given, "suite": str(folder / "suite.toml"), "workers": 1}))
    evaluate(plan, RunDir(folder / "run"))
    seal(folder / "run")
    return folder / "run"


def test_the_report_has_the_curve_and_validates(run: Path) -> None:
    report = read_report(run)
    assert validate(run) == []
    assert [point.eps for point in report.curve] == ["0.05", "0.1", "0.2"]
    assert report.curve[-1].results == report.results
    robust = [point.results.empirical.count for point in report.curve]
    assert report.results.clean.count > robust[0] > robust[1] > robust[2]


def _forge(run: Path, forged: Path, change: Callable[[dict[str, Any], list[dict[str, Any]]], None]) -> list[str]:
    """Copy a run, change report and rows, seal it again and return what `validate` finds."""
    forged.mkdir()
    (forged / "witnesses").mkdir()
    for path in (run / "witnesses").iterdir():
        (forged / "witnesses" / path.name).write_bytes(path.read_bytes())
    report = json.loads((run / "report.json").read_text())
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    change(report, rows)
    (forged / "report.json").write_text(json.dumps(report))
    (forged / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seal(forged)
    return validate(forged)


def _first(rows: list[dict[str, Any]], level: int) -> dict[str, Any]:
    """Return the first row that is open at the budget before ``level`` and broken there."""
    return next(row for row in rows if row["stages"][level] and not row["stages"][level - 1])


def _keep(report: Any, rows: Any) -> None:
    """Change nothing."""


def _better_point(report: Any, rows: Any) -> None:
    report["curve"][0]["results"]["verdicts"]["broken"] -= 1
    report["curve"][0]["results"]["verdicts"]["unknown"] += 1


def _open_again(report: Any, rows: Any) -> None:
    _first(rows, 1)["stages"][1] = None


def _farther(report: Any, rows: Any) -> None:
    _first(rows, 1)["adv_distance"] = 0.15


def _other_radius(report: Any, rows: Any) -> None:
    report["curve"][0]["radius"] = 0.01


def _without_points(report: Any, rows: Any) -> None:
    report["curve"] = []


def _fewer(report: Any, rows: Any) -> None:
    del report["curve"][0]


def _unknown_eps(report: Any, rows: Any) -> None:
    report["stages"][0]["eps"] = "7"


def _skipped(report: Any, rows: Any) -> None:
    report["stages"].pop()


def _other_eps(report: Any, rows: Any) -> None:
    report["stages"][1]["eps"] = "0.2"


def _served_all(report: Any, rows: Any) -> None:
    """Claim that the attack at the smallest eps served all."""
    report["stages"] = [turn for turn in report["stages"] if turn["name"] in ("fmn", "apgd@0.05")]
    report["stages"][1]["name"] = "apgd"
    report["seconds"] = sum(turn["seconds"] for turn in report["stages"])
    for one in rows:
        one["stages"] = [closer and closer.split("@")[0] for closer in one["stages"]]


def _in_no_time(report: Any, rows: Any) -> None:
    report["seconds"] = 0.0


def _doubted(report: Any, rows: Any) -> None:
    row = next(row for row in rows if row["reason"])
    row["reason"] = "apgd@0.2: a candidate errs in most evaluations, but not beyond doubt"


def _closed_more(report: Any, rows: Any) -> None:
    report["curve"][1]["closed"]["fmn"] += 1


FORGERIES = (
    _better_point, _open_again, _farther, _other_radius, _without_points, _fewer, _unknown_eps, _skipped, _closed_more,
    _other_eps, _served_all, _in_no_time, _doubted,
)  # fmt: skip


@pytest.mark.parametrize("change", FORGERIES, ids=lambda change: change.__name__)
def test_a_forged_curve_is_found(run: Path, tmp_path: Path, change: Any) -> None:
    assert _forge(run, tmp_path / "same", _keep) == []
    assert _forge(run, tmp_path / "forged", change) != []


def test_the_command_writes_table_and_picture(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_text(SUITE)
    common = ("--model", model_folder, "--suite", "suite.toml", "--limit", "40", "--set", "chunk_size=20")
    done = cli("evaluate", *common, "--eps", "0.05,0.1", "--out", "run", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "robust accuracy against Linf eps" in done.stdout
    assert validate(tmp_path / "run") == []
    table = list(csv.DictReader((tmp_path / "run" / CURVE_TABLE).read_text().splitlines()))
    assert tuple(table[0]) == COLUMNS
    points = read_report(tmp_path / "run").curve
    stated = [(row["eps"], float(row["robust_accuracy"]), int(row["broken"])) for row in table]
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    right = [row for row in rows if row["prediction"] == row["label"]]
    for (eps, empirical, broken), point in zip(stated, points, strict=True):
        within = sum((row["adv_distance"] or 9) <= point.radius + 1e-6 for row in right)
        assert (eps, broken) == (point.eps, within)
        assert empirical == pytest.approx((len(right) - within) / 40)
    assert (tmp_path / "run" / CURVE_PICTURE).read_bytes().startswith(b"\x89PNG")
    assert CURVE_PICTURE in (tmp_path / "run" / "report.md").read_text()
    (tmp_path / "run" / CURVE_TABLE).write_text("eps,radius\n0.05,0.05\n")
    seal(tmp_path / "run")
    assert "curve.csv does not say" in cli("validate", "run").stderr
    alone = cli("evaluate", *common, "--eps", "0.05,0.1", "--out", "alone", "--workers", "1", "--batch-size", "7")
    assert alone.returncode == 0, alone.stderr
    assert (tmp_path / "alone" / "samples.jsonl").read_bytes() == (tmp_path / "run" / "samples.jsonl").read_bytes()


def test_a_curve_of_several_eps_is_refused(cli: Cli, model_folder: Path) -> None:
    done = cli("evaluate", "--model", model_folder, "--eps", "0.05,0.1", "--curve")
    assert (done.returncode, one_sentence(done.stderr)) == (2, True), done.stderr
    assert "curve already" in done.stderr
