"""Servers on this machine that speak what `submit` speaks: a leaderboard's protocol, and as much of the Hub's."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs


@dataclass
class Seen:
    """A request as it arrived; ``body`` is what was read of it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class StandIn:
    """A server; ``script`` is how it misbehaves, one word or status per request that changes something."""

    token: str
    requests: list[Seen] = field(default_factory=list)
    script: list[Any] = field(default_factory=list)
    url: str = ""

    def answer(self, seen: Seen, handler: Handler) -> None:
        raise NotImplementedError

    def calls(self, method: str) -> list[Seen]:
        return [seen for seen in self.requests if seen.method == method]


class Handler(BaseHTTPRequestHandler):
    """Passes every request on to the stand-in."""

    protocol_version = "HTTP/1.1"
    stand_in: StandIn

    def read_all(self, seen: Seen) -> None:
        seen.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def say(self, status: int, value: Any, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, content in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), content)
        self.end_headers()
        self.wfile.write(body)

    def serve(self) -> None:
        seen = Seen(self.command, self.path, dict(self.headers))
        self.stand_in.requests.append(seen)
        self.stand_in.answer(seen, self)

    do_GET = do_PUT = do_POST = serve

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def running(stand_in: StandIn) -> Iterator[StandIn]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"stand_in": stand_in}))
    server.daemon_threads = True
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Leaderboard(StandIn):
    """`GET` and `PUT /api/v1/submissions/{sha256}`; what is stored is always whole."""

    stored: dict[str, bytes] = field(default_factory=dict)

    def answer(self, seen: Seen, handler: Handler) -> None:
        sha256 = seen.path.removeprefix("/api/v1/submissions/")
        if seen.method == "GET":
            known = sha256 in self.stored
            handler.say(200 if known else 404, self.facts(sha256) if known else {"detail": "no such submission"})
            return
        trouble = self.script.pop(0) if self.script else None
        if trouble == "cut":
            seen.body = handler.rfile.read(1000)
            handler.close_connection = True
            return
        handler.read_all(seen)
        if callable(trouble):
            trouble(handler, seen)
        elif trouble:
            handler.say(trouble, {"detail": "not now"}, Retry_After="3")
        elif seen.headers.get("Authorization") != f"Bearer {self.token}":
            handler.say(401, {"detail": f"not a token: {seen.headers.get('Authorization')}"})
        elif hashlib.sha256(seen.body).hexdigest() != sha256:
            handler.say(400, {"detail": "the body has another hash"})
        else:
            self.stored[sha256] = seen.body
            handler.say(201, self.facts(sha256))

    def facts(self, sha256: str) -> dict[str, str]:
        return {"id": sha256, "status": "claimed", "url": f"{self.url}/submissions/{sha256}"}


@dataclass
class HubStandIn(StandIn):
    """The calls of huggingface_hub that make a repository and commit to it; large files by basic LFS transfer."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def answer(self, seen: Seen, handler: Handler) -> None:
        handler.read_all(seen)
        path = seen.path.split("?")[0]
        trouble = self.script.pop(0) if self.script else None
        if callable(trouble):
            trouble(handler, seen)
        elif path.startswith("/lfs/"):
            self.lfs[path.removeprefix("/lfs/")] = seen.body
            handler.say(200, {})
        elif seen.headers.get("authorization", seen.headers.get("Authorization")) != f"Bearer {self.token}":
            handler.say(401, {"error": f"Invalid credentials: {dict(seen.headers)}"})
        else:
            handler.say(*self.respond(path, seen.body))

    def respond(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            fresh = name not in self.repos
            self.repos.setdefault(name, {})
            return (200 if fresh else 409), {"url": f"{self.url}/{name}", "error": "exists"}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.lfs_action(one) for one in json.loads(body)["objects"]]}
        user, name, *rest = path.removeprefix("/api/models/").split("/")
        files = self.repos[f"{user}/{name}"]
        if not rest or rest[0] == "revision":
            return 200, {"id": f"{user}/{name}", "sha": self.head()}
        if rest[0] == "paths-info":
            wanted = [one for one in parse_qs(body.decode())["paths"] if one in files]
            return 200, [{"type": "file", "path": one, "size": 1, "oid": git_oid(files[one])} for one in wanted]
        if rest[0] == "preupload":
            return 200, {"files": [self.plan(files, one["path"]) for one in json.loads(body)["files"]]}
        return 200, self.commit(f"{user}/{name}", body)

    def head(self) -> str:
        return f"{len(self.commits):040x}"

    def lfs_action(self, one: dict[str, Any]) -> dict[str, Any]:
        upload = {"actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
        return {**one, **({} if one["oid"] in self.lfs else upload)}

    def plan(self, files: dict[str, bytes], path: str) -> dict[str, Any]:
        large = path.endswith(".safetensors")
        known = path in files
        oid = (hashlib.sha256(files[path]).hexdigest() if large else git_oid(files[path])) if known else None
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def commit(self, repo: str, body: bytes) -> dict[str, Any]:
        files, at = self.repos[repo], f"{self.url}/{repo}"
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.lfs[value["oid"]]
        self.commits.append(lines[0]["value"])
        done = self.head()
        return {"commitUrl": f"{at}/commit/{done}", "commitOid": done, "pullRequestUrl": f"{at}/discussions/1"}


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
