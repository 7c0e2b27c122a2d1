"""Submissions: reproducible bundles, the leaderboard's protocol, the Hub, and a token that stays where it belongs."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import sys
import types
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub._commit_api
import pytest
from conftest import Cli, make_model, one_sentence
from pydantic import SecretStr
from standins import Handler, HubStandIn, Leaderboard, Seen, running

from robusteval.datasets.base import Split
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.validate import MANIFEST, read_report, seal, validate
from robusteval.models.io import load_folder, save_model, weights_digest
from robusteval.render.markdown import render
from robusteval.runs import RunDir
from robusteval.submission.bundle import FileToSend, model_files, report_files, write_zip
from robusteval.submission.endpoint import check_endpoint, find_token, redacted
from robusteval.submission.server import LONGEST_WAIT, Server

TOKEN = "hf_notToBeSeenAnywhere0123456789"


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submitted") / "run"
    settings = {"model": str(model_folder), "dataset": "digits", "norm": "Linf", "eps": "0.1", "suite": "quick"}
    report = evaluate(prepare(EvalConfig(**settings, limit=30, workers=1)), RunDir(folder))
    (folder / "report.md").write_text(render(report), encoding="utf-8")
    seal(folder)
    return folder


@pytest.fixture(autouse=True)
def only_this_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "ROBUSTEVAL_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "keyring", None)


@pytest.fixture
def board() -> Iterator[Leaderboard]:
    with running(Leaderboard(TOKEN)) as stand_in:
        assert isinstance(stand_in, Leaderboard)
        yield stand_in


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setattr(huggingface_hub._commit_api, "is_xet_available", lambda: False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running(HubStandIn(TOKEN)) as stand_in:
        assert isinstance(stand_in, HubStandIn)
        yield stand_in


def bundle(run: Path, folder: Path) -> FileToSend:
    return write_zip(report_files(run), folder / "bundle.zip")


def server(board: Leaderboard, waits: list[float], **changes: Any) -> Server:
    return replace(Server(board.url, SecretStr(TOKEN), sleep=waits.append), **changes)


def test_the_same_content_is_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = bundle(run, tmp_path / "a")
    for name in sorted((path.relative_to(run) for path in run.rglob("*") if path.is_file()), reverse=True):
        copy = tmp_path / "copy" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((run / name).read_bytes())
        copy.chmod(0o600)
        os.utime(copy, (1, 1))
    second = bundle(tmp_path / "copy", tmp_path / "b")
    assert first.path.read_bytes() == second.path.read_bytes()
    backwards = dict(reversed(report_files(run).items()))
    assert write_zip(backwards, tmp_path / "d" / "bundle.zip").sha256 == first.sha256
    assert (first.sha256, first.bytes) == (second.sha256, second.bytes)
    names = zipfile.ZipFile(first.path).namelist()
    assert names == sorted(names)
    assert {"report.json", "samples.jsonl", MANIFEST, "report.md", "witnesses/00000.safetensors"} <= set(names)
    assert "launch.json" not in names
    (tmp_path / "copy" / "report.md").write_text("other")
    assert bundle(tmp_path / "copy", tmp_path / "c").sha256 != first.sha256


def test_an_unpacked_bundle_is_a_valid_report(run: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(bundle(run, tmp_path).path).extractall(tmp_path / "there")
    assert validate(tmp_path / "there") == []


@pytest.mark.parametrize("name", ["a\\b", "a:b", "a\nb", "model/x"])
def test_names_that_would_lie_elsewhere_are_refused(run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_text("x")
    seal(tmp_path / "run")
    with pytest.raises(RobustevalError, match="cannot be a file of a bundle"):
        report_files(tmp_path / "run")


def test_the_model_is_sent_only_if_it_is_the_reports(
    run: Path, model_folder: Path, digits: Split, tmp_path: Path
) -> None:
    report = read_report(run)
    sent = write_zip(report_files(run) | model_files(model_folder, report), tmp_path / "bundle.zip")
    zipfile.ZipFile(sent.path).extractall(tmp_path / "there")
    loaded = load_folder(tmp_path / "there" / "model", (1, 8, 8), 10)
    assert weights_digest(loaded.module) == report.model.weights_sha256
    card = {"architecture": {"name": "small_cnn"}, "shape": digits.info.shape, "num_classes": 10}
    save_model(tmp_path / "other", make_model(digits, seed=5), card)
    with pytest.raises(UsageError, match="not the model of the report"):
        model_files(tmp_path / "other", report)


def test_a_bundle_is_sent_once(run: Path, board: Leaderboard, tmp_path: Path) -> None:
    sent = bundle(run, tmp_path)
    answer, new = server(board, []).submit(sent)
    assert (answer.id, answer.status, new) == (sent.sha256, "claimed", True)
    assert board.stored == {sent.sha256: sent.path.read_bytes()}
    (put,) = board.calls("PUT")
    assert put.path == f"/api/v1/submissions/{sent.sha256}"
    assert put.headers["Content-Type"] == "application/zip"
    assert put.headers["Authorization"] == f"Bearer {TOKEN}"
    assert int(put.headers["Content-Length"]) == sent.bytes
    again, new = server(board, []).submit(sent)
    assert (again, new) == (answer, False)
    assert len(board.calls("PUT")) == 1


def test_a_server_that_is_down_is_asked_again_as_late_as_it_says(run: Path, board: Leaderboard, tmp_path: Path) -> None:
    waits: list[float] = []
    board.script = [503, 500]
    answer, new = server(board, waits, pause=0.001).submit(bundle(run, tmp_path))
    assert (answer.status, new, waits) == ("claimed", True, [3.0, 3.0])


def test_a_cut_connection_is_taken_up_again_and_nothing_is_stored_half(
    run: Path, board: Leaderboard, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(os.urandom(4 << 20))  # more than the buffers of a connection hold
    sent = write_zip({**report_files(run), "large": tmp_path / "large"}, tmp_path / "bundle.zip")
    waits: list[float] = []
    board.script = ["cut", "cut"]
    answer, _ = server(board, waits).submit(sent)
    assert answer.id == sent.sha256
    assert board.stored == {sent.sha256: sent.path.read_bytes()}
    assert [len(put.body) for put in board.calls("PUT")] == [1000, 1000, sent.bytes]
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


def test_tries_and_waits_are_bounded(run: Path, board: Leaderboard, tmp_path: Path) -> None:
    sent, waits = bundle(run, tmp_path), []
    board.script = [503] * 9
    with pytest.raises(RobustevalError, match=r"the server said 503.*same command sends it again"):
        server(board, waits, tries=4).submit(sent)
    assert (len(waits), len(board.calls("PUT"))) == (3, 4)

    def much_later(handler: Handler, seen: Seen) -> None:
        handler.say(503, {}, Retry_After=str(int(LONGEST_WAIT) + 1))

    board.script, waits[:] = [much_later], []
    with pytest.raises(RobustevalError, match="asks to wait 121 s"):
        server(board, waits).submit(sent)
    assert waits == []
    with pytest.raises(RobustevalError, match="ConnectError"):
        Server("http://127.0.0.1:9", SecretStr(TOKEN), tries=2, sleep=waits.append).submit(sent)
    assert len(waits) == 1


def test_a_refusal_is_final_and_shown_without_the_token(run: Path, board: Leaderboard, tmp_path: Path) -> None:
    board.token = "another"
    waits: list[float] = []
    with pytest.raises(RobustevalError, match=r"refused: 401, not a token: Bearer \(token\)") as refused:
        server(board, waits).submit(bundle(run, tmp_path))
    assert (waits, len(board.calls("PUT"))) == ([], 1)
    assert_unseen(refused.value)


def assert_unseen(error: BaseException | None) -> None:
    while error is not None:
        assert TOKEN not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__


def test_a_redirect_does_not_get_the_token(run: Path, board: Leaderboard, tmp_path: Path) -> None:
    with running(Leaderboard(TOKEN)) as elsewhere:

        def away(handler: Handler, seen: Seen) -> None:
            handler.say(307, {}, Location=elsewhere.url + seen.path)

        board.script = [away]
        with pytest.raises(RobustevalError, match=r"307, a redirect to .* not followed"):
            server(board, []).submit(bundle(run, tmp_path))
        assert elsewhere.requests == []


@pytest.mark.parametrize(
    ("said", "problem"),
    [(b"<html>", "not a submission"), (b'{"id": "%s", "status": "ok"}' % (b"0" * 64), "another submission")],
)
def test_an_odd_answer_is_no_success(run: Path, board: Leaderboard, tmp_path: Path, said: bytes, problem: str) -> None:
    board.script = [lambda handler, seen: handler.say(201, said)]
    with pytest.raises(RobustevalError, match=problem):
        server(board, []).submit(bundle(run, tmp_path))


@pytest.mark.parametrize("url", ["https://example.org/", "http://127.0.0.1:8000", "http://[::1]:1", "http://localhost"])
def test_tokens_go_to_https_and_to_this_machine(url: str) -> None:
    assert check_endpoint(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org", "http://127.0.0.1.evil.example", "ftp://localhost", "https://", "example.org",
        "https://u:secret@example.org", "https://example.org?x=1", "https://example.org#x", "https://a b",
        "https://example.org:99999", "http://10.0.0.1",
    ],
)  # fmt: skip
def test_tokens_go_nowhere_else(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_endpoint(url)
    assert "secret" not in str(refused.value)


def test_where_tokens_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no token for example\.org: .*ROBUSTEVAL_TOKEN"):
        find_token("ROBUSTEVAL_TOKEN", "https://example.org")
    fake, errors = types.ModuleType("keyring"), types.ModuleType("keyring.errors")
    fake.get_password = {("robusteval", "example.org"): "kept"}.get  # type: ignore[attr-defined]
    monkeypatch.setattr(fake, "get_password", lambda *key: {("robusteval", "example.org"): "kept"}.get(key))
    errors.KeyringError = type("KeyringError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyring", fake)
    monkeypatch.setitem(sys.modules, "keyring.errors", errors)
    assert find_token("ROBUSTEVAL_TOKEN", "https://example.org").get_secret_value() == "kept"
    monkeypatch.setenv("ROBUSTEVAL_TOKEN", f" {TOKEN}\n")
    found = find_token("ROBUSTEVAL_TOKEN", "https://example.org")
    assert found.get_secret_value() == TOKEN
    assert TOKEN not in f"{found} {found!r} {Server('https://example.org', found)}"
    assert redacted(f"you said {TOKEN}\x1b[31m", found) == "you said (token) [31m"
    for odd in (f"{TOKEN}\nX-Evil: 1", f"{TOKEN}'", "tökén"):
        monkeypatch.setenv("ROBUSTEVAL_TOKEN", odd)
        with pytest.raises(UsageError) as refused:
            find_token("ROBUSTEVAL_TOKEN", "https://example.org")
        assert TOKEN not in str(refused.value)


def test_the_command_sends_to_a_server_and_says_nothing_of_the_token(
    run: Path, board: Leaderboard, inside: Cli, model_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    arguments = ("submit", run, "--to", board.url, "--out", tmp_path / "out")
    none = inside(*arguments)
    assert (none.returncode, one_sentence(none.stderr), board.requests) == (2, True, [])
    dry = inside(*arguments, "--dry-run", "--weights", model_folder)
    assert (dry.returncode, board.requests) == (0, []), dry.stderr
    archive = zipfile.ZipFile(tmp_path / "out" / "bundle.zip")
    for name in archive.namelist():
        assert f"{hashlib.sha256(archive.read(name)).hexdigest()}  {name}" in dry.stdout
    assert "model/model.safetensors" in dry.stdout
    assert f"PUT {board.url}/api/v1/submissions/" in dry.stdout
    assert f"the report tells its source: {model_folder}" in dry.stdout
    monkeypatch.setenv("ROBUSTEVAL_TOKEN", TOKEN)
    first, second = inside(*arguments), inside(*arguments)
    assert first.stdout.splitlines()[1].startswith("sent: claimed, http://127.0.0.1")
    assert second.stdout.splitlines()[1].startswith("there already: claimed")
    ((sha256, body),) = board.stored.items()
    assert sha256 in first.stdout
    assert zipfile.ZipFile(io.BytesIO(body)).testzip() is None
    board.token = "another"
    board.stored.clear()
    refused = inside(*arguments)
    assert (refused.returncode, one_sentence(refused.stderr)) == (1, True)
    said = [*(done.stdout + done.stderr for done in (none, dry, first, second, refused)), caplog.text]
    assert all(TOKEN not in text for text in said)


def test_wrong_requests(run: Path, inside: Cli, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "samples.jsonl").write_text("")
    for arguments, code, said in (
        ((run, "--to", "robustbenhc"), 2, "Did you mean 'robustbench'?"),
        ((run, "--to", "csv"), 2, "place to submit to"),
        ((run, "--to", "huggingface"), 2, "--repo USER/NAME"),
        ((run, "--to", "http://example.org"), 2, "not https"),
        ((run, "--to", "https://example.org", "--repo", "a/b"), 2, "--repo means nothing"),
        ((run, "--to", "robustbench", "--pull-request"), 2, "--pull-request means nothing"),
        ((run, "--to", "robustbench"), 3, "rules of robustbench"),
        (("broken", "--to", "https://example.org", "--dry-run"), 3, "not a valid report"),
    ):
        done = inside("submit", *arguments)
        assert (done.returncode, one_sentence(done.stderr)) == (code, True), done.stderr
        assert said in done.stderr


def test_the_hub_gets_card_report_and_model_in_one_commit(
    run: Path, hub: HubStandIn, inside: Cli, model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    arguments = ("submit", run, "--to", "huggingface", "--repo", "jane/toy", "--endpoint", hub.url, "--out", "card")
    arguments += ("--weights", model_folder)
    dry = inside(*arguments, "--dry-run", "--private")
    assert (dry.returncode, hub.requests) == (0, []), dry.stderr
    assert f"repository jane/toy at {hub.url} --private" in dry.stdout
    first = inside(*arguments, "--private")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"sent: {hub.url}/jane/toy/commit/")
    files = hub.repos["jane/toy"]
    assert files["README.md"] == (tmp_path / "card" / "README.md").read_bytes()
    assert files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    for name, path in report_files(run).items():
        assert files[f"evaluation/{name}"] == path.read_bytes()
    assert len(hub.commits) == 1
    assert b'"private"' in next(seen.body for seen in hub.requests if seen.path == "/api/repos/create")
    second = inside(*arguments)
    assert second.stdout.startswith("there already: ")
    assert len(hub.commits) == 1
    assert len([seen for seen in hub.requests if seen.path.startswith("/lfs/")]) == 2  # model and witnesses, once
    assert all(TOKEN not in text for text in (dry.stdout, first.stdout, first.stderr, second.stdout, caplog.text))
    assert "huggingface.co" not in caplog.text  # another Hub was asked for: the public one has no part in it


def test_somebody_elses_card_is_not_replaced_unasked(run: Path, hub: HubStandIn, inside: Cli) -> None:
    hub.repos["jane/toy"] = {"README.md": b"# My own words"}
    arguments = ("submit", run, "--to", "huggingface", "--repo", "jane/toy", "--endpoint", hub.url)
    refused = inside(*arguments)
    assert (refused.returncode, one_sentence(refused.stderr)) == (2, True)
    assert "--replace-card" in refused.stderr
    assert hub.repos["jane/toy"] == {"README.md": b"# My own words"}
    proposed = inside(*arguments, "--pull-request")
    assert proposed.stdout.startswith(f"sent: {hub.url}/jane/toy/discussions/1"), proposed.stderr
    assert any(seen.path.endswith("/commit/main?create_pr=1") for seen in hub.requests)
    hub.repos["jane/toy"] = {"README.md": b"# My own words"}
    assert inside(*arguments, "--replace-card").returncode == 0
    assert b"# My own words" not in hub.repos["jane/toy"]["README.md"]


def test_the_hub_refuses_and_the_token_is_not_told(
    run: Path, hub: HubStandIn, inside: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.token = "another"
    done = inside("submit", run, "--to", "huggingface", "--repo", "jane/toy", "--endpoint", hub.url)
    assert (done.returncode, one_sentence(done.stderr)) == (1, True), done.stderr
    assert "401" in done.stderr
    assert TOKEN not in done.stdout + done.stderr + caplog.text
    bad = inside("submit", run, "--to", "huggingface", "--repo", "jane/../x", "--endpoint", hub.url)
    assert (bad.returncode, one_sentence(bad.stderr)) == (1, True), bad.stderr


def test_a_redirect_of_the_hub_does_not_carry_the_token(run: Path, hub: HubStandIn, inside: Cli) -> None:
    with running(HubStandIn(TOKEN)) as elsewhere:

        def away(handler: Handler, seen: Seen) -> None:
            handler.say(307, {}, Location=elsewhere.url.replace("127.0.0.1", "localhost") + seen.path)

        hub.script = [away]
        done = inside("submit", run, "--to", "huggingface", "--repo", "jane/toy", "--endpoint", hub.url)
        assert done.returncode == 1
        assert TOKEN not in str([(seen.headers, seen.body) for seen in elsewhere.requests])
