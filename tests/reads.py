"""What the tests of the reader share: shards of random bytes, readers that cut small pieces, and watched reads."""

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_moecache.checkpoints import direct_io, read_batch, reader
from mlx_moecache.checkpoints.reader import ExpertReader, ReadRequest

SIZES = (400_001, 123_456)  # bytes of the two shards; no multiple of any block size
WAYS = ("buffered", "direct", "refused")  # refused: direct I/O was asked for, the file system says no

Preadv = Callable[[int, Sequence[memoryview], int], int]


def write_shards(folder: Path) -> tuple[Path, ...]:
    paths = tuple(folder / f"model-{i}.safetensors" for i in range(len(SIZES)))
    for seed, (path, size) in enumerate(zip(paths, SIZES, strict=True)):
        path.write_bytes(random.Random(seed).randbytes(size))
    return paths


def refuse_o_direct(patch: pytest.MonkeyPatch) -> None:
    real = os.open

    def open_without(path: object, flags: int, *args: int) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return real(path, flags, *args)

    patch.setattr(os, "open", open_without)


@contextlib.contextmanager
def small_pieces(way: str, shards: Sequence[Path], **options: object) -> Iterator[ExpertReader]:
    """A reader that cuts even short requests into pieces for its threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "PIECE_BYTES", 10_000)
        patch.setattr(reader, "BOUNCE_BYTES", 3 * direct_io.DEFAULT_ALIGNMENT)
        patch.setattr(reader, "INLINE_BYTES", 0)
        if way == "refused":
            refuse_o_direct(patch)
        with ExpertReader(shards, direct_io=way != "buffered", **options) as opened:  # type: ignore[arg-type]
            yield opened


def need_direct(opened: ExpertReader) -> None:
    if opened.io_mode != "direct":
        pytest.skip(f"no O_DIRECT here: {opened.io_note}")


def request(target: bytearray, offset: int, *, shard: int = 0) -> ReadRequest:
    return ReadRequest(shard, offset, memoryview(target))


def watch_preadv(patch: pytest.MonkeyPatch, fake: Callable[[Preadv], Preadv]) -> None:
    patch.setattr(os, "preadv", fake(os.preadv))


class Gauge:
    """Counts the calls of preadv, those running now, and the threads they come from."""

    def __init__(self) -> None:
        self.calls = 0
        self.running = 0
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def call(self) -> Iterator[int]:
        with self._lock:
            number = self.calls
            self.calls += 1
            self.running += 1
            self.threads.add(threading.current_thread().name)
        try:
            yield number
        finally:
            with self._lock:
                self.running -= 1


class FastClock:
    """Replaces the reader's clock: sleeping takes no time and moves the clock on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.slept = 0.0
        for module in (reader, read_batch):
            patch.setattr(module, "time", SimpleNamespace(sleep=self.sleep, perf_counter=self.now))

    def now(self) -> float:
        return time.perf_counter() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
