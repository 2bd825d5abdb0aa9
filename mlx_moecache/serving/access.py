"""Who may use the server: names under which it is reached, pages of other origins, the API key. Plain Python.

A web page that its user happens to visit can send requests to 127.0.0.1, directly or through a name that it points
there. Browsers tell the page's origin and the name, so both are checked; a client that is no browser sends neither a
foreign Origin nor a foreign Host.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from .api_errors import RequestError, shown

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """True for an address or name that only this machine can reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_origin(text: str) -> bool:
    """True for what a browser sends as Origin, such as https://example.org:8443."""
    try:
        parts = urlsplit(text)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port_is_fine and _origin(text) == text.lower()


@dataclass(frozen=True)
class Access:
    """The rules of one server."""

    host: str  # that it is bound to
    origins: tuple[str, ...] = ()  # other origins that may use it, as in https://example.org
    api_key: str | None = None

    def check_host(self, host: str | None) -> None:
        """Raises RequestError (403) for a name that this server does not have.

        With an API key any name will do: a page that reaches the server through a name of its own lacks the key.
        """
        if host is None or self.api_key is not None:
            return
        name = _host_name(host)
        known = {*LOOPBACK_NAMES, self.host.lower(), *(urlsplit(o).hostname for o in self.origins)}
        if name not in known:
            message = f"the Host {shown(host)} is not a name of this server; use {LOOPBACK_NAMES[1]}, or add it"
            raise RequestError(403, f"{message} with --allow-origin", code="host_not_allowed")

    def check_origin(self, origin: str | None, host: str | None) -> None:
        """Raises RequestError (403) for requests of web pages that are neither ours nor allowed."""
        if origin is None or self.allows(origin):
            return
        if host is not None and is_origin(origin) and urlsplit(origin).netloc.lower() == host.lower():
            return
        raise RequestError(
            403,
            f"pages of {shown(origin)} may not use this server; --allow-origin allows it",
            code="origin_not_allowed",
        )

    def allows(self, origin: str) -> bool:
        """True if pages of this origin may read answers."""
        return origin.lower() in self.origins

    def check_key(self, authorization: str | None) -> None:
        """Raises RequestError (401) if a key is needed and this is not it. Takes as long for every wrong key."""
        if self.api_key is None:
            return
        scheme, _, given = (authorization or "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key"
            )


def _host_name(host: str) -> str | None:
    """The name in a Host header, without the port; None for what is no name."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{0,5})?", host.lower())
    return None if found is None else found[1] or found[2]


def _origin(text: str) -> str:
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc}".lower()
