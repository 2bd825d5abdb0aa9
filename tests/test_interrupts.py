"""Ctrl-C, a lack of memory or of threads at any line: the slots hold what the host believes, and replies stay exact."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_moecache import look_ahead, slots
from mlx_moecache.checkpoints import reader
from mlx_moecache.demo import demo_model
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.generation import StepOptions, generate_step
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.stats import PhaseStats

SLOTS = 6
TRACED = (
    "expert_cache",
    "slot_loading",
    "layer_experts",
    "residents",
    "slots",
    "look_ahead",
    "cached_switch",
    "journal",
    "eviction",
    "rising_heap",
)


_open: list[nn.Module] = []


def opened(*, slots: int = SLOTS, eviction: str = "lru") -> nn.Module:
    options = MemoryOptions(slots=slots, max_context=128, prefill_step_size=32)
    model = OpenedModel(demo_model()).load(options, CacheOptions(routing="original", eviction=eviction))
    _open.append(model)
    return model


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Tracebacks of interrupts keep models alive, and with them threads and files that other tests count."""
    yield
    while _open:
        _open.pop().expert_cache.close()
    gc.collect()


def reply(model: nn.Module, seed: int, tokens: int = 12) -> list[int]:
    prompt = mx.array(np.random.default_rng(seed).integers(100, 4000, 20))
    return [int(t) for t, _ in generate_step(prompt, model, StepOptions(max_tokens=tokens))]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    model = opened(slots=60)
    return [reply(model, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    return {k: v for shard in demo_model().glob("*.safetensors") for k, v in mx.load(str(shard)).items()}  # type: ignore[union-attr,arg-type]


def check(cache: ExpertCache, weights: dict[str, Any]) -> None:
    """Every record of the host agrees with the others, and with the bytes in the slots."""
    cache.mend()
    assert not cache.journal.open
    for x in cache.layers:
        r = x.residents
        taken = [r.slot_of(e) for e in r.experts]
        assert r.capacity == x.pool.slots == len(next(iter(x.pool.arrays.values())))
        assert sorted([*taken, *r._free]) == list(range(r.capacity))
        assert set(r.eviction_order()) == set(r.experts) == {e for e, there in enumerate(r.mask) if there}
        for i, c in enumerate(x.pool.components):
            whole = weights[f"{x.path}.{c.name}"]
            for e, slot in zip(r.experts, taken, strict=True):
                assert bytes(x.pool.view(i, slot)) == bytes(memoryview(whole[e]).cast("B")), (x.path, e)


class Interrupt:
    """Raises KeyboardInterrupt before line number `at` of our own that runs inside; counts them. 0: never."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __enter__(self) -> Interrupt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        path = Path(frame.f_code.co_filename)
        return self._line if path.stem in TRACED and "mlx_moecache" in path.parts else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize("eviction", ["lru", "lfru"])
def test_an_interrupt_at_any_line_of_a_reply_leaves_true_records(
    expected: list[list[int]], weights: dict[str, Any], eviction: str
) -> None:
    model = opened(eviction=eviction)
    cache = model.expert_cache
    with Interrupt(0) as whole:
        reply(model, 0, 4)
    rng, interrupted = np.random.default_rng(len(eviction)), 0
    for n in range(40):
        try:
            with Interrupt(int(rng.integers(1, whole.lines))):
                reply(model, n % 3, 4)
        except KeyboardInterrupt:
            interrupted += 1
        check(cache, weights)
        if n % 5 == 0:
            assert reply(model, n % 3) == expected[n % 3]
    assert interrupted > 30
    ahead = cache.look_ahead
    assert ahead is not None
    assert len({id(b) for b in (*ahead._free, *(s.buffer for s in (*ahead._staged, *ahead._dropped)))}) == len(
        ahead._buffers
    )


@pytest.mark.parametrize("new", [4, 12])
def test_an_interrupt_at_any_line_of_a_resize_leaves_true_records(
    expected: list[list[int]], weights: dict[str, Any], new: int
) -> None:
    model = opened()
    cache = model.expert_cache
    with Interrupt(0) as whole:
        cache.resize(slots=new)
    for at in range(1, whole.lines, whole.lines // 25):
        cache.resize(slots=SLOTS)
        reply(model, 0, 2)
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            cache.resize(slots=new)
        check(cache, weights)
    assert reply(model, 1) == expected[1]
    cache.resize(slots=new)
    assert cache.slots_per_layer == [new] * len(cache.layers)
    assert reply(model, 2) == expected[2]


@pytest.mark.parametrize("new", [4, 12])
@pytest.mark.parametrize("at", [1, 3, 4, 20])
def test_a_resize_that_finds_no_memory_may_be_repeated(
    expected: list[list[int]], weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch, new: int, at: int
) -> None:
    model, allocate, calls = opened(), slots._allocate, 0
    cache = model.expert_cache
    reply(model, 0, 4)

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise MemoryError("no memory left")
        return allocate(*args)

    monkeypatch.setattr(slots, "_allocate", failing)
    with pytest.raises(MemoryError):
        cache.resize(slots=new)
    assert set(cache.slots_per_layer) <= {SLOTS, new}
    check(cache, weights)
    assert reply(model, 0) == expected[0]
    cache.resize(slots=new)
    check(cache, weights)
    assert reply(model, 1) == expected[1]


def test_a_resize_that_finds_no_memory_twice_is_mended_when_there_is_some(
    expected: list[list[int]], weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, allocate, calls = opened(), slots._allocate, 0
    reply(model, 0, 4)

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise MemoryError("no memory left")
        return allocate(*args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(slots, "_allocate", failing)
        model.expert_cache.resize(slots=12)
    assert reply(model, 0) == expected[0]
    check(model.expert_cache, weights)


def test_reads_go_on_where_no_thread_can_be_started(
    expected: list[list[int]], weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ThreadPoolExecutor, *args: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(reader, "INLINE_BYTES", 0)  # experts of real models are larger
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    model = opened()
    assert reply(model, 0) == expected[0]
    check(model.expert_cache, weights)


def test_a_load_that_is_given_up_late_leaves_newer_residents_alone(weights: dict[str, Any]) -> None:
    """After an interrupt between `with` and its block nobody closes the block but the garbage collector."""
    cache = opened().expert_cache
    layer, stats = cache.layers[0], PhaseStats()
    cache.load(layer, layer.residents.plan(list(range(SLOTS))), stats)
    late = cache.loading(layer, layer.residents.plan([10, 11]), stats)
    late.__enter__()
    cache.mend()
    cache.load(layer, layer.residents.plan([20, 21]), stats)
    assert {20, 21} <= set(layer.residents.experts)
    del late
    gc.collect()
    assert {20, 21} <= set(layer.residents.experts)
    check(cache, weights)


def test_buffers_of_a_load_that_is_given_up_late_are_not_given_back_twice() -> None:
    model = opened()
    ahead, layer = model.expert_cache.look_ahead, model.expert_cache.layers[1]
    ahead._start(layer, [30, 31], PhaseStats())
    taken = ahead.claim(layer, [30, 31], PhaseStats())
    assert len(taken) == 2
    ahead.guesser_after(0)  # finds that buffers are missing
    assert len(ahead._free) == len(ahead._buffers)
    ahead.release(list(taken.values()))  # the load that was cut off is closed at last
    ahead._collect(PhaseStats())
    assert len(ahead._free) == len({id(b) for b in ahead._free}) == len(ahead._buffers)


def test_an_interrupt_at_any_line_of_a_reset_or_a_return_leaves_true_records(
    expected: list[list[int]], weights: dict[str, Any]
) -> None:
    model = opened()
    cache = model.expert_cache
    reply(model, 0, 4)
    contents = cache.contents()
    for action in (cache.reset, lambda: cache.restore(contents)):
        reply(model, 1, 4)
        with Interrupt(0) as whole:
            action()
        for at in range(1, whole.lines, max(1, whole.lines // 25)):
            reply(model, 1, 4)
            with pytest.raises(KeyboardInterrupt), Interrupt(at):
                action()
            check(cache, weights)
    assert reply(model, 1) == expected[1]


def test_a_buffer_is_never_handed_out_twice(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    reply(model, 0)
    release, armed = look_ahead.LookAhead.release, True

    def interrupted(self: look_ahead.LookAhead, staged: Sequence[look_ahead.Staged]) -> None:
        nonlocal armed
        release(self, staged)
        if armed and staged:
            armed = False
            raise KeyboardInterrupt

    monkeypatch.setattr(look_ahead.LookAhead, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for n in range(20):
            reply(model, n)
    assert [reply(model, n) for n in range(3)] == expected
    ahead = model.expert_cache.look_ahead
    listed = [id(b) for b in (*ahead._free, *(s.buffer for s in (*ahead._staged, *ahead._dropped)))]
    assert len(listed) == len(set(listed)) == len(ahead._buffers)
