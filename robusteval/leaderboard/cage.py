"""Work on hostile input, each piece in a process of its own that may die of it: memory and time are limited."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from robusteval.errors import RobustevalError
from robusteval.processes import die_with_parent

OUT_OF_MEMORY = 77
MAX_ANSWER = 4 * 1024 * 1024
PATIENCE = 4
"""How many times its CPU seconds a job may take on the clock."""


class CageError(RobustevalError):
    """A job took more memory or time than it may, or crashed."""


@dataclass
class Cage:
    """Runs ``function``, a module's own, on JSON values; what it returns must be JSON too.

    A keeper process imports the function once, calls ``warm``, and forks for every call, so that nothing of one job is
    left for the next. A job may take ``memory`` bytes more than the keeper has (enforced on Linux) and ``seconds`` of
    CPU.
    """

    function: Callable[..., Any]
    memory: int
    seconds: int
    warm: Callable[[], Any] = gc.collect
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _keeper: tuple[BaseProcess, Connection] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Return ``function(*arguments)``; raise `CageError` when the job came to no end."""
        with self._lock:
            try:
                code, answer = self._ask(json.dumps(arguments).encode())
            except (EOFError, OSError) as error:
                self._end()
                raise CageError("the process that keeps the worker ended.") from error
        if code != 0:
            raise CageError(self._why(code))
        return json.loads(answer)

    def start(self) -> None:
        """Start the keeper, which takes seconds; the first call would."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """End the keeper and what it runs."""
        self._end()  # without the lock, which a running call holds

    def _started(self) -> Connection:
        if self._keeper is None:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            arguments = (theirs, self.function, self.warm, self.memory, self.seconds)
            keeper = context.Process(target=_keep, args=arguments, daemon=True)
            keeper.start()
            theirs.close()
            self._keeper = keeper, ours
        return self._keeper[1]

    def _ask(self, job: bytes) -> tuple[int, str]:
        connection = self._started()
        connection.send_bytes(job)
        code, answer = json.loads(connection.recv_bytes())
        return code, answer

    def _end(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper:
            keeper[0].kill()
            keeper[0].join()
            keeper[1].close()

    def _why(self, code: int) -> str:
        if code == OUT_OF_MEMORY:
            return f"it needs more than {self.memory // 2**20} MiB of memory."
        if code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
            return f"it takes more than {self.seconds} s."
        return f"the worker crashed (exit code {code})."


def _keep(
    connection: Connection, function: Callable[..., Any], warm: Callable[[], Any], memory: int, seconds: int
) -> None:
    die_with_parent()
    warm()
    gc.collect()
    gc.freeze()  # or collections in the children would copy every page
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            connection.close()
            _run(writer, function, json.loads(job), memory, seconds)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read(MAX_ANSWER)
        _, status = os.waitpid(child, 0)
        connection.send_bytes(json.dumps([os.waitstatus_to_exitcode(status), answer.decode()]).encode())


def _run(writer: int, function: Callable[..., Any], arguments: list[Any], memory: int, seconds: int) -> NoReturn:
    code = 1
    try:
        die_with_parent()
        _limit(memory, seconds)
        answer = json.dumps(function(*arguments)).encode()
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
        code = 0
    except MemoryError:
        code = OUT_OF_MEMORY
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        os._exit(code)


def _limit(memory: int, seconds: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE * seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    mapped = Path("/proc/self/statm")
    if mapped.exists():
        size = int(mapped.read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
