"""What a server finds when it runs the model that came with a report, and how it runs it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import PATIENCE
from leaderboard_kit import API, Board, Files, changed, files_of, packed, resealed, sha256

from robusteval.datasets.base import Split
from robusteval.evaluation.validate import validate
from robusteval.leaderboard.check import checked
from robusteval.models.base import Classifier
from robusteval.models.io import save_model
from robusteval.threat import ThreatModel


@pytest.fixture
def whole(small_run: Path, model_folder: Path) -> Files:
    return files_of(small_run, model_folder)


def written(files: Files, folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def _rows(files: Files) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files["samples.jsonl"].splitlines()]


def _with_rows(files: Files, rows: list[dict[str, Any]]) -> Files:
    return resealed({**files, "samples.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})


def _witness(files: Files, change: Callable[[torch.Tensor, Split, list[int]], torch.Tensor], digits: Split) -> Files:
    name = next(name for name in files if name.startswith("witnesses/"))
    stored = safetensors.torch.load(files[name])
    stored["x_adv"] = change(stored["x_adv"], digits, stored["ids"].tolist()).contiguous()
    return resealed({**files, name: safetensors.torch.save(stored)})


def test_an_honest_report_is_checked(whole: Files, tmp_path: Path) -> None:
    assert checked(written(whole, tmp_path), None)[0] == "checked"


def test_forged_witnesses_are_refuted_though_valid(whole: Files, digits: Split, tmp_path: Path) -> None:
    """The clean image itself is near, but classified correctly; a grey one is far."""
    clean = written(_witness(whole, lambda x, data, ids: data.images(ids), digits), tmp_path / "clean")
    grey = written(_witness(whole, lambda x, data, ids: torch.full_like(x, 0.5), digits), tmp_path / "grey")
    assert validate(clean) == validate(grey) == []
    assert [checked(folder, None)[0] for folder in (clean, grey)] == ["refuted"] * 2
    assert "witness: is 0 away, the report says" in checked(clean, None)[1]
    assert "farther than" in checked(grey, None)[1]


def test_a_witness_slightly_too_far_is_refuted(whole: Files, digits: Split, tmp_path: Path) -> None:
    threat = ThreatModel.parse("Linf", "0.1")

    def stretch(x_adv: torch.Tensor, data: Split, ids: list[int]) -> torch.Tensor:
        x = data.images(ids)
        return (x + 1.01 * (x_adv - x)).clamp(0, 1)

    folder = written(_witness(whole, stretch, digits), tmp_path)
    ids = [row["id"] for row in _rows(whole) if row["adv_distance"] is not None]
    assert ids
    assert not threat.contains(digits.images(ids), stretch(_stored(whole), digits, ids)).all()
    assert checked(folder, None)[0] == "refuted"


def _stored(files: Files) -> torch.Tensor:
    name = next(name for name in files if name.startswith("witnesses/"))
    return safetensors.torch.load(files[name])["x_adv"]


def test_forged_predictions_labels_weights_and_data_are_refuted(whole: Files, tmp_path: Path) -> None:
    rows = _rows(whole)
    wrong = next(row for row in rows if row["verdict"] == "misclassified")
    wrong["prediction"] = next(k for k in range(10) if k not in (wrong["prediction"], wrong["label"]))
    forged = {
        "is classified as": _with_rows(whole, rows),
        "with label": _with_rows(whole, [row | {"label": 9 - row["label"]} for row in _rows(whole)]),
        "weights": changed(whole, model__weights_sha256="0" * 64),
        "samples": changed(whole, data__sha256="0" * 64),
    }
    for said, files in forged.items():
        status, reason = checked(written(files, tmp_path / said.split()[0]), None)
        assert (status, said in reason) == ("refuted", True), (said, reason)


def test_other_weights_are_refuted(whole: Files, digits_net: Classifier, digits: Split, tmp_path: Path) -> None:
    folder = written(whole, tmp_path)
    card = json.loads(whole["model/config.json"])
    first = next(iter(digits_net.state_dict().values()))
    first.add_(1e-3)
    try:
        save_model(folder / "model", digits_net, {key: card[key] for key in ("architecture", "shape", "num_classes")})
    finally:
        first.sub_(1e-3)
    assert checked(folder, None)[0] == "refuted"


def test_what_cannot_be_run_here_stays_claimed(whole: Files, tmp_path: Path) -> None:
    cases = {
        "cifar10": changed(whole, data__name="cifar10"),
        "path": changed(whole, data__name="imagefolder:/etc"),
        "npz": changed(whole, data__name="npz"),
        "nonsense": changed(whole, data__name="nonsense"),
        "architecture": {
            **whole,
            "model/config.json": whole["model/config.json"].replace(b"small_cnn", b"unknown_net"),
        },
    }
    for name, files in cases.items():
        status, reason = checked(written(files, tmp_path / name), None)
        assert (status, "cannot be run here" in reason) == ("claimed", True), (name, reason)


def test_a_damaged_model_is_refuted(whole: Files, tmp_path: Path) -> None:
    weights = bytearray(whole["model/model.safetensors"])
    weights[-5] ^= 1
    status, reason = checked(written({**whole, "model/model.safetensors": bytes(weights)}, tmp_path), None)
    assert (status, "damaged" in reason) == ("refuted", True)


def test_the_server_checks_what_comes_with_weights(board: Board, whole: Files, digits: Split) -> None:
    honest, forged = packed(whole), packed(_witness(whole, lambda x, data, ids: data.images(ids), digits))
    for body in (honest, forged):
        assert board.put(body).status_code == 201
    end = time.monotonic() + PATIENCE
    found: dict[str, str] = {}
    while set(found.values()) != {"checked", "refuted"} and time.monotonic() < end:
        time.sleep(0.1)
        found = {sha256(body): board.client.get(f"{API}/{sha256(body)}").json()["status"] for body in (honest, forged)}
    assert found == {sha256(honest): "checked", sha256(forged): "refuted"}
    assert "witness: is 0 away" in board.client.get(f"/submissions/{sha256(forged)}").text
