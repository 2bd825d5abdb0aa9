"""A Hugging Face hub on this machine: enough of its HTTP protocol for downloads through huggingface-hub.

Point a process at it with HF_ENDPOINT before huggingface_hub is imported. What it imitates of the real hub:
anyone may list the files of a gated repo, only the files themselves are refused; without a token a missing
repo is answered 401, with one 404; safetensors files are kept elsewhere (a redirect to another host), small
files are sent directly. It never mentions xet, so clients use plain HTTP.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

Revisions = Mapping[str, Mapping[str, bytes]]  # revision -> file name -> content

_API = re.compile(r"/api/models/(?P<repo>(?:[^/]+/)?[^/]+)/(?P<call>revision|tree)/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<repo>(?:[^/]+/)?[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_STORE = re.compile(r"/store/(?P<digest>[0-9a-f]{64})/(?P<file>.+)")


@dataclass(frozen=True)
class LoggedRequest:
    """One request as it arrived; `path` is decoded and has no query."""

    method: str
    path: str
    range: str | None
    token: str | None  # the Authorization header


@dataclass(frozen=True)
class Cut:
    """How the next download of a file breaks off."""

    after: int  # bytes sent before the connection goes
    reset: bool  # with a TCP reset instead of an orderly close


class FakeHub:
    """A running hub; use it in a `with` statement.

    `repos` maps "org/name" to revisions and may be changed while the server runs; a commit hash follows from
    the content. `gated` names repos whose files nobody may fetch. `failing` maps a repo to the status that
    every request for it gets. `rejected_tokens` are access tokens that count as expired.
    """

    def __init__(self, repos: Mapping[str, Revisions], *, gated: Iterable[str] = ()) -> None:
        self.repos: dict[str, Revisions] = dict(repos)
        self.gated: set[str] = set(gated)
        self.failing: dict[str, int] = {}
        self.rejected_tokens: set[str] = set()
        self.requests: list[LoggedRequest] = []
        self.sent: Counter[str] = Counter()  # file name -> bytes of its content that were sent
        self._cuts: dict[str, Cut] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._server.daemon_threads = True
        # A short poll interval, because __exit__ waits for the loop to notice.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def store_url(self) -> str:
        """Where large files are: the same server under another host name, which clients treat as foreign."""
        return f"http://localhost:{self.port}/store"

    def commit(self, repo: str, revision: str = "main") -> str:
        """The commit hash of `revision` (40 hex digits)."""
        digest = hashlib.sha1(repo.encode())
        for name, content in sorted(self.repos[repo][revision].items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()

    def files(self, repo: str, revision: str) -> Mapping[str, bytes] | None:
        """The files at a branch name or commit hash, None when there is no such revision."""
        revisions = self.repos[repo]
        if revision in revisions:
            return revisions[revision]
        return next((revisions[name] for name in revisions if self.commit(repo, name) == revision), None)

    def cut_once(self, file: str, *, after: int, reset: bool = False) -> None:
        """Break off the next GET of `file` after `after` body bytes."""
        with self._lock:
            self._cuts[file] = Cut(after, reset)

    def take_cut(self, file: str) -> Cut | None:
        with self._lock:
            return self._cuts.pop(file, None)

    def downloads(self, file: str | None = None) -> list[LoggedRequest]:
        """The GET requests that asked for content (of `file`, or of any file), in order."""
        with self._lock:
            gets = [r for r in self.requests if r.method == "GET" and not r.path.startswith("/api/")]
        return [r for r in gets if file is None or r.path.endswith("/" + file)]

    def log(self, request: LoggedRequest) -> None:
        with self._lock:
            self.requests.append(request)

    def forget_requests(self) -> None:
        with self._lock:
            self.requests.clear()
            self.sent.clear()

    def count_sent(self, file: str, size: int) -> None:
        with self._lock:
            self.sent[file] += size


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _handler_for(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: Any) -> None:  # the request log is hub.requests, not stderr
            return

        def _answer(self) -> None:
            path = urlsplit(self.path).path
            token = self.headers.get("Authorization")
            hub.log(LoggedRequest(self.command, unquote(path), self.headers.get("Range"), token))
            if match := _STORE.fullmatch(path):
                return self._from_store(match["digest"], unquote(match["file"]))
            match = _API.fullmatch(path.rstrip("/")) or _FILE.fullmatch(path)
            if match is None:
                return self._refuse(404, "EntryNotFound", "no such address")
            repo, revision = match["repo"], unquote(match["revision"])
            if token is not None and token.removeprefix("Bearer ") in hub.rejected_tokens:
                return self._refuse(401, None, "Invalid credentials in Authorization header")
            if repo in hub.failing:
                return self._refuse(hub.failing[repo], None, "told to fail")
            if repo not in hub.repos:
                if token is None:
                    return self._refuse(401, None, "Invalid username or password.")
                return self._refuse(404, "RepoNotFound", "Repository not found")
            files = hub.files(repo, revision)
            if files is None:
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            name = next(name for name in hub.repos[repo] if hub.repos[repo][name] is files)
            commit = hub.commit(repo, name)
            if match.re is _API:
                return self._api(match["call"], repo, commit, files)
            return self._resolve(repo, commit, files, unquote(match["file"]))

        def _api(self, call: str, repo: str, commit: str, files: Mapping[str, bytes]) -> None:
            if call == "revision":
                gated = "auto" if repo in hub.gated else False
                siblings = [{"rfilename": name} for name in sorted(files)]
                return self._json({"id": repo, "sha": commit, "gated": gated, "siblings": siblings})
            entries: list[dict[str, Any]] = []
            for name, content in sorted(files.items()):
                oid = hashlib.sha1(content).hexdigest()
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": oid}
                if is_large(name):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
                entries.append(entry)
            return self._json(entries)

        def _resolve(self, repo: str, commit: str, files: Mapping[str, bytes], name: str) -> None:
            if repo in hub.gated:
                status = 401 if self.headers.get("Authorization") is None else 403
                return self._refuse(status, "GatedRepo", f"Access to model {repo} is restricted.")
            if name not in files:
                return self._refuse(404, "EntryNotFound", "Entry not found")
            content = files[name]
            if not is_large(name):
                etag = hashlib.sha1(content).hexdigest()
                return self._content(name, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})
            digest = hashlib.sha256(content).hexdigest()
            return self._send(
                302,
                {
                    "Location": f"{hub.store_url}/{digest}/{name}",
                    "X-Repo-Commit": commit,
                    "X-Linked-ETag": f'"{digest}"',
                    "X-Linked-Size": str(len(content)),
                },
            )

        def _from_store(self, digest: str, name: str) -> None:
            for revisions in hub.repos.values():
                for files in revisions.values():
                    if name in files and hashlib.sha256(files[name]).hexdigest() == digest:
                        return self._content(name, files[name], {"ETag": f'"{digest}"'})
            return self._refuse(404, None, "no such object")

        def _content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
            """Send `content`, or a part of it when the request has a Range of the form bytes=N- or bytes=N-M."""
            status, start, stop = 200, 0, len(content)
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                status, start = 206, int(wanted[1])
                if start >= len(content):
                    return self._send(416, {"Content-Range": f"bytes */{len(content)}"})
                stop = min(stop, int(wanted[2]) + 1) if wanted[2] else stop
                headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            headers = {**headers, "Accept-Ranges": "bytes"}
            cut = hub.take_cut(name) if self.command == "GET" else None
            if self.command == "GET":
                hub.count_sent(name, stop - start if cut is None else min(cut.after, stop - start))
            if cut is None:
                return self._send(status, headers, content[start:stop])
            self._send(status, headers, content[start:stop], stop_after=cut.after)
            self.close_connection = True
            if cut.reset:
                self.wfile.flush()
                # A linger time of zero makes close() send a reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return None

        def _json(self, value: Any) -> None:
            self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

        def _refuse(self, status: int, code: str | None, message: str) -> None:
            headers = {"X-Error-Message": message, "Content-Type": "application/json"}
            if code is not None:
                headers["X-Error-Code"] = code
            self._send(status, headers, json.dumps({"error": message}).encode())

        def _send(
            self, status: int, headers: Mapping[str, str], body: bytes = b"", stop_after: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:stop_after])

    return Handler
