"""What the tests of the leaderboard share: bundles, good and bad, and a server process."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import PATIENCE, launch

from robusteval.evaluation.config import EvalConfig
from robusteval.evaluation.plan import prepare
from robusteval.evaluation.run import evaluate
from robusteval.evaluation.validate import seal
from robusteval.leaderboard.bundle import MIB, Limits
from robusteval.render.markdown import render
from robusteval.runs import RunDir

API = "/api/v1/submissions"
LIMITS = Limits(upload=4 * MIB, total=8 * MIB, samples=2 * MIB, document=MIB, entries=32, seconds=20)
SCRIPT = "<script>alert(1)</script>\u202e"
Files = dict[str, bytes]


@dataclass(frozen=True)
class Board:
    """A leaderboard in this process, and the tokens of two who may submit."""

    client: Any
    root: Path
    alice: str
    bob: str

    def put(self, body: bytes, token: str | None = None, name: str | None = None, **headers: str) -> Any:
        given = {"Authorization": f"Bearer {token or self.alice}", "Content-Type": "application/zip", **headers}
        return self.client.put(f"{API}/{name or sha256(body)}", content=body, headers=given)

    def stored(self) -> set[str]:
        return {path.stem for path in self.root.glob("bundles/*/*.zip")}


@contextmanager
def board_in(root: Path) -> Iterator[Board]:
    """Run a leaderboard in this process."""
    from fastapi.testclient import TestClient

    from robusteval.leaderboard.app import make_app
    from robusteval.leaderboard.intake import Storage
    from robusteval.leaderboard.server import Server
    from robusteval.leaderboard.store import Store

    store = Store(f"sqlite:///{root / 'board.db'}")
    alice, bob = store.add_token("alice"), store.add_token("bob")
    with TestClient(make_app(Server(store, Storage(root), LIMITS))) as client:
        yield Board(client, root, alice, bob)
    store.close()


def make_run(model: Path, folder: Path) -> Path:
    """Attack a few digits and write the whole report."""
    settings = {"model": str(model), "dataset": "digits", "suite": "quick", "limit": 12, "workers": 1}
    report = evaluate(prepare(EvalConfig.model_validate(settings)), RunDir(folder))
    (folder / "report.md").write_text(render(report))
    seal(folder)
    return folder


def files_of(run: Path, model: Path | None = None) -> Files:
    """Return what a bundle of a run holds."""
    listed = [fact["path"] for fact in json.loads((run / "manifest.json").read_text())["files"]]
    files = {name: (run / name).read_bytes() for name in ("manifest.json", *listed)}
    if model:
        files |= {f"model/{name}": (model / name).read_bytes() for name in ("model.safetensors", "config.json")}
    return files


def resealed(files: Mapping[str, bytes]) -> Files:
    """Return the files with a manifest that fits them, as a forger would."""
    facts = [
        {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
        if name != "manifest.json" and not name.startswith("model/")
    ]
    manifest = json.loads(files["manifest.json"]) | {"files": facts}
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def changed(files: Mapping[str, bytes], **changes: object) -> Files:
    """Return a sealed variant whose report has other values at ``a__b`` paths."""
    report = json.loads(files["report.json"])
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = report
        for parent in parents:
            node = node[parent]
        node[last] = value
    return resealed({**files, "report.json": json.dumps(report).encode()})


def packed(files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return the zip of ``files``, the same bytes for the same files."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", compression) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            archive.writestr(info, data)
    return body.getvalue()


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def ask(port: int, method: str, path: str, body: bytes = b"", token: str = "") -> tuple[int, bytes]:
    """Send one request; return status and body. Raises `OSError` or `HTTPException` where the server is not there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/zip"}
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@contextmanager
def serving(folder: Path, port: int, *options: object) -> Iterator[subprocess.Popen[str]]:
    """Run the real server on ``folder``; yields once it answers, and kills it."""
    log = (folder / "server.log").open("a")
    server = launch(folder, "leaderboard", "serve", "--port", port, "--storage", folder / "storage", *options, log=log)
    try:
        _wait(server, port, folder / "server.log")
        yield server
    finally:
        server.kill()
        server.wait()
        log.close()


def _wait(server: subprocess.Popen[str], port: int, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            if ask(port, "GET", "/healthz")[0] == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())
