"""What a leaderboard takes in: good reports once, and nothing that is wrong, too large or meant to do harm."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("sqlalchemy", reason="the extra `server` is not installed")

from cage_jobs import take
from conftest import Cli, one_sentence
from leaderboard_kit import API, LIMITS, SCRIPT, Board, Files, changed, packed, sha256

from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.validate import read_report
from robusteval.leaderboard.bundle import MIB, Limits, Refused
from robusteval.leaderboard.cage import Cage, CageError
from robusteval.leaderboard.entry import entry_of, harmless
from robusteval.leaderboard.intake import Accepted, Storage, TooSlow, receive
from robusteval.leaderboard.server import Server
from robusteval.leaderboard.store import Store


def test_a_report_is_taken_once_and_stays_with_its_first_owner(board: Board, files: Files) -> None:
    body = packed(changed(files, seed=1))
    first, again, other = board.put(body), board.put(body), board.put(body, board.bob)
    assert [one.status_code for one in (first, again, other)] == [201, 200, 200]
    assert first.json() == {
        "id": sha256(body),
        "status": "claimed",
        "url": f"http://testserver/submissions/{sha256(body)}",
    }
    shown = board.client.get(f"{API}/{sha256(body)}").json()
    assert (shown["owner"], shown["report"]["evaluated"]) == ("alice", 12)
    assert board.root.joinpath("bundles", sha256(body)[:2], f"{sha256(body)}.zip").read_bytes() == body
    assert list(board.root.joinpath("incoming").iterdir()) == []


def test_one_bundle_from_many_at_once_is_stored_once(board: Board, files: Files) -> None:
    body = packed(changed(files, seed=3))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda turn: board.put(body, (board.alice, board.bob)[turn % 2]), range(8)))
    codes = [one.status_code for one in answers]
    assert sorted(codes) == [200] * 7 + [201]
    owner = board.client.get(f"{API}/{sha256(body)}").json()["owner"]
    assert owner == ("alice", "bob")[codes.index(201) % 2]


def test_what_was_uploaded_is_text_on_the_pages(board: Board, files: Files) -> None:
    body = packed(changed(files, model__name=SCRIPT, model__architecture="a\0b", data__title='"><img src=x onerror=1>'))
    assert board.put(body).status_code == 201
    for path in ("/", f"/submissions/{sha256(body)}"):
        page = board.client.get(path)
        assert "<script>alert" not in page.text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;\N{REPLACEMENT CHARACTER}" in page.text
        assert "<img" not in page.text
        assert not any(c in page.text for c in "\0\u202e")
        assert page.headers["x-content-type-options"] == "nosniff"
        assert "script-src 'self';" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]


def test_wrong_requests_are_refused(board: Board, files: Files) -> None:
    body = packed(changed(files, seed=2))
    for token in ("nobody.x", "alice.wrong", f"{board.alice}x", "alice.", "."):
        assert board.put(body, token).status_code == 401, token
    assert board.client.put(f"{API}/{sha256(body)}", content=body).status_code == 401
    assert board.put(body, name="0" * 64).status_code == 409
    assert board.put(body, name="0" * 63).status_code == 422
    assert board.put(body, **{"Content-Type": "text/html"}).status_code == 415
    assert board.put(bytes(LIMITS.upload + 1)).status_code == 413
    assert board.client.get(f"{API}?eps=1/0").status_code == 422
    assert board.client.get("/submissions/nothing").status_code == 422
    assert board.client.get(f"{API}/{sha256(body)}").status_code == 404


def test_a_streamed_body_may_not_be_too_large_or_too_slow(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(65536)

    async def stalled() -> AsyncIterator[bytes]:
        yield b"PK"
        await asyncio.sleep(60)

    with pytest.raises(Refused, match="larger than 1048576"):
        asyncio.run(receive(endless(), tmp_path / "large", Limits(upload=MIB)))
    assert (tmp_path / "large").stat().st_size <= MIB
    with pytest.raises(TooSlow):
        asyncio.run(receive(stalled(), tmp_path / "slow", Limits(patience=0)))


def test_submissions_can_be_filtered_and_sorted(board: Board, files: Files) -> None:
    names = ["b-sorted", "a-sorted", "c-sorted"]
    for name in names:
        assert board.put(packed(changed(files, model__name=name))).status_code == 201
    ask = {"dataset": "digits", "norm": "Linf", "eps": "1/10", "status": "claimed", "sort": "model", "order": "asc"}
    found = board.client.get(API, params={**ask, "size": 500}).json()
    models = [one["report"]["model"] for one in found["submissions"]]
    assert [model for model in models if model in names] == sorted(names)
    assert found["total"] == len(models) <= len(board.stored())  # others were checked by now
    second = board.client.get(API, params={**ask, "size": 1, "page": 2}).json()
    assert [one["report"]["model"] for one in second["submissions"]] == [models[1]]
    for other in ({"eps": "0.2"}, {"norm": "L2"}, {"dataset": "mnist"}, {"status": "checked"}):
        assert board.client.get(API, params=ask | other).json()["total"] == 0, other


def test_nothing_is_told_of_before_it_is_kept(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails in between, there is no row without a bundle; a bundle without a row goes at the next start."""
    store, storage = Store(f"sqlite:///{tmp_path}/board.db"), Storage(tmp_path / "storage")
    store.add_token("alice")
    storage.clean(store.known())
    server = Server(store, storage)

    async def look(*_: Path) -> Accepted:
        return Accepted(entry_of(read_report(small_run)), with_model=False)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    def take(name: str) -> None:
        (storage.temporary / name).write_bytes(b"bundle")
        asyncio.run(server.take(storage.temporary / name, tmp_path, name * 64, "alice"))

    monkeypatch.setattr(server, "_look", look)
    for owner, method, left in ((Storage, "keep", 0), (Store, "add", 1)):
        with monkeypatch.context() as broken:
            broken.setattr(owner, method, fail)
            with pytest.raises(OSError, match="no space"):
                take("a")
        assert (store.known(), len(list(storage.root.glob("bundles/*/*")))) == (set(), left)
    take("b")
    storage.clean(store.known())
    assert [path.stem for path in storage.root.glob("bundles/*/*")] == ["b" * 64]
    assert list(storage.temporary.iterdir()) == []
    store.close()


def test_a_check_that_kills_the_server_is_not_tried_for_ever(small_run: Path, tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/board.db")
    store.add_token("alice")
    for name, with_model in (("a", True), ("b", False)):
        store.add(name * 64, "alice", Accepted(entry_of(read_report(small_run)), with_model))
    assert [store.next_to_check() for _ in range(4)] == ["a" * 64] * 3 + [None]
    store.reopen()
    assert store.next_to_check() == "a" * 64
    store.settle("a" * 64, "checked", "fine")
    store.reopen()
    assert store.next_to_check() is None
    store.close()


@pytest.mark.parametrize(("package", "arguments"), [("sqlalchemy", ["token", "list"]), ("uvicorn", ["serve"])])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, package: str, arguments: list[str]) -> None:
    from robusteval.cli.leaderboard import command

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "robusteval.leaderboard.store")
    with pytest.raises(UsageError, match=r"'robusteval\[server\]'"):
        command.main(arguments, standalone_mode=False)


def test_shown_texts_are_cut_and_cleaned() -> None:
    assert harmless("a\0\u202e\ud800b\n") == "a" + "\N{REPLACEMENT CHARACTER}" * 3 + "b\N{REPLACEMENT CHARACTER}"
    assert len(harmless("x" * 1_000_000)) == 120


def test_a_job_that_takes_too_much_dies_alone() -> None:
    cage = Cage(take, 64 * MIB, 1)
    try:
        for what, said in (("memory", "64 MiB"), ("time", "more than 1 s"), ("crash", "crashed"), ("memory", "64 MiB")):
            with pytest.raises(CageError, match=said):
                cage(what)
        assert cage("well") == "well"
    finally:
        cage.close()


def test_tokens_are_kept_as_hashes_and_can_be_revoked(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "board.db"
    store = Store(f"sqlite:///{path}")
    token = store.add_token("carol")
    assert token.partition(".")[2].encode() not in path.read_bytes()
    assert (store.holder(token), store.holder(token + "x"), store.holder("carol.")) == ("carol", None, None)
    store.revoke_token("carol")
    assert store.holder(token) is None
    for wrong in ("carol", "a b", "", "x" * 41):
        with pytest.raises(UsageError):
            store.add_token(wrong)
    for gone in ("carol", "dora"):
        with pytest.raises(UsageError, match="no token"):
            store.revoke_token(gone)
    store.close()


def test_the_token_commands(cli: Cli) -> None:
    assert cli("leaderboard", "token", "add", "carol").stdout.startswith("carol.")
    assert "0 submissions" in cli("leaderboard", "token", "list").stdout
    done = cli("leaderboard", "token", "revoke", "dora")
    assert (done.returncode, one_sentence(done.stderr)) == (2, True), done.stderr


@pytest.mark.parametrize("url", ["sqlite://", "mysql://x/y", "nonsense", "postgresql://nobody@127.0.0.1:1/none"])
def test_a_database_that_cannot_be_used_is_said_in_one_sentence(url: str) -> None:
    with pytest.raises(RobustevalError, match="database"):
        Store(url)
