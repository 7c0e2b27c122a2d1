"""Jobs for `test_leaderboard.py`, in a file that a worker imports at once."""

from __future__ import annotations


def take(what: str) -> str:
    """Take too much of something, or only answer."""
    if what == "memory":
        return str(len(bytearray(1 << 30)))
    while what == "time":
        pass
    if what == "crash":
        raise RecursionError(what)
    return what
