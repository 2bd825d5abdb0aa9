"""A server for tests of the live page: the page, a live view of made-up use, and replies that a test writes itself."""

from __future__ import annotations

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

from mlx_moecache.console.report import MemoryUse
from mlx_moecache.residents import Residents
from mlx_moecache.routing import CachePrior
from mlx_moecache.serving.live import LiveView
from mlx_moecache.serving.page import page
from mlx_moecache.stats import CacheStats, PhaseStats


def made_up_view(layers: int, experts: int, slots: int, *, name: str, has_template: bool = True) -> LiveView:
    """A LiveView over residents and counters alone; its first `slots` experts are resident in every layer."""
    made = [
        SimpleNamespace(residents=Residents(experts, slots, "lru"), num_experts=experts, k=4) for _ in range(layers)
    ]
    for layer in made:
        layer.residents.publish(layer.residents.plan(range(slots)))
        layer.residents.touch([(e, 1) for e in range(slots)])
    cache = SimpleNamespace(
        layers=made,
        stats=CacheStats(),
        strategy=CachePrior(strength=0.1, top_j=2),
        experts_per_layer=[experts] * layers,
        slots_per_layer=[slots] * layers,
        listener=None,
    )
    plan = SimpleNamespace(budget=4_000_000_000, total=3_900_000_000)
    view = LiveView(SimpleNamespace(expert_cache=cache, memory_plan=plan), name=name, has_template=has_template)  # type: ignore[arg-type]
    GB = 10**9
    view._memory = MemoryUse(3 * GB, resident=GB, slots=GB, kv=GB // 2, host_buffers=0, not_charged=None)
    return view


def count(view: LiveView, tokens: int, **decode: int) -> None:
    """Let the view say that a reply of so many tokens has these counters."""
    view.began()
    view._measured_at = float("inf")  # there is no model whose memory could be measured
    view._cache.stats.decode.add(PhaseStats(**decode))
    view.wrote(SimpleNamespace(generation_tokens=tokens, generation_tps=31.44, prompt_tps=200.0), ())  # type: ignore[arg-type]


class Reply:
    """One request of the page, and what the test answers. ``gone`` is set when the page closes the connection."""

    def __init__(self, path: str, body: dict[str, Any], authorization: str | None) -> None:
        self.path, self.body, self.authorization = path, body, authorization
        self.gone = threading.Event()
        self._events: queue.Queue[str | None] = queue.Queue()

    def say(self, **delta: str) -> None:
        """content="...", reasoning="..." or, for a completion, text="..."."""
        choice = {"text": delta["text"]} if "text" in delta else {"delta": delta}
        self.send({"choices": [{"index": 0, "finish_reason": None, **choice}]})

    def send(self, event: dict[str, Any]) -> None:
        self._events.put(f"data: {json.dumps(event)}\n\n")

    def end(self, reason: str | None = "stop", usage: dict[str, Any] | None = None) -> None:
        if reason is not None:
            self.send({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        if usage is not None:
            self.send({"choices": [], "usage": usage})
        self._events.put(None)


class PageServer:
    """``replies`` holds the requests that wait for the test; ``refuse`` is answered instead of a reply if set."""

    def __init__(self, view: LiveView, *, key: str | None = None, port: int = 0) -> None:
        self.view, self.key = view, key
        self.replies: queue.Queue[Reply] = queue.Queue()
        self.refuse: tuple[int, str] | None = None
        self.closing = threading.Event()
        self.watching = 0  # connections to /live
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def reply(self) -> Reply:
        """The next request for a reply."""
        return self.replies.get(timeout=10)

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/":
                    body, headers = page()
                    self._answer(200, body, headers)
                elif self.path == "/live" and self._is_allowed():
                    server.watching += 1
                    self._live()
                    server.watching -= 1

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self._is_allowed():
                    return
                if server.refuse is not None:
                    self._answer(server.refuse[0], server.refuse[1].encode(), {"Content-Type": "application/json"})
                    return
                reply = Reply(self.path, body, self.headers["Authorization"])
                self._begin_stream()
                server.replies.put(reply)
                while not server.closing.is_set():
                    try:
                        event = reply._events.get(timeout=0.05)
                    except queue.Empty:
                        event = ": \n\n"
                    if event is None:
                        self._send("data: [DONE]\n\n")
                        return
                    if not self._send(event):
                        reply.gone.set()
                        return

            def _live(self) -> None:
                self._begin_stream()
                since, changes = 0.0, -1
                while not server.closing.is_set():
                    event = ": \n\n"
                    if changes != server.view.changes:
                        changes = server.view.changes
                        snapshot = server.view.snapshot(since)
                        since, event = snapshot["time"], f"data: {json.dumps(snapshot)}\n\n"
                    if not self._send(event):
                        return
                    server.closing.wait(0.1)

            def _is_allowed(self) -> bool:
                if server.key is None or self.headers["Authorization"] == f"Bearer {server.key}":
                    return True
                self._answer(401, b'{"error": {"message": "wrong key"}}', {"Content-Type": "application/json"})
                return False

            def _begin_stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()

            def _send(self, text: str) -> bool:
                try:
                    self.wfile.write(text.encode())
                    self.wfile.flush()
                except OSError:
                    return False
                return True

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        return Handler
