"""The evaluation as a whole: resuming, batch sizes, workers, findings, validation of the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from robusteval.datasets.base import Split, TensorPixels, in_order
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.assemble import REPORT, SAMPLES
from robusteval.evaluation.chunks import CHUNKS
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.defaults import fill_in
from robusteval.evaluation.judge import Judgement, judge
from robusteval.evaluation.plan import Plan, judge_chunk, prepare
from robusteval.evaluation.probe import Probe
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.suite import load_suite
from robusteval.evaluation.validate import MANIFEST, read_report, seal, validate
from robusteval.models.base import LoadedModel, frozen
from robusteval.report import Report
from robusteval.rng import SampleRng
from robusteval.runs import RunDir, file_digest, write_json
from robusteval.threat import ThreatModel

BASE = {"dataset": "digits", "norm": "Linf", "eps": "0.1", "suite": "quick", "limit": 60, "chunk_size": 25}


def plan_for(model_folder: Path, **changes: Any) -> Plan:
    return prepare(EvalConfig.model_validate({"model": str(model_folder), **BASE, "workers": 1, **changes}))


def in_memory(module: nn.Module, **changes: Any) -> Plan:
    loaded = LoadedModel(module, name="toy", source="memory", architecture="toy")
    config = EvalConfig.model_validate({"model": "memory", **BASE, "workers": 1, **changes})
    return prepare(config, loaded)


def finish(plan: Plan, folder: Path) -> Report:
    report = evaluate(plan, RunDir(folder))
    (folder / "report.md").write_text("# report")
    seal(folder)
    return report


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    finish(plan_for(model_folder), folder)
    return folder


def same_evidence(a: Path, b: Path) -> bool:
    names = [SAMPLES, *(f"witnesses/{path.name}" for path in sorted((a / "witnesses").iterdir()))]
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_a_finished_report_is_valid_and_brackets_the_truth(finished: Path) -> None:
    assert validate(finished) == []
    results = read_report(finished).results
    assert 0 < results.empirical.count < results.clean.count <= 60
    assert results.certified is None
    assert not (finished / CHUNKS).exists()


@pytest.mark.parametrize("batch_size", [7, 17, 24, 500])
def test_batch_size_changes_no_byte(model_folder: Path, finished: Path, tmp_path: Path, batch_size: int) -> None:
    finish(plan_for(model_folder, batch_size=batch_size), tmp_path / "run")
    assert same_evidence(finished, tmp_path / "run")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 15, 16, 17, 33])
def test_company_changes_no_bit_of_logits_and_gradients(digits_net: nn.Module, digits: Split, count: int) -> None:
    """Below 16 images CPU kernels sum in another order, which shows on convolutions unless batches are filled."""
    x, y = digits.images(slice(0, 60)), digits.labels[:60]
    probe = Probe(digits_net, 60)
    few, many = (part.clone().requires_grad_() for part in (x[:count], x))
    alone, together = probe(few), probe(many)
    assert torch.equal(alone, together[:count])
    loss = (functional.cross_entropy(logits, y[: len(logits)], reduction="sum") for logits in (alone, together))
    (own,), (shared,) = (torch.autograd.grad(value, point) for value, point in zip(loss, (few, many), strict=True))
    assert torch.equal(own, shared[:count])
    assert probe.passes.forward == count + 60, "what fills a batch up is not counted"


SUITES = ("quick", "foolbox")


@pytest.mark.parametrize("suite", SUITES)
def test_shuffled_samples_get_the_same_verdicts_and_witnesses(digits_net: nn.Module, digits: Split, suite: str) -> None:
    threat = ThreatModel.parse("Linf", "0.1")
    stages = load_suite(suite, threat).stages()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))

    def judged(rows: Tensor) -> Judgement:
        ids = digits.ids[rows]
        rng = SampleRng(0, tuple(ids.tolist()), 0)
        with frozen(digits_net) as net:
            return judge(Probe(net, 60), digits.images(rows), digits.labels[rows], ids, threat, stages, rng)

    straight, shuffled = judged(torch.arange(40)), judged(order)
    assert sorted(shuffled.rows, key=lambda row: row.id) == list(straight.rows)
    assert straight.witnesses.keys() == shuffled.witnesses.keys()
    for sample, witness in straight.witnesses.items():
        assert torch.equal(witness.x_adv, shuffled.witnesses[sample].x_adv)


def test_a_dataset_that_shuffles_is_put_in_order(digits: Split) -> None:
    """So chunks, and attacks that draw for a whole chunk, are the same."""
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    again = in_order(digits.take(order))
    assert torch.equal(again.ids, digits.ids)
    assert again.content_hash == digits.content_hash
    assert in_order(digits) is digits


def test_two_workers_change_no_byte(model_folder: Path, finished: Path, tmp_path: Path) -> None:
    plan = plan_for(model_folder, workers=2)
    assert plan.workers == 2
    finish(plan, tmp_path / "run")
    assert same_evidence(finished, tmp_path / "run")


def test_chunk_size_does_not_matter_to_attacks_with_streams_per_sample(
    model_folder: Path, finished: Path, tmp_path: Path
) -> None:
    """`quick` draws per sample, so only suites that draw per batch, such as `standard`, depend on the chunk."""
    finish(plan_for(model_folder, chunk_size=40), tmp_path / "run")
    assert (finished / SAMPLES).read_bytes() == (tmp_path / "run" / SAMPLES).read_bytes()


def test_an_interrupted_run_continues_with_what_is_missing(model_folder: Path, finished: Path, tmp_path: Path) -> None:
    plan, folder = plan_for(model_folder), tmp_path / "run"
    judge_chunk(plan, 1, folder)
    shutil.rmtree(folder / "witnesses")  # as if killed: rows are there, so the witnesses were, too
    judge_chunk(plan, 1, folder)
    write_json(folder / "config.json", json.loads((finished / "config.json").read_text()))
    heard: list[Any] = []
    evaluate(plan, RunDir(folder), heard.append)
    assert [news.rows[0].id for news in heard if not isinstance(news, str)] == [0, 50], "chunk 1 is not done again"
    assert same_evidence(finished, folder)


@pytest.mark.parametrize(("field", "value"), [("seed", 1), ("eps", "0.2"), ("limit", 50), ("chunk_size", 30)])
def test_resuming_with_other_settings_names_the_field(
    model_folder: Path, finished: Path, field: str, value: object
) -> None:
    with pytest.raises(UsageError, match=field):
        evaluate(plan_for(model_folder, **{field: value}), RunDir(finished))


def test_resuming_with_other_weights_is_refused(finished: Path, digits_net: nn.Module, model_folder: Path) -> None:
    plan = plan_for(model_folder)
    with torch.no_grad():
        next(plan.model.module.parameters()).add_(1e-3)
    with pytest.raises(UsageError, match="weights_sha256"):
        evaluate(plan, RunDir(finished))


def test_an_existing_folder_of_something_else_is_left_alone(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a run folder"):
        evaluate(plan_for(model_folder), RunDir(tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "mine"


class Wrapped(nn.Module):
    """The digits net with something wrong at its end."""

    def __init__(self, net: nn.Module, twist: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.twist = net, twist

    def forward(self, x: Tensor) -> Tensor:
        return self.twist(self.net(x))


IMPOSSIBLE: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("nan", lambda z: z * torch.nan, "NaN"),
    ("wrong shape", lambda z: z[:, :7], r"\(2, 10\)"),
    ("flat", lambda z: z.flatten(), r"\(2, 10\)"),
    ("detached", lambda z: z.detach(), "gradient"),
    ("rounded away", lambda z: torch.tensor(z.detach().numpy()), "gradient"),
]


@pytest.mark.parametrize(("name", "twist", "message"), IMPOSSIBLE, ids=[case[0] for case in IMPOSSIBLE])
def test_models_that_cannot_be_judged(
    digits_net: nn.Module, tmp_path: Path, name: str, twist: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(RobustevalError, match=message):
        evaluate(in_memory(Wrapped(digits_net, twist)), RunDir(tmp_path / "run"))


DOUBTFUL: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("probabilities", lambda z: z.softmax(1)),
    ("randomised", lambda z: z + 0.1 * torch.randn_like(z)),
    ("batch-dependent", lambda z: z - z.mean(0, keepdim=True) * 0.5),
]


@pytest.mark.parametrize(("name", "twist"), DOUBTFUL, ids=[case[0] for case in DOUBTFUL])
def test_doubtful_models_stop_unless_allowed_and_are_named_in_the_report(
    digits_net: nn.Module, tmp_path: Path, name: str, twist: Callable[[Tensor], Tensor]
) -> None:
    model = Wrapped(digits_net, twist)
    with pytest.raises(RobustevalError, match=f"--allow {name}"):
        evaluate(in_memory(model), RunDir(tmp_path / "stopped"))
    allowed = ("probabilities", "randomised", "batch-dependent")
    report = finish(in_memory(model, allow=allowed, limit=25), tmp_path / "run")
    assert name in {finding.name for finding in report.findings if finding.severity == "error"}


def test_autoattacks_own_checks_are_in_the_report(digits_net: nn.Module, tmp_path: Path) -> None:
    plan = in_memory(Wrapped(digits_net, lambda z: z.softmax(1)), allow=("probabilities",), limit=25)
    report = finish(plan, tmp_path / "run")
    assert "range-output" in {finding.name for finding in report.findings if finding.origin == "autoattack"}


def test_log_probabilities_are_fine(digits_net: nn.Module, tmp_path: Path) -> None:
    report = finish(in_memory(Wrapped(digits_net, lambda z: z.log_softmax(1)), limit=25), tmp_path / "run")
    assert {finding.severity for finding in report.findings} == {"info"}


def test_the_model_is_left_as_found(digits_net: nn.Module, tmp_path: Path) -> None:
    model = Wrapped(digits_net, lambda z: z).train()
    digits_net.eval().zero_grad()
    next(model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    rng = torch.get_rng_state()
    report = finish(in_memory(model, limit=25), tmp_path / "run")
    assert model.training
    assert not digits_net.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert "train-mode" in {finding.name for finding in report.findings}
    next(model.parameters()).requires_grad_(True)


def test_nan_gradients_near_the_samples_do_not_pass_as_robustness(digits_net: nn.Module, tmp_path: Path) -> None:
    """A term of value 0 whose gradient is NaN except exactly on the clean images."""

    class Trap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = digits_net

        def forward(self, x: Tensor) -> Tensor:
            off = (x * 16 - (x * 16).round()).abs().flatten(1).sum(1, keepdim=True)
            trap = torch.where(off > 1e-3, (off - off).abs().sqrt(), torch.zeros_like(off))
            return self.net(x) + trap

    with pytest.raises(RobustevalError, match="--allow non-finite-gradients"):
        evaluate(in_memory(Trap(), limit=25), RunDir(tmp_path / "stopped"))
    report = evaluate(in_memory(Trap(), limit=25, allow=("non-finite-gradients",)), RunDir(tmp_path / "late"))
    told = [finding for finding in report.findings if finding.severity == "error"]
    assert {finding.name for finding in told} == {"non-finite-gradients"}
    assert any("pgd-margin met" in finding.message for finding in told)  # also where the check beforehand saw nothing
    assert report.stages[0].non_finite_gradients == report.stages[0].backward


def test_a_model_no_better_than_guessing_is_named(digits_net: nn.Module, tmp_path: Path) -> None:
    report = evaluate(in_memory(Wrapped(digits_net, lambda z: z.roll(1, dims=1))), RunDir(tmp_path / "run"))
    assert "near-chance" in {finding.name for finding in report.findings}


def test_resuming_with_other_code_is_refused(digits_net: nn.Module, tmp_path: Path) -> None:
    """The weights are the same, what is computed with them is not."""
    plan = in_memory(Wrapped(digits_net, lambda z: z))
    evaluate(plan, RunDir(tmp_path / "run"))
    with pytest.raises(UsageError, match="logits_sha256"):
        evaluate(in_memory(Wrapped(digits_net, lambda z: 2 * z)), RunDir(tmp_path / "run"))


def test_a_pixel_out_of_range_anywhere_stops_the_run(digits_net: nn.Module, tmp_path: Path) -> None:
    plan = in_memory(digits_net, limit=100)
    pixels = TensorPixels(plan.split.pixels.read(plan.split.ids).clone())
    pixels.data[90, 0, 0, 0] = 1.5
    with pytest.raises(RobustevalError, match="sample 90"):
        evaluate(replace(plan, split=replace(plan.split, pixels=pixels)), RunDir(tmp_path / "run"))


@pytest.mark.parametrize("norm", [None, "Linf", "linf"])
def test_however_the_norm_is_spelled_the_models_own_eps_stays(model_folder: Path, norm: str | None) -> None:
    config = {"model": str(model_folder), "limit": 10, "suite": "quick", "norm": norm}
    assert str(prepare(EvalConfig.model_validate(config)).threat) == "Linf 0.1"
    card = json.loads((model_folder / "config.json").read_text())
    other = model_folder.parent / "other"
    shutil.copytree(model_folder, other, dirs_exist_ok=True)
    card["training"]["eps"] = "0.3"
    (other / "config.json").write_text(json.dumps(card))
    assert prepare(EvalConfig.model_validate({**config, "model": str(other)})).threat.label == "0.3"


@pytest.mark.parametrize("training", [5, {"dataset": 5}, {"eps": 0.1, "dataset": ["digits"]}, None])
def test_a_strange_card_is_not_believed(model_folder: Path, tmp_path: Path, training: object) -> None:
    folder = tmp_path / "net"
    shutil.copytree(model_folder, folder)
    card = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**card, "training": training}))
    (folder / "launch.json").write_text('["eps"]')
    filled = fill_in(EvalConfig(model=str(folder)))
    assert (filled.dataset, filled.norm, filled.eps) == ("digits", "Linf", None)


def test_a_suite_of_ones_own_does_not_pass_as_a_shipped_one(model_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "standard.toml"
    mine.write_text('title = "AutoAttack standard"\n[[stages]]\nname = "apgd-ce"\nattack = "pgd"\n')
    plan = plan_for(model_folder, suite=str(mine), limit=25)
    report = finish(plan, tmp_path / "run")
    assert report.suite.name == str(mine)
    assert report.baselines.reason is not None


@pytest.mark.parametrize("names", [("a", "a"), ("clean", "b"), ("", "b")])
def test_stages_have_distinct_names(model_folder: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    stages = "".join(f'[[stages]]\nname = "{name}"\nattack = "pgd"\n' for name in names)
    (tmp_path / "mine.toml").write_text(f'title = "mine"\n{stages}')
    with pytest.raises(UsageError, match="repeated, empty or reserved"):
        plan_for(model_folder, suite=str(tmp_path / "mine.toml"))


def test_an_attack_that_crashes_is_one_sentence(digits_net: nn.Module, tmp_path: Path) -> None:
    """Fine on the few images that are looked at first, not on an attack's batch."""

    def fragile(z: Tensor) -> Tensor:
        if z.requires_grad and 40 < len(z) <= 50:
            raise ValueError("no such batch")
        return z

    with pytest.raises(RobustevalError, match="stage 'pgd-margin' failed: ValueError: no such batch"):
        evaluate(in_memory(Wrapped(digits_net, fragile), limit=60, chunk_size=50), RunDir(tmp_path / "run"))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_row(folder: Path, verdict: str, change: Callable[[Any], None]) -> None:
    lines = (folder / SAMPLES).read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if json.loads(line)["verdict"] == verdict)
    row = json.loads(lines[at])
    change(row)
    lines[at] = json.dumps(row)
    (folder / SAMPLES).write_text("\n".join(lines) + "\n")


def brighten(folder: Path) -> None:
    path = next((folder / "witnesses").iterdir())
    tensors = safetensors.torch.load_file(path)
    tensors["x_adv"][0, 0, 0, 0] = 1.5
    safetensors.torch.save_file(tensors, path)


def reshape_ids(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    path = next((folder / "witnesses").iterdir())
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "ids": change(tensors["ids"]).contiguous()}, path)


MUTATIONS: dict[str, Callable[[Path], None]] = {
    "higher count": lambda f: edit(f / REPORT, lambda r: r["results"]["empirical"].update(count=59)),
    "higher rate": lambda f: edit(f / REPORT, lambda r: r["results"]["empirical"].update(rate=0.99)),
    "narrower interval": lambda f: edit(f / REPORT, lambda r: r["results"]["clean"].update(low=0.9)),
    "claimed certificates": lambda f: edit(f / REPORT, lambda r: r["results"].update(certified=r["results"]["clean"])),
    "other eps": lambda f: edit(f / REPORT, lambda r: r["threat"].update(eps="0.2")),
    "impossible eps": lambda f: edit(f / REPORT, lambda r: r["threat"].update(eps="0")),
    "other radius": lambda f: edit(f / REPORT, lambda r: r["threat"].update(radius=0.2)),
    "other stage": lambda f: edit(f / REPORT, lambda r: r["suite"]["stages"][0].update(plugin="autoattack")),
    "stage count": lambda f: edit(f / REPORT, lambda r: r["stages"][0].update(closed=0)),
    "missing field": lambda f: edit(f / REPORT, lambda r: r.pop("seed")),
    "extra field": lambda f: edit(f / REPORT, lambda r: r.update(bonus=1)),
    "not a number": lambda f: edit(f / REPORT, lambda r: r.update(seconds=float("nan"))),
    "rewritten verdict": lambda f: edit_row(f, "broken", lambda r: r.update(verdict="unknown")),
    "repeated sample": lambda f: edit_row(f, "broken", lambda r: r.update(id=0)),
    "far witness": lambda f: edit_row(f, "broken", lambda r: r.update(adv_distance=0.2)),
    "correct witness": lambda f: edit_row(f, "broken", lambda r: r.update(adv_prediction=r["label"])),
    "impossible class": lambda f: edit_row(f, "broken", lambda r: r.update(adv_prediction=10)),
    "misread label": lambda f: edit_row(f, "unknown", lambda r: r.update(label=(r["label"] + 1) % 10)),
    "dropped row": lambda f: (f / SAMPLES).write_text("\n".join((f / SAMPLES).read_text().splitlines()[1:]) + "\n"),
    "garbage line": lambda f: (f / SAMPLES).write_text("{" + (f / SAMPLES).read_text()),
    "bright witness": brighten,
    "invented rank": lambda f: edit(f / REPORT, lambda r: r["baselines"].update(reason=None, rank=1, entries=67)),
    "standard in name only": lambda f: edit(f / REPORT, lambda r: r["suite"].update(name="standard")),
    "inflated stage": lambda f: edit(f / REPORT, lambda r: r["stages"][0].update(entered=60)),
    "free of charge": lambda f: edit(f / REPORT, lambda r: r["stages"][0].update(forward=0)),
    "other sample": lambda f: edit_row(f, "unknown", lambda r: r.update(id=999)),
    "false reason": lambda f: edit_row(f, "unknown", lambda r: r.update(reason="proved robust")),
    "endless eps": lambda f: edit(f / REPORT, lambda r: r["threat"].update(eps="1" * 5000)),
    "nul path": lambda f: edit(f / MANIFEST, lambda m: m["files"][0].update(path="a\0b")),
    "long path": lambda f: edit(f / MANIFEST, lambda m: m["files"][0].update(path="a" * 5000)),
    "nested": lambda f: (f / REPORT).write_text("[" * 100_000),
    "scalar ids": lambda f: reshape_ids(f, lambda ids: ids[0]),
    "square ids": lambda f: reshape_ids(f, lambda ids: ids[None]),
    "lost witnesses": lambda f: next((f / "witnesses").iterdir()).unlink(),
    "truncated witnesses": lambda f: (p := next((f / "witnesses").iterdir())).write_bytes(p.read_bytes()[:-8]),
}


def rehash(folder: Path) -> None:
    """Recompute the manifest, as a forger would, so that only the content can give the change away."""
    data = json.loads((folder / MANIFEST).read_text())
    for fact in data["files"]:
        path = folder / fact["path"]
        if len(fact["path"]) < 100 and "\0" not in fact["path"] and path.exists():
            fact.update(bytes=path.stat().st_size, sha256=file_digest(path))
    (folder / MANIFEST).write_text(json.dumps(data))


@pytest.mark.parametrize("name", MUTATIONS)
def test_validate_finds_a_forged_report_even_with_fresh_hashes(finished: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "forged"
    shutil.copytree(finished, folder)
    MUTATIONS[name](folder)
    rehash(folder)
    assert validate(folder), name


def test_validate_finds_a_flipped_byte_in_any_hashed_file(finished: Path, tmp_path: Path) -> None:
    for fact in json.loads((finished / MANIFEST).read_text())["files"]:
        folder = tmp_path / fact["path"].replace("/", "-")
        shutil.copytree(finished, folder)
        content = bytearray((folder / fact["path"]).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / fact["path"]).write_bytes(content)
        assert validate(folder), fact["path"]


def test_validate_does_not_follow_paths_out_of_the_folder(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    secret = tmp_path / "secret"
    secret.write_text("x")
    fact = {"path": "../secret", "bytes": 1, "sha256": file_digest(secret)}
    edit(folder / MANIFEST, lambda m: m["files"].append(fact))
    assert any("outside" in problem for problem in validate(folder))
