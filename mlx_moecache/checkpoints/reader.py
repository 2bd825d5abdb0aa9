"""Bring byte ranges of the shards into given memory: threads, short reads, failures, emulated flash speed.

The reader knows files and memoryviews. What an expert is, which MLX array the memory belongs to and whether
its bytes are wanted again are for others to know. Its threads move bytes and call nothing of MLX.
"""

import os
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from mlx_moecache.checkpoints.direct_io import BounceArena, BounceBuffer, drop_from_page_cache, open_shards, read_into
from mlx_moecache.checkpoints.emulated_flash import EmulatedFlash as EmulatedFlash
from mlx_moecache.checkpoints.emulated_flash import FlashQueue
from mlx_moecache.checkpoints.open_files import allow_open_files
from mlx_moecache.checkpoints.read_batch import Pending as Pending
from mlx_moecache.checkpoints.read_batch import Piece, split
from mlx_moecache.checkpoints.read_batch import ReadRequest as ReadRequest
from mlx_moecache.errors import ReadError

# Measured with benchmarks/expert_reads.py on a virtual disk of 2.5 GB/s: smaller pieces cost speed, larger ones
# leave threads without work when few experts are read. Bounce buffers are memory, so theirs are smaller.
PIECE_BYTES = 2 * 1024 * 1024
BOUNCE_BYTES = 768 * 1024
# Used in turn: letting the device write over memory that a CPU has just read cost up to a tenth of the speed.
BOUNCES_PER_THREAD = 2
# Below this a buffered batch is read on the calling thread: waking a helper costs more than the reads.
INLINE_BYTES = 256 * 1024
# A demand waits for the pieces of an ahead batch that were begun, one per thread: so these are small.
AHEAD_PIECE_BYTES = 512 * 1024
GIVEN_UP = "these reads were given up before, so their bytes never arrived; start them again"
CLOSED = "the reader is closed; open the model again to read its experts"


class ExpertReader:
    """Reads byte ranges of a fixed list of shards into memory that the caller owns.

    At most `threads` helpers and one waiting caller read at once. Helpers take pieces of demand batches first, so an
    ahead batch delays a demand by one (small) piece per helper at most. Callers of `wait` take turns.
    Raises ReadError if a shard cannot be opened.

    bytes_read: of the batches that arrived. read_seconds: wall time during which some batch was under way.
    wait_seconds: wall time that callers spent waiting.
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
        self.wait_seconds = 0.0
        self._read_seconds = 0.0
        self._shards = tuple(shards)
        self._threads = max(1, threads)
        allow_open_files(2 * len(self._shards))  # MLX keeps each shard open, too, until it has evaluated its tensors
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
        self._versions = [_version(d) for d in self._descriptors]
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
        self._turn = threading.Lock()  # of callers who wait
        # Guards all below and the counters of batches. Taken as a plain lock, whose `with` no Ctrl-C can cut in two.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._demand: list[Pending] = []
        self._ahead: list[Pending] = []
        self._working = 0  # helpers that will look for a piece again
        self._under_way: list[Pending] = []
        self._busy_since = self._busy_until = 0.0
        grain = self._threads * min(self._piece_bytes, AHEAD_PIECE_BYTES)
        self._flash = FlashQueue(flash, grain) if flash is not None else None
        self._closed = False
        # Descriptors are plain numbers: without this a forgotten reader would leak them.
        self._close_descriptors = weakref.finalize(self, _close_all, self._descriptors)

    @property
    def read_seconds(self) -> float:
        with self._lock:
            self._account()
            return self._read_seconds + (time.perf_counter() - self._busy_since if self._under_way else 0.0)

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill the view of every request; returns when all bytes have landed. Failures are those of `Pending.wait`."""
        self._start(requests, ahead=False, joining=True).wait()

    def start(self, requests: Sequence[ReadRequest], *, ahead: bool = False, joining: bool = False) -> Pending:
        """Begin to fill the view of every request on helper threads and return at once.

        ahead: nobody needs it yet, so it gives way to batches that somebody needs. joining: the caller is about to
        wait, so one helper fewer is woken. Raises ReadError if the reader is closed.
        """
        return self._start(requests, ahead=ahead, joining=joining)

    def reserve(self, nbytes: int) -> memoryview:
        """Host memory of the caller's, counted in `host_buffer_bytes`."""
        self.host_buffer_bytes += nbytes
        return memoryview(bytearray(nbytes))

    def give_up(self, *, ahead: bool = False) -> None:
        """Cancel the batches that were needed (ahead: those that nobody needed yet), whose callers were cut off.

        Nothing of them lands after this call.
        """
        with self._lock:
            batches = [b for b in self._under_way if b.ahead == ahead]
        for batch in batches:
            batch.cancel()

    def check_unchanged(self) -> None:
        """Raises ReadError if a shard was written to since it was opened: what is read now may be of another model.

        A system call per shard, so it is for the start of a reply and not for every read. A file that took the place of
        a shard does no harm: the reader still has the old one.
        """
        with self._turn:
            if self._closed:
                return  # reading says so
            for path, descriptor, version in zip(self._shards, self._descriptors, self._versions, strict=True):
                now = _version(descriptor)
                if None not in (now, version) and now != version:
                    raise ReadError(
                        f"{path} was changed since the model was loaded, so its experts are not those of the model in "
                        "memory; load the model again"
                    )

    def account(self) -> None:
        """Note which batches have ended."""
        with self._lock:
            self._account()

    def close(self) -> None:
        """Drop what nobody waits for, stop the helpers and close the shards; waits for a running `wait()`.

        Closing again does nothing.
        """
        with self._turn:
            with self._lock:
                self._closed = True
                for batch in (*self._demand, *self._ahead):
                    if batch.pieces:
                        batch.stop(ReadError(CLOSED))
            if self._pool is not None:
                self._pool.shutdown(wait=True)
                self._pool = None
            if self._arena is not None:
                self.host_buffer_bytes -= self._arena.nbytes
                self._arena.close()
                self._arena = None
            self._close_descriptors()

    def __enter__(self) -> "ExpertReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- batches ----

    def _start(self, requests: Sequence[ReadRequest], *, ahead: bool, joining: bool) -> Pending:
        """joining: the caller waits at once, so one helper fewer is wanted."""
        most = min(self._piece_bytes, AHEAD_PIECE_BYTES) if ahead else self._piece_bytes
        batch = Pending(self, split(requests, most), ahead=ahead)
        helpers = min(self._threads, batch.unread) - joining
        if self._arena is None and batch.nbytes <= INLINE_BYTES:
            helpers = min(helpers, 1 - joining)
        try:
            with self._lock:
                if self._closed:
                    raise ReadError(CLOSED)
                if batch.finished:
                    return batch
                self._account()
                if not self._under_way:
                    self._busy_since = self._busy_until = batch.started
                if self._flash is not None:
                    batch.transfer = self._flash.add(batch.started, batch.nbytes, ahead=ahead)
                self._under_way.append(batch)
                (self._ahead if ahead else self._demand).append(batch)
                helpers -= self._working
                if helpers > 0 and self._pool is None:
                    self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="expert-reader")
            for _ in range(helpers):
                assert self._pool is not None
                try:
                    self._pool.submit(self._help)
                except RuntimeError:  # no more threads: those that are there, and whoever waits, read it all
                    break
        except BaseException as error:
            self._settle(batch, error)
            self._finish(batch)
            raise
        return batch

    def _wait(self, batch: Pending) -> None:
        if batch.gave_up and batch.failure is None:
            raise ReadError(GIVEN_UP)
        started = time.perf_counter()
        try:
            with self._turn:
                if batch.ahead:
                    self._promote(batch)
                if self._working < self._threads:
                    self._drain(batch)
                with self._lock:
                    self._changed.wait_for(lambda: batch.is_idle)
                if batch.gave_up and batch.failure is None:
                    raise ReadError(GIVEN_UP)
                if batch.failure is None:
                    self._sleep_until_delivered(batch)
        except BaseException as error:
            self._settle(batch, error)
        finally:
            self._finish(batch)
            waited = time.perf_counter() - started
            batch.wait_seconds += waited
            self.wait_seconds += waited
        failure, batch.failure = batch.failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                # Its traceback holds this frame and the batch: a cycle would keep the caller's memory alive.
                del failure

    def _drop(self, batch: Pending) -> None:
        with self._lock:
            if batch.finished or batch.gave_up:
                return
            batch.pieces.clear()
            batch.gave_up, batch.landed_at = True, time.perf_counter()
            if self._flash is not None and batch.transfer is not None:
                saved = self._flash.cancel(batch.landed_at, batch.transfer)
                batch.refused = round(self._flash.bytes_in(saved))
            self._account()

    def _cancel(self, batch: Pending) -> None:
        self._drop(batch)
        try:
            with self._lock:
                self._changed.wait_for(lambda: batch.is_idle)
            self._sleep_until_delivered(batch)
        except BaseException as error:
            self._settle(batch, error)
            raise
        finally:
            self._finish(batch)

    def _settle(self, batch: Pending, error: BaseException) -> None:
        """Give a batch up. However often Ctrl-C is pressed, wait for its helpers: the memory is the caller's."""
        while True:
            try:
                batch.stop(error)
                with self._lock:
                    self._changed.wait_for(lambda: batch.is_idle)
                return
            except BaseException as another:
                error = another

    def _promote(self, batch: Pending) -> None:
        with self._lock:
            batch.ahead = False
            if batch in self._ahead:
                self._ahead.remove(batch)
                self._demand.append(batch)
            if self._flash is not None and batch.transfer is not None:
                self._flash.promote(batch.transfer)

    def _help(self) -> None:
        """What a helper does: piece after piece, demand first, until none is left."""
        with self._lock:
            self._working += 1
        while (taken := self._take()) is not None:
            batch, piece = taken
            failure: BaseException | None = None
            try:
                self._read_piece(piece)
            except BaseException as error:
                failure = error
            with self._lock:
                batch.helpers -= 1
                self._landed(batch, piece, failure)
                if batch.is_idle:
                    self._changed.notify_all()
            # An idle frame must not keep the memory of the caller.
            del taken, batch, piece, failure

    def _take(self) -> tuple[Pending, Piece] | None:
        with self._lock:
            for queue in (self._demand, self._ahead):
                while queue:
                    batch = queue[0]
                    try:
                        piece = batch.pieces.popleft()
                    except IndexError:
                        queue.pop(0)
                        continue
                    batch.helpers += 1
                    return batch, piece
            self._working -= 1  # in the same locked section, so that nobody counts on this helper in vain
            return None

    def _drain(self, batch: Pending) -> None:
        """Read pieces of `batch` on the calling thread until none is left."""
        while True:
            try:
                piece = batch.pieces.popleft()
            except IndexError:
                return
            self._read_piece(piece)
            with self._lock:
                self._landed(batch, piece, None)

    def _landed(self, batch: Pending, piece: Piece, failure: BaseException | None) -> None:
        batch.landed_at = time.perf_counter()
        if failure is not None:
            batch.stop(failure)
        else:
            batch.unread -= 1
            batch.landed += piece.nbytes

    # ---- counting and emulation ----

    def _finish(self, batch: Pending) -> None:
        """Nobody waits for `batch` any more, and nothing of it will land."""
        with self._lock:
            if batch.failure is not None and self._flash is not None and batch.transfer is not None:
                self._flash.cancel(time.perf_counter(), batch.transfer)
                batch.transfer = None
            for queue in (self._demand, self._ahead):
                if batch in queue:
                    queue.remove(batch)
            self._account()

    def _account(self) -> None:
        """Count the batches that ended. The lock is held."""
        if not self._under_way:
            return
        now = time.perf_counter()
        if self._flash is not None:
            self._flash.advance(now)
        for batch in tuple(self._under_way):
            if batch.unread and not (batch.gave_up and batch.is_idle):
                continue
            end = batch.landed_at
            if batch.transfer is not None:
                if batch.transfer.ended is None:
                    continue
                end = max(end, batch.transfer.ended)
            self._under_way.remove(batch)
            batch.finished = True
            self._busy_until = max(self._busy_until, end)
            batch.read_seconds = end - batch.started
            if batch.failure is None:
                batch.bytes_read = min(batch.landed, batch.nbytes - batch.refused)
                self.bytes_read += batch.bytes_read
        if not self._under_way:
            self._read_seconds += self._busy_until - self._busy_since

    def _sleep_until_delivered(self, batch: Pending) -> None:
        """Until the emulated device has delivered `batch`; other batches may come in between."""
        if self._flash is None or batch.transfer is None:
            return
        while True:
            with self._lock:
                left = self._flash.end_of(batch.transfer) - time.perf_counter()
            if left <= 0:
                return
            time.sleep(left)

    # ---- one piece ----
    def _read_piece(self, piece: Piece) -> None:
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


def _version(descriptor: int) -> tuple[int, int] | None:
    """What changes when a file is written to (bytes, nanoseconds), and not when it is read, linked or renamed.

    None if the file is out of reach, of which reading tells more.
    """
    try:
        info = os.fstat(descriptor)
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
