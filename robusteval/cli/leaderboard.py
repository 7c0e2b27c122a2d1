"""`leaderboard`: run a leaderboard, say who may submit to it, or write one as static files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robusteval.cli import _console
from robusteval.cli._options import stack
from robusteval.errors import RobustevalError, UsageError

if TYPE_CHECKING:
    from robusteval.leaderboard.store import Store

EXTRA = ("fastapi", "sqlalchemy", "uvicorn", "psycopg")

database_options = stack(
    click.option(
        "--storage",
        type=click.Path(path_type=Path),
        default="leaderboard",
        show_default=True,
        help="Folder of the bundles.",
    ),
    click.option(
        "--database",
        metavar="URL",
        help="sqlite:///FILE or postgresql://USER@HOST/NAME.  [default: a file in the storage]",
    ),
)


@click.group("leaderboard")
def command() -> None:
    """Run a leaderboard that checks what it can, or write one as static files."""


@command.command("serve")
@database_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option("--data-dir", help="Folder of data sets, to run submitted models on; digits is there anyway.")
@click.option("--max-upload", type=click.IntRange(min=1), default=512, show_default=True, help="MiB of a submission.")
@click.option("--recheck", is_flag=True, help="Check again what could not be checked before.")
def serve(
    storage: Path, database: str | None, host: str, port: int, data_dir: str | None, max_upload: int, recheck: bool
) -> None:
    """Take reports in over HTTP, check them, and show them; stop with Ctrl-C.

    It speaks plain HTTP: to be reached from elsewhere, put it behind a proxy that speaks TLS.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"--data-dir '{data_dir}' is not a folder.")
    with _extra(), _console.err.status("loading"):
        import uvicorn

        from robusteval.leaderboard.app import make_app
        from robusteval.leaderboard.bundle import MIB, Limits
        from robusteval.leaderboard.intake import Storage
        from robusteval.leaderboard.server import Server

    with _alone(storage), _opened(storage, database) as store:
        if recheck:
            store.reopen()
        app = make_app(Server(store, Storage(storage), Limits(upload=max_upload * MIB), data_dir))
        uvicorn.run(app, host=host, port=port)


@contextmanager
def _alone(storage: Path) -> Iterator[None]:
    """Keep other servers out of the storage, whose unfinished uploads this one clears away."""
    from robusteval.runs import RunDir

    with ExitStack() as held:
        try:
            storage.mkdir(parents=True, exist_ok=True)
            held.enter_context(RunDir(storage).locked())
        except (OSError, RobustevalError) as error:
            raise RobustevalError(
                f"'{storage}' is in use by another server, or read-only; choose --storage."
            ) from error
        yield


@command.group("token")
def token() -> None:
    """Say who may submit."""


@token.command("add")
@click.argument("name")
@database_options
def add(name: str, storage: Path, database: str | None) -> None:
    """Create a token for NAME and print it; only a hash is kept, so it cannot be shown again."""
    with _opened(storage, database) as store:
        click.echo(store.add_token(name))


@token.command("list")
@database_options
def listed(storage: Path, database: str | None) -> None:
    """Print every token's name, when it was created or revoked, and how much was submitted with it."""
    with _opened(storage, database) as store:
        for one, submissions in store.tokens():
            ended = f", revoked {one.revoked}" if one.revoked else ""
            click.echo(f"{one.name}: created {one.created}{ended}, {submissions} submissions")


@token.command("revoke")
@click.argument("name")
@database_options
def revoke(name: str, storage: Path, database: str | None) -> None:
    """End NAME's token; what was submitted with it stays."""
    with _opened(storage, database) as store:
        store.revoke_token(name)
    click.echo(f"revoked: {name}")


@command.command("build")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="site", show_default=True, help="Folder to write.")
def build(runs: tuple[Path, ...], out: Path) -> None:
    """Write the leaderboard of evaluation folders RUNS as static files; each must be a valid report."""
    from robusteval.leaderboard.site import build

    count = build(runs, out)
    click.echo(f"{count} results: {out / 'index.html'}")


@contextmanager
def _extra() -> Iterator[None]:
    """Say of a failed import of the server's packages what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        missing = f"'{error.name}' is not installed"
        raise UsageError(f"{missing}; the server needs the extra: pip install 'robusteval[server]'.") from error


@contextmanager
def _opened(storage: Path, database: str | None) -> Iterator[Store]:
    with _extra(), _console.err.status("loading"):
        from robusteval.leaderboard.store import Store

    store = Store(database or f"sqlite:///{(storage / 'leaderboard.db').absolute()}")
    try:
        yield store
    finally:
        store.close()
