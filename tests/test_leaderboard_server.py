"""A real server: large bodies in bounded memory, and nothing lost or halved when it is killed."""

from __future__ import annotations

import contextlib
import http.client
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra `server` is not installed")
pytest.importorskip("sqlalchemy", reason="the extra `server` is not installed")

from conftest import PATIENCE
from leaderboard_kit import API, Files, ask, changed, free_port, packed, serving, sha256

from robusteval.leaderboard.bundle import MIB
from robusteval.leaderboard.store import Store

CLIENTS, REPORTS, REPORTS_POSTGRESQL = 50, 500, 50


def _peak(pid: int) -> int:
    """Return the largest resident memory of a process so far, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _send(port: int, token: str, length: int | None, blocks: int) -> int:
    """Send ``blocks`` MiB of zeros, announced as ``length`` bytes or in chunks; return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.putrequest("PUT", f"{API}/{'0' * 64}")
    for name, value in (("Authorization", f"Bearer {token}"), ("Content-Type", "application/zip")):
        connection.putheader(name, value)
    framing = ("Transfer-Encoding", "chunked") if length is None else ("Content-Length", str(length))
    connection.putheader(*framing)
    connection.endheaders()
    block = bytes(MIB)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it does not listen to the end
        for _ in range(blocks):
            connection.send(b"%x\r\n%b\r\n" % (len(block), block) if length is None else block)
    try:
        return connection.getresponse().status
    except ConnectionResetError:
        return 0
    finally:
        connection.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_two_gigabytes_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    port, store = free_port(), Store(f"sqlite:///{tmp_path}/storage/leaderboard.db")
    token = store.add_token("alice")
    with serving(tmp_path, port, "--max-upload", 4) as server:
        before = _peak(server.pid)
        assert _send(port, token, 2 << 30, 0) == 413  # before anything of it came
        assert _send(port, token, 1000, 64) == 409  # announced as little: only that is read
        assert _send(port, token, None, 2048) in (413, 0)
        assert _send(port, "alice.wrong", None, 8) in (401, 0)
        assert _peak(server.pid) - before < 48 * MIB
        assert list((tmp_path / "storage" / "incoming").iterdir()) == []
        assert ask(port, "GET", "/healthz")[0] == 200
    store.close()


class Clients:
    """Threads that submit bodies, each until it is in, and remember what was acknowledged."""

    def __init__(self, port: int, token: str, bodies: list[bytes]) -> None:
        self.port, self.token = port, token
        self.acknowledged: dict[str, list[int]] = {}
        self.trouble: list[object] = []
        share = [bodies[first::CLIENTS] for first in range(CLIENTS)]
        self.threads = [threading.Thread(target=self._run, args=(own,), daemon=True) for own in share if own]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def wait(self, count: int) -> None:
        end = time.monotonic() + PATIENCE
        while len(self.acknowledged) < count and not self.trouble:
            assert time.monotonic() < end
            time.sleep(0.02)

    def _run(self, bodies: list[bytes]) -> None:
        for body in bodies:
            name = sha256(body)
            while not self.trouble:
                try:
                    code, answer = ask(self.port, "PUT", f"{API}/{name}", body, self.token)
                except (OSError, http.client.HTTPException):
                    time.sleep(0.2)  # the server is gone; it comes back
                    continue
                if code not in (200, 201):
                    self.trouble.append((code, answer))
                self.acknowledged.setdefault(name, []).append(code)
                break


def _check_whole(storage: Path, store: Store) -> set[str]:
    """Return what the database tells of, after checking that the bundle of each is there and whole."""
    known = store.known()
    for name in known:
        assert sha256((storage / "bundles" / name[:2] / f"{name}.zip").read_bytes()) == name
    return known


def submit_while_killed(folder: Path, url: str, files: Files, count: int) -> None:
    bodies = [packed(changed(files, seed=1000 + number)) for number in range(count)]
    names = {sha256(body) for body in bodies}
    assert len(names) == count
    port, store, storage = free_port(), Store(url), folder / "storage"
    clients = Clients(port, store.add_token("alice"), bodies)
    with serving(folder, port, "--database", url) as server:
        clients.start()
        clients.wait(count // 3)
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        time.sleep(0.3)  # whatever answer was on its way has come
        told, known = set(clients.acknowledged), _check_whole(storage, store)
        assert told <= known < names
    with serving(folder, port, "--database", url):
        for thread in clients.threads:
            thread.join(PATIENCE)
        assert clients.trouble == []
        assert set(clients.acknowledged) == names
        assert _check_whole(storage, store) == names
        assert all(len(codes) == 1 for codes in clients.acknowledged.values())
        assert ask(port, "GET", f"{API}?size=1")[1].startswith(b'{"total":%d,' % count)
        assert {path.stem for path in storage.glob("bundles/*/*.zip")} == names
        assert list((storage / "incoming").iterdir()) == []
        assert ask(port, "PUT", f"{API}/{sha256(bodies[0])}", bodies[0], clients.token)[0] == 200
    store.close()


@pytest.mark.slow
def test_a_killed_server_loses_nothing_it_acknowledged(tmp_path: Path, files: Files) -> None:
    submit_while_killed(tmp_path, f"sqlite:///{tmp_path}/board.db", files, REPORTS)


def _postgresql() -> Path | None:
    found = shutil.which("postgres")
    beside = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return Path(found).resolve().parent if found else beside[-1].parent if beside else None


def _unprivileged() -> dict[str, Any]:
    """Return as whom to start PostgreSQL, which refuses to run as root; skip where there is nobody."""
    if os.geteuid() != 0:
        return {}
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@pytest.fixture
def postgresql() -> Iterator[str]:
    """Run a PostgreSQL server of this test's own, on a socket in a short path; yields its URL."""
    binaries = _postgresql()
    if binaries is None:
        pytest.skip("no PostgreSQL server (initdb, postgres) on this machine")
    pytest.importorskip("psycopg", reason="the extra `server` is not installed")
    as_owner = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    if as_owner:
        shutil.chown(folder, as_owner["user"])
    data = folder / "data"
    setup = [binaries / "initdb", "-D", data, "-U", "robusteval", "-A", "trust", "--no-sync"]
    subprocess.run(setup, check=True, capture_output=True, cwd=folder, **as_owner)
    run = [binaries / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
    server = subprocess.Popen(run, cwd=folder, stderr=subprocess.DEVNULL, **as_owner)
    try:
        yield _answering(f"postgresql://robusteval@/postgres?host={folder}", server)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(PATIENCE)
        shutil.rmtree(folder)


def _answering(url: str, server: subprocess.Popen[bytes]) -> str:
    import psycopg

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert server.poll() is None
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return url
    raise AssertionError("PostgreSQL does not answer")


@pytest.mark.slow
def test_a_killed_server_loses_nothing_on_postgresql(tmp_path: Path, files: Files, postgresql: str) -> None:
    submit_while_killed(tmp_path, postgresql, files, REPORTS_POSTGRESQL)
