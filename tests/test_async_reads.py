"""Reads that go on while the caller computes: what waits for what, what failures leave, and what is counted."""

import contextlib
import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reads import SIZES, WAYS, FastClock, Preadv, request, small_pieces, watch_preadv, write_shards

from mlx_moecache.checkpoints import reader
from mlx_moecache.checkpoints.reader import EmulatedFlash, ExpertReader, Pending
from mlx_moecache.errors import ReadError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def contents(shards: tuple[Path, ...]) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in shards)


class Gate:
    """Holds every read back until it is opened, and notes the offsets in the order in which reads began."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.began: list[int] = []
        self.ended = 0
        self.opened = threading.Event()
        self.failing: Callable[[int], bool] = lambda offset: False
        self._lock = threading.Lock()
        watch_preadv(patch, self._held)

    def until_began(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while len(self.began) < count:
            assert time.monotonic() < deadline, f"only {len(self.began)} reads began"
            time.sleep(0.001)

    def _held(self, real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            with self._lock:
                self.began.append(offset)
            assert self.opened.wait(10)
            try:
                if self.failing(offset):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return real(descriptor, views, offset)
            finally:
                with self._lock:
                    self.ended += 1

        return preadv


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held = Gate(monkeypatch)
    yield held
    held.opened.set()


@pytest.mark.parametrize("way", WAYS)
def test_the_caller_goes_on_while_helpers_read(
    way: str, shards: tuple[Path, ...], contents: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = bytearray(60_000)
    with small_pieces(way, shards, threads=2) as opened:
        held = Gate(monkeypatch)
        pending = opened.start([request(target, 77)])
        held.until_began(2)  # so reads run, and this thread was not held back
        assert not any(target)
        held.opened.set()
        pending.wait()
    assert target == contents[0][77:60_077]
    assert (pending.bytes_read, opened.bytes_read) == (60_000, 60_000)


def test_reads_finish_without_anybody_waiting(shards: tuple[Path, ...], contents: tuple[bytes, ...]) -> None:
    target = bytearray(100_000)
    with small_pieces("buffered", shards, threads=1) as opened:
        opened.start([request(target, 5)])
        deadline = time.monotonic() + 10
        while opened.bytes_read < 100_000 and time.monotonic() < deadline:
            time.sleep(0.001)
            assert opened.read_seconds > 0  # asking brings the books up to date
        assert target == contents[0][5:100_005]


def test_waiting_again_and_an_empty_batch_do_nothing(shards: tuple[Path, ...]) -> None:
    with small_pieces("buffered", shards) as opened:
        empty = opened.start([])
        empty.wait()
        empty.cancel()
        pending = opened.start([request(bytearray(10), 0)])
        for _ in range(3):
            pending.wait()
        pending.cancel()
        assert opened.bytes_read == pending.bytes_read == 10


batches = st.lists(
    st.tuples(
        st.booleans(),  # ahead
        st.sampled_from(["wait", "cancel"]),
        st.lists(st.tuples(st.integers(0, SIZES[1] - 30_000), st.integers(0, 30_000)), max_size=4),
    ),
    max_size=6,
)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40)
@given(batches=batches, threads=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_mix_of_batches_lands_what_was_waited_for_and_nothing_after_its_end(
    way: str,
    shards: tuple[Path, ...],
    contents: tuple[bytes, ...],
    batches: list[tuple[bool, str, list[tuple[int, int]]]],
    threads: int,
    seed: int,
) -> None:
    with small_pieces(way, shards, threads=threads) as opened:
        started: list[tuple[Pending, str, list[tuple[int, bytearray]]]] = []
        for ahead, end, extents in batches:
            targets = [(offset, bytearray(length)) for offset, length in extents]
            requests = [request(target, offset, shard=1) for offset, target in targets]
            started.append((opened.start(requests, ahead=ahead), end, targets))
        random.Random(seed).shuffle(started)
        frozen: list[tuple[bytearray, bytes]] = []
        for pending, end, targets in started:
            pending.wait() if end == "wait" else pending.cancel()
            for offset, target in targets:
                if end == "wait":
                    assert target == contents[1][offset : offset + len(target)]
                frozen.append((target, bytes(target)))
        for target, before in frozen:
            assert target == before
        assert opened.bytes_read == sum(pending.bytes_read for pending, _, _ in started)
        waited = [p for p, end, _ in started if end == "wait"]
        assert all(p.bytes_read == p.nbytes for p in waited)


class TestPriorities:
    def test_a_demand_passes_every_ahead_piece_that_nobody_began(
        self, shards: tuple[Path, ...], contents: tuple[bytes, ...], gate: Gate
    ) -> None:
        speculative, needed = bytearray(200_000), bytearray(40_000)
        with small_pieces("buffered", shards, threads=2) as opened:
            ahead = opened.start([request(speculative, 0)], ahead=True)
            gate.until_began(2)
            demand = opened.start([request(needed, 300_000)])
            gate.opened.set()
            demand.wait()
            assert needed == contents[0][300_000:340_000]
            order = list(gate.began)
            ahead.wait()
        demanded = [i for i, offset in enumerate(order) if offset >= 300_000]
        assert len(demanded) == 4
        # Two ahead pieces ran when it came; at most one more was begun by a helper beside the last of the demand.
        assert demanded[-1] <= 2 + 4
        assert sum(offset < 300_000 for offset in order[: demanded[-1]]) <= 3
        assert speculative == contents[0][:200_000]

    def test_ahead_pieces_are_small(self, shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reader, "AHEAD_PIECE_BYTES", 3000)
        lengths: list[int] = []

        def noting(real: Preadv) -> Preadv:
            def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
                lengths.append(sum(map(len, views)))
                return real(descriptor, views, offset)

            return preadv

        with small_pieces("buffered", shards, threads=2) as opened:
            watch_preadv(monkeypatch, noting)
            opened.start([request(bytearray(30_000), 0)], ahead=True).wait()
            assert lengths == [3000] * 10
            opened.start([request(bytearray(30_000), 0)]).wait()
            assert lengths[10:] == [10_000] * 3

    def test_waiting_for_an_ahead_batch_makes_it_a_demand(self, shards: tuple[Path, ...], gate: Gate) -> None:
        with small_pieces("buffered", shards, threads=1) as opened:
            other = opened.start([request(bytearray(100_000), 0)], ahead=True)
            gate.until_began(1)
            wanted = opened.start([request(bytearray(50_000), 200_000)], ahead=True)
            threading.Timer(0.05, gate.opened.set).start()
            wanted.wait()
            began = list(gate.began)
            other.wait()
        last = max(i for i, offset in enumerate(began) if offset >= 200_000)
        assert sum(offset < 200_000 for offset in began[:last]) <= 2


class TestCancelling:
    @pytest.mark.parametrize("way", WAYS)
    def test_pieces_that_nobody_began_are_never_read_and_those_in_flight_are_awaited(
        self, way: str, shards: tuple[Path, ...], contents: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = bytearray(300_000)
        with small_pieces(way, shards, threads=2) as opened:
            held = Gate(monkeypatch)
            pending = opened.start([request(target, 0)], ahead=True)
            held.until_began(2)
            threading.Timer(0.1, held.opened.set).start()
            started = time.perf_counter()
            pending.cancel()
            assert time.perf_counter() - started >= 0.05
            assert (len(held.began), held.ended) == (2, 2)
            landed = bytes(target)
            count = sum(a == b for a, b in zip(target, contents[0], strict=False))
            assert 0 < pending.bytes_read == opened.bytes_read <= min(20_000, count)
            time.sleep(0.05)
            assert bytes(target) == landed
            with pytest.raises(ReadError, match="given up"):
                pending.wait()
            opened.read([request(target, 0)])
        assert target == contents[0][:300_000]

    def test_a_failed_ahead_batch_can_be_cancelled_silently(self, shards: tuple[Path, ...], gate: Gate) -> None:
        gate.failing = lambda offset: True
        gate.opened.set()
        with small_pieces("buffered", shards, threads=2) as opened:
            pending = opened.start([request(bytearray(100_000), 0)], ahead=True)
            gate.until_began(1)
            pending.cancel()
            assert opened.bytes_read == pending.bytes_read == 0


class TestFailures:
    @pytest.mark.parametrize("way", WAYS)
    def test_a_helpers_failure_comes_out_of_wait_and_of_no_other_batch(
        self, way: str, shards: tuple[Path, ...], contents: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good = bytearray(50_000)
        with small_pieces(way, shards, threads=2) as opened:
            held = Gate(monkeypatch)
            held.failing = lambda offset: 100_000 <= offset < 290_000
            held.opened.set()
            bad = opened.start([request(bytearray(100_000), 120_000)])
            fine = opened.start([request(good, 300_000)])
            fine.wait()
            with pytest.raises(ReadError, match="Input/output error"):
                bad.wait()
            assert held.ended == len(held.began)
            with pytest.raises(ReadError, match="given up"):
                bad.wait()  # it must not look as if it had arrived
            assert (bad.bytes_read, opened.bytes_read) == (0, 50_000)
        assert good == contents[0][300_000:350_000]

    def test_ctrl_c_while_waiting_leaves_when_every_helper_is_idle(self, shards: tuple[Path, ...], gate: Gate) -> None:
        main = threading.main_thread().ident or 0
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        target = bytearray(300_000)
        try:
            with small_pieces("buffered", shards, threads=2) as opened:
                pending = opened.start([request(target, 0)])
                gate.until_began(2)
                threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
                threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
                threading.Timer(0.4, gate.opened.set).start()
                with pytest.raises(KeyboardInterrupt):
                    pending.wait()
                assert gate.opened.is_set()
                assert gate.ended == len(gate.began) <= 3
                landed = bytes(target)
                time.sleep(0.05)
                assert bytes(target) == landed
                assert opened.bytes_read == 0
                opened.read([request(target, 0)])  # nothing of it is left
                assert opened.bytes_read == 300_000
        finally:
            signal.signal(signal.SIGINT, previous)

    def test_a_batch_that_ended_keeps_no_memory_alive(self, shards: tuple[Path, ...]) -> None:
        class Memory(bytearray):
            pass

        gc.disable()
        try:
            with small_pieces("buffered", shards, threads=2) as opened:
                for end in ("wait", "cancel"):
                    target = Memory(100_000)
                    watched = weakref.ref(target)
                    pending = opened.start([request(target, 0)])
                    getattr(pending, end)()
                    del target
                    deadline = time.monotonic() + 5
                    while watched() is not None and time.monotonic() < deadline:
                        time.sleep(0.001)  # a helper may be about to leave its last piece
                    assert watched() is None
        finally:
            gc.enable()

    def test_closing_drops_what_nobody_waits_for(self, shards: tuple[Path, ...], gate: Gate) -> None:
        before = set(threading.enumerate())
        with small_pieces("buffered", shards, threads=2) as opened:
            pending = opened.start([request(bytearray(300_000), 0)])
            gate.until_began(2)
            threading.Timer(0.05, gate.opened.set).start()
            opened.close()
            assert gate.ended == len(gate.began) == 2
            with pytest.raises(ReadError, match="closed"):
                pending.wait()
            with pytest.raises(ReadError, match="closed"):
                opened.start([request(bytearray(1), 0)])
            pending.cancel()
        assert set(threading.enumerate()) <= before

    def test_a_forgotten_batch_does_not_keep_the_reader_open(
        self, shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed: list[int] = []
        real_close = os.close
        opened = ExpertReader(shards)
        pending = opened.start([request(bytearray(300_000), 0)])
        with contextlib.suppress(ReadError):
            pending.wait()
        monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), real_close(descriptor)))
        del opened, pending
        deadline = time.monotonic() + 5
        while len(closed) < len(SIZES) and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.001)
        assert len(closed) == len(SIZES)


class TestSeconds:
    def test_overlapping_batches_count_once_and_pauses_between_not_at_all(
        self, shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = FastClock(monkeypatch)
        with small_pieces("buffered", shards, threads=2, flash=EmulatedFlash(1e3)) as opened:
            first = opened.start([request(bytearray(20_000), 0)])
            second = opened.start([request(bytearray(30_000), 50_000)])
            second.wait()
            first.wait()  # the emulated device was done with it before
            clock.sleep(1000.0)  # nothing is under way
            third = opened.start([request(bytearray(10_000), 0)])
            third.wait()
            assert opened.read_seconds == pytest.approx(20 + 30 + 10, abs=0.5)
            assert first.read_seconds == pytest.approx(20, abs=0.5)
            assert second.read_seconds == pytest.approx(50, abs=0.5)  # they share one device
            assert opened.wait_seconds == pytest.approx(50 + 10, abs=0.5)
            assert first.wait_seconds < 0.5

    def test_computing_meanwhile_is_no_waiting(self, shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        clock = FastClock(monkeypatch)
        with small_pieces("buffered", shards, threads=2, flash=EmulatedFlash(1e3, latency_seconds=5.0)) as opened:
            pending = opened.start([request(bytearray(20_000), 0)])
            clock.sleep(15.0)
            pending.wait()
            assert pending.read_seconds == opened.read_seconds == pytest.approx(25, abs=0.5)
            assert pending.wait_seconds == opened.wait_seconds == pytest.approx(10, abs=0.5)


def test_more_shards_than_the_limit_of_open_files_are_opened_as_far_as_the_system_allows(
    tmp_path: Path, shards: tuple[Path, ...]
) -> None:
    script = f"""
import resource
from pathlib import Path
from mlx_moecache.checkpoints.reader import ExpertReader, ReadRequest
from mlx_moecache.errors import ReadError
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 400))
shards = [Path({str(shards[0])!r})]
target = bytearray(10)
with ExpertReader(shards * 100) as reader:
    reader.read([ReadRequest(99, 0, memoryview(target))])
print(target == Path(shards[0]).read_bytes()[:10], resource.getrlimit(resource.RLIMIT_NOFILE))
try:
    ExpertReader(shards * 500)
except ReadError as error:
    print(error)
ExpertReader(shards).close()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, refused, last = ran.stdout.splitlines()
    assert first == "True (328, 400)"
    assert "Too many open files" in refused
    assert last == "(400, 400)"  # enough, so it stays
