"""Faults measured in AutoAttack (pyautoattack 0.2.0) and Foolbox (3.3.4): each must stop short of our users.

`ELSEWHERE` lists the faults that a test in another file guards against, as (fault, "file::test") without the prefixes
"test_"; the tests below are for the rest. So any known fault is found from this file.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pyautoattack
import pytest
import torch
from test_apgd_square import THREATS, linear
from test_cli_evaluate import folder_of_images
from test_closed_forms import CASES, FACTORS, Case, affine, problem, run
from test_evaluation import in_memory
from test_foolbox import Flat, Precise, broken, distance, inputs, odd_one, raw, rng, threat, wrap
from test_foolbox import linear as two_classes
from test_judge import Linear, attack, samples
from test_judge import run as judged
from torch import Tensor, nn

from robusteval.attacks.apgd import APGD
from robusteval.attacks.autoattack import AutoAttack
from robusteval.attacks.foolbox import Foolbox
from robusteval.attacks.pgd import PGD
from robusteval.attacks.square import Square
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.flags import autoattack_checks
from robusteval.evaluation.judge import judge
from robusteval.evaluation.preflight import inspect
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.suite import Stage, load_suite
from robusteval.models.base import frozen
from robusteval.rng import SampleRng
from robusteval.runs import RunDir
from robusteval.testing._problems import relu_net
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict

ELSEWHERE = (
    # AutoAttack, resuming
    ("resume always raises", "evaluation::an_interrupted_run_continues_with_what_is_missing"),
    ("a loaded state cannot be read", "cli_evaluate::report_json_on_stdout_fail_under_and_validate"),
    ("the first success after a resume raises", "cli_evaluate::kill_at_three_moments_then_the_same_command"),
    ("a path given as text raises", "cli_evaluate::ctrl_c_is_130_says_so_and_resumes"),
    ("RobustBench crashes after the last attack", "evaluation::a_finished_report_is_valid_and_brackets_the_truth"),
    ("resume repeats a whole attack", "evaluation::an_interrupted_run_continues_with_what_is_missing"),
    ("resume with other eps or seed is not noticed", "evaluation::resuming_with_other_settings_names_the_field"),
    ("resume with another model is not noticed", "evaluation::resuming_with_other_weights_is_refused"),
    ("resume with other code is not noticed", "evaluation::resuming_with_other_code_is_refused"),
    ("the state is not written atomically", "cli_evaluate::full_disk_loses_nothing"),
    ("earlier adversarial inputs are lost", "cli_evaluate::kill_at_three_moments_then_the_same_command"),
    # AutoAttack, checks
    ("checks are text, nothing is stored", "evaluation::autoattacks_own_checks_are_in_the_report"),
    ("inputs outside [0, 1] are silent", "evaluation::a_pixel_out_of_range_anywhere_stops_the_run"),
    ("batch statistics at inference are not flagged", "gallery::every_broken_defence_is_caught"),
    ("log-softmax and half-precision softmax slip by", "gallery::every_broken_defence_is_caught"),
    ("training mode is not checked", "evaluation::the_model_is_left_as_found"),
    ("NaN logits are not checked", "judge::nan_logits_near_a_sample_stop_the_run"),
    ("NaN gradients are not checked", "evaluation::nan_gradients_near_the_samples_do_not_pass_as_robustness"),
    ("wrong normalisation is silent", "evaluation::a_model_no_better_than_guessing_is_named"),
    ("eps = 8 for 8/255 is silent", "cli_evaluate::wrong_requests"),
    # AutoAttack, behaviour
    ("standard crashes for 2 to 9 classes", "autoattack::few_classes"),
    ("APGD crashes on other precisions", "randomised::models_of_other_precisions_are_attacked_like_any"),
    ("norm and box are never enforced", "judge::an_attack_that_lies_breaks_nothing"),
    ("float32 rounding leaves the ball", "conformance::held_candidates_are_inside_without_any_tolerance"),
    ("without a seed the clock decides", "evaluation::two_workers_change_no_byte"),
    ("global generators are overwritten", "conformance::attack"),
    ("an attack leaves its object changed", "conformance::attack"),
    ("lucky draws break", "randomised::where_one_evaluation_decides_a_lucky_draw_breaks_and_in_rand_it_does_not"),
    ("softmax gets a warning only", "evaluation::doubtful_models_stop_unless_allowed_and_are_named_in_the_report"),
    ("Square crashes on some sizes in L2 and L1", "autoattack::square_takes_images_of_any_size"),
    ("the device is cuda or nothing", "cli_evaluate::report_json_on_stdout_fail_under_and_validate"),
    ("not torch: needs adapters", "transfer::a_function_is_attacked_by_its_scores_and_gradient_attacks_are_refused"),
    ("no L0", "transfer::l0_from_the_command_to_the_checked_report"),
    ("users average over attacks", "evaluation::validate_finds_a_forged_report_even_with_fresh_hashes"),
    # Foolbox
    ("what quarantine.toml says", "foolbox::a_quarantined_fault_is_still_there"),
    ("L2FMN never projects", "foolbox::a_wrong_request_is_answered"),
    ("GenAttack, Spatial, Dataset: misnomers", "foolbox::every_attack_is_refused_with_a_reason_or_not_at_all"),
    ("Brendel-Bethge needs numba, undeclared", "foolbox::every_attack_is_refused_with_a_reason_or_not_at_all"),
    ("dense L1 steps break next to nothing", "foolbox::running_what_is_quarantined_leaves_a_warning"),
    ("HopSkipJump and noise depend on the batch", "foolbox::company_changes_nothing"),
    ("Carlini-Wagner depends on the batch", "foolbox::a_stage_is_exact_on_a_linear_classifier"),
    ("L0 attacks raise when given an eps", "foolbox::a_stage_is_exact_on_a_linear_classifier"),
    ("one sample without a start stops all", "foolbox::a_sample_without_a_starting_point_is_left_alone"),
    ("one failing sample stops all", "foolbox::a_sample_that_fails_does_not_take_others_with_it"),
    ("raw results lie outside the ball", "foolbox::every_other_attack_keeps_to_its_norms"),
    ("results exceed eps by rounding", "foolbox::the_harness_accepts_every_claim"),
    ("success and prediction differ", "judge::witnesses_are_inside_and_misclassified_and_described_truly"),
    ("HopSkipJump's norm is not what was meant", "foolbox::norms"),
    ("cross-entropy alone overstates", "foolbox::the_margin_has_a_gradient_where_cross_entropy_has_none"),
    ("restarts attack what is broken already", "foolbox::restarts_go_on_with_what_is_left"),
    ("labels other than int64 crash", "conformance::dataset"),
    ("mixed-up smallest perturbations", "closed_forms::a_shipped_attack_does_what_the_closed_form_says"),
)


def test_the_tests_listed_are_there() -> None:
    for fault, test in ELSEWHERE:
        file, name = test.split("::")
        tree = ast.parse((Path(__file__).parent / f"test_{file}.py").read_text(encoding="utf-8"))
        assert f"test_{name}" in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}, fault


LINF, L1 = THREATS[0], THREATS[2]
FEW = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
COUNTED = {"apgd-t": "apgd-t: 2 targets instead of 5", "fab-t": "fab-t: 2 targets instead of 9"}


def streams(count: int) -> SampleRng:
    return SampleRng(5, tuple(range(count)), 0)


# AutoAttack.


def test_a_resume_with_other_data_or_libraries_is_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        folder_of_images(tmp_path / "images", part, 3, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def start() -> None:
        evaluate(in_memory(model, dataset=f"imagefolder:{tmp_path / 'images'}"), RunDir(tmp_path / "run"))

    start()
    config, image = tmp_path / "run" / "config.json", tmp_path / "images" / "test" / "class0" / "0.png"
    settings, pixels = config.read_text(), image.read_bytes()
    config.write_text(settings.replace('"foolbox": "', '"foolbox": "0.'))
    with pytest.raises(UsageError, match="foolbox"):
        start()
    config.write_text(settings)
    image.write_bytes((image.parent / "1.png").read_bytes())
    with pytest.raises(UsageError, match="data_sha256"):
        start()
    image.write_bytes(pixels)
    start()


def test_what_square_finds_after_gradients_is_told_in_a_resumed_run(digits_net: nn.Module, tmp_path: Path) -> None:
    """AutoAttack's check of Square is silent there."""

    class Rounded(nn.Module):
        net, stopped = digits_net, True

        def forward(self, x: Tensor) -> Tensor:
            if self.stopped and any((tmp_path / "run" / "chunks").glob("*.json")):
                raise RuntimeError("stopped")
            logits: Tensor = self.net((x * 8).round() / 8)
            return logits

    (tmp_path / "both.toml").write_text(
        'title = "one with gradients, one without"\n'
        '[[stages]]\nname = "apgd-ce"\nattack = "apgd"\nparams = { steps = 5 }\n'
        '[[stages]]\nname = "square"\nattack = "square"\nparams = { queries = 100 }\n'
    )
    model = Rounded()
    plan = in_memory(model, suite=str(tmp_path / "both.toml"), eps="0.15", limit=40, chunk_size=20)
    with pytest.raises((RobustevalError, RuntimeError), match="stopped"):
        evaluate(plan, RunDir(tmp_path / "run"))
    model.stopped = False
    report = evaluate(plan, RunDir(tmp_path / "run"))
    assert report.stages[1].closed > 3
    assert {"square-success", "black-box-beats-white-box"} <= {finding.name for finding in report.findings}


def test_a_dynamic_model_is_named_and_the_next_one_and_the_tracer_are_left_in_peace() -> None:
    class Purifier(Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                point = x.clone().requires_grad_()
                (slope,) = torch.autograd.grad(super().forward(point).sum(), point)
            return super().forward(x - 1e-6 * slope)

    def tracer(frame: FrameType, event: str, value: Any) -> None:
        return None

    (_, x, y), before = samples(8), sys.gettrace()
    sys.settrace(tracer)
    try:
        named = [{each.name for each in autoattack_checks(model, x, y)} for model in (Purifier(), Linear())]
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert ["dynamic" in names for names in named] == [True, False]


@pytest.mark.parametrize("ce", [AutoAttack("apgd-ce"), APGD(steps=5), PGD(steps=5, loss="ce")])
def test_zero_gradients_are_counted_for_every_loss_and_step(ce: Any) -> None:
    class Stairs(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * 200).round() / 200)

    (_, x, _), model = samples(), Stairs()
    stage = judged(model, x, model(x).argmax(1), [Stage("ce", "attack", ce)]).stages[0]
    assert stage.zero_gradients == stage.backward > 4 * stage.entered > 0


def test_labels_out_of_range_are_named() -> None:
    model, x, y = samples()
    y[3] = 4
    with frozen(model) as module, pytest.raises(RobustevalError, match=r"labels span 0\.\.4; expected 0\.\.3"):
        inspect(module, x, y, 4, False, LINF)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("component", FEW)
def test_plus_runs_with_few_classes(component: Any, classes: int) -> None:
    factors = (0.3, 1.3) if component.endswith("-t") else (0.3,)  # survivors meet every target
    case = linear(LINF, classes, factors, (1, 6, 8))
    assert case.broken(case.run(AutoAttack(component, "plus")).candidates) == [factor < 1 for factor in factors]


def test_few_classes_are_described_truly() -> None:
    """AutoAttack prints APGD's count of targets for FAB's, and warns of targets that `rand` does not have."""
    case = linear(L1, 3, (0.3,), (1, 6, 8))
    for component, said in COUNTED.items():
        assert case.run(AutoAttack(component)).adaptations[-1] == said  # type: ignore[arg-type]
    told = linear(LINF, 3, (0.3,)).run(AutoAttack("apgd-dlr", "rand")).adaptations
    assert not any(word in each for each in told for word in ("targets", "classes"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("component", ["fab-t", "square"])
def test_fab_and_square_take_models_of_other_precisions(component: Any, dtype: torch.dtype) -> None:
    case = linear(LINF, 3, (0.3,) * 3, (1, 6, 8))
    with frozen(affine(case.model.weights[0]).to(dtype)) as case.model:  # type: ignore[assignment]
        assert case.broken(case.run(AutoAttack(component)).candidates) == [True] * 3


def test_the_forward_batch_size_changes_nothing_in_autoattack() -> None:
    """AutoAttack seeds every batch alike, so its own results depend on the batch size."""
    it = relu_net(ThreatModel.parse("Linf", "0.01"), 36)
    probes, ce = (Probe(it.model, 64), Probe(it.model, 16)), AutoAttack("apgd-ce")
    whole, split = (ce(probe, it.x, it.y, it.threat, streams(36)).candidates for probe in probes)
    assert torch.equal(whole, split)
    assert 0 < int((it.predict(whole) == it.y).sum()) < 36


@pytest.mark.parametrize("dlr", [AutoAttack("apgd-dlr"), APGD(loss="dlr")])
def test_the_dead_zone_of_dlr_is_neither_robustness_nor_a_fault_of_the_model(dlr: Any) -> None:
    class Third(nn.Module):
        """Puts class 0 first at grey and third everywhere else, where the DLR loss has no gradient."""

        def forward(self, x: Tensor) -> Tensor:
            off = (x.flatten(1) - 0.5).sum(1).abs()
            return torch.stack([0 * off + 1e-6, off, 2 * off], 1)

    x, y = torch.full((2, 3, 2, 2), 0.5), torch.zeros(2, dtype=torch.long)
    end = judged(Third(), x, y, [Stage("dlr", "attack", dlr)])
    assert [row.verdict for row in end.rows] == [Verdict.BROKEN] * 2
    assert end.stages[0].zero_gradients == 0


@pytest.mark.parametrize("edge", [(slice(None), 0, -1), (slice(None), 0, slice(None), -1)], ids=["row", "column"])
def test_our_square_searches_the_last_row_and_column(edge: Any) -> None:
    """AutoAttack's never puts a small square there; once it does, this test says so."""
    pattern = torch.where(torch.arange(8) % 3 == 0, -1.0, 1.0)

    class Edge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            margin = 0.9 * 8 * LINF.radius - ((x[edge] - 0.5) * pattern).sum(1)
            return torch.stack([margin, -margin], 1)

    x, y = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.long)
    theirs = pyautoattack.AutoAttack(Edge(), norm="Linf", eps=LINF.radius, seed=1, version="standard").square
    theirs.n_queries = 1000
    with torch.random.fork_rng():
        found = [Square(queries=1000)(Edge(), x, y, LINF, streams(4)).candidates, theirs.perturb(x, y)]
    assert [Edge()(point).argmax(1).tolist() for point in found] == [[1] * 4, [0] * 4]


# Foolbox.


def test_what_is_misclassified_or_broken_already_is_not_attacked() -> None:
    (model, x, y), seen = samples(), []

    def halfway(x: Tensor, y: Tensor) -> Tensor:
        seen.append(x)
        return PGD(steps=40)(model, x, y, ThreatModel.parse("Linf", "0.01"), streams(len(x))).candidates

    end = judged(model, x, y, [attack(halfway), Stage("again", "attack", attack(halfway).run)])
    left = torch.tensor([row.verdict is Verdict.UNKNOWN for row in end.rows])
    assert torch.equal(seen[0], x[model(x).argmax(1) == y])
    assert torch.equal(seen[1], x[left])
    assert len(x) > len(seen[0]) > len(seen[1]) > 0


def test_an_input_just_outside_the_box_is_named() -> None:
    model, x, y = samples()
    x[7, 0, 0, 0] = 1 + 2**-23
    with pytest.raises(RobustevalError, match=r"sample 107 has pixels outside \[0, 1\]"):
        judged(model, x, y, [attack(lambda x, y: x)])


SUITE = [case for case in CASES.values() if "-foolbox-" in case.name]
OURS = [case for case in CASES.values() if case.name.endswith(("-apgd", "-pgd", "-fmn", "-ddn", "-sigma_zero"))]


@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.name)
def test_every_stage_takes_double_precision_logits(case: Case) -> None:
    """In Foolbox some turn their inputs into double precision, too, and fail."""
    (x, y), bound = inputs(case.norm.value), threat(case.norm.value)
    result = case.attack(Precise(torch.float64), x[:2], y[:2], bound, rng(2))
    assert broken(two_classes(), x[:2], y[:2], result, bound)[0]
    assert result.warnings == ()


@pytest.mark.parametrize("case", [*SUITE[:3], *OURS], ids=lambda case: case.name)
def test_a_caller_that_wants_no_gradients_changes_nothing(case: Case) -> None:
    it = problem(case.norm, 2, FACTORS[:3], (3, 4, 4))
    expected = run(case, it)
    with torch.no_grad():
        assert torch.equal(run(case, it), expected)


@pytest.mark.parametrize(
    "white",
    [
        PGD(),
        AutoAttack("apgd-ce"),
        Foolbox("LinfDeepFoolAttack"),
    ],
)
def test_inference_mode_is_an_error_never_robustness(white: Any) -> None:
    model, x, y = samples()
    with torch.inference_mode(), pytest.raises(RobustevalError):
        judged(model, x, y, [Stage("white", "attack", white)])


@pytest.mark.parametrize(("norm", "eps", "weak"), [("Linf", "0.02", "LinfPGD"), ("L1", "1", "L1PGD")])
def test_the_suite_breaks_what_default_pgd_breaks_and_more(norm: str, eps: str, weak: str) -> None:
    bound = ThreatModel.parse(norm, eps)
    it = relu_net(bound)
    fell = it.predict(Foolbox(weak)(it.model, it.x, it.y, bound, streams(32)).candidates) != it.y
    stages = load_suite("foolbox", bound).stages()
    rows = judge(Probe(it.model, 64), it.x, it.y, torch.arange(32), bound, stages, streams(32)).rows
    falls = torch.tensor([row.verdict is Verdict.BROKEN for row in rows])
    assert falls[fell].all()
    assert 32 > int(falls.sum()) > int(fell.sum())


def test_a_hopeless_sample_leaves_l0_fmn_the_others() -> None:
    class Stuck(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            constant = torch.tensor([1.0, 0.0]).expand(len(x), 2)
            return torch.where((x[:, 0, 0, 0] == 1)[:, None], constant, two_classes()(x))

    (x, y), bound = odd_one("L0"), threat("L0")
    with pytest.raises(IndexError):
        raw("L0FMNAttack", steps=400)(wrap(Stuck()), x[:3], y[:3], epsilons=None)
    result = Foolbox("L0FMNAttack", {"steps": 400})(Stuck(), x[:3], y[:3], bound, rng(3))
    assert broken(Stuck(), x[:3], y[:3], result, bound) == [False, True, True]


def test_hop_skip_jump_searches_its_grid_per_sample() -> None:
    """In Foolbox the best of the grid is chosen for the whole batch."""
    (x, y), bound = inputs("L2"), threat("L2")
    search = Foolbox("HopSkipJumpAttack", {"steps": 4, "stepsize_search": "grid_search"})
    found = search(two_classes(), x[:3], y[:3], bound, rng(3)).candidates
    alone = search(two_classes(), x[2:3], y[2:3], bound, SampleRng(7, rng(3).ids[2:], 5)).candidates
    assert torch.allclose(found[2], alone[0], atol=1e-5)
    assert (bound.distance(x[:3], found) < 1.5 * distance(x[:3], "L2")).all()


def test_a_vanishing_gradient_gives_no_nan() -> None:
    (x, y), bound = inputs("L2"), threat("L2")
    for name in ("VirtualAdversarialAttack", "DDNAttack", "L2DeepFoolAttack"):
        result = Foolbox(name, {"steps": 3})(Flat(), x, torch.zeros_like(y), bound, rng(8))
        assert bound.contains(x, result.candidates).all()


def test_an_attack_of_one_eps_is_not_taken_for_a_minimiser() -> None:
    """In Foolbox it does not search for the smallest eps."""
    claims = {case.attack.attack: case.attack.minimal for case in SUITE if isinstance(case.attack, Foolbox)}
    fixed = ("LinfBasicIterativeAttack", "LinfPGD", "L2BasicIterativeAttack", "SparseL1DescentAttack")
    assert {name for name, minimal in claims.items() if not minimal} == set(fixed)
