"""Bring byte ranges of the shards into given memory: threads, short reads, failures, emulated flash speed.

The reader knows files and memoryviews. What an expert is, which MLX array the memory belongs to and whether
its bytes are wanted again are for others to know. Its threads move bytes and call nothing of MLX.
"""

import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mlx_moecache.checkpoints.direct_io import BounceArena, BounceBuffer, drop_from_page_cache, open_shards, read_into
from mlx_moecache.errors import ReadError

# Measured with benchmarks/expert_reads.py on a virtual disk of 2.5 GB/s: smaller pieces cost speed, larger ones
# leave threads without work when few experts are read. Bounce buffers are memory, so theirs are smaller.
PIECE_BYTES = 2 * 1024 * 1024
BOUNCE_BYTES = 768 * 1024
# Used in turn: letting the device write over memory that a CPU has just read cost up to a tenth of the speed.
BOUNCES_PER_THREAD = 2
# Below this a buffered batch is read on the calling thread: waking a helper costs more than the reads.
INLINE_BYTES = 256 * 1024


@dataclass(frozen=True)
class ReadRequest:
    shard: int  # index into the reader's shards
    offset: int  # bytes from the start of the file
    view: memoryview  # writable, contiguous, cast to "B"; its length is the byte count


@dataclass(frozen=True)
class EmulatedFlash:
    """A slower storage device: each `read()` call takes at least latency + bytes / speed of wall time.

    The latency is charged once per call, whatever the number of requests in it, and nothing else is added.
    A disk that is slower than the emulated one is not made faster.
    """

    bytes_per_second: float
    latency_seconds: float = 0.0


class _Piece(NamedTuple):
    """Neighbouring bytes of one shard, read by one call; they may end up in several places."""

    shard: int
    offset: int
    nbytes: int
    views: tuple[memoryview, ...]


class _Batch:
    """The pieces of one `read()` call: the calling thread and its helpers take them one by one."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self.failure: BaseException | None = None
        self._pending = deque(pieces)
        self._helpers = 0
        self._idle = threading.Condition()

    def drain(self, read_piece: Callable[[_Piece], None]) -> None:
        """Take and read pieces until none is left."""
        while True:
            try:
                piece = self._pending.popleft()  # atomic, so this needs no lock
            except IndexError:
                return
            read_piece(piece)

    def help(self, read_piece: Callable[[_Piece], None]) -> None:
        """`drain` on another thread; a failure is kept for the calling thread."""
        with self._idle:
            self._helpers += 1
        try:
            self.drain(read_piece)
        except BaseException as error:
            self.stop(error)
        finally:
            with self._idle:
                self._helpers -= 1
                self._idle.notify_all()

    def stop(self, failure: BaseException) -> None:
        """Discard the pieces nobody has taken. Of several failures the first counts, or an interrupt."""
        self._pending.clear()
        if self.failure is None or not isinstance(failure, Exception):
            self.failure = failure

    def wait(self) -> None:
        """Return when no helper is reading. Nothing may be pending: a helper that starts later finds no work."""
        with self._idle:
            self._idle.wait_for(lambda: not self._helpers)


class ExpertReader:
    """Reads byte ranges of a fixed list of shards into memory that the caller owns.

    `threads` reads are in flight at once: the calling thread's and those of a small pool. Calls from several
    threads take turns. Raises ReadError if a shard cannot be opened.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        threads: int = 4,
        direct_io: bool = False,
        flash: EmulatedFlash | None = None,
    ) -> None:
        self.bytes_read = 0
        self.read_seconds = 0.0
        self._shards = tuple(shards)
        self._threads = max(1, threads)
        self._flash = flash
        try:
            opened = open_shards(self._shards, direct=direct_io)
        except OSError as error:
            raise ReadError(
                f"cannot open shard {error.filename}: {error.strerror}; check that the checkpoint is "
                "complete and readable"
            ) from error
        self.io_mode = opened.mode
        self.io_note = opened.note
        self._descriptors = opened.descriptors
        self._piece_bytes = PIECE_BYTES
        self._arena: BounceArena | None = None
        self._bounces: queue.SimpleQueue[BounceBuffer] = queue.SimpleQueue()
        if opened.mode == "direct":
            self._arena = BounceArena(BOUNCES_PER_THREAD * self._threads, BOUNCE_BYTES, opened.alignment)
            self._piece_bytes = BOUNCE_BYTES - opened.alignment
            for bounce in self._arena.buffers:
                self._bounces.put(bounce)
        self.host_buffer_bytes = self._arena.nbytes if self._arena is not None else 0
        self._pool: ThreadPoolExecutor | None = None
        self._one_call = threading.Lock()
        self._closed = False
        # Descriptors are plain numbers: without this a forgotten reader would leak them.
        self._close_descriptors = weakref.finalize(self, _close_all, self._descriptors)

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill the view of every request; returns when all bytes have landed.

        On the first failure the pieces still queued are dropped. ReadError, as KeyboardInterrupt, leaves this
        call only when every helper is idle: no byte lands after it. The views then hold an unknown mix of old
        and new bytes, the counter of bytes is unchanged, and the call may be repeated.
        """
        with self._one_call:
            if self._closed:
                raise ReadError("the reader is closed; open the model again to read its experts")
            started = time.perf_counter()
            try:
                pieces = _split(requests, self._piece_bytes)
                nbytes = sum(piece.nbytes for piece in pieces)
                if pieces:
                    self._read_pieces(pieces, nbytes)
                    if self._flash is not None:
                        least = self._flash.latency_seconds + nbytes / self._flash.bytes_per_second
                        time.sleep(max(0.0, started + least - time.perf_counter()))
                    self.bytes_read += nbytes
            finally:
                self.read_seconds += time.perf_counter() - started

    def close(self) -> None:
        """Stop the helpers and close the shards; waits for a running `read()`. Closing again does nothing."""
        with self._one_call:
            self._closed = True
            if self._pool is not None:
                self._pool.shutdown(wait=True)
                self._pool = None
            if self._arena is not None:
                self._arena.close()
                self._arena = None
                self.host_buffer_bytes = 0
            self._close_descriptors()

    def __enter__(self) -> "ExpertReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_pieces(self, pieces: list[_Piece], nbytes: int) -> None:
        helpers = min(self._threads, len(pieces)) - 1
        if self._arena is None and nbytes <= INLINE_BYTES:
            helpers = 0
        batch = _Batch(pieces)
        started = False
        while True:
            try:
                if not started:
                    started = True
                    self._start_helpers(batch, helpers)
                    batch.drain(self._read_piece)
                batch.wait()
                break
            except BaseException as error:
                # However often Ctrl-C is pressed, wait for the helpers: they write into the caller's memory.
                batch.stop(error)
        failure, batch.failure = batch.failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                # Its traceback holds this frame and the batch: a cycle would keep the caller's memory alive.
                del failure

    def _start_helpers(self, batch: _Batch, count: int) -> None:
        if count == 0:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="expert-reader")
        for _ in range(count):
            self._pool.submit(batch.help, self._read_piece)

    def _read_piece(self, piece: _Piece) -> None:
        descriptor = self._descriptors[piece.shard]
        try:
            if self._arena is not None:
                bounce = self._bounces.get()
                try:
                    got = bounce.read_into(descriptor, piece.views, piece.offset)
                finally:
                    self._bounces.put(bounce)
            else:
                got = read_into(descriptor, piece.views, piece.offset)
            if self.io_mode == "fadvise":
                drop_from_page_cache(descriptor, piece.offset, piece.nbytes)
        except OSError as error:
            raise ReadError(
                f"cannot read {piece.nbytes} bytes at offset {piece.offset} of {self._shards[piece.shard]}: "
                f"{error.strerror or error}; check the disk and try again"
            ) from error
        if got < piece.nbytes:
            raise ReadError(
                f"{self._shards[piece.shard]} ends early: wanted {piece.nbytes} bytes at offset "
                f"{piece.offset}, got {got}; the file is truncated or was changed, download it again"
            )


def _split(requests: Sequence[ReadRequest], most: int) -> list[_Piece]:
    """Requests in file order as pieces of at most `most` bytes: neighbours joined, long ones cut."""
    pieces: list[_Piece] = []
    views: list[memoryview] = []  # the piece that is being put together
    shard = offset = nbytes = 0
    for request in sorted(requests, key=lambda request: (request.shard, request.offset)):
        length = len(request.view)
        taken = 0
        while taken < length:
            here = request.offset + taken
            if nbytes and (request.shard != shard or here != offset + nbytes or nbytes == most):
                pieces.append(_Piece(shard, offset, nbytes, tuple(views)))
                views, nbytes = [], 0
            if not nbytes:
                shard, offset = request.shard, here
            part = min(length - taken, most - nbytes)
            views.append(request.view if part == length else request.view[taken : taken + part])
            nbytes += part
            taken += part
    if nbytes:
        pieces.append(_Piece(shard, offset, nbytes, tuple(views)))
    # Long pieces first: the threads then finish at about the same time.
    pieces.sort(key=lambda piece: -piece.nbytes)
    return pieces


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
