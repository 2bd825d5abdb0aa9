"""The line of requests and the loop that answers them one after the other, on the thread that called `run`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Protocol

from .api_errors import RequestError, as_request_error
from .engine_state import EngineState
from .events import Event, Failed, Finished
from .requests import Request

LOOK_EVERY = 0.25  # seconds between looks at whether a signal asked to stop
STATE_EVERY = 1.0  # seconds between notes of what was done, while a reply is made


class Replies(Protocol):
    """What answers requests; see `Engine`."""

    def reply(self, request: Request, watch: Callable[[], None], waited: float) -> Iterator[Event]: ...

    def recover(self) -> None: ...

    def state(self) -> EngineState: ...


class GivenUp(Exception):
    """The reply at hand is not wanted any more."""


class Job:
    """A request in line or being answered."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.events: SimpleQueue[Event] = SimpleQueue()  # ends with Finished or Failed, unless it was cancelled
        self.submitted = time.perf_counter()
        self.cancelled = False


class Worker:
    """One reply at a time; others wait in a line of limited length."""

    def __init__(self, replies: Replies, *, max_waiting: int, fatal: type[Exception] | tuple[()] = ()) -> None:
        """fatal: errors that end the loop, too."""
        self._replies = replies
        self._max_waiting = max_waiting
        self._fatal = fatal
        self._line: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._stopping = False  # a plain attribute, so that a signal handler can set it
        self._last_seconds = 1.0
        self.state = replies.state()  # replaced as a whole
        self._state_at = 0.0

    # ---- on any thread ----

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def is_busy(self) -> bool:
        return self._running is not None

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    def submit(self, request: Request) -> Job:
        """Put a request into the line. Raises RequestError (503) if it is full or the server is stopping."""
        job = Job(request)
        with self._changed:
            if self._stopping:
                raise _stopping()
            if len(self._line) + (self._running is not None) > self._max_waiting:
                seconds = max(1, min(60, round(self._last_seconds)))
                message = (
                    f"{len(self._line)} requests are waiting already, and {self._max_waiting} may; try again later"
                )
                raise RequestError(503, message, code="queue_full", retry_after=seconds)
            self._line.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more; harmless once it has ended."""
        job.cancelled = True
        with self._changed:
            if job in self._line:
                self._line.remove(job)

    def stop(self) -> None:
        """Let `run` return soon; may be called from a signal handler."""
        self._stopping = True

    # ---- on the thread that uses MLX ----

    def run(self) -> None:
        """Answer requests until `stop` is called; those that are left are told so."""
        try:
            while not self._stopping:
                job = self._next()
                if job is not None:
                    self._answer(job)
                    self._running = None
        finally:
            self._stopping = True
            with self._changed:
                left = [*self._line, *([self._running] if self._running else [])]
                self._line.clear()
                self._running = None
            for job in left:
                job.events.put(Failed(_stopping()))

    def _next(self) -> Job | None:
        with self._changed:
            if not self._line:
                self._changed.wait(LOOK_EVERY)
            if self._line and not self._stopping:
                self._running = self._line.popleft()
                return self._running
        return None

    def _answer(self, job: Job) -> None:
        began = time.perf_counter()

        def watch() -> None:
            if job.cancelled or self._stopping:
                raise GivenUp
            if time.perf_counter() - self._state_at > STATE_EVERY:
                self._note()

        end: Finished | Failed | None = None
        try:
            for event in self._replies.reply(job.request, watch, began - job.submitted):
                if isinstance(event, Finished):
                    end = event
                else:
                    job.events.put(event)
        except GivenUp:
            end = Failed(_stopping()) if self._stopping else None
        except Exception as error:
            end = Failed(as_request_error(error))
            if isinstance(error, self._fatal):
                raise
            if end.error.code == "internal_error":
                self._replies.recover()
        finally:
            # Before the client learns that its reply is complete: what it asks next must know of it.
            self._last_seconds = time.perf_counter() - began
            self._note()
            self._running = None
            if end is not None:
                job.events.put(end)

    def _note(self) -> None:
        self.state = self._replies.state()
        self._state_at = time.perf_counter()


def _stopping() -> RequestError:
    return RequestError(503, "the server is stopping; send the request again once it runs", code="stopping")
