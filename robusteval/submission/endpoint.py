"""Where a token may go, and where tokens come from."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit

from pydantic import SecretStr

from robusteval.errors import UsageError

KEYRING = "robusteval"
"""Name of the service under which the keyring holds tokens, by host."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""RFC 6750; anything else might be quoted in an error about the header that holds it."""


def check_endpoint(url: str) -> str:
    """Return ``url`` without a slash at its end; raise `UsageError` unless a token may be sent there.

    That is https, or http to this very machine; the address holds no password, query or fragment.
    """
    if "@" in url:
        raise UsageError("an address must not hold a user name or password; tokens come from the environment.")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"'{url}' is not an address: {error}.") from error
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise UsageError(f"'{url}' is not an http address.")
    if parts.query or parts.fragment:
        raise UsageError(f"'{url}' has a query or a fragment; give the address of the server alone.")
    if parts.scheme == "http" and not is_loopback(host):
        raise UsageError(f"'{url}' is not https, so a token sent there could be read on the way.")
    return url.rstrip("/")


def is_loopback(host: str | None) -> bool:
    """Say whether ``host`` is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def find_token(variable: str, endpoint: str) -> SecretStr:
    """Return the token in the environment ``variable``, else the keyring's for the host of ``endpoint``.

    Raises `UsageError` when there is none or it cannot be one; never says what it is.
    """
    host = urlsplit(endpoint).netloc
    found = os.environ.get(variable, "").strip() or _from_keyring(host)
    if not found:
        raise UsageError(
            f"no token for {host}: set the environment variable {variable}, or install the extra 'keyring' and type "
            f"`keyring set {KEYRING} {host}`. --dry-run needs none."
        )
    if not _TOKEN.fullmatch(found):
        raise UsageError(f"the token for {host} has characters that no token has; look at {variable} or the keyring.")
    return SecretStr(found)


def _from_keyring(host: str) -> str:
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return ""
    try:
        return (keyring.get_password(KEYRING, host) or "").strip()
    except KeyringError:  # locked, or there is no keyring on this system
        return ""


def redacted(text: str, token: SecretStr) -> str:
    """Return what somebody else said, on one line, at most 500 characters, without the token."""
    hidden = text.replace(token.get_secret_value(), "(token)")
    return " ".join("".join(c if c.isprintable() else " " for c in hidden).split())[:500]
