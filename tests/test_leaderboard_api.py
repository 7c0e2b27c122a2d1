"""The OpenAPI document is exact: whatever it allows, and whatever it does not, is answered as it says."""

from __future__ import annotations

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


def test_every_call_is_tested(board: Board) -> None:
    paths = board.client.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, calls in paths.items() for method in calls} == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_every_answer_is_as_declared(board: Board, method: str, path: str, mode: str) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    schemathesis.serializer.alias("application/zip", "application/octet-stream")
    operation = schemathesis.openapi.from_asgi("/openapi.json", board.client.app)[path][method]
    if mode == "NEGATIVE" and path == "/healthz":
        pytest.skip("it takes nothing that could be wrong")
    cases = operation.as_strategy(schemathesis.GenerationMode[mode])

    @hypothesis.settings(max_examples=40, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.data())
    def every(data: st.DataObject) -> None:
        data.draw(cases).call_and_validate(headers={"Authorization": f"Bearer {board.alice}"})

    every()


def test_wrong_methods_learn_the_right_ones(board: Board) -> None:
    answer = board.client.post(f"{API}/{'0' * 64}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, PUT")


def test_what_is_stored_is_answered_as_declared(board: Board, files: Files) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    body = packed(changed(files, seed=4))
    stored = {"sha256": sha256(body)}
    assert board.put(body).status_code == 201
    paths = schemathesis.openapi.from_asgi("/openapi.json", board.client.app)
    one = paths[f"{API}/{{sha256}}"]["GET"].Case(path_parameters=stored)
    assert one.call_and_validate().json()["id"] == stored["sha256"]
    found = paths[API]["GET"].Case(query={"size": 500}).call_and_validate()
    assert stored["sha256"] in {one["id"] for one in found.json()["submissions"]}
