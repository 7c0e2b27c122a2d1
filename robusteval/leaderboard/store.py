"""The database: who may submit, what was submitted, and what is known about it."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, cast

from sqlalchemy import ColumnElement, CursorResult, func, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from robusteval.errors import RobustevalError, UsageError
from robusteval.leaderboard.entry import Entry, Published, Status
from robusteval.leaderboard.tables import Base, Submission, Token, open_engine

if TYPE_CHECKING:  # tokens are managed without loading what looks at bundles
    from robusteval.leaderboard.intake import Accepted

Sort = Literal["received", "model", "clean", "empirical", "certified"]
MAX_TRIES = 3
"""Checks of one submission that may be begun and not ended, by a server that was killed perhaps."""
WITHOUT_MODEL = "It came without weights, so nobody can run it here."
_TOKEN_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class Filter:
    """Which submissions are asked for; None leaves open. ``eps`` is compared as a number."""

    dataset: str | None = None
    norm: str | None = None
    eps: str | None = None
    status: str | None = None

    def clauses(self) -> list[ColumnElement[bool]]:
        """Return the conditions on `Submission`."""
        wanted = {"dataset": self.dataset, "norm": self.norm, "status": self.status}
        equal = [getattr(Submission, name) == value for name, value in wanted.items() if value is not None]
        return [*equal, *([Submission.radius == float(Fraction(self.eps))] if self.eps is not None else [])]


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Store:
    """Queries on one database, from any thread."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        try:
            Base.metadata.create_all(self.engine)
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", error)).strip().split("\n")[0]
            raise RobustevalError(f"the database cannot be used: {reason}.") from error

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def add_token(self, name: str) -> str:
        """Create a token and return it; it cannot be read again. Names of revoked tokens stay taken."""
        if not _TOKEN_NAME.fullmatch(name):
            raise UsageError(f"token name '{name}' must have 1 to 40 letters, digits, - or _.")
        secret = secrets.token_urlsafe(32)
        try:
            with Session(self.engine) as session, session.begin():
                session.add(Token(name=name, digest=_hash(secret), created=now()))
        except IntegrityError as error:
            raise UsageError(f"there is, or was, a token '{name}': submissions may belong to it.") from error
        return f"{name}.{secret}"

    def revoke_token(self, name: str) -> None:
        """End a token; what it submitted stays. Raises `UsageError` when there is no such token."""
        with Session(self.engine) as session, session.begin():
            changed = session.execute(
                update(Token).where(Token.name == name, Token.revoked.is_(None)).values(revoked=now())
            )
            if cast(CursorResult[Any], changed).rowcount == 0:
                raise UsageError(f"there is no token '{name}' that could be revoked.")

    def tokens(self) -> list[tuple[Token, int]]:
        """Return every token with the number of its submissions."""
        mine = select(func.count()).where(Submission.owner == Token.name).scalar_subquery()
        with Session(self.engine, expire_on_commit=False) as session:
            return [(token, count) for token, count in session.execute(select(Token, mine).order_by(Token.name))]

    def holder(self, token: str) -> str | None:
        """Return whose token this is, None if nobody's; the secret is compared in constant time."""
        name, _, secret = token.partition(".")
        name = name if _TOKEN_NAME.fullmatch(name) else ""
        with Session(self.engine) as session:
            found = session.get(Token, name)
            stored = found.digest if found and found.revoked is None else _hash("")
        return name if hmac.compare_digest(stored, _hash(secret)) and secret else None

    def add(self, sha256: str, owner: str, accepted: Accepted) -> bool:
        """Insert a submission whose bundle is stored; say whether it is new, or was there with its first owner."""
        entry = accepted.entry
        row = Submission(
            sha256=sha256,
            owner=owner,
            received=now(),
            entry=entry.model_dump_json(),
            dataset=entry.dataset,
            norm=entry.norm,
            radius=entry.radius,
            model=entry.model,
            clean=entry.clean.rate,
            empirical=entry.empirical.rate,
            certified=entry.certified.rate if entry.certified else None,
            with_model=accepted.with_model,
            reason="" if accepted.with_model else WITHOUT_MODEL,
        )
        try:
            with Session(self.engine) as session, session.begin():
                session.add(row)
        except IntegrityError:
            if self.get(sha256) is None:
                raise
            return False
        return True

    def get(self, sha256: str) -> Published | None:
        """Return a submission, or None."""
        with Session(self.engine) as session:
            row = session.get(Submission, sha256)
            return _published(row) if row else None

    def search(self, wanted: Filter, sort: Sort, down: bool, first: int, most: int) -> tuple[int, Sequence[Published]]:
        """Return how many submissions match, and ``most`` of them from ``first`` on, in order."""
        column = getattr(Submission, sort)
        order = (column.desc() if down else column.asc()).nulls_last()
        query = select(Submission).where(*wanted.clauses()).order_by(order, Submission.sha256)
        with Session(self.engine) as session:
            total = session.scalar(select(func.count()).select_from(Submission).where(*wanted.clauses()))
            rows = session.scalars(query.offset(first).limit(most))
            return total or 0, [_published(row) for row in rows]

    def next_to_check(self) -> str | None:
        """Return the oldest submission with weights that no check has been through, and count that it is tried."""
        open_ = (Submission.with_model, ~Submission.settled, Submission.tries < MAX_TRIES)
        with Session(self.engine) as session, session.begin():
            query = select(Submission.sha256).where(*open_).order_by(Submission.received, Submission.sha256).limit(1)
            sha256 = session.scalar(query)
        if sha256 is not None:
            self._set(sha256, tries=Submission.tries + 1)
        return sha256

    def settle(self, sha256: str, status: Status, reason: str) -> None:
        """Store what a check found."""
        self._set(sha256, status=status, reason=reason, settled=True)

    def reopen(self) -> None:
        """Let what is only claimed be checked again, because the server has more data now."""
        with Session(self.engine) as session, session.begin():
            again = update(Submission).where(Submission.status == "claimed", Submission.with_model)
            session.execute(again.values(tries=0, settled=False))

    def known(self) -> set[str]:
        """Return the hashes of all submissions."""
        with Session(self.engine) as session:
            return set(session.scalars(select(Submission.sha256)))

    def _set(self, sha256: str, **values: Any) -> None:
        with Session(self.engine) as session, session.begin():
            session.execute(update(Submission).where(Submission.sha256 == sha256).values(**values))


def _published(row: Submission) -> Published:
    return Published(
        id=row.sha256,
        status=cast(Status, row.status),
        reason=row.reason,
        owner=row.owner,
        received=row.received,
        report=Entry.model_validate_json(row.entry),
    )


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
