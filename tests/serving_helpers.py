"""What the tests of the server share: a real one in a process of its own, and one whose replies are made up."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_moecache.console.report import MemoryUse
from mlx_moecache.serving.access import Access
from mlx_moecache.serving.engine_state import EngineState
from mlx_moecache.serving.events import Delta, Event, Finished, Timings
from mlx_moecache.serving.handler import Handler
from mlx_moecache.serving.http_server import HttpServer
from mlx_moecache.serving.json_handler import App, Timeouts
from mlx_moecache.serving.requests import Limits, Request
from mlx_moecache.serving.worker import Worker
from mlx_moecache.stats import CacheStats

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


class ServerProcess:
    """`python -m mlx_moecache.server` as a user runs it, on a free port."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "mlx_moecache.server", "--port", "0", "--no-warm-start", *flags]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        self.lines: list[str] = []
        self._seen: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.port = int(self.wait_for(r"http://[^ ]*:(\d+)/v1", seconds=60)[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait_for(self, pattern: str, *, seconds: float = 20) -> re.Match[str]:
        """A line of stderr that matches; lines before it are skipped."""
        until = time.monotonic() + seconds
        while True:
            try:
                line = self._seen.get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {pattern!r} in {self.lines}") from None
            found = re.search(pattern, line)
            if found:
                return found

    def end(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout=20)
        finally:
            self.process.kill()

    def rss(self) -> int:
        """Bytes in memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            self._seen.put(line)


class Answer(SimpleNamespace):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert found["message"] and "\n" not in found["message"]
        return found

    @property
    def events(self) -> list[Any]:
        """What a stream said; the last one is "[DONE]"."""
        lines = [x for x in self.body.decode().split("\n\n") if x.startswith("data: ")]
        return [x if x == "[DONE]" else json.loads(x) for x in (line[6:] for line in lines)]


def ask(
    port: int,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
    seconds: float = 30,
) -> Answer:
    """One request; `body` as JSON, or as bytes."""
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        c.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
        r = c.getresponse()
        return Answer(status=r.status, headers={k.lower(): v for k, v in r.getheaders()}, body=r.read())
    finally:
        c.close()


def raw(port: int, data: bytes, *, seconds: float = 10, close_writing: bool = False) -> bytes:
    """Everything that comes back for these bytes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as s:
        s.sendall(data)
        if close_writing:
            s.shutdown(socket.SHUT_WR)
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while part := s.recv(65536):
                got += part
        return got


def post_bytes(body: bytes, path: str = CHAT, *more: str, length: str | None = None) -> bytes:
    """A request as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", *more]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def wait_until(true: Callable[[], bool], *, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


# ---- replies that are made up ----


class MadeUpReplies:
    """Says "one ", "two " and so on; waits before each word while `gate` is closed."""

    def __init__(self, words: int = 3) -> None:
        self.words = words
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None  # raised after the first word
        self.error_at_once: Exception | None = None
        self.asked: list[Request] = []
        self.given_up = 0
        self.recovered = 0

    def reply(self, request: Request, watch: Callable[[], None], waited: float) -> Iterator[Event]:
        self.asked.append(request)
        if self.error_at_once is not None:
            raise self.error_at_once
        try:
            for i in range(min(self.words, request.max_tokens)):
                while not self.gate.wait(0.005):
                    watch()
                watch()
                yield Delta(f"word{i} ")
                if self.error is not None:
                    raise self.error
        except BaseException:
            self.given_up += 1
            raise
        timings = Timings(waited, 0.1, 0.2, 10.0, 20.0)
        yield Finished("stop", 5, 2, self.words, CacheStats(), False, True, timings)

    def recover(self) -> None:
        self.recovered += 1

    def state(self) -> EngineState:
        return EngineState(CacheStats(), 1, 2, 3, 0.5, 0.25, 20.0, MemoryUse(10, 4, 3, 2, 1, None), 30, 60)


class FakeLive:
    changes = 0

    def snapshot(self, since: float) -> dict[str, Any]:
        return {"time": since + 1.0, "changes": self.changes}


@contextlib.contextmanager
def made_up_server(
    replies: MadeUpReplies | None = None,
    *,
    max_waiting: int = 2,
    access: Access | None = None,
    limits: Limits | None = None,
    max_request_bytes: int = 100_000,
    timeouts: Timeouts | None = None,
    max_connections: int = 64,
) -> Iterator[SimpleNamespace]:
    """A server without a model: .port, .app, .replies, .lines of its log."""
    replies = replies or MadeUpReplies()
    handler = type("TestHandler", (Handler,), {})
    server = HttpServer("127.0.0.1", 0, handler, max_connections=max_connections)
    worker = Worker(replies, max_waiting=max_waiting)
    lines: list[str] = []
    app = App(
        worker,
        limits or Limits("tiny", vocabulary=1000),
        access or Access("127.0.0.1"),
        FakeLive(),  # type: ignore[arg-type]
        max_context=100,
        max_request_bytes=max_request_bytes,
        timeouts=timeouts or Timeouts(),
        log=lines.append,
    )
    handler.app = app  # type: ignore[attr-defined]
    server.open()
    threads = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True),
        threading.Thread(target=worker.run, daemon=True),
    ]
    for t in threads:
        t.start()
    try:
        yield SimpleNamespace(port=server.port, app=app, replies=replies, lines=lines, server=server)
    finally:
        worker.stop()
        server.shutdown()
        server.server_close()
        for t in threads:
            t.join(5)
