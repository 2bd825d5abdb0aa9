"""Computing what is in memory while the rest is read: the same bits, in the right order, and only where it pays."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from faulty_reads import after_each_read, scribble
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import MODEL_TYPES, Shelf, num_experts, random_tokens, run_model, same_bits, tiny_config

from mlx_moecache import read_pace, residents
from mlx_moecache.checkpoints.reader import EmulatedFlash, ExpertReader, Pending
from mlx_moecache.errors import ReadError
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.read_pace import SPLIT_SECONDS, ReadPace
from mlx_moecache.residents import LEAST_IN_TURN, Residents

LENGTHS = [32, 32, 11] + [1] * 12
TOKENS = random_tokens(1, sum(LENGTHS))
SLOW = EmulatedFlash(bytes_per_second=1e12, latency_seconds=4e-3)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlap at every miss, and read waves of any size ahead."""
    monkeypatch.setattr(read_pace, "SPLIT_SECONDS", 0.0)
    monkeypatch.setattr(residents, "LEAST_IN_TURN", 2)


def load(shelf: Shelf, model_type: str, layout: str, *, flash: EmulatedFlash | None = None) -> nn.Module:
    opened = OpenedModel(shelf.checkpoint(model_type, layout))  # type: ignore[arg-type]
    slots = num_experts(tiny_config(model_type)) // 2
    return opened.load(MemoryOptions(slots=slots), CacheOptions(routing="original", flash=flash))


class TestTheResult:
    @pytest.mark.parametrize("layout", ["float32", "4bit"])
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_has_the_bits_of_stock(self, shelf: Shelf, always: None, model_type: str, layout: str) -> None:
        stock = shelf.stock(shelf.checkpoint(model_type, layout))  # type: ignore[arg-type]
        model = load(shelf, model_type, layout)
        assert same_bits(run_model(model, TOKENS, LENGTHS), run_model(stock, TOKENS, LENGTHS))
        decode = model.expert_cache.stats.decode
        assert decode.misses > 0
        if tiny_config(model_type).get("num_experts_per_tok") != 1:
            assert decode.hits > 0

    @pytest.mark.parametrize("failing", range(1, 24, 3))
    def test_is_right_again_after_a_read_that_failed_while_hits_were_computed(
        self, shelf: Shelf, always: None, failing: int
    ) -> None:
        model = load(shelf, "qwen2_moe", "4bit")

        def fail(n: int, requests: object) -> None:
            if n == failing:
                scribble(requests)  # type: ignore[arg-type]
                raise ReadError("made up")

        with pytest.MonkeyPatch.context() as patch, pytest.raises(ReadError):
            after_each_read(patch, fail)
            run_model(model, TOKENS, LENGTHS)
        stock = shelf.stock(shelf.checkpoint("qwen2_moe", "4bit"))
        assert same_bits(run_model(model, TOKENS, LENGTHS), run_model(stock, TOKENS, LENGTHS))

    def test_a_failing_computation_leaves_the_slots_as_they_were(
        self, shelf: Shelf, always: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(shelf, "qwen2_moe", "4bit")
        run_model(model, TOKENS, LENGTHS)
        started: list[Pending] = []
        start = ExpertReader.start

        def remember(self: ExpertReader, requests: Any, **how: bool) -> Pending:
            pending = start(self, requests, **how)
            if not how.get("joining"):  # else somebody waits at once
                started.append(pending)
            return pending

        evaluate = mx.eval

        def fail(*arrays: mx.array) -> None:
            if started:
                raise MemoryError
            evaluate(*arrays)

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(ExpertReader, "start", remember)
            patch.setattr(mx, "eval", fail)
            run_model(model, random_tokens(1, 20, seed=3), [1] * 20)
        assert started and all(p.gave_up or p.finished for p in started)
        stock = shelf.stock(shelf.checkpoint("qwen2_moe", "4bit"))
        assert same_bits(run_model(model, TOKENS, LENGTHS), run_model(stock, TOKENS, LENGTHS))


class TestTime:
    def test_hits_are_computed_before_anybody_waits_for_misses(
        self, shelf: Shelf, always: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(shelf, "qwen2_moe", "4bit")
        run_model(model, TOKENS, LENGTHS)
        events: list[str] = []
        start, wait, evaluate = ExpertReader.start, Pending.wait, mx.eval

        def note(name: str, call: object) -> object:
            def wrapped(*args: object, **how: bool) -> object:
                if not how.get("joining"):  # else somebody waits at once
                    events.append(name)
                return call(*args, **how)  # type: ignore[operator]

            return wrapped

        monkeypatch.setattr(ExpertReader, "start", note("start", start))
        monkeypatch.setattr(Pending, "wait", note("wait", wait))
        monkeypatch.setattr(mx, "eval", note("compute", evaluate))
        run_model(model, random_tokens(1, 40, seed=3), [1] * 40)
        assert "start" in events
        for i, event in enumerate(events):
            if event == "start":
                assert events[i : i + 3] == ["start", "compute", "wait"]

    def test_a_prompt_waits_for_less_than_the_device_takes(self, shelf: Shelf, always: None) -> None:
        model = load(shelf, "qwen2_moe", "4bit", flash=SLOW)
        cache = model.expert_cache
        block_time = 4e-3
        upstream = {}

        def slowly(block: object) -> object:
            def compute(x: mx.array, indices: mx.array) -> mx.array:
                time.sleep(block_time)
                return upstream[id(block)](x, indices)

            return compute

        for module in _blocks(model):
            upstream[id(module)] = module._upstream
            module._upstream = slowly(module)
        run_model(model, TOKENS[:, :64], [64])
        stats = cache.stats.prefill
        assert stats.read_seconds > 4e-3
        assert stats.wait_seconds < 0.9 * stats.read_seconds

    def test_fast_reads_are_simply_waited_for(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        model = load(shelf, "qwen2_moe", "4bit")
        monkeypatch.setattr(model.expert_cache.pace, "read_per_byte", 1e-12)
        monkeypatch.setattr(model.expert_cache.pace, "observe", lambda nbytes, seconds: None)
        start = ExpertReader.start

        def at_once(self: ExpertReader, requests: Any, *, ahead: bool = False, joining: bool = False) -> Pending:
            assert joining, "began in the background"
            return start(self, requests, ahead=ahead, joining=joining)

        monkeypatch.setattr(ExpertReader, "start", at_once)
        run_model(model, TOKENS, [1] * 20)
        assert model.expert_cache.stats.decode.misses > 0


class TestPace:
    def test_is_unknown_until_something_was_read(self) -> None:
        assert not ReadPace().pays(10**12, 10**12)

    def test_splitting_pays_where_reads_take_longer_than_it_costs(self) -> None:
        pace = ReadPace()
        pace.observe(10**6, 1e-3)
        assert pace.pays(round(1.01 * SPLIT_SECONDS * 1e9), 1)
        assert not pace.pays(round(0.99 * SPLIT_SECONDS * 1e9), 1)

    def test_and_where_there_is_enough_to_compute_meanwhile(self) -> None:
        pace = ReadPace()
        pace.observe(10**6, 1.0)
        pace.observe_compute(10**6, 1e-3)
        assert pace.pays(10**6, round(1.01 * SPLIT_SECONDS * 1e9))
        assert not pace.pays(10**6, round(0.99 * SPLIT_SECONDS * 1e9))

    def test_follows_the_last_batches(self) -> None:
        pace = ReadPace()
        pace.observe(10**6, 1.0)
        for _ in range(60):
            pace.observe(10**6, 1e-3)
        assert pace.read_per_byte == pytest.approx(1e-9, rel=2)
        pace.observe(0, 5.0)
        assert pace.read_per_byte < 1e-8


class TestWavesInTurn:
    @given(
        capacity=st.integers(LEAST_IN_TURN, 20),
        crowd=st.permutations(range(32)),
        history=st.lists(st.permutations(range(32)), max_size=3),
    )
    def test_the_next_wave_can_be_read_while_one_is_computed(
        self, capacity: int, crowd: list[int], history: list[list[int]]
    ) -> None:
        r = Residents(32, capacity, "lru")
        for order in history:
            r.publish(r.plan(order[:4]))
            r.touch([(e, 1) for e in order[:4]])
        missing = sum(e not in r for e in crowd)
        usable = capacity - sum(e in r for e in crowd[-capacity:])  # slots of experts that need not stay
        waves = r.plan_waves(crowd)
        slots_of_wave = []
        for wave in waves:
            r.publish(wave.loads)
            slots_of_wave.append({r.slot_of(e) for e in wave.experts})
        with_loads = [i for i, w in enumerate(waves) if w.loads]
        if usable >= LEAST_IN_TURN:
            for i in with_loads[1:]:
                assert not slots_of_wave[i - 1] & {x.slot for x in waves[i].loads}
            assert len(with_loads) == -(-missing // (usable // 2))

    def test_slots_that_are_taken_first_belong_to_experts_that_were_served_first(self) -> None:
        r = Residents(32, 16, "lru")
        r.publish(r.plan(list(range(16))))
        waves = r.plan_waves(list(range(8)) + list(range(16, 32)) + list(range(8, 16)))
        assert waves[0].experts == list(range(8)) and not waves[0].loads
        assert waves[1].experts == list(range(8, 16)) and not waves[1].loads
        assert {x.victim for x in waves[2].loads} <= set(range(8))


def _blocks(model: nn.Module) -> list[object]:
    """The MoE blocks, found from the seams of their layers."""
    return [x.on_resize.__self__ for x in model.expert_cache.layers]  # type: ignore[attr-defined]
