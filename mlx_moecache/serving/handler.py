"""What each path does: completions, streamed or whole, models, metrics, the live page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from queue import Empty
from typing import Any
from urllib.parse import unquote

from . import formats
from .api_errors import RequestError, as_request_error, shown
from .connection import body_length, is_gone, read_body
from .events import Delta, Event, Failed, Finished
from .fields import parse_json
from .json_handler import ClientGone, JsonHandler, authority_of, path_of
from .metrics import CONTENT_TYPE, exposition
from .page import page
from .requests import Kind, parse_request
from .worker import Job

LOOK_EVERY = 0.25  # seconds between looks at whether a client is still there
COMMENT_EVERY = 5.0  # seconds between comments in a stream that has nothing to say
LIVE_EVERY = 0.2  # seconds between pictures of the live page
POSTS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}
GETS = ("/", "/live", "/health", "/metrics", "/v1/models")


class Handler(JsonHandler):
    """All paths of the server."""

    def dispatch(self) -> None:
        self._unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        path = path_of(self.path)
        try:
            hosts = self.headers.get_all("Host") or []
            if len(hosts) > 1 or (not hosts and self.request_version == "HTTP/1.1"):
                raise RequestError(400, "a request needs one Host header")
            named = authority_of(self.path)
            host = named if named is not None else hosts[0] if hosts else None
            self.app.access.check_host(host)
            self.app.access.check_origin(self.headers.get("Origin"), host)
            self._route(path)
        except RequestError as error:
            self._send_error(error)
        except (OSError, ClientGone):
            raise
        except Exception as error:  # a bug of ours: this client learns of it, others go on
            if self._status:
                raise
            self._send_error(as_request_error(error))
        if self._unread:
            self.close_connection = True
        known = path if path in POSTS or path in GETS else "other"
        self.app.requests.add(known, self._status)
        if path in POSTS or self._status >= 400:
            self._log(self._note)

    def _route(self, path: str) -> None:
        if self.command == "OPTIONS":
            self._send(204, b"", {"Allow": "GET, POST, OPTIONS"})
        elif path in POSTS:
            self._need("POST", path)
            self.app.access.check_key(self.headers.get("Authorization"))
            self._complete(POSTS[path])
        elif path in GETS or path.startswith("/v1/models/"):
            self._need("GET", path)
            if path not in ("/", "/health"):
                self.app.access.check_key(self.headers.get("Authorization"))
            self._get(path)
        else:
            paths = ", ".join((*POSTS, *GETS))
            raise RequestError(404, f"no such path: {shown(path)}; there are {paths}", code="not_found")

    def _need(self, method: str, path: str) -> None:
        if self.command != method:
            raise RequestError(405, f"{path} takes {method}, not {shown(self.command)}", code="method_not_allowed")

    def _get(self, path: str) -> None:
        app = self.app
        if path == "/":
            body, headers = page()
            self._send(200, body, headers)
        elif path == "/live":
            self._send_live()
        elif path == "/health":
            stopping = app.worker.is_stopping
            self._send_json(503 if stopping else 200, {"status": "stopping" if stopping else "ok"})
        elif path == "/metrics":
            w = app.worker
            text = exposition(w.state, app.requests, waiting=w.waiting, busy=w.is_busy)
            self._send(200, text.encode(), {"Content-Type": CONTENT_TYPE})
        elif path == "/v1/models":
            self._send_json(200, formats.models(app.limits.model, app.started, app.max_context))
        else:
            name = unquote(path.removeprefix("/v1/models/"))
            if name not in (app.limits.model, *app.limits.aliases):
                message = f"the model {shown(name)} is not served here; this server has {shown(app.limits.model)}"
                raise RequestError(404, message, param="model", code="model_not_found")
            self._send_json(200, formats.one_model(app.limits.model, app.started, app.max_context))

    # ---- completions ----

    def _complete(self, kind: Kind) -> None:
        request = parse_request(kind, self._read_json(), self.app.limits)
        job = self.app.worker.submit(request)
        self.app.requests.begin()
        reply = formats.Reply(kind, self.app.limits.model, include_usage=request.include_usage)
        try:
            if request.stream:
                self._stream(job, reply)
            else:
                self._whole(job, reply)
        except OSError as error:
            raise ClientGone from error
        finally:
            self.app.worker.cancel(job)
            self.app.requests.end()

    def _read_json(self) -> dict[str, Any]:
        length = body_length(self.headers, self.app.max_request_bytes)
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        raw = read_body(self.rfile, length)  # type: ignore[arg-type]
        self._unread = False
        return parse_json(raw)

    def _events(self, job: Job) -> Iterator[list[Event]]:
        """What has happened since, in lists that are empty now and then. Raises ClientGone and the job's error."""
        looked = time.monotonic()
        while True:
            batch: list[Event] = []
            try:
                batch.append(job.events.get(timeout=LOOK_EVERY))
                while True:
                    batch.append(job.events.get_nowait())
            except Empty:
                pass
            now = time.monotonic()
            if now - looked >= LOOK_EVERY:
                looked = now
                if is_gone(self.connection):
                    raise ClientGone
            failed = batch[-1] if batch and isinstance(batch[-1], Failed) else None
            yield batch if failed is None else batch[:-1]
            if failed is not None:
                raise failed.error
            if batch and isinstance(batch[-1], Finished):
                return

    def _whole(self, job: Job, reply: formats.Reply) -> None:
        deltas: list[Delta] = []
        for batch in self._events(job):
            for event in batch:
                if isinstance(event, Delta):
                    deltas.append(event)
                elif isinstance(event, Finished):
                    self._note = _summary(event)
                    self._send_json(200, reply.whole(deltas, event))

    def _stream(self, job: Job, reply: formats.Reply) -> None:
        """Server-Sent Events. The status waits for the first token, so that early errors have one of their own."""
        begun = False
        wrote = time.monotonic()

        def write(parts: list[bytes]) -> None:
            nonlocal begun, wrote
            if not begun:
                begun = True
                self._begin_stream()
                first = reply.first_chunk()
                parts = [*([formats.event_line(first)] if first else []), *parts]
            if parts:
                self.wfile.write(b"".join(parts))
            wrote = time.monotonic()

        try:
            for batch in self._events(job):
                parts: list[bytes] = []
                for event in batch:
                    if isinstance(event, Delta):
                        parts.append(formats.event_line(reply.chunk(event)))
                    elif isinstance(event, Finished):
                        self._note = _summary(event)
                        parts.append(formats.event_line(reply.last_chunk(event)))
                        if reply.include_usage:
                            parts.append(formats.event_line(reply.usage_chunk(event)))
                        parts.append(formats.DONE)
                if parts:
                    write(parts)
                elif time.monotonic() - wrote > COMMENT_EVERY:
                    write([b": still at work\n\n"])
        except RequestError as error:
            if not begun:
                raise
            self._note = error.message
            write([formats.event_line(error.body()), formats.DONE])

    def _send_live(self) -> None:
        """Pictures of the expert cache while something changes."""
        self._begin_stream()
        since, seen, wrote = 0.0, -1, time.monotonic()
        while not self.app.worker.is_stopping and not is_gone(self.connection):
            changes = self.app.live.changes
            try:
                if changes != seen:
                    picture = self.app.live.snapshot(since) | {"waiting": self.app.worker.waiting}
                    since, seen, wrote = picture["time"], changes, time.monotonic()
                    self.wfile.write(formats.event_line(picture))
                elif time.monotonic() - wrote > COMMENT_EVERY:
                    wrote = time.monotonic()
                    self.wfile.write(b": nothing new\n\n")
            except OSError:
                break
            time.sleep(LIVE_EVERY)


def _summary(end: Finished) -> str:
    parts = [f"{end.completion_tokens:,} tokens"]
    if end.timings.decode_tps is not None:
        parts.append(f"{end.timings.decode_tps:.1f} tok/s")
    new = end.prompt_tokens - end.cached_tokens
    parts.append(f"prompt {new:,}" + (f" after {end.cached_tokens:,} kept" if end.cached_tokens else ""))
    if end.stats.decode.hit_rate is not None:
        parts.append(f"{end.stats.decode.hit_rate:.1%} hit")
    if end.is_exact:
        parts.append("exact")
    return " · ".join(parts)
