"""The reader: exact bytes whatever the way of reading, and nothing lands after a call has ended."""

import contextlib
import errno
import fcntl
import gc
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reads import (
    SIZES,
    WAYS,
    FastClock,
    Gauge,
    Preadv,
    need_direct,
    refuse_o_direct,
    request,
    small_pieces,
    watch_preadv,
    write_shards,
)

from mlx_moecache.checkpoints import direct_io, reader
from mlx_moecache.checkpoints.reader import EmulatedFlash, ExpertReader, ReadRequest
from mlx_moecache.errors import ReadError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def contents(shards: tuple[Path, ...]) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in shards)


extents = st.lists(
    st.integers(0, len(SIZES) - 1).flatmap(
        lambda shard: st.tuples(st.just(shard), st.integers(0, SIZES[shard]), st.integers(0, 60_000))
    ),
    max_size=12,
)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40, deadline=None)
@given(extents=extents, threads=st.integers(1, 5), gap=st.integers(0, 9))
def test_random_extents_arrive_byte_for_byte_and_touch_nothing_else(
    way: str,
    shards: tuple[Path, ...],
    contents: tuple[bytes, ...],
    extents: list[tuple[int, int, int]],
    threads: int,
    gap: int,
) -> None:
    requests, expected, at = [], b"", 0
    wanted = [(shard, offset, min(length, SIZES[shard] - offset)) for shard, offset, length in extents]
    target = bytearray(b"\xaa" * sum(length + gap for _, _, length in wanted))
    for shard, offset, length in wanted:
        requests.append(ReadRequest(shard, offset, memoryview(target)[at : at + length]))
        expected += contents[shard][offset : offset + length] + b"\xaa" * gap
        at += length + gap
    with small_pieces(way, shards, threads=threads) as opened:
        opened.read(requests)
        assert target == expected
        assert opened.bytes_read == sum(length for _, _, length in wanted)


@pytest.mark.parametrize("way", WAYS)
def test_default_sizes_read_a_whole_expert_sized_extent(way: str, tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    data = random.Random(5).randbytes(5_000_001)
    path.write_bytes(data)
    target = bytearray(len(data) - 3)
    with pytest.MonkeyPatch.context() as patch:
        if way == "refused":
            refuse_o_direct(patch)
        with ExpertReader([path], direct_io=way != "buffered") as opened:
            opened.read([request(target, 3)])
    assert target == data[3:]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("most", [4096, 4097, 5000, 8191])
def test_short_reads_are_continued(
    way: str, most: int, shards: tuple[Path, ...], contents: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge()

    def short(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            if way == "direct":  # the kernel wants whole blocks, so these are read and only the count is cut
                with gauge.call():
                    return min(most, real(descriptor, views, offset))
            left, cut = most, []
            for view in views:
                cut.append(memoryview(view)[:left])
                left -= len(cut[-1])
            with gauge.call():
                return real(descriptor, cut, offset)

        return preadv

    with small_pieces(way, shards) as opened:
        watch_preadv(monkeypatch, short)
        targets = [bytearray(30_000), bytearray(7), bytearray(SIZES[0] - 350_000)]
        opened.read([request(targets[0], 1001), request(targets[1], 31_001), request(targets[2], 350_000)])
        assert targets[0] == contents[0][1001:31_001]
        assert targets[1] == contents[0][31_001:31_008]
        assert targets[2] == contents[0][350_000:]
    assert gauge.calls > 80_000 / most  # the reads were indeed cut short


@pytest.mark.parametrize("way", WAYS)
def test_a_read_that_starts_inside_the_last_block_works_to_the_last_byte(
    way: str, shards: tuple[Path, ...], contents: tuple[bytes, ...]
) -> None:
    with small_pieces(way, shards) as opened:
        target = bytearray(5)
        opened.read([request(target, SIZES[1] - 5, shard=1)])
        assert target == contents[1][-5:]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("offset", "got"), [(SIZES[1] - 100, 100), (SIZES[1] + 50_000, 0)])
def test_the_end_of_the_file_is_an_error_that_names_shard_offset_wanted_and_got(
    way: str, offset: int, got: int, shards: tuple[Path, ...]
) -> None:
    with small_pieces(way, shards) as opened:
        with pytest.raises(ReadError) as caught:
            opened.read([request(bytearray(150), offset, shard=1)])
        message = str(caught.value)
        assert str(shards[1]) in message
        assert f"wanted 150 bytes at offset {offset}, got {got};" in message
        assert opened.bytes_read == 0
        assert opened.read_seconds > 0


def test_a_shard_truncated_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 10_000)
    with ExpertReader([path]) as opened:
        os.truncate(path, 4000)
        with pytest.raises(ReadError, match="ends early"):
            opened.read([request(bytearray(10_000), 0)])


@pytest.mark.parametrize("direct", [False, True])
def test_a_shard_that_was_written_to_after_opening_is_noticed_and_named(tmp_path: Path, direct: bool) -> None:
    paths = [tmp_path / f"model-{n}.safetensors" for n in (1, 2)]
    for path in paths:
        path.write_bytes(b"x" * 10_000)
        os.utime(path, ns=(10**18, 10**18))
    with ExpertReader(paths, direct_io=direct) as opened:
        opened.check_unchanged()
        opened.read([request(bytearray(10_000), 0)])
        os.utime(paths[0], ns=(2 * 10**18, 10**18))  # read
        os.link(paths[0], tmp_path / "another")
        paths[1].rename(tmp_path / "old")
        paths[1].write_bytes(b"y" * 10_000)  # another file of this name
        opened.check_unchanged()
        with open(paths[0], "r+b") as file:
            file.write(b"z")
        with pytest.raises(ReadError, match=rf"{paths[0]} was changed .*; load the model again$"):
            opened.check_unchanged()
    opened.check_unchanged()  # its descriptors may be those of other files now


@pytest.mark.parametrize("way", WAYS)
def test_an_io_error_is_raised_when_every_thread_is_idle_and_queued_pieces_are_skipped(
    way: str, shards: tuple[Path, ...], contents: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge()
    failed = threading.Event()

    def failing(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            with gauge.call() as number:
                if number == 1:
                    failed.set()
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                assert failed.wait(10)
                time.sleep(0.05)  # long enough for the failure to overtake the reads that run
                return real(descriptor, views, offset)

        return preadv

    with small_pieces(way, shards, threads=3) as opened:
        with pytest.MonkeyPatch.context() as patch:
            watch_preadv(patch, failing)
            target = bytearray(300_000)
            with pytest.raises(ReadError) as caught:
                opened.read([request(target, 0)])
            assert gauge.running == 0
            landed = bytes(target)
        assert str(shards[0]) in str(caught.value)
        assert os.strerror(errno.EIO) in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        assert gauge.calls <= 3 * 2  # of 30 pieces: those that ran, and at most one more each
        assert opened.bytes_read == 0
        time.sleep(0.1)
        assert target == landed
        opened.read([request(target, 0)])  # the failure is not remembered
        assert target == contents[0][:300_000]


def test_a_failed_read_does_not_keep_the_callers_memory_alive(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory(bytearray):
        pass  # unlike bytearray it can be watched by a weak reference

    def failing(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        return preadv

    with small_pieces("buffered", shards) as opened:
        watch_preadv(monkeypatch, failing)
        target = Memory(100_000)
        watched = weakref.ref(target)
        gc.disable()
        try:
            with contextlib.suppress(ReadError):
                opened.read([request(target, 0)])
                pytest.fail("the read did not fail")
            opened.close()
            del target
            assert watched() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_leaves_the_call_only_when_every_thread_is_idle(
    presses: int, shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge()
    main = threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupting(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            with gauge.call():
                if threading.current_thread() is main:
                    time.sleep(5)  # ended by the interrupt
                for _ in range(presses):
                    time.sleep(0.05)
                    signal.pthread_kill(main.ident or 0, signal.SIGINT)
                time.sleep(0.1)
                return real(descriptor, views, offset)

        return preadv

    try:
        with small_pieces("buffered", shards, threads=2) as opened:
            watch_preadv(monkeypatch, interrupting)
            target = bytearray(300_000)
            with pytest.raises(KeyboardInterrupt):
                opened.read([request(target, 0)])
            assert gauge.running == 0
            landed = bytes(target)
            assert gauge.calls < 30
            time.sleep(0.2)
            assert bytes(target) == landed
    finally:
        signal.signal(signal.SIGINT, previous)


def test_ctrl_c_is_not_hidden_by_an_io_error_of_the_same_call(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, reading = threading.main_thread(), threading.Event()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def failing(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            if threading.current_thread() is main:
                reading.set()
                time.sleep(5)  # ended by the interrupt, which comes after the failure
            assert reading.wait(5)  # a helper that failed earlier would end the call without the main thread
            threading.Timer(0.1, signal.pthread_kill, (main.ident, signal.SIGINT)).start()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        return preadv

    try:
        with small_pieces("buffered", shards, threads=2) as opened:
            watch_preadv(monkeypatch, failing)
            with pytest.raises(KeyboardInterrupt):
                opened.read([request(bytearray(300_000), 0)])
    finally:
        signal.signal(signal.SIGINT, previous)


def test_large_batches_use_several_threads_and_small_ones_only_the_callers(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge()
    together = threading.Barrier(3)

    def meeting(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            with gauge.call() as number:
                if number < 3:
                    together.wait(10)  # breaks unless three reads run at once
                return real(descriptor, views, offset)

        return preadv

    with small_pieces("buffered", shards, threads=3) as opened:
        watch_preadv(monkeypatch, meeting)
        opened.read([request(bytearray(300_000), 0)])
        assert len(gauge.threads) == 3
        helpers = gauge.threads - {threading.main_thread().name}
        assert all(name.startswith("expert-reader") for name in helpers)
        gauge.threads.clear()
        monkeypatch.setattr(reader, "INLINE_BYTES", 36_000)
        for _ in range(20):
            opened.read([request(bytearray(1000), 5000 * i) for i in range(36)])
        assert gauge.threads == {threading.main_thread().name}


def test_one_thread_means_no_pool(shards: tuple[Path, ...], contents: tuple[bytes, ...]) -> None:
    before = threading.active_count()
    with small_pieces("buffered", shards, threads=1) as opened:
        target = bytearray(300_000)
        opened.read([request(target, 7)])
        assert target == contents[0][7:300_007]
        assert threading.active_count() == before


@pytest.mark.parametrize("way", WAYS)
def test_neighbours_in_the_file_are_read_by_one_call_in_any_order(
    way: str, shards: tuple[Path, ...], contents: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge()

    def counting(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            with gauge.call():
                return real(descriptor, views, offset)

        return preadv

    if way == "refused":
        refuse_o_direct(monkeypatch)
    with ExpertReader(shards, direct_io=way != "buffered") as opened:
        watch_preadv(monkeypatch, counting)
        targets = [bytearray(10) for _ in range(300)]
        requests = [request(target, 40 + 10 * i) for i, target in enumerate(targets)]
        random.Random(0).shuffle(requests)
        opened.read(requests)
    assert b"".join(targets) == contents[0][40:3040]
    assert gauge.calls == 1


@pytest.mark.parametrize("way", WAYS)
def test_more_neighbours_than_one_call_may_take_still_arrive(
    way: str, shards: tuple[Path, ...], contents: tuple[bytes, ...]
) -> None:
    with small_pieces(way, shards) as opened:
        targets = [bytearray(1) for _ in range(3000)]
        opened.read([request(target, 100 + i) for i, target in enumerate(targets)])
    assert b"".join(targets) == contents[0][100:3100]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.uint32, mx.uint8])
def test_bytes_land_in_the_slot_of_an_mlx_array_and_mlx_sees_them(
    way: str, dtype: mx.Dtype, shards: tuple[Path, ...], contents: tuple[bytes, ...]
) -> None:
    pool = mx.zeros((3, 40, 64), dtype=dtype)
    mx.eval(pool)
    slot = 40 * 64 * dtype.size
    view = memoryview(pool).cast("B")[slot : 2 * slot]
    with small_pieces(way, shards) as opened:
        opened.read([ReadRequest(0, 777, view)])
    seen = np.array(pool[1].view(mx.uint8)).tobytes()
    assert seen == contents[0][777 : 777 + slot]
    assert not np.array(pool[0].view(mx.uint8)).any()
    assert not np.array(pool[2].view(mx.uint8)).any()


def test_calls_from_several_threads_take_turns(
    shards: tuple[Path, ...], contents: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge()
    together: list[int] = []

    def slow(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            with gauge.call():
                time.sleep(0.002)
                together.append(gauge.running)
                return real(descriptor, views, offset)

        return preadv

    targets = [bytearray(50_000) for _ in range(6)]
    with small_pieces("buffered", shards, threads=1) as opened:
        watch_preadv(monkeypatch, slow)
        callers = [
            threading.Thread(target=opened.read, args=([request(target, 1000 * i)],))
            for i, target in enumerate(targets)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert opened.bytes_read == 300_000
    assert max(together) == 1
    for i, target in enumerate(targets):
        assert target == contents[0][1000 * i : 1000 * i + 50_000]


def test_an_emulated_flash_takes_at_least_latency_and_transfer_time(shards: tuple[Path, ...]) -> None:
    flash = EmulatedFlash(bytes_per_second=2e6, latency_seconds=0.02)
    with ExpertReader(shards, flash=flash) as opened:
        started = time.perf_counter()
        opened.read([request(bytearray(20_000), 0), request(bytearray(40_000), 90_000)])
        elapsed = time.perf_counter() - started
        assert elapsed >= 0.05
        assert 0.05 <= opened.read_seconds <= elapsed


def test_an_emulated_flash_charges_the_latency_once_per_call_and_nothing_for_an_empty_one(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FastClock(monkeypatch)
    with ExpertReader(shards, flash=EmulatedFlash(1e6, latency_seconds=100.0)) as opened:
        opened.read([request(bytearray(1000), 5000 * i) for i in range(50)])
        opened.read([])
        opened.read([request(bytearray(0), 17)])
    assert 50 < clock.slept <= 100.051  # 100 s and 50 ms, less the time of the reads themselves


def test_a_disk_slower_than_the_emulated_flash_is_not_slowed_further(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FastClock(monkeypatch)
    with ExpertReader(shards, flash=EmulatedFlash(1e15)) as opened:
        opened.read([request(bytearray(1000), 0)])
    assert clock.slept == 0.0


def test_direct_reads_use_aligned_blocks_and_count_only_the_bytes_wanted(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def noting(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            calls.append((offset, sum(map(len, views))))
            return real(descriptor, views, offset)

        return preadv

    with small_pieces("direct", shards, threads=2) as opened:
        need_direct(opened)
        assert opened.io_note is None
        assert opened.host_buffer_bytes >= 2 * 3 * 4096
        watch_preadv(monkeypatch, noting)
        opened.read([request(bytearray(20_000), 4095)])
        assert opened.bytes_read == 20_000
    assert calls
    assert all(offset % 4096 == 0 and nbytes % 4096 == 0 for offset, nbytes in calls)
    assert sum(nbytes for _, nbytes in calls) == 3 * 4096 + 3 * 4096 + 2 * 4096  # no block more than needed
    assert opened.host_buffer_bytes == 0  # given back


def test_the_bounce_memory_of_a_default_reader_is_known_and_small(shards: tuple[Path, ...]) -> None:
    with ExpertReader(shards, direct_io=True) as opened:
        need_direct(opened)
        known = opened.host_buffer_bytes
        assert known == 4 * 2 * 768 * 1024
        opened.read([request(bytearray(200_000), 0)])
        assert opened.host_buffer_bytes == known
    with ExpertReader(shards) as opened:
        assert opened.host_buffer_bytes == 0
        assert (opened.io_mode, opened.io_note) == ("buffered", None)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_refused_o_direct_falls_back_to_dropping_the_pages_and_says_so(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[tuple[int, int]] = []

    def fadvise(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((offset, nbytes))

    refuse_o_direct(monkeypatch)
    with ExpertReader(shards, direct_io=True) as opened:
        monkeypatch.setattr(os, "posix_fadvise", fadvise)
        assert opened.io_mode == "fadvise"
        assert opened.io_note is not None
        assert "O_DIRECT" in opened.io_note
        assert "\n" not in opened.io_note
        assert opened.host_buffer_bytes == 0
        opened.read([request(bytearray(10_000), 5000)])
    assert dropped == [(4096, 3 * 4096)]  # the whole pages around bytes 5000 to 15000


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs O_DIRECT")
def test_a_file_system_that_refuses_only_the_reads_falls_back_too(
    shards: tuple[Path, ...], contents: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(descriptor, views, offset)

        return preadv

    watch_preadv(monkeypatch, refusing)
    with ExpertReader(shards, direct_io=True) as opened:
        assert opened.io_mode in ("fadvise", "buffered")
        target = bytearray(100)
        opened.read([request(target, 50)])
    assert target == contents[0][50:150]


def test_a_system_with_neither_o_direct_nor_fadvise_reads_buffered_and_says_so(
    shards: tuple[Path, ...], contents: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(direct_io, "sys", SimpleNamespace(platform="someos"))
    with ExpertReader(shards, direct_io=True) as opened:
        assert opened.io_mode == "buffered"
        assert opened.io_note is not None
        assert "someos" in opened.io_note
        target = bytearray(100)
        opened.read([request(target, 50)])
    assert target == contents[0][50:150]


def test_macos_sets_f_nocache_on_every_shard_and_reads_straight_into_the_view(
    shards: tuple[Path, ...], contents: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def fake_fcntl(descriptor: int, command: int, value: int) -> int:
        assert os.fstat(descriptor).st_size in SIZES
        calls.append((command, value))
        return 0

    monkeypatch.setattr(direct_io, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(direct_io, "fcntl", SimpleNamespace(fcntl=fake_fcntl))
    with ExpertReader(shards, direct_io=True) as opened:
        assert calls == [(48, 1)] * len(SIZES)
        assert (opened.io_mode, opened.io_note, opened.host_buffer_bytes) == ("nocache", None, 0)
        target = bytearray(100_000)
        opened.read([request(target, 13)])
    assert target == contents[0][13:100_013]


def test_macos_reads_buffered_and_says_so_where_f_nocache_is_refused(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_fcntl(descriptor: int, command: int, value: int) -> int:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(direct_io, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(direct_io, "fcntl", SimpleNamespace(fcntl=fake_fcntl))
    with ExpertReader(shards, direct_io=True) as opened:
        assert opened.io_mode == "buffered"
        assert opened.io_note is not None
        assert "F_NOCACHE" in opened.io_note


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_shard_is_an_error_that_names_it_and_leaves_no_descriptor_open(
    way: str, shards: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    closed: list[int] = []
    real_open, real_close = os.open, os.close

    def noting_open(path: object, flags: int, *args: int) -> int:
        opened.append(real_open(path, flags, *args))
        return opened[-1]

    def noting_close(descriptor: int) -> None:
        closed.append(descriptor)
        real_close(descriptor)

    monkeypatch.setattr(os, "open", noting_open)
    monkeypatch.setattr(os, "close", noting_close)
    if way == "refused":
        refuse_o_direct(monkeypatch)
    missing = tmp_path / "model-2.safetensors"
    with pytest.raises(ReadError, match="cannot open shard") as caught:
        ExpertReader([*shards, missing], direct_io=way != "buffered")
    assert str(missing) in str(caught.value)
    assert opened
    assert sorted(opened) == sorted(closed)


@pytest.mark.parametrize("way", WAYS)
def test_close_ends_the_threads_closes_the_shards_and_may_be_repeated(
    way: str, shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # readers that earlier tests forgot have files to close, too
    closed: list[int] = []
    real_close, others = os.close, set(threading.enumerate())

    def helpers() -> set[threading.Thread]:
        return {x for x in threading.enumerate() if x.name.startswith("expert-reader")} - others

    with small_pieces(way, shards) as opened:
        opened.read([request(bytearray(300_000), 0)])
        assert helpers()
        monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), real_close(descriptor)))
        opened.close()
        assert len(closed) == len(SIZES)
        assert not helpers()
        opened.close()
        assert len(closed) == len(SIZES)
        with pytest.raises(ReadError, match="closed"):
            opened.read([request(bytearray(1), 0)])


def test_a_forgotten_reader_closes_its_shards(shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # what earlier tests forgot
    closed: list[int] = []
    real_close = os.close
    opened = ExpertReader(shards)
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), real_close(descriptor)))
    del opened
    gc.collect()
    assert len(closed) == len(SIZES)


@pytest.mark.parametrize("way", WAYS)
def test_a_reader_can_be_closed_while_its_error_is_being_handled(
    way: str, shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(real: Preadv) -> Preadv:
        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        return preadv

    with small_pieces(way, shards) as opened:
        watch_preadv(monkeypatch, failing)
        try:
            opened.read([request(bytearray(100_000), 0)])
        except ReadError:
            opened.close()
        else:
            pytest.fail("the read did not fail")
        assert opened.host_buffer_bytes == 0
