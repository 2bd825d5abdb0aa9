"""One slower storage device for all batches of a reader: when would each of them have arrived?

Virtual time only. Who sleeps until then, and the reads themselves, belong to `reader.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EmulatedFlash:
    """A slower storage device: each batch takes at least latency + bytes / speed of wall time.

    The latency is charged once per batch, whatever the number of requests in it, and nothing else is added.
    Batches that are under way together share the speed; their latencies pass side by side.
    A disk that is slower than the emulated one is not made faster.
    """

    bytes_per_second: float
    latency_seconds: float = 0.0


@dataclass(eq=False)  # two batches may have equal figures
class Transfer:
    """One batch on the device. Times are those of the caller's clock, in seconds."""

    ready: float  # when its latency has passed
    left: float  # seconds of the whole device that it still needs
    ended: float | None = None


ROUNDING = 1e-9  # seconds more for each transfer, so that rounding never makes it faster than the device


class FlashQueue:
    """The device serves demand transfers first, in their order, then those that were asked for ahead of need.

    What the reader has handed to the device cannot be called back: an ahead transfer that was begun keeps it for up
    to `grain_bytes` more when a demand comes or when it is cancelled.
    """

    def __init__(self, flash: EmulatedFlash, grain_bytes: int) -> None:
        self._flash = flash
        self._grain = grain_bytes / flash.bytes_per_second
        self._demand: list[Transfer] = []
        self._ahead: list[Transfer] = []
        self._at = 0.0  # everything up to here has been worked out

    def add(self, now: float, nbytes: int, *, ahead: bool) -> Transfer:
        self.advance(now)
        transfer = Transfer(now + self._flash.latency_seconds, nbytes / self._flash.bytes_per_second + ROUNDING)
        if ahead:
            self._ahead.append(transfer)
            return transfer
        begun = None if any(t.ready <= now for t in self._demand) else _first_ready(self._ahead, now)
        if begun is not None and begun.left <= self._grain:
            self._ahead.remove(begun)
            self._demand.insert(0, begun)
        elif begun is not None:
            begun.left -= self._grain
            self._demand.insert(0, Transfer(now, self._grain))
        self._demand.append(transfer)
        return transfer

    def bytes_in(self, seconds: float) -> float:
        return seconds * self._flash.bytes_per_second

    def promote(self, transfer: Transfer) -> None:
        """An ahead transfer is needed now."""
        if transfer in self._ahead:
            self._ahead.remove(transfer)
            self._demand.append(transfer)

    def cancel(self, now: float, transfer: Transfer) -> float:
        """Give up what the device has not begun. Returns the seconds of device time saved."""
        self.advance(now)
        if transfer.ended is not None:
            return 0.0
        kept = min(transfer.left, self._grain if transfer.ready <= now else 0.0)
        saved = transfer.left - kept
        transfer.left, transfer.ready = kept, now
        for queue in (self._demand, self._ahead):
            queue[:] = [t for t in queue if t is not transfer]
        self._demand.insert(0, transfer)
        self.advance(now)
        return saved

    def advance(self, now: float) -> None:
        """Note the end of every transfer that ended by `now`."""
        order = [*self._demand, *self._ahead]
        _serve(order, self._at, now)
        self._at = max(self._at, now)
        for queue in (self._demand, self._ahead):
            queue[:] = [t for t in queue if t.ended is None]

    def end_of(self, transfer: Transfer) -> float:
        """When `transfer` ends, or ended, if nothing else comes."""
        if transfer.ended is not None:
            return transfer.ended
        order = [*self._demand, *self._ahead]
        copies = [replace(t) for t in order]
        _serve(copies, self._at, math.inf)
        end = next(copy.ended for t, copy in zip(order, copies, strict=True) if t is transfer)
        assert end is not None
        return end


def _first_ready(order: Sequence[Transfer], at: float) -> Transfer | None:
    return next((t for t in order if t.ended is None and t.ready <= at), None)


def _serve(order: Sequence[Transfer], at: float, until: float) -> None:
    """Let the device work from `at` to `until`, always on the first of `order` that is ready."""
    while any(t.ended is None for t in order):
        current = _first_ready(order, at)
        next_ready = min((t.ready for t in order if t.ended is None and t.ready > at), default=math.inf)
        limit = min(until, next_ready)
        if current is not None and at + current.left <= limit:
            at += current.left
            current.left, current.ended = 0.0, at
            continue
        if current is not None:
            current.left -= limit - at
        if limit >= until:
            return
        at = limit
