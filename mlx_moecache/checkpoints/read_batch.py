"""What the reader reads: requests of its callers, cut and joined to pieces, and batches of them that are under way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mlx_moecache.checkpoints.emulated_flash import Transfer

if TYPE_CHECKING:
    from mlx_moecache.checkpoints.reader import ExpertReader


@dataclass(frozen=True)
class ReadRequest:
    shard: int  # index into the reader's shards
    offset: int  # bytes from the start of the file
    view: memoryview  # writable, contiguous, cast to "B"; its length is the byte count


class Piece(NamedTuple):
    """Neighbouring bytes of one shard, read by one call; they may end up in several places."""

    shard: int
    offset: int
    nbytes: int
    views: tuple[memoryview, ...]


def split(requests: Sequence[ReadRequest], most: int) -> list[Piece]:
    """Requests in file order as pieces of at most `most` bytes: neighbours joined, long ones cut."""
    pieces: list[Piece] = []
    views: list[memoryview] = []  # the piece that is being put together
    shard = offset = nbytes = 0
    for request in sorted(requests, key=lambda request: (request.shard, request.offset)):
        length = len(request.view)
        taken = 0
        while taken < length:
            here = request.offset + taken
            if nbytes and (request.shard != shard or here != offset + nbytes or nbytes == most):
                pieces.append(Piece(shard, offset, nbytes, tuple(views)))
                views, nbytes = [], 0
            if not nbytes:
                shard, offset = request.shard, here
            part = min(length - taken, most - nbytes)
            views.append(request.view if part == length else request.view[taken : taken + part])
            nbytes += part
            taken += part
    if nbytes:
        pieces.append(Piece(shard, offset, nbytes, tuple(views)))
    # Long pieces first: the threads then finish at about the same time.
    pieces.sort(key=lambda piece: -piece.nbytes)
    return pieces


class Pending:
    """Reads that are under way: the pieces of one batch, which the helpers and a waiting caller take one by one.

    Its views must not be used before `wait` has returned. One of `wait` and `cancel` must be called before the memory
    is used for anything else.

    Afterwards: bytes_read, 0 if it failed; read_seconds, wall time from its start to its last byte, whoever else was
    reading; wait_seconds, how much of it a caller spent in `wait`.
    """

    def __init__(self, reader: ExpertReader, pieces: Sequence[Piece], *, ahead: bool) -> None:
        self.nbytes = sum(piece.nbytes for piece in pieces)
        self.bytes_read = 0
        self.read_seconds = self.wait_seconds = 0.0
        self.started = time.perf_counter()
        self.failure: BaseException | None = None
        self.pieces = deque(pieces)  # nobody has taken these; popleft is atomic, so taking one needs no lock
        self.ahead = ahead
        self.unread = len(pieces)  # pieces that have not landed
        self.helpers = 0  # that read one of its pieces now
        self.landed = 0  # bytes
        self.refused = 0  # bytes that the emulated device never delivered because the batch was given up
        self.landed_at = 0.0
        self.transfer: Transfer | None = None  # on the emulated device
        self.finished = not pieces  # its bytes and seconds are counted
        self.gave_up = False  # it failed or was cancelled
        self._reader = reader

    def wait(self) -> None:
        """Return when all bytes have landed, helping until then; a batch started ahead is now a demand.

        On the first failure the pieces that nobody has begun are dropped. ReadError, as KeyboardInterrupt, leaves this
        call only when every helper is done with this batch: no byte lands after it. The views then hold an unknown mix
        of old and new bytes, and the counter of bytes is unchanged. Waiting again after success does nothing.
        """
        self._reader._wait(self)

    def cancel(self) -> None:
        """Drop the pieces that nobody has begun and wait for the others: no byte lands after this call.

        Raises nothing about the reads; the views hold an unknown mix of old and new bytes. What had arrived by then
        counts as read.
        """
        self._reader._cancel(self)

    def drop(self) -> None:
        """The same without waiting: the memory may be used again as soon as `is_idle`."""
        self._reader._drop(self)

    def stop(self, failure: BaseException) -> None:
        """Discard the pieces nobody has taken. Of several failures the first counts, or an interrupt."""
        self.pieces.clear()
        self.gave_up, self.landed_at = True, time.perf_counter()
        if self.failure is None or not isinstance(failure, Exception):
            self.failure = failure

    @property
    def is_idle(self) -> bool:
        """Nothing is left that could still land (but for the piece of a caller who is waiting)."""
        return not self.pieces and not self.helpers
