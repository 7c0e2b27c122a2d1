"""What one server process works with: its database, its storage, and the processes that look at bundles."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool

from robusteval.leaderboard.bundle import Limits, Refused
from robusteval.leaderboard.cage import Cage, CageError
from robusteval.leaderboard.check import replay
from robusteval.leaderboard.entry import Status, harmless
from robusteval.leaderboard.intake import Accepted, Storage, accepted, examine, warm
from robusteval.leaderboard.store import Store

LOOKERS = 2
"""Bundles that are looked at at once; each looker holds torch in memory."""
IDLE = 30.0
"""Seconds after which the watch looks for work though nobody told it of any."""

log = logging.getLogger("uvicorn.error")


@dataclass
class Server:
    """Takes bundles in, and checks in a thread what came with weights."""

    store: Store
    storage: Storage
    limits: Limits = field(default_factory=Limits)
    data_dir: str | None = None
    _work: threading.Event = field(default_factory=threading.Event)
    _stopping: bool = False

    def __post_init__(self) -> None:
        limits = self.limits
        self._lookers = [Cage(examine, limits.memory, limits.seconds, warm) for _ in range(LOOKERS)]
        self._checker = Cage(replay, limits.check_memory, limits.check_seconds)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Clean up after a server that was killed, start the processes, and end them."""
        self.storage.clean(self.store.known())
        self._free: asyncio.LifoQueue[Cage] = asyncio.LifoQueue()
        for cage in self._lookers:
            self._free.put_nowait(cage)
        threading.Thread(target=self._lookers[-1].start, daemon=True).start()  # the one that is taken first
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        yield
        self._stopping = True
        self._work.set()
        for cage in (*self._lookers, self._checker):
            cage.close()
        await run_in_threadpool(watch.join)

    async def take(self, bundle: Path, folder: Path, sha256: str, owner: str) -> bool:
        """Look at a bundle and, if it is good, store it; say whether it is new. Raises `Refused`.

        First the file is in place, then the row that tells of it: whatever is told of is there.
        """
        good = await self._look(bundle, folder)

        def keep() -> bool:
            self.storage.keep(bundle, sha256)
            return self.store.add(sha256, owner, good)

        new = await run_in_threadpool(keep)
        self._work.set()
        return new

    async def _look(self, bundle: Path, folder: Path) -> Accepted:
        cage = await self._free.get()
        try:
            return accepted(await run_in_threadpool(cage, str(bundle), str(folder), self.limits.plain()))
        except CageError as error:
            raise Refused(f"the bundle cannot be looked at: {error}") from error
        finally:
            self._free.put_nowait(cage)

    def _watch(self) -> None:
        while not self._stopping:
            self._work.clear()
            try:
                idle = not self._check_next()
            except Exception:
                log.exception("a check failed")  # the database, perhaps: later it may answer again
                idle = True
            if idle:
                self._work.wait(IDLE)

    def _check_next(self) -> bool:
        """Check what has waited longest; say whether there was anything."""
        sha256 = self.store.next_to_check()
        if sha256 is None:
            return False
        with self.storage.workplace() as folder:
            status, reason = self._check(self.storage.bundle(sha256), folder)
        if not self._stopping:
            self.store.settle(sha256, status, harmless(reason, 500))
        return True

    def _check(self, *places: Path) -> tuple[Status, str]:
        try:
            answer: Any = self._checker(*map(str, places), self.data_dir, self.limits.plain())
        except CageError as error:
            return "claimed", f"It could not be checked: {error}"
        status, reason = answer
        return status, reason
