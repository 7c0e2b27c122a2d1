"""The OpenAPI document is exact: whatever it allows, and whatever it does not, is answered as it says."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from leaderboard_kit import API, Board, Files, changed, packed, sha256

OPERATIONS = [
    ("PUT", "/api/v1/submissions/{sha256}"),
    ("GET", "/api/v1/submissions/{sha256}"),
    ("GET", "/api/v1/submissions"),
    ("GET", "/healthz"),
]


def calls(board: Board) -> Any:
    """Return the calls by path and method; the app's lifespan, which schemathesis would end, stays the board's."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    schemathesis.serializer.alias("application/zip", "application/octet-stream")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await board.client.app(scope, receive, send)
            return
        for step in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{step}.complete"})

    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_every_call_is_tested(board: Board) -> None:
    paths = board.client.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, calls in paths.items() for method in calls} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("mode", "method", "path"),
    [*(("POSITIVE", *call) for call in OPERATIONS), *(("NEGATIVE", *call) for call in OPERATIONS if "api" in call[1])],
)
def test_every_answer_is_as_declared(board: Board, mode: str, method: str, path: str) -> None:
    operation = calls(board)[path][method]
    from schemathesis import GenerationMode

    cases = operation.as_strategy(GenerationMode[mode])

    @hypothesis.settings(max_examples=40, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.data())
    def every(data: st.DataObject) -> None:
        data.draw(cases).call_and_validate(headers={"Authorization": f"Bearer {board.alice}"})

    every()


def test_wrong_methods_learn_the_right_ones(board: Board) -> None:
    answer = board.client.post(f"{API}/{'0' * 64}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, PUT")


def test_what_is_stored_is_answered_as_declared(board: Board, files: Files) -> None:
    body = packed(changed(files, seed=4))
    stored = {"sha256": sha256(body)}
    assert board.put(body).status_code == 201
    paths = calls(board)
    one = paths[f"{API}/{{sha256}}"]["GET"].Case(path_parameters=stored)
    assert one.call_and_validate().json()["id"] == stored["sha256"]
    found = paths[API]["GET"].Case(query={"size": 500}).call_and_validate()
    assert stored["sha256"] in {one["id"] for one in found.json()["submissions"]}
