"""The tables of the leaderboard and the database they are in, SQLite or PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, ForeignKey, String, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from robusteval.errors import UsageError


class Base(DeclarativeBase):
    """The tables."""


class Token(Base):
    """Somebody who may submit; only a hash of the secret is kept, which is random and so needs no slow hash."""

    __tablename__ = "tokens"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    created: Mapped[str] = mapped_column(String(40))
    revoked: Mapped[str | None] = mapped_column(String(40))


class Submission(Base):
    """A stored bundle. ``entry`` is what is shown, as JSON; the columns that repeat some of it are for queries."""

    __tablename__ = "submissions"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(ForeignKey("tokens.name"))
    received: Mapped[str] = mapped_column(String(40), index=True)
    entry: Mapped[str]
    dataset: Mapped[str] = mapped_column(index=True)
    norm: Mapped[str]
    radius: Mapped[float]
    model: Mapped[str]
    clean: Mapped[float]
    empirical: Mapped[float]
    certified: Mapped[float | None]
    with_model: Mapped[bool]
    status: Mapped[str] = mapped_column(String(10), default="claimed", index=True)
    reason: Mapped[str] = mapped_column(default="")
    tries: Mapped[int] = mapped_column(default=0)
    settled: Mapped[bool] = mapped_column(default=False)


def open_engine(text: str) -> Engine:
    """Connect to the database at a URL; raise `UsageError` for one that cannot be used."""
    try:
        url = make_url(text)
        if url.drivername in ("postgresql", "postgres"):
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise UsageError(
                f"database '{url.get_backend_name()}' is not known; give sqlite:///FILE or postgresql://..."
            )
        if url.get_backend_name() == "sqlite":
            if not url.database:
                raise UsageError("a database in memory would be lost; give sqlite:///FILE.")
            Path(url.database).absolute().parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, pool_pre_ping=True)
    except (ArgumentError, ImportError, OSError) as error:
        raise UsageError(f"the database URL cannot be used: {error}.") from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: object) -> None:
    """Let readers go on while one writes, lose nothing when power fails, and wait for other writers."""
    connection.execute("PRAGMA busy_timeout = 30000")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
