"""The suite `rapid` and what it is made of: targets by successive halving, and stages for near samples alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evaluation import edit, finish, plan_for
from test_judge import THREAT, Linear, samples
from torch import Tensor, nn

from robusteval.attacks._nearness import STUCK, is_near
from robusteval.attacks.base import AttackResult
from robusteval.attacks.halving import Halving, leading
from robusteval.errors import UsageError
from robusteval.evaluation.assemble import REPORT
from robusteval.evaluation.judge import judge
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.suite import Stage, load_suite, suite_digest
from robusteval.evaluation.validate import read_rows, seal, validate
from robusteval.models.base import Classifier
from robusteval.render._text import rulings
from robusteval.report import StageSpec
from robusteval.rng import SampleRng
from robusteval.runs import digest
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict

RNG, LONG = (SampleRng(0, tuple(range(count)), 0) for count in (64, 256))


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([-1.0, 0.0, 1.0, 2.0])), max_size=20), st.integers(1, 4))
def test_the_leading_are_the_largest_of_each_row(entries: list[tuple[int, float]], count: int) -> None:
    rows, values = (torch.tensor([entry[i] for entry in entries]) for i in (0, 1))
    expected = [
        sum(r == row and (v > value or (v == value and j < i)) for j, (r, v) in enumerate(entries)) < count
        for i, (row, value) in enumerate(entries)
    ]
    assert leading(rows, values, count).tolist() == expected


def test_passes_are_those_of_the_climbs_that_are_kept() -> None:
    """Of 4 classes the 3 wrong ones for 5 steps, then 2 for 10, then 1 for the other 15 and a last look."""
    net, x, y = samples(64)
    robust = net.exactly_robust(x, y)
    probe = Probe(net, 512)
    Halving(steps=30, targets=3, keep=((5, 2), (15, 1)))(
        probe, x[robust], y[robust], THREAT, RNG.take(robust.nonzero()[:, 0])
    )
    per_sample = 1 + 3 * 5 + 2 * 10 + 16
    assert probe.passes.forward == per_sample * int(robust.sum())
    assert probe.passes.backward == (per_sample - 2) * int(robust.sum())


def test_each_restart_climbs_towards_every_target() -> None:
    """3 wrong classes from 2 points for 5 steps, then 2 climbs for the other 25 and a last look."""
    net, x, y = samples(64)
    robust = net.exactly_robust(x, y)
    probe = Probe(net, 512)
    attack = Halving(steps=30, targets=3, restarts=2, keep=((5, 2),))
    attack(probe, x[robust], y[robust], THREAT, RNG.take(robust.nonzero()[:, 0]))
    assert probe.passes.forward == (1 + 6 * 5 + 2 * 26) * int(robust.sum())


@pytest.mark.parametrize("restarts", [1, 4])
def test_nothing_is_run_twice_to_save_memory(digits_net: Classifier, digits: Any, restarts: int) -> None:
    """Batches fit into the probe's, so what it counts is what the network runs, but for filling up."""
    ran, probe = [], Probe(digits_net, 250)
    watch = digits_net.register_forward_hook(lambda _, given, __: ran.append(len(given[0])))
    attack = Halving(steps=12, targets=9, restarts=restarts, keep=((3, 3),))
    with watch:
        attack(probe, digits.images(slice(0, 90)), digits.labels[:90], ThreatModel.parse("Linf", "0.01"), LONG)
    assert probe.passes.forward == sum(ran) > 90 * restarts


def test_inputs_in_groups_are_inputs_together(
    digits_net: Classifier, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (digits.images(slice(0, 40)), digits.labels[:40], ThreatModel.parse("Linf", "0.1"), LONG)
    attack = Halving(steps=8, targets=3, restarts=2, keep=((3, 2),))
    together = attack(Probe(digits_net, 250), *given).candidates
    monkeypatch.setattr("robusteval.attacks.halving.HELD", 50)
    assert torch.equal(attack(Probe(digits_net, 250), *given).candidates, together)


def test_more_restarts_never_do_worse(digits_net: Classifier, digits: Any) -> None:
    """The first starts are the same, so only the best of more climbs is returned; somewhere it is another."""
    x, y, threat = digits.images(slice(0, 48)), digits.labels[:48], ThreatModel.parse("Linf", "0.05")
    margins = []
    for restarts in (1, 4):
        attack = Halving(steps=10, targets=2, restarts=restarts, keep=())
        z = digits_net(attack(digits_net, x, y, threat, RNG.take(torch.arange(48))).candidates)
        margins.append(z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -1e9).amax(1))
    one, four = margins
    compared = (one > 0) & (digits_net(x).argmax(1) == y)
    assert (four <= one)[compared].all()
    assert (four < one)[compared].any()


def test_a_sample_is_attacked_alike_in_any_company(
    digits_net: Classifier, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, threat = digits.images(slice(0, 24)), digits.labels[:24], ThreatModel.parse("Linf", "0.1")
    attack, ids = Halving(steps=20, targets=4, keep=((4, 2), (8, 1))), torch.arange(24)
    together = attack(Probe(digits_net, 512), x, y, threat, RNG.take(ids)).candidates
    monkeypatch.setattr("robusteval.attacks.halving.ROWS", 9)
    parts = [attack(Probe(digits_net, 512), x[i], y[i], threat, RNG.take(i)).candidates for i in ids.split(5)]
    assert torch.equal(torch.cat(parts), together)


def test_far_inputs_are_left_after_the_last_of_keep() -> None:
    """Those for which what is left of the margin exceeds what was lost; the others are climbed as without `reach`."""
    net, x, y = samples(64)
    robust = net.exactly_robust(x, y)
    x, y, rng = x[robust], y[robust], RNG.take(robust.nonzero()[:, 0])
    plan: dict[str, Any] = {"steps": 30, "targets": 3, "keep": ((5, 2), (15, 1))}
    probe = Probe(net, 512)
    stopped = Halving(**{**plan, "steps": 15, "keep": ((5, 2),)})(net, x, y, THREAT, rng).candidates
    found, whole = (Halving(**plan, reach=reach)(probe, x, y, THREAT, rng).candidates for reach in (0.5, None))
    z, least = net(x), net(stopped)
    margin = [logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -1e9).amax(1) for logits in (z, least)]
    near = is_near(*margin, 0.5)
    assert 0 < near.sum() < len(x)
    same = (found == whole).flatten(1).all(1)
    assert same[near].all()
    per_sample = 1 + 3 * 5 + 2 * 10
    assert probe.passes.forward == (2 * per_sample + 16) * len(x) + 16 * int(near.sum())


class Fussy(nn.Module):
    """A net that cannot take an empty batch, like many that reshape by the number of images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(x.size(0), -1).view_as(x))


@pytest.mark.parametrize("reach", [1e-6, None])
def test_no_empty_batch_is_asked_when_every_input_has_left(reach: float | None) -> None:
    net, x, y = samples(16)
    wide = ThreatModel.parse("Linf", "0.3" if reach is None else "0.0001")
    attack = Halving(steps=20, targets=3, keep=((4, 2), (8, 1)), reach=reach)
    attack(Fussy(net), x, y, wide, RNG.take(torch.arange(16)))


def test_the_candidate_is_the_best_of_all_climbs() -> None:
    """Also where the last of `keep` leaves several, and `reach` ends them."""
    net, x, y = samples(64)
    robust = net.exactly_robust(x, y)
    x, y, rng = x[robust], y[robust], RNG.take(robust.nonzero()[:, 0])
    several, one = (
        Halving(steps=20, targets=3, keep=keep, reach=1e-6)(net, x, y, THREAT, rng).candidates
        for keep in (((5, 3),), ((5, 1),))
    )
    assert torch.equal(several, one)


@pytest.mark.parametrize("classes", [3, 6])
def test_the_ratio_of_differences_is_a_loss_where_it_is_defined(classes: int) -> None:
    net, (_, x, _) = Linear(classes).eval(), samples(40)
    y = net(x).argmax(1)
    made = Halving(steps=20, targets=2, keep=(), loss="dlr")(net, x, y, THREAT, RNG.take(torch.arange(40)))
    broken = net(made.candidates).argmax(1) != y
    assert broken.tolist() == (~net.exactly_robust(x, y)).tolist()
    assert made.adaptations == (("margin as loss, as targeted DLR is undefined for 3 classes",) if classes == 3 else ())


@pytest.mark.parametrize(("targets", "said"), [(9, ("3 targets instead of 9",)), (3, ()), (2, ())])
def test_fewer_classes_than_targets_are_said(targets: int, said: tuple[str, ...]) -> None:
    net, x, y = samples(8)
    found = Halving(steps=4, targets=targets, keep=((2, 1),))(net, x, y, THREAT, RNG.take(torch.arange(8)))
    assert found.adaptations == said


@pytest.mark.parametrize(
    "params",
    [
        {"steps": 0},
        {"targets": 0},
        {"keep": ((10, 3), (5, 1))},
        {"keep": ((10, 3), (20, 4))},
        {"keep": ((100, 1),)},
        {"reach": 0.0},
        {"keep": (), "reach": 0.5},
    ],
)
def test_plans_that_make_no_sense_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="halving"):
        Halving(**params)


# Which samples are near


@pytest.mark.parametrize(
    ("clean", "least", "near", "expected"),
    [
        (10.0, 1.0, 0.2, True),
        (10.0, 2.0, 0.2, False),
        (10.0, 9.0, 0.2, False),
        (10.0, 10.0, 0.2, True),
        (10.0, 10.0 - 10 * STUCK * 0.9, 0.2, True),
        (10.0, 10.0 - 10 * STUCK * 1.1, 0.2, False),
        (10.0, -1.0, 0.2, True),
    ],
)
def test_near_are_those_close_to_another_class_and_those_that_do_not_move(
    clean: float, least: float, near: float, expected: bool
) -> None:
    assert is_near(torch.tensor([clean]), torch.tensor([least]), near).tolist() == [expected]


class Shift:
    """An attack that moves every input by ``share`` of the budget towards its nearest class of a linear net."""

    def __init__(self, net: Linear, share: float) -> None:
        self.net, self.share, self.seen = net, share, 0

    def supports(self, threat: ThreatModel) -> bool:
        return True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        self.seen = len(x)
        w, logits = self.net.w.detach(), model(x)
        slope = (w[y][:, None] - w[None]).view(len(x), len(w), *x.shape[1:])
        reach = (logits.gather(1, y[:, None]) - logits) / slope.abs().flatten(2).sum(2).clamp_min(1e-9)
        rival = reach.scatter(1, y[:, None], torch.inf).argmin(1)
        step = self.share * threat.radius * slope[torch.arange(len(x)), rival].sign()
        return AttackResult((x - step).detach())


def test_a_stage_with_near_is_given_near_samples_alone() -> None:
    net, x, y = samples(64)
    first, second, third = Shift(net, 0.5), Shift(net, 1.0), Shift(net, 1.0)
    stages = [Stage("half", "attack", first), Stage("near", "attack", second, 0.25), Stage("all", "attack", third)]
    made = judge(Probe(net, 64), x, y, torch.arange(64), THREAT, stages, RNG)
    with torch.no_grad():
        moved = first(net, x, y, THREAT, RNG).candidates
    margins = [net(z).scatter_add(1, y[:, None], torch.full_like(y[:, None], -1e9).float()) for z in (x, moved)]
    clean, least = (net(z).gather(1, y[:, None])[:, 0] - m.amax(1) for z, m in zip((x, moved), margins, strict=True))
    expected = int((is_near(clean, least, 0.25) & (clean > 0) & (least > 0)).sum())
    unbroken = int(((clean > 0) & (least > 0)).sum())
    assert (made.stages[1].entered, made.stages[2].entered) == (expected, unbroken - made.stages[1].broken)
    assert 0 < expected < unbroken
    exactly = net.exactly_robust(x, y)
    assert [row.verdict is Verdict.UNKNOWN for row in made.rows] == exactly.tolist()


def test_near_is_for_attacks(tmp_path: Any) -> None:
    (tmp_path / "odd.toml").write_text('title = "x"\n[[stages]]\nname = "ibp"\ncertifier = "ibp"\nnear = 0.1\n')
    with pytest.raises(UsageError, match="near"):
        load_suite(str(tmp_path / "odd.toml"), THREAT)


def test_rapid_is_exact_on_linear_classifiers() -> None:
    net, x, y = samples(64)
    made = judge(Probe(net, 64), x, y, torch.arange(64), THREAT, load_suite("rapid", THREAT).stages(), RNG)
    robust = [row.verdict in (Verdict.UNKNOWN, Verdict.CERTIFIED) for row in made.rows]
    assert robust == net.exactly_robust(x, y).tolist()


def test_reports_from_before_there_was_near_keep_their_suite() -> None:
    spec = StageSpec(name="pgd", kind="attack", plugin="pgd", params={"steps": 3})
    before = {key: value for key, value in spec.model_dump().items() if key != "near"}
    assert suite_digest([spec], False, None, None) == digest({"stages": [before], "skip_certified": False})
    assert suite_digest([spec.model_copy(update={"near": 0.1})], False, None, None) != suite_digest(
        [spec], False, None, None
    )


@pytest.mark.parametrize("curve", [False, ["0.02", "0.1"]])
def test_reports_of_chosen_samples_are_valid(model_folder: Path, tmp_path: Path, curve: Any) -> None:
    """Rows do not tell which samples came near another class; that no more entered than were open, they do."""
    report = finish(plan_for(model_folder, suite="rapid", eps="0.1", curve=curve), tmp_path)
    near = [i for i, turn in enumerate(report.stages) if turn.name.startswith(("restarts", "targets", "square"))]
    still_open = sum(row.verdict is Verdict.UNKNOWN for row in read_rows(tmp_path))
    assert min(report.stages[i].entered for i in near) < still_open
    assert validate(tmp_path) == []
    (said,) = rulings(report)
    assert "restarts, targets, square-near" in said
    assert "calibrate" in said
    for entered in (-1, 61):
        forged = tmp_path / "forged"
        shutil.copytree(tmp_path, forged, dirs_exist_ok=True, ignore=shutil.ignore_patterns("forged"))
        edit(forged / REPORT, lambda r, e=entered: r["stages"][near[0]].update(entered=e))
        seal(forged)
        assert validate(forged), entered
