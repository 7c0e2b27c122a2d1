"""The web application: the API, two pages, and headers that keep browsers from believing what was uploaded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from robusteval.leaderboard import pages
from robusteval.leaderboard.api import Context, Problem, Sha256, router, submission
from robusteval.leaderboard.bundle import Refused
from robusteval.leaderboard.intake import Conflict, Invalid, TooLarge, TooSlow
from robusteval.leaderboard.server import Server
from robusteval.leaderboard.store import Filter

HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": f"{pages.POLICY}; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
CODES: dict[type[Exception], int] = {TooLarge: 413, TooSlow: 408, Conflict: 409}
"""What is refused for another reason is 422."""


def make_app(server: Server) -> FastAPI:
    """Return the application; its lifespan is that of the processes which do the work."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with server.running():
            yield

    app = FastAPI(title="robusteval leaderboard", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = server
    app.add_exception_handler(RequestValidationError, _unprocessable)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(405, _wrong_method)
    app.add_middleware(SafeHeaders)
    app.include_router(router)
    app.add_api_route("/", index, include_in_schema=False)
    app.add_api_route("/submissions/{sha256}", page, include_in_schema=False, name="page")
    app.mount("/static", StaticFiles(directory=pages.STATIC))
    return app


def index(server: Context) -> HTMLResponse:
    """Return the leaderboard."""
    total, found = server.store.search(Filter(), "empirical", True, 0, pages.MOST)
    return HTMLResponse(pages.index(found, total))


def page(sha256: Sha256, server: Context) -> HTMLResponse:
    """Return the page of one submission."""
    return HTMLResponse(pages.detail(submission(sha256, server)))


async def _unprocessable(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return _problem(422, said[0], said)


async def _refused(_: Request, error: Exception) -> Response:
    return _problem(CODES.get(type(error), 422), str(error), error.problems if isinstance(error, Invalid) else [])


async def _wrong_method(request: Request, _: Exception) -> Response:
    """Name the methods of every route with this path; a route knows only its own."""
    routes = [route for route in (*request.app.routes, *router.routes) if route.matches(request.scope)[0] != Match.NONE]
    allowed = {method for route in routes for method in getattr(route, "methods", None) or ()} or {"GET", "HEAD"}
    answer = _problem(405, "this method is not for this address.", [])
    answer.headers["allow"] = ", ".join(sorted(allowed))
    return answer


async def _gone(_: Request, __: Exception) -> Response:
    return _problem(400, "the body ended early.", [])


def _problem(code: int, detail: str, problems: list[str]) -> Response:
    return JSONResponse(Problem(detail=detail, problems=problems).model_dump(), code)


class SafeHeaders:
    """Puts `HEADERS` on every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self.app(scope, receive, sending)
