"""Verification: honest reports pass, and whatever is changed in one is found and named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from conftest import Cli
from scipy.stats import hypergeom
from test_branch import small

from robusteval.certifiers.alpha_crown import AlphaCrown
from robusteval.certifiers.bab import BaB
from robusteval.errors import UsageError
from robusteval.evaluation.assemble import REPORT, SAMPLES
from robusteval.evaluation.audit import audit, hidden
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.replay import _behind
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.suite import suite_digest
from robusteval.evaluation.validate import MANIFEST, seal, validate
from robusteval.evaluation.verify import Source, subject, verify
from robusteval.render.eps_curve import write_curve
from robusteval.render.markdown import render
from robusteval.report import Report, StageSpec
from robusteval.rng import SampleRng
from robusteval.runs import RunDir, read_json, write_json
from robusteval.settings import PluginSpec

SUITE = """
title = "Everything that leaves evidence"
[[stages]]
name = "ibp"
certifier = "ibp"
[[stages]]
name = "crown"
certifier = "crown"
[[stages]]
name = "apgd"
attack = "apgd"
params = { steps = 20 }
[[stages]]
name = "bab"
certifier = "bab"
params = { seconds = 0.0, domains = 60 }
"""


def run(model: Path, folder: Path, **changes: Any) -> Path:
    """Evaluate on digits and seal the report, as the command does."""
    config = {"model": str(model), "dataset": "digits", "norm": "Linf", "workers": 1, "chunk_size": 8, **changes}
    report = evaluate(prepare(EvalConfig.model_validate(config)), RunDir(folder))
    (folder / "report.md").write_text(render(report), encoding="utf-8")
    if report.curve:
        write_curve(report, folder)
    seal(folder)
    return folder


@pytest.fixture(scope="module")
def honest(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    (folder / "suite.toml").write_text(SUITE)
    changes = {"suite": str(folder / "suite.toml"), "eps": "0.002,0.02,0.1", "limit": 16}
    return run(model_folder, folder / "run", **changes)


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "run"))


def problems(folder: Path) -> str:
    return "\n".join(verify(folder, Source()).problems)


def test_an_honest_report_passes_and_everything_in_it_was_replayed(honest: Path) -> None:
    found = verify(honest, Source())
    assert found.problems == ()
    rows = [json.loads(line) for line in (honest / SAMPLES).read_text().splitlines()]
    certified = [row for row in rows if any(name and not name.startswith("apgd") for name in row["stages"])]
    done = found.replayed
    assert done.clean == len(rows) == 16
    assert done.witnesses == sum(row["adv_distance"] is not None for row in rows) > 0
    assert done.proofs + done.certified_again == len(certified)
    assert done.proofs > 0


def test_one_byte_in_any_file_is_noticed(honest: Path, copy: Path) -> None:
    draw = random.Random(0)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and not path.name.startswith("."))
    assert {"config.json", "events.jsonl", MANIFEST, REPORT, SAMPLES} < {path.name for path in files}
    assert {"witnesses", "proofs"} < {path.parent.name for path in files}
    for path in files:
        before = path.read_bytes()
        for place in draw.sample(range(len(before)), 12):
            changed = bytearray(before)
            changed[place] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            found = validate(copy)
            assert found, (path.name, place)
            assert path.name == MANIFEST or any(path.name in problem for problem in found), (path.name, found)
        path.write_bytes(before)
    assert validate(copy) == []


def edited(folder: Path, change: Callable[[list[dict[str, Any]], dict[str, Any]], None]) -> None:
    """Change rows and report as a forger would: hashes and what is rendered are made to fit."""
    rows = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    report = read_json(folder / REPORT)
    change(rows, report)
    (folder / SAMPLES).write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    write_json(folder / REPORT, report)
    (folder / "report.md").write_text(render(Report.model_validate(report)), encoding="utf-8")
    seal(folder)


def stored(folder: Path, part: str, sample: int) -> tuple[Path, dict[str, torch.Tensor]]:
    path = folder / part / f"{sample // 8:05d}.safetensors"
    return path, safetensors.torch.load_file(path)


def first(folder: Path, good: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    return next(row for row in map(json.loads, (folder / SAMPLES).read_text().splitlines()) if good(row))


def test_a_wrong_margin_label_or_prediction_is_named(copy: Path) -> None:
    row = first(copy, lambda row: row["verdict"] != "misclassified")

    def margin(rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
        rows[row["id"]]["margin"] *= 1.1

    edited(copy, margin)
    assert f"sample {row['id']}: has margin" in problems(copy)

    def label(rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
        rows[row["id"]] |= {"label": 1 - min(row["label"], 1), "prediction": 1 - min(row["label"], 1)}

    edited(copy, label)
    assert f"sample {row['id']}: is of class {row['label']}" in problems(copy)


@pytest.mark.parametrize("step", [1.5, 0.25])
def test_a_witness_pixel_beyond_the_box_or_eps_is_named(copy: Path, step: float) -> None:
    row = first(copy, lambda row: row["adv_distance"] is not None)
    path, tensors = stored(copy, "witnesses", row["id"])
    place = tensors["ids"].tolist().index(row["id"])
    value = tensors["x_adv"][place].flatten()[30]
    tensors["x_adv"][place].view(-1)[30] = (value - step) if value > 0.5 else (value + step)
    safetensors.torch.save_file(tensors, path)
    seal(copy)
    assert f"sample {row['id']}" in problems(copy)


def test_another_eps_is_named(copy: Path) -> None:
    def eps(rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
        text = json.dumps(report).replace('"0.1"', '"0.099"').replace("@0.1", "@0.099")
        report |= json.loads(text)
        report["threat"]["radius"] = report["curve"][-1]["radius"] = 0.099
        for row in rows:
            row["stages"] = [name and name.replace("@0.1", "@0.099") for name in row["stages"]]
            row["stage"] = row["stage"] and row["stage"].replace("@0.1", "@0.099")
            row["reason"] = row["reason"] and row["reason"].replace("@0.1", "@0.099")

    edited(copy, eps)
    assert "0.099" in problems(copy)


def test_a_finding_left_out_is_missed(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "loose.toml").write_text(
        'title = "Loose"\n[[stages]]\nname = "one"\nattack = "square"\nparams = { queries = 20 }\n'
    )
    folder = run(model_folder, tmp_path / "run", suite=str(tmp_path / "loose.toml"), norm="L2", eps="0.5", limit=16)
    findings = read_json(folder / REPORT)["findings"]
    names = [finding["name"] for finding in findings]
    assert names
    for other in ({"severity": "info"}, {"origin": "foolbox"}):
        edited(folder, lambda rows, report, o=other: report.update(findings=[{**one, **o} for one in findings]))  # type: ignore[misc]
        assert all(f"'{name}' (" in problems(folder) for name in names)
    edited(folder, lambda rows, report: report.update(findings=[]))
    assert all(f"'{name}' (" in problems(folder) for name in names)


def test_proofs_that_no_longer_prove_are_named(copy: Path) -> None:
    """Nothing is asked of inner values any more, so intervals alone must do, which they do for the easiest."""
    everything = set()
    for path in (copy / "proofs").iterdir():
        tensors = safetensors.torch.load_file(path)
        everything |= {int(name.split(".")[0]) for name in tensors}
        safetensors.torch.save_file({n: torch.zeros_like(v) if ".round." in n else v for n, v in tensors.items()}, path)
    seal(copy)
    named = [problem for problem in verify(copy, Source()).problems if "its proof by" in problem]
    assert len(everything) >= len(named) > 0
    assert {int(problem.split(":")[0].removeprefix("sample ")) for problem in named} <= everything


def test_a_proof_of_a_sample_that_is_not_certified_is_named(copy: Path) -> None:
    row = first(copy, lambda row: not any(name and not name.startswith("apgd") for name in row["stages"]))
    path, tensors = stored(copy, "proofs", row["id"])
    safetensors.torch.save_file({**tensors, f"{row['id']}.rivals": torch.zeros(0, dtype=torch.int32)}, path)
    seal(copy)
    assert f"sample {row['id']}: has a proof, but is not certified" in problems(copy)


def test_other_weights_are_noticed_and_code_in_a_report_is_not_run(honest: Path, copy: Path, tmp_path: Path) -> None:
    model = Path(read_json(honest / "config.json")["model"])
    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights = {
        name: value * 1.001 if value.dim() == 4 and "mean" not in name else value for name, value in weights.items()
    }
    other = {name: value for name, value in weights.items() if name not in ("mean", "std")}
    safetensors.torch.save_file(other, tmp_path / "other.safetensors")
    source = Source(model=str(tmp_path / "other.safetensors"), architecture=PluginSpec(name="small_cnn"))
    assert "the model has other weights than the report says" in verify(honest, source).problems
    write_json(copy / "config.json", {**read_json(copy / "config.json"), "model": "os:getcwd"})
    seal(copy)
    with pytest.raises(UsageError, match="name it with --model"):
        verify(copy, Source())


# Evidence

SPLITTING = BaB(seconds=0.0, steps=1, inner_steps=0, split_steps=5)
"""Bounds so loose that much has to be split."""


@pytest.mark.slow
def test_no_evidence_whatsoever_proves_what_is_false() -> None:
    """Proofs of other samples and networks, shuffled, cut short, out of range or not numbers at all."""
    rng, draw, tried = SampleRng(0, (0, 1), 0), random.Random(0), 0
    proofs, refuted = [], []
    for seed in range(18):
        net, x, y, threat = small(seed)
        for row, one in enumerate(SPLITTING(net, x, y, threat, rng)):
            if one.counterexample is not None:
                refuted.append((net, x[row : row + 1], y[row : row + 1], threat))
            elif one.evidence is not None:
                proofs.append(one.evidence)
    assert len(refuted) > 3
    assert sum("leaves.sign" in proof for proof in proofs) > 5
    for problem in refuted:
        for evidence in draw.sample(proofs, 4):
            for kind in (float("nan"), 6e4, -1.0, 0.5, None):
                changed = {
                    name: value if kind is None or not value.is_floating_point() else torch.full_like(value, kind)
                    for name, value in evidence.items()
                }
                if draw.random() < 0.3:
                    changed.pop(draw.choice(list(changed)))
                assert AlphaCrown().recheck(*problem, [changed]) == [False]
                tried += 1
    assert tried > 50


def test_leaves_that_do_not_cover_the_ball_prove_nothing() -> None:
    rng, seen = SampleRng(0, (0, 1), 0), 0
    for seed in range(12):
        net, x, y, threat = small(seed)
        for row, one in enumerate(SPLITTING(net, x, y, threat, rng)):
            if one.evidence is None or len(one.evidence.get("leaves.rival", ())) < 2:
                continue
            own = (net, x[row : row + 1], y[row : row + 1], threat)
            assert BaB().recheck(*own, [one.evidence]) == [True]
            names = ("leaves.rival", "leaves.sign", "leaves.value")
            for left_out in range(len(one.evidence["leaves.rival"])):
                kept = torch.arange(len(one.evidence["leaves.rival"])) != left_out
                fewer = {name: value[kept] if name in names else value for name, value in one.evidence.items()}
                assert BaB().recheck(*own, [fewer]) == [False]
                seen += 1
    assert seen > 10


# The audit


@pytest.mark.parametrize(("population", "sampled"), [(12, 5), (30, 30), (40, 7), (9, 1)])
def test_bounds_of_what_is_hidden_hold_as_often_as_they_say(population: int, sampled: int) -> None:
    for true in range(population + 1):
        chances = hypergeom.pmf(numpy.arange(sampled + 1), population, true, sampled)
        bounds = [
            hidden(population, sampled, found, 0.05) if chance > 0 else (0, population)
            for found, chance in enumerate(chances)
        ]
        assert sum(chance for chance, (low, _) in zip(chances, bounds, strict=True) if low > true) <= 0.05 + 1e-9
        assert sum(chance for chance, (_, high) in zip(chances, bounds, strict=True) if high < true) <= 0.05 + 1e-9
    assert [hidden(population, population, found, 0.05) for found in range(3)] == [(found, found) for found in range(3)]
    assert hidden(0, 0, 0, 0.05) == (0, 0)


def test_an_inflated_accuracy_is_refuted_and_an_honest_one_passes(model_folder: Path, tmp_path: Path) -> None:
    """The forger ran a weak attack, and says that it was a strong one: nothing but an attack can tell."""
    weak, strong = (
        f'title = "PGD"\n[[stages]]\nname = "pgd"\nattack = "pgd"\nparams = {{ steps = {steps} }}\n'
        for steps in (1, 30)
    )
    for name, text in (("weak", weak), ("strong", strong)):
        (tmp_path / f"{name}.toml").write_text(text)
    given = {"eps": "0.05", "limit": 200, "chunk_size": 200}
    forged = run(model_folder, tmp_path / "forged", suite=str(tmp_path / "weak.toml"), **given)
    honest = run(model_folder, tmp_path / "honest", suite=str(tmp_path / "strong.toml"), **given)

    def steps(rows: list[dict[str, Any]], report: dict[str, Any]) -> None:
        report["suite"]["stages"][0]["params"]["steps"] = 30
        report["stages"][0] |= {"forward": 6200, "backward": 6000}
        specs = [StageSpec.model_validate(spec) for spec in report["suite"]["stages"]]
        report["suite"]["sha256"] = suite_digest(specs, False, None, None)

    edited(forged, steps)
    config = read_json(forged / "config.json")
    write_json(forged / "config.json", {**config, "suite_sha256": read_json(forged / REPORT)["suite"]["sha256"]})
    seal(forged)
    robust = [read_json(folder / REPORT)["results"]["empirical"]["count"] for folder in (forged, honest)]
    assert robust[0] >= robust[1] + 10, "inflated by 5 points"
    assert verify(forged, Source()).problems == ()
    found = audit(subject(forged, Source()), forged, 200, seed=1)
    assert found.refutes(0.5)
    assert found.overstated[0] > 2
    plan = subject(honest, Source())
    assert not any(audit(plan, honest, 40, seed).refutes(0.5) for seed in range(25))


def test_the_command(honest: Path, copy: Path, cli: Cli) -> None:
    done = cli("verify", honest, "--attack", "5", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert "verified: 16 clean predictions" in done.stdout
    assert "audit, seed 3: 0 of" in done.stdout
    row = first(copy, lambda row: row["verdict"] != "misclassified")
    edited(copy, lambda rows, report: rows[row["id"]].update(margin=rows[row["id"]]["margin"] + 1))
    done = cli("verify", copy, "--json")
    assert done.returncode == 3
    assert any(f"sample {row['id']}" in problem for problem in json.loads(done.stdout)["problems"])


def test_a_class_that_all_but_ties_is_no_contradiction() -> None:
    logits = torch.tensor([3.0, 2.9995, 1.0])
    assert [_behind(logits, label) for label in range(3)] == [False, False, True]
