"""Runs many commands from one process that has already imported torch, each in a fork of its own.

Reads one JSON job per line: arguments, folder, and files for stdout and stderr; answers with the exit code. What
runs is the real entry point with real exit codes; only the seconds that importing torch takes are saved.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn

import torch

from robusteval.cli import main


def child(job: dict[str, Any]) -> NoReturn:
    """Become the command."""
    code = 1
    try:
        os.chdir(job["cwd"])
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["cli.py", *job["arguments"]]
        sys.path.insert(0, job["cwd"])
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answer jobs until stdin closes."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
