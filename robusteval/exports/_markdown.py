"""Strings of strangers in Markdown and YAML: shown as they are read, never acting as markup."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

LONGEST = 2000
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#!&~@:$^])")
_AUTOLINK = re.compile(r"(?i)\bwww\.")
_URL = re.compile(r"https?://[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")
_NOT_IN_LINKS = re.compile(r"[\[\]()*_~`!|]")


def plain(text: str) -> str:
    """Return ``text`` on one line, without control characters or ones that turn or hide text, at most `LONGEST`."""
    kept = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text[:LONGEST])
    return " ".join(kept.split())


def inline(text: str) -> str:
    """Return ``text`` for the inside of a Markdown line: no markup, link, mention of a user or of an issue."""
    escaped = _AUTOLINK.sub(r"www\\.", _MARKUP.sub(r"\\\1", plain(text)))
    # GitHub looks for @user and #1 after escapes are gone; an invisible space keeps them text.
    return escaped.replace("@", "@\u200b").replace("#", "#\u200b")


def linked(text: str) -> str:
    """Return ``text`` with its http addresses as links and the rest as `inline`; for what the user typed."""
    words = plain(text).split(" ")
    return " ".join(f"<{word}>" if is_url(word) and not _NOT_IN_LINKS.search(word) else inline(word) for word in words)


def is_url(text: str) -> bool:
    """Say whether ``text`` is one http or https address and nothing else."""
    return _URL.fullmatch(text) is not None


def block(text: str) -> str:
    """Return ``text``, which may have lines, as a fenced block that nothing in it can close."""
    lines = [plain(line) for line in text.splitlines()]
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence, *lines, fence])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, every cell of ``rows`` as `inline`."""
    lines = [header, ["---"] * len(header), *([inline(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
