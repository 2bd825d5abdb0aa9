"""Timing all sides of a comparison in turn, on the same tokens, with the counters of the cache around each segment."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from expert_reads import BLOCK, block_buffer, device_bytes
from speed_setup import Side
from speed_waits import IdleControl
from tqdm import tqdm

from mlx_moecache.checkpoints.direct_io import open_shards
from mlx_moecache.checkpoints.reader import ReadRequest
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.slots import SlotPool
from mlx_moecache.stats import PhaseStats

RAW_BYTES = 8 * BLOCK  # of the raw sequential read in each round
START = 8  # tokens of the prompt before the tokens that are timed


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one side."""

    seconds: float
    tokens: int
    stats: PhaseStats  # of these tokens
    device_bytes: int | None  # fetched from storage meanwhile; None where the system does not say
    calls: tuple[tuple[int, int], ...] = ()  # (experts that were there, experts that were missing) per layer and token
    waits: tuple[float, ...] = ()  # seconds in which that layer waited for experts, or for a lengthened host read
    span: int | None = None  # layers that share a look at the device, at the end


@dataclass(frozen=True)
class Round:
    """One turn of all sides."""

    decode: dict[str, Segment]
    raw: float  # bytes per second of a sequential read of the same file
    reads: dict[str, tuple[float, ...]]  # seconds to read 1 .. k experts with nothing else to do, per side that reads
    idle: dict[str, float] = field(default_factory=dict)  # seconds per token that its waits cost beyond themselves


class CountCalls:
    """A usage listener that keeps how many experts each call found and missed, and how long it waited."""

    def __init__(self, waited: Callable[[], float]) -> None:
        """waited: the seconds of waiting so far."""
        self.calls: list[tuple[int, int]] = []
        self.waits: list[float] = []
        self._waited, self._before = waited, waited()

    def used(self, layer: int, phase: str, experts: Sequence[int], missed: Sequence[int]) -> None:
        now = self._waited()
        self.calls.append((len(experts) - len(missed), len(missed)))
        self.waits.append(now - self._before)
        self._before = now


def segment(side: Side, tokens: int) -> Segment:
    """Let `side` compute `tokens` tokens more."""
    counter = CountCalls(lambda: side.waited)
    stats = side.cache.stats.copy().decode if side.cache is not None else PhaseStats()
    if side.cache is not None:
        side.cache.listener = counter
    before = device_bytes()
    began = time.perf_counter()
    side.advance(tokens)
    seconds = time.perf_counter() - began
    after = device_bytes()
    if side.cache is not None:
        side.cache.listener = None
        stats = side.cache.stats.decode - stats
    fetched = None if before is None or after is None else after - before
    return Segment(seconds, tokens, stats, fetched, tuple(counter.calls), tuple(counter.waits), side.span)


def joined(a: Segment, b: Segment) -> Segment:
    stats = PhaseStats()
    stats.add(a.stats)
    stats.add(b.stats)
    fetched = None if a.device_bytes is None or b.device_bytes is None else a.device_bytes + b.device_bytes
    calls, waits = a.calls + b.calls, a.waits + b.waits
    return Segment(a.seconds + b.seconds, a.tokens + b.tokens, stats, fetched, calls, waits, b.span)


def measure_decode(
    sides: Sequence[Side],
    *,
    rounds: int,
    tokens: int,
    warm_up: int,
    shard: Path,
    show: bool,
    idle: IdleControl | None = None,
    idle_for: Sequence[str] = (),
) -> list[Round]:
    """`rounds` rounds of two segments of `tokens` tokens each: forwards through the sides, then backwards.

    idle: then idles as the sides named in `idle_for` did in the second segment.
    """
    for side in sides:
        side.warm()
        side.begin(START, tokens=1 + warm_up + 2 * rounds * tokens)
        side.advance(1 + warm_up)
    if idle is not None:
        idle.begin(idle_for, START, warm_up=warm_up, tokens=rounds * tokens)
    raw = RawReader(shard)
    alone = {s.name: ReadAlone(s.cache) for s in sides if s.cache is not None and s.cache.has_host_reads}
    found = []
    try:
        for _ in tqdm(range(rounds), desc="decode", unit="round", disable=None if show else True):
            forwards = {s.name: segment(s, tokens) for s in sides}
            backwards = {s.name: segment(s, tokens) for s in reversed(sides)}
            decode = {s.name: joined(forwards[s.name], backwards[s.name]) for s in sides}
            excess = idle.excess({name: backwards[name] for name in idle_for}) if idle is not None else {}
            found.append(Round(decode, raw.speed(), {name: x.seconds() for name, x in alone.items()}, excess))
    finally:
        raw.close()
    return found


@dataclass(frozen=True)
class Prefill:
    """One prompt of one side, with the experts in memory that earlier text left there."""

    seconds: float  # to the first token
    tokens: int
    stats: PhaseStats
    device_bytes: int | None


def measure_prefill(
    sides: Sequence[Side], *, rounds: int, prompt: int, at: int, show: bool
) -> list[dict[str, Prefill]]:
    """Time to the first token of prompts that follow each other in the text from `at` on."""
    found = []
    for number in tqdm(range(rounds), desc="prefill", unit="round", disable=None if show else True):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        found.append({s.name: _prefill(s, prompt, at + number * prompt) for s in order})
    return found


def _prefill(side: Side, prompt: int, at: int) -> Prefill:
    side.begin(prompt, tokens=1, at=at)
    stats = side.cache.stats.copy().prefill if side.cache is not None else PhaseStats()
    before = device_bytes()
    began = time.perf_counter()
    side.advance(1)
    seconds = time.perf_counter() - began
    after = device_bytes()
    if side.cache is not None:
        stats = side.cache.stats.prefill - stats
    mx.clear_cache()
    return Prefill(seconds, prompt, stats, None if before is None or after is None else after - before)


class RawReader:
    """Reads a file in order, in large blocks, on one thread, past the page cache: what the device gives."""

    def __init__(self, shard: Path) -> None:
        self._descriptor = open_shards([shard], direct=True).descriptors[0]
        self._size = shard.stat().st_size
        self._block = min(BLOCK, self._size // 4096 * 4096)
        self._buffers = block_buffer(2 * BLOCK, huge=True)
        self._random = random.Random(0)

    def speed(self) -> float:
        """Bytes per second, from a random block on."""
        count = max(1, min(RAW_BYTES, self._size) // self._block)
        first = self._random.randrange(self._size // self._block - count + 1)
        began, done = time.perf_counter(), 0
        for i in range(first, first + count):
            done += os.preadv(self._descriptor, [self._buffers[i % 2][: self._block]], i * self._block)
        return done / (time.perf_counter() - began)

    def close(self) -> None:
        os.close(self._descriptor)


class ReadAlone:
    """How long the reader of a cache needs for the missing experts of one call, when nothing is computed meanwhile."""

    def __init__(self, cache: ExpertCache) -> None:
        self._cache = cache
        self._k = cache.layers[0].k
        self._pool = SlotPool(cache.layers[0].pool.components, self._k)
        self._random = random.Random(0)

    def seconds(self) -> tuple[float, ...]:
        """Of 1 .. k experts of a random layer."""
        return tuple(self._read(n) for n in range(1, self._k + 1))

    def _read(self, count: int) -> float:
        layer = self._random.choice(self._cache.layers)
        e = layer.extents
        requests = [
            ReadRequest(e.shards[c][expert], e.offsets[c][expert], self._pool.view(c, slot))
            for slot, expert in enumerate(self._random.sample(range(layer.num_experts), count))
            for c in range(len(e.nbytes))
        ]
        began = time.perf_counter()
        self._cache.reader.read(requests)
        return time.perf_counter() - began
