"""How attacks run the model: in low precision, compiled, and with less memory than was asked for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_evaluation import BASE, finish, in_memory, plan_for, same_evidence
from test_judge import THREAT, samples
from torch import Tensor, nn

from robusteval.attacks.base import AttackResult
from robusteval.certifiers.ibp import IBP
from robusteval.comparison.calibrate import reference, side_by_side
from robusteval.datasets.base import Split
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.audit import audit
from robusteval.evaluation.config import MIN_BATCH, EvalConfig
from robusteval.evaluation.judge import judge
from robusteval.evaluation.plan import identity, judge_chunk, preflight, prepare
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.suite import Stage, Suite
from robusteval.evaluation.validate import validate
from robusteval.evaluation.verify import Source, subject, verify
from robusteval.models.base import frozen
from robusteval.report import Search
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.verdict import Verdict

LOW = Search(precision="bfloat16")


def test_attacks_ask_in_low_precision_and_all_else_in_float32() -> None:
    net, x, _ = samples()
    probe = Probe(net, 64, LOW)
    exact = probe(x)
    with probe.searching():
        low = probe(x)
    assert low.dtype is torch.float32
    assert torch.equal(low, low.bfloat16().float())
    assert not torch.equal(low, exact)
    assert torch.equal(probe(x), exact)


class Rounded(nn.Module):
    """The first class wins by a hair for every input; in bfloat16 that hair is lost, and the second class wins."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.lin.weight)

    def forward(self, x: Tensor) -> Tensor:
        ones = self.lin(torch.ones_like(x.flatten(1)[:, :1]))
        hair = self.lin(torch.full_like(ones, 1.001)).float()
        return torch.cat([hair, ones.float() + 5e-4], 1)


class Counting:
    """Returns its inputs, and remembers how many it was given each time and in which precision."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def supports(self, threat: ThreatModel) -> bool:
        return True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        with torch.no_grad():
            self.seen.append((len(x), float(model(x)[0, 0])))
        return AttackResult(x)


def test_what_only_low_precision_breaks_is_attacked_again_in_float32_and_not_called_broken() -> None:
    attack, x, y = Counting(), torch.rand(20, 1, 2, 2), torch.zeros(20, dtype=torch.long)
    rng = SampleRng(0, tuple(range(20)), 0)
    done = judge(Probe(Rounded(), 64, LOW), x, y, torch.arange(20), THREAT, [Stage("a", "attack", attack)], rng)
    assert attack.seen == [(20, 1.0), (20, pytest.approx(1.001))]
    assert {row.verdict for row in done.rows} == {Verdict.UNKNOWN}
    exact = Counting()
    judge(Probe(Rounded(), 64), x, y, torch.arange(20), THREAT, [Stage("a", "attack", exact)], rng)
    assert len(exact.seen) == 1


@pytest.mark.parametrize("count", [1, 17, 60])
def test_company_changes_no_bit_in_low_precision(digits_net: nn.Module, digits: Split, count: int) -> None:
    """As in float32, of which verdicts at any batch size depend."""
    x = digits.images(slice(0, 120)).requires_grad_()

    def answers(batch_size: int, images: Tensor) -> tuple[Tensor, Tensor]:
        with frozen(digits_net) as net, Probe(net, batch_size, LOW).searching() as probe:
            logits = probe(images)
            return logits.detach(), torch.autograd.grad(logits.square().sum(), images)[0]

    torch.set_num_threads(1)
    whole, alone = answers(120, x), answers(64, x[:count].detach().requires_grad_())
    assert all(torch.equal(few, many[:count]) for few, many in zip(alone, whole, strict=True))


def test_a_run_in_low_precision_says_so_and_has_witnesses_of_float32(model_folder: Path, tmp_path: Path) -> None:
    report = finish(plan_for(model_folder, precision="bfloat16"), tmp_path / "run")
    assert validate(tmp_path / "run") == []
    assert report.search == LOW
    assert report.baselines.reason
    assert 0 < report.results.empirical.count < report.results.clean.count


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with a C++ compiler")
@pytest.mark.slow
def test_a_compiled_run_has_the_same_verdicts(model_folder: Path, tmp_path: Path) -> None:
    eager = finish(plan_for(model_folder), tmp_path / "eager")
    compiled = finish(plan_for(model_folder, compiled=True), tmp_path / "compiled")
    assert compiled.search == Search(compiled=True)
    assert validate(tmp_path / "compiled") == []
    assert abs(compiled.results.empirical.count - eager.results.empirical.count) <= 1


def test_an_unknown_precision_is_refused(model_folder: Path) -> None:
    with pytest.raises((UsageError, ValueError), match="precision"):
        plan_for(model_folder, precision="float16")


class Cramped(nn.Module):
    """A net on a device that holds only so many images at once, or so many whose gradients are ``wanted``."""

    def __init__(self, net: nn.Module, room: int, wanted: bool = False) -> None:
        super().__init__()
        self.net, self.room, self.wanted = net, room, wanted

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room and (x.requires_grad or not self.wanted):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        logits: Tensor = self.net(x)
        return logits


def test_too_large_a_batch_is_halved_and_changes_no_byte(digits_net: nn.Module, tmp_path: Path) -> None:
    finish(in_memory(digits_net, limit=120, chunk_size=100), tmp_path / "roomy")
    plan = in_memory(Cramped(digits_net, 64), limit=120, chunk_size=100)
    assert plan.batch_size == 100
    report = finish(plan, tmp_path / "cramped")
    assert (report.batch_size, plan.halvings.count) == (50, 1)
    assert same_evidence(tmp_path / "roomy", tmp_path / "cramped")


@pytest.mark.parametrize("wanted", [False, True])
def test_the_checks_before_the_first_attack_fit_the_device_too(digits_net: nn.Module, wanted: bool) -> None:
    plan = in_memory(Cramped(digits_net, 20, wanted).eval(), limit=100, chunk_size=100)
    roomy = in_memory(digits_net, limit=100, chunk_size=100)
    assert preflight(plan) == preflight(roomy)
    assert (plan.batch_size, plan.halvings.count) == (MIN_BATCH, 3)
    assert identity(plan)["logits_sha256"] == identity(roomy)["logits_sha256"]


class Moody(nn.Module):
    """A net with noise on its logits that hides the gradient of some images, by chance."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        shown = torch.rand(len(x), 1, 1, 1) > 0.02
        logits: Tensor = self.net(torch.where(shown, x, x.detach()))
        return logits + 0.01 * torch.randn_like(logits)


def test_what_is_found_in_a_randomised_model_does_not_depend_on_the_batch_size(digits_net: nn.Module) -> None:
    """Else who checks its report with another would miss findings."""
    plans = [in_memory(Moody(digits_net), limit=64, batch_size=size, allow=("randomised",)) for size in (16, 17, 64)]
    first, *others = ([one for one in preflight(plan) if one.name != "randomised"] for plan in plans)
    assert "zero-gradients" in [finding.name for finding in first]
    assert all(other == first for other in others)


def test_all_that_is_done_with_a_report_fits_the_device_that_it_was_made_on(
    digits_net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(room: int) -> Source:
        """Offer the model under a name that a user would give."""
        module = ModuleType("device")
        vars(module)["make"] = lambda: Cramped(digits_net, room)
        monkeypatch.setitem(sys.modules, "device", module)
        return Source(model="device:make")

    source = on(room=20)
    config = EvalConfig.model_validate({**BASE, "model": source.model, "limit": 120, "chunk_size": 100, "workers": 1})
    assert finish(prepare(config), tmp_path).batch_size == MIN_BATCH
    verified = verify(tmp_path, on(room=64))  # room for the checks, not for a chunk
    assert (verified.problems, verified.replayed.clean) == ((), 120)
    few, many = subject(tmp_path, on(room=20)), subject(tmp_path, on(room=1000))
    audited, roomy = (audit(plan, tmp_path, 100, 3) for plan in (few, many))
    assert few.halvings.count > 0 == many.halvings.count
    assert audited.sampled > MIN_BATCH
    assert (audited.sampled, audited.broken.keys()) == (roomy.sampled, roomy.broken.keys())
    few = subject(tmp_path, on(room=20))
    sides, same = (side_by_side(plan, reference(plan, "rapid"), range(100), 100) for plan in (few, many))
    assert few.halvings.count > 0
    assert [side.verdicts for side in sides] == [side.verdicts for side in same]
    assert [len(side.seconds) for side in sides] == [1, 1]


class Recorder:
    """Asks again and again, and remembers how often, in which precision and within what."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.exact: list[bool] = []
        self.within: list[str] = []

    def supports(self, threat: ThreatModel) -> bool:
        return True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, rng: SampleRng) -> AttackResult:
        self.within.append(threat.label)
        self.asked.append(0)
        with torch.no_grad():
            for _ in range(100):
                logits = model(x)
                self.asked[-1] += len(x)
                self.exact.append(not torch.equal(logits, logits.bfloat16().float()))
        return AttackResult(x)


def test_an_audit_runs_the_attacks_alone_in_float32_within_the_queries_of_the_run(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(model_folder, precision="bfloat16", queries=10, eps="0.05,0.1", limit=30)
    report = finish(plan, tmp_path)
    recorder = Recorder()
    stages = [Stage("bound", "certifier", IBP()), Stage("record", "attack", recorder)]
    monkeypatch.setattr(Suite, "stages", lambda self: stages)
    monkeypatch.setattr(IBP, "__call__", lambda *given: pytest.fail("an audit certifies nothing"))
    found = audit(plan, tmp_path, 5, 0)
    assert found.sampled == 5
    assert all(recorder.exact)
    assert set(recorder.within) == {report.threat.eps}
    assert len(recorder.asked) == 5
    assert max(recorder.asked) <= 10


def test_a_device_too_small_for_the_smallest_batch_ends_the_run(digits_net: nn.Module, tmp_path: Path) -> None:
    plan = in_memory(Cramped(digits_net, MIN_BATCH - 1), limit=100, chunk_size=100)
    with pytest.raises(RobustevalError, match=r"out of memory; try a smaller --batch-size"):
        judge_chunk(plan, 0, tmp_path)
    assert plan.batch_size == MIN_BATCH


def test_a_randomised_model_is_not_judged_with_smaller_batches(digits_net: nn.Module, tmp_path: Path) -> None:
    """How its batch is split decides what it draws: what ran before must not change that."""
    plan = in_memory(Cramped(digits_net, 30), suite="rand", limit=100, chunk_size=100)
    with pytest.raises(RobustevalError, match="out of memory"):
        judge_chunk(plan, 0, tmp_path)
    assert plan.halvings.count == 0


@pytest.mark.parametrize("suite", ["rand", "smoothing"])
def test_votes_are_not_for_low_precision(model_folder: Path, suite: str) -> None:
    with pytest.raises(UsageError, match="float32"):
        plan_for(model_folder, suite=suite, norm="L2", eps="0.5", precision="bfloat16")


def test_a_budget_of_queries_in_low_precision_leaves_a_valid_report(model_folder: Path, tmp_path: Path) -> None:
    finish(plan_for(model_folder, precision="bfloat16", queries=60, eps="0.001", limit=30), tmp_path / "run")
    assert validate(tmp_path / "run") == []
