"""Worker processes that never outlive the work they were started for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from robusteval.errors import RobustevalError


@contextmanager
def worker_pool(workers: int, flag: str, start: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of spawned ``workers``, each of which first calls ``start(*arguments)``.

    However the block is left, no worker stays behind. ``flag`` is the option to advise when a worker was killed,
    which raises `RobustevalError`.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (start, *arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RobustevalError(f"a worker process died, perhaps for lack of memory; try {flag} 1.") from error
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()  # the executor itself would wait for work that nobody wants any more
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(start: Callable[..., None], *arguments: Any) -> None:
    die_with_parent()
    start(*arguments)


def die_with_parent() -> None:
    """Make this process, a child by `multiprocessing`, end when its parent does, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)  # an orphan would wait for work for ever
