"""A connection that is kept, with deadlines for what comes in, and answers and errors as JSON."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from . import formats
from .access import Access
from .api_errors import RequestError, shown
from .connection import TimedReader, drain
from .metrics import RequestCounts
from .requests import Limits
from .worker import Worker

if TYPE_CHECKING:
    from .live import LiveView


@dataclass(frozen=True)
class Timeouts:
    """Seconds."""

    headers: float = 10.0
    body: float = 30.0
    idle: float = 30.0  # between requests on one connection
    write: float = 30.0  # for a client that reads nothing


@dataclass
class App:
    """What all connections share."""

    worker: Worker
    limits: Limits
    access: Access
    live: LiveView
    max_context: int
    max_request_bytes: int = 4 << 20
    timeouts: Timeouts = Timeouts()
    log: Callable[[str], None] = lambda line: None
    requests: RequestCounts = field(default_factory=RequestCounts)
    started: int = field(default_factory=lambda: int(time.time()))


class ClientGone(Exception):
    """Nobody reads the answer."""


class JsonHandler(BaseHTTPRequestHandler):
    """One connection; ``app`` is set on a subclass, one for each server. Subclasses answer in ``dispatch``."""

    app: App
    protocol_version = "HTTP/1.1"
    server_version = "mlx_moecache"
    sys_version = ""
    disable_nagle_algorithm = True

    def dispatch(self) -> None:
        raise NotImplementedError

    # ---- the connection ----

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.app.timeouts.write)
        self._timed = TimedReader(self.connection)
        self.rfile.close()
        self.rfile = io.BufferedReader(self._timed, 1 << 16)
        self._unread = False  # a body was announced and not read
        self._status = 0
        self._note = ""

    def handle_one_request(self) -> None:
        """As in the base class, with deadlines, and an error instead of a page of HTML."""
        t = self.app.timeouts
        self._status, self._note = 0, ""
        self._timed.allow(t.idle)
        try:
            if not self.rfile.peek(1):  # type: ignore[attr-defined]
                self.close_connection = True
                return
            self._timed.allow(t.headers)
            self.raw_requestline = self.rfile.readline(65537)
            if len(self.raw_requestline) > 65536:
                self.requestline, self.request_version, self.command = "", "HTTP/1.1", ""
                self.send_error(414)
                return
            if self.parse_request():
                self._timed.allow(t.body)
                self.dispatch()
            self.wfile.flush()
        except (TimeoutError, ConnectionError):
            self.close_connection = True
        except ClientGone:
            self.close_connection = True
            self.app.requests.add_abandoned()
            self._log("client left")

    def finish(self) -> None:
        super().finish()
        if self._unread:
            drain(self.connection)

    def handle_expect_100(self) -> bool:
        """The body's length is checked before it is asked for; see `_read_json`."""
        return True

    # ---- answers ----

    def _begin_stream(self) -> None:
        self.close_connection = True
        kind = "text/event-stream; charset=utf-8"
        self._head(200, {"Content-Type": kind, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    def _send_json(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, formats.to_json(body), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self._unread:
            self.close_connection = True
        self._head(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_error(self, error: RequestError) -> None:
        headers = {"Content-Type": "application/json"}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if error.status in (408, 411):
            self.close_connection = True
        self._note = error.message
        # The message may quote what the client sent, which JSON writes in ASCII whatever it is.
        self._send(error.status, json.dumps(error.body()).encode(), headers)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self._status = status
        self.send_response_only(status)
        self.send_header("Server", self.server_version)
        self.send_header("Date", self.date_time_string())
        for name, value in {"X-Content-Type-Options": "nosniff", **headers}.items():
            self.send_header(name, value)
        # After a broken request line there are no headers, or those of the request before.
        request_headers: Message = getattr(self, "headers", None) or Message()
        origin = request_headers.get("Origin")
        if origin is not None and self.app.access.allows(origin):
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Vary", "Origin")
            if self.command == "OPTIONS":
                self.send_header("Access-Control-Allow-Methods", "GET, POST")
                asked = request_headers.get("Access-Control-Request-Headers") or "Authorization, Content-Type"
                self.send_header("Access-Control-Allow-Headers", " ".join(asked.split()))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with the request line or the headers."""
        self.close_connection = True
        self._unread = True
        if not getattr(self, "request_version", "") or self.request_version == "HTTP/0.9":
            self.request_version = "HTTP/1.1"
        self.command = getattr(self, "command", None) or ""
        text = message or self.responses.get(code, ("error", ""))[0]
        self._send_error(RequestError(code, f"this is not a request that the server understands: {text}"))
        self.app.requests.add("other", code)
        self._log(self._note)

    def log_message(self, format: str, *args: Any) -> None:
        """The base class's log is not ours."""

    def _log(self, note: str) -> None:
        what = f"{shown(self.command, 20)[1:-1]} {shown(path_of(self.path))[1:-1]}" if self.command else "-"
        status = self._status or "-"
        self.app.log(f"{what} {status}{' · ' + note if note else ''}")


def path_of(target: str) -> str:
    """The path that a request asks for, without its query."""
    return _split(target)[1]


def authority_of(target: str) -> str | None:
    """The host that a target in absolute form names, as proxies write it; it then counts instead of the Host header."""
    return _split(target)[0]


def _split(target: str) -> tuple[str | None, str]:
    target = target.partition("?")[0].partition("#")[0]
    scheme, mark, rest = target.partition("://")
    if not mark or scheme.lower() not in ("http", "https"):
        return None, target
    authority, _, path = rest.partition("/")
    return authority, f"/{path}"
