"""Uploading a bundle to a leaderboard server: one PUT under the bundle's own hash, sent again until it is there."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2
from pydantic import BaseModel, SecretStr, ValidationError

from robusteval.errors import RobustevalError
from robusteval.submission.bundle import FileToSend
from robusteval.submission.endpoint import is_loopback, redacted

TIMEOUT = httpx2.Timeout(30, read=300, write=120)
LONGEST_WAIT = 120.0
"""Seconds; a server that asks to wait longer is left alone."""


class Answer(BaseModel):
    """What the server says of a submission; ``id`` is the bundle's SHA-256. Other fields are left out."""

    id: str
    status: str
    url: str | None = None


@dataclass(frozen=True)
class Server:
    """A leaderboard server at ``endpoint``, as `check_endpoint` returned it.

    What fails with 5xx or on the way is tried again, ``tries`` times in all, after ``pause`` seconds, then twice as
    long and so on, each time less by chance; `Retry-After` is honoured. Redirects are not followed, so the token goes
    nowhere else.
    """

    endpoint: str
    token: SecretStr = field(repr=False)
    tries: int = 6
    pause: float = 1.0
    sleep: Callable[[float], None] = time.sleep
    told: Callable[[str], None] = lambda news: None

    def submit(self, bundle: FileToSend) -> tuple[Answer, bool]:
        """Upload ``bundle`` unless it is there; return the server's answer and whether anything was sent.

        Raises `RobustevalError` when the server refuses it or cannot be reached.
        """
        # the environment's proxies would see what goes to this machine without encryption
        local = is_loopback(urlsplit(self.endpoint).hostname)
        headers = {"Authorization": f"Bearer {self.token.get_secret_value()}"}
        with httpx2.Client(headers=headers, timeout=TIMEOUT, trust_env=not local) as client:
            there = self._insist(lambda: client.get(address(self.endpoint, bundle.sha256)))
            if there.status_code == httpx2.codes.NOT_FOUND:
                return self._read(self._insist(lambda: self._put(client, bundle)), bundle.sha256), True
            return self._read(there, bundle.sha256), False

    def _put(self, client: httpx2.Client, bundle: FileToSend) -> httpx2.Response:
        with bundle.path.open("rb") as body:
            return client.put(
                address(self.endpoint, bundle.sha256), content=body, headers={"Content-Type": "application/zip"}
            )

    def _insist(self, request: Callable[[], httpx2.Response]) -> httpx2.Response:
        """Return the first answer below 500; raise `RobustevalError` once all tries are used up."""
        for left, wait in zip(range(self.tries - 1, -1, -1), self._waits(), strict=False):
            try:
                response = request()
            except httpx2.TransportError as error:
                said, asked = redacted(f"{type(error).__name__}: {error}", self.token), None
            else:
                if response.status_code < httpx2.codes.INTERNAL_SERVER_ERROR:
                    return response
                said, asked = f"the server said {response.status_code}", retry_after(response)
            if left == 0 or (asked or 0) > LONGEST_WAIT:
                break
            pause = max(wait, asked or 0)
            self.told(f"{said}; trying again in {pause:.0f} s")
            self.sleep(pause)
        later = f" It asks to wait {asked:.0f} s." if asked else ""
        raise RobustevalError(f"{self.endpoint} did not take it: {said}.{later} The same command sends it again.")

    def _waits(self) -> Iterator[float]:
        pause = self.pause
        while True:
            yield min(pause, LONGEST_WAIT) * random.uniform(0.5, 1)
            pause *= 2

    def _read(self, response: httpx2.Response, sha256: str) -> Answer:
        if response.status_code not in (httpx2.codes.OK, httpx2.codes.CREATED):
            raise RobustevalError(f"{self.endpoint} refused: {response.status_code}, {self._detail(response)}.")
        try:
            answer = Answer.model_validate_json(response.content)
        except ValidationError:
            raise RobustevalError(f"{self.endpoint} answered with something that is not a submission.") from None
        if answer.id != sha256:
            raise RobustevalError(f"{self.endpoint} answered about another submission than the one that was sent.")
        shown = {"status": redacted(answer.status, self.token), "url": redacted(answer.url or "", self.token) or None}
        return answer.model_copy(update=shown)

    def _detail(self, response: httpx2.Response) -> str:
        if response.is_redirect:
            return f"a redirect to {redacted(response.headers.get('Location', ''), self.token)}, which is not followed"
        try:
            said: Any = response.json()
        except ValueError:
            return response.reason_phrase or "no reason given"
        detail = said.get("detail") if isinstance(said, dict) else None
        return redacted(str(detail or "no reason given"), self.token).rstrip(".")


def address(endpoint: str, sha256: str) -> str:
    """Return where a bundle lives on the server at ``endpoint``."""
    return f"{endpoint}/api/v1/submissions/{sha256}"


def retry_after(response: httpx2.Response) -> float | None:
    """Return how many seconds the server asks to wait, by number or date (RFC 9110, 10.2.3); None if it does not."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
