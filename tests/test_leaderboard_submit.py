"""From `evaluate` over `submit` to a server's verdict: the commands themselves, with nothing between them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra `server` is not installed")
pytest.importorskip("sqlalchemy", reason="the extra `server` is not installed")

from conftest import PATIENCE, Cli, launch
from leaderboard_kit import API, SCRIPT, ask, free_port, serving

from robusteval.evaluation.validate import seal
from robusteval.leaderboard.store import Store


@pytest.mark.slow
def test_an_evaluation_is_submitted_and_checked(
    model_folder: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli(
        "evaluate", "--model", model_folder, "--suite", "certified", "--eps", "0.02", "--limit", "12", "--out", "run"
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "proofs").iterdir()), "a bundle with proofs"
    with (tmp_path / "run" / "report.html").open("a") as page:
        page.write(SCRIPT)
    seal(tmp_path / "run")
    port, store = free_port(), Store(f"sqlite:///{tmp_path}/storage/leaderboard.db")
    monkeypatch.setenv("ROBUSTEVAL_TOKEN", store.add_token("alice"))
    with serving(tmp_path, port):
        sending = launch(tmp_path, "submit", "run", "--to", f"http://127.0.0.1:{port}", "--weights", model_folder)
        said, complaint = sending.communicate(timeout=PATIENCE)
        assert sending.returncode == 0, complaint
        (found,) = json.loads(ask(port, "GET", API)[1])["submissions"]
        assert found["id"] in said
        end = time.monotonic() + PATIENCE
        while found["status"] == "claimed" and time.monotonic() < end:
            time.sleep(0.2)
            found = json.loads(ask(port, "GET", f"{API}/{found['id']}")[1])
        assert found["status"] == "checked", found
        assert "proofs from their evidence" in found["reason"]
        assert SCRIPT.encode() not in ask(port, "GET", f"/submissions/{found['id']}")[1]
    store.close()
