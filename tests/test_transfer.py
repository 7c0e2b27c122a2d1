"""Witnesses of another run as an attack, and models that are functions without gradients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, one_sentence
from torch import nn

from robusteval.attacks.transfer import Transfer
from robusteval.datasets.base import Split
from robusteval.errors import UsageError
from robusteval.rng import SampleRng
from robusteval.threat import ThreatModel
from robusteval.witnesses import load_witnesses, witness_files

ASKED = ("evaluate", "--dataset", "digits", "--limit", "40", "--workers", "1")

BLACK_BOX = """
from pathlib import Path

import torch
from robusteval.models.io import load_folder

net = load_folder(Path({folder!r}), (1, 8, 8), 10).module.eval()

def predict(images):
    with torch.no_grad():
        return net(torch.from_numpy(images)).numpy()
"""

SCORES = """
title = "Scores alone"
[[stages]]
name = "square"
attack = "square"
params = { queries = 200 }
"""


FEW = """
title = "L0"
[[stages]]
name = "fmn"
attack = "fmn"
params = { steps = 20 }
"""


def report_of(cli: Cli, *arguments: str | Path) -> dict[str, Any]:
    done = cli(*ASKED, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_witnesses_of_one_run_break_the_same_samples_in_the_next(
    cli: Cli, model_folder: Path, tmp_path: Path, digits: Split
) -> None:
    asked, first = ("--suite", "quick", "--model", model_folder), tmp_path / "first"
    found = report_of(cli, *asked, "--eps", "0.1", "--out", first)
    again = report_of(cli, *asked, "--eps", "0.1", "--witnesses", first, "--out", tmp_path / "second")
    transfer, others = again["stages"][0], again["stages"][1:]
    assert (transfer["name"], transfer["backward"]) == ("transfer", 0)
    assert transfer["closed"] == found["results"]["verdicts"]["broken"] > 5
    assert sum(stage["closed"] for stage in others) == 0
    assert again["suite"]["name"] == "quick+transfer"
    assert cli("validate", tmp_path / "second").returncode == 0

    threat, ids = ThreatModel.parse("Linf", "0.05"), (3, 39, 700)
    x, y = digits.images(slice(0, 3)), digits.labels[:3]
    candidates = Transfer(str(first))(nn.Identity(), x, y, threat, SampleRng(0, ids, 0)).candidates
    stored = {i: w for path in witness_files(first) for i, w in zip(*load_witnesses(path), strict=True)}
    for row, sample in enumerate(ids):
        own = x[row : row + 1]
        expected = threat.hold(own, stored[sample][None]) if sample in stored else own
        assert torch.equal(candidates[row : row + 1], expected)

    copied, sha256 = tmp_path / "copied", again["suite"]["stages"][0]["params"]["sha256"]
    shutil.copytree(first, copied)
    Transfer(str(copied), sha256).check()
    path = witness_files(copied)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UsageError, match="not those that this suite was made with"):
        Transfer(str(copied), sha256).check()
    refused = cli(*ASKED, *asked, "--witnesses", tmp_path / "nowhere")
    assert (refused.returncode, one_sentence(refused.stderr)) == (2, True)


def test_a_function_is_attacked_by_its_scores_and_gradient_attacks_are_refused(
    cli: Cli, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "service.py").write_text(BLACK_BOX.format(folder=str(model_folder)))
    (tmp_path / "scores.toml").write_text(SCORES)
    refused = cli(*ASKED, "--suite", "quick", "--model", "service:predict", "--eps", "0.15")
    assert refused.returncode == 1
    assert "--allow no-gradient" in refused.stderr
    assert "score- or decision-based" in refused.stderr
    asked = ("--suite", "scores.toml", "--eps", "0.15")
    box, net = (report_of(cli, *asked, "--model", model) for model in ("service:predict", model_folder))
    assert {finding["name"]: finding["severity"] for finding in box["findings"]}["no-gradient"] == "info"
    assert box["results"] == net["results"]
    assert box["results"]["verdicts"]["broken"] > 5
    assert box["stages"][0]["forward"] <= 200 * box["stages"][0]["entered"] + 2 * 40


def test_l0_from_the_command_to_the_checked_report(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.toml").write_text(
        'title = "L0"\n[[stages]]\nname = "fmn"\nattack = "fmn"\nparams = { steps = 20 }\n'
    )
    asked = ("--model", model_folder, "--norm", "L0", "--eps", "6", "--suite", "few.toml", "--out", "few")
    report = report_of(cli, *asked)
    assert report["threat"]["norm"] == "L0"
    assert report["results"]["verdicts"]["broken"] > 5
    assert "L0" in report["baselines"]["reason"]
    rows = [json.loads(line) for line in (tmp_path / "few" / "samples.jsonl").read_text().splitlines()]
    assert {row["adv_distance"] for row in rows if row["verdict"] == "broken"} <= {1, 2, 3, 4, 5, 6}
    assert cli("validate", "few").returncode == 0
    for suite in ("standard", "rand"):
        refused = cli(*ASKED, "--model", model_folder, "--norm", "L0", "--eps", "6", "--suite", suite)
        assert (refused.returncode, one_sentence(refused.stderr)) == (2, True)
        assert f"'{suite}' has no stage for L0" in refused.stderr
