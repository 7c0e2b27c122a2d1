"""The calls under `/api/v1`; what OpenAPI says of them is made from these declarations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field

from robusteval.leaderboard.entry import NormName, Published, Status
from robusteval.leaderboard.intake import Conflict, TooLarge, receive
from robusteval.leaderboard.server import Server
from robusteval.leaderboard.store import Filter, Sort

ZIP = "application/zip"
_EPS = r"^([0-9]{1,9}/[1-9][0-9]{0,8}|[0-9]{1,9}(\.[0-9]{1,20})?)$"
_BODY = {"requestBody": {"required": True, "content": {ZIP: {"schema": {"type": "string", "format": "binary"}}}}}

router = APIRouter()
bearer = HTTPBearer(auto_error=False, description="What `leaderboard token add` printed.")


class Problem(BaseModel):
    """Why a request was not done."""

    detail: str
    problems: list[str] = []


class Receipt(BaseModel):
    """A submission that is stored."""

    id: str = Field(pattern="^[0-9a-f]{64}$")
    status: Status
    url: str


class Found(BaseModel):
    """A page of submissions; ``total`` is how many match."""

    total: int = Field(ge=0)
    page: int = Field(ge=1)
    submissions: list[Published]


class Health(BaseModel):
    """The server answers and so does its database."""

    status: Literal["ok"] = "ok"


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Declare error responses."""
    return {code: {"model": Problem} for code in codes}


def server_of(request: Request) -> Server:
    """Return what the application works with."""
    server: Server = request.app.state.server
    return server


Context = Annotated[Server, Depends(server_of)]
Sha256 = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256 of the zip.")]


def holder(server: Context, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> str:
    """Return whose token came along; answer 401 if nobody's."""
    name = server.store.holder(given.credentials) if given else None
    if name is None:
        raise HTTPException(401, "a valid token is needed.", {"WWW-Authenticate": "Bearer"})
    return name


@router.put(
    "/api/v1/submissions/{sha256}",
    status_code=201,
    response_model=Receipt,
    responses={200: {"model": Receipt}, **problems(400, 401, 408, 409, 413, 415, 422)},
    openapi_extra=_BODY,
)
async def submit(sha256: Sha256, server: Context, owner: Annotated[str, Depends(holder)], request: Request) -> Any:
    """Store a report: 201 when it is new, 200 when it was there; then it stays with its first owner."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != ZIP:
        raise HTTPException(415, f"the body must be {ZIP}.")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > server.limits.upload:
        raise TooLarge(f"the body is larger than {server.limits.upload} bytes.")
    with server.storage.workplace() as folder:
        bundle, files = folder / "bundle.zip", folder / "files"
        if await receive(request.stream(), bundle, server.limits) != sha256:
            raise Conflict("the SHA-256 of the body is not the one in the address.")
        files.mkdir()
        known = await run_in_threadpool(server.store.get, sha256)
        new = known is None and await server.take(bundle, files, sha256, owner)
    found = known or await run_in_threadpool(server.store.get, sha256)
    assert found is not None
    receipt = Receipt(id=sha256, status=found.status, url=str(request.url_for("page", sha256=sha256)))
    return JSONResponse(receipt.model_dump(), 201 if new else 200)


@router.get("/api/v1/submissions/{sha256}", responses=problems(404, 422))
def submission(sha256: Sha256, server: Context) -> Published:
    """Return a submission."""
    found = server.store.get(sha256)
    if found is None:
        raise HTTPException(404, "there is no such submission.")
    return found


@router.get("/api/v1/submissions", responses=problems(422))
def submissions(
    server: Context,
    dataset: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)] = None,
    norm: NormName | None = None,
    eps: Annotated[str | None, Query(pattern=_EPS, description="As in 8/255 or 0.5; compared as a number.")] = None,
    status: Status | None = None,
    sort: Sort = "received",
    order: Literal["desc", "asc"] = "desc",
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
    size: Annotated[int, Query(ge=1, le=500)] = 100,
) -> Found:
    """Return the submissions that match, one page of them."""
    wanted = Filter(dataset, norm, eps, status)
    total, found = server.store.search(wanted, sort, order == "desc", (page - 1) * size, size)
    return Found(total=total, page=page, submissions=list(found))


@router.get("/healthz")
def healthz(server: Context) -> Health:
    """Answer when the server and its database do."""
    server.store.search(Filter(), "received", True, 0, 1)
    return Health()
