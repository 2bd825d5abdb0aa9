"""The expert cache over real files: failed reads, resizes, statistics, and that slots hold the checkpoint's bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from faulty_reads import after_each_read, scribble
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Shelf, random_tokens, run_model, same_bits

from mlx_moecache.checkpoints.expert_layout import ComponentSpec, LayerExtents
from mlx_moecache.checkpoints.reader import ExpertReader, Pending, ReadRequest
from mlx_moecache.errors import BudgetError, ReadError, UsageError
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.layer_experts import LayerExperts
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.routing import CachePrior, Original, RunningRange
from mlx_moecache.stats import CacheStats, PhaseStats

LAYERS, EXPERTS, K = 2, 8, 2
COMPONENTS = (
    ComponentSpec("up_proj.weight", "float32", (3, 5)),
    ComponentSpec("up_proj.scales", "bfloat16", (3,)),
    ComponentSpec("down_proj.weight", "uint32", (7,)),
)
SHARDS = 2


class FailingReader(ExpertReader):
    """A reader whose next batches end as the script says: "ok", "raise", or "scribble" and raise."""

    def __init__(self, shards: Sequence[Path]) -> None:
        super().__init__(shards, threads=2)
        self.script: list[str] = []
        self.forever: str | None = None
        self.interruption: type[BaseException] = ReadError

    def _start(self, requests: Sequence[ReadRequest], *, ahead: bool, joining: bool) -> Pending:
        action = self.script.pop(0) if self.script else self.forever or "ok"
        if action == "ok":
            return super()._start(requests, ahead=ahead, joining=joining)
        batch = super()._start([], ahead=ahead, joining=joining)

        def fail() -> None:
            if action == "scribble":
                scribble(requests[: len(requests) // 2 + 1])
            raise self.interruption("made up")

        batch.wait = fail  # type: ignore[method-assign]
        return batch


class Bench:
    """A cache of two layers over files of random bytes, without any model."""

    def __init__(self, folder: Path, slots: int, eviction: str = "lru") -> None:
        rng = np.random.default_rng(0)
        sizes = [c.nbytes for c in COMPONENTS]
        self.files = [rng.bytes(LAYERS * EXPERTS * sum(sizes) + 13) for _ in range(SHARDS)]
        paths = [folder / f"shard{i}.bin" for i in range(SHARDS)]
        for path, content in zip(paths, self.files, strict=True):
            path.write_bytes(content)
        self.reader = FailingReader(paths)
        self.extents, start = [], 13
        for _ in range(LAYERS):
            shards, offsets = [], []
            for c, size in enumerate(sizes):
                shards.append(tuple((c + e) % SHARDS for e in range(EXPERTS)))
                offsets.append(tuple(start + e * size for e in range(EXPERTS)))
                start += EXPERTS * size
            self.extents.append(LayerExtents(tuple(sizes), tuple(shards), tuple(offsets)))
        layers = [
            LayerExperts(
                f"layers.{i}",
                extents,
                COMPONENTS,
                num_experts=EXPERTS,
                k=K,
                slots=slots,
                eviction=eviction,
                running_range=RunningRange(),
            )
            for i, extents in enumerate(self.extents)
        ]
        self.cache = ExpertCache(layers, self.reader, Original())

    def acquire(self, layer: int, needed: Sequence[int], stats: PhaseStats | None = None) -> None:
        """What a MoE block does for one token."""
        x = self.cache.layers[layer]
        self.cache.load(x, x.residents.plan(needed), stats or PhaseStats())
        x.residents.touch([(e, 1) for e in needed])

    def slot_bytes(self, layer: int) -> dict[int, bytes]:
        """Resident expert -> the bytes that MLX sees in its slot."""
        x = self.cache.layers[layer]
        return {
            e: b"".join(
                bytes(memoryview(mx.contiguous(x.pool.arrays[c.name][x.residents.slot_of(e)])).cast("B"))
                for c in COMPONENTS
            )
            for e in x.residents.experts
        }

    def file_bytes(self, layer: int, expert: int) -> bytes:
        e = self.extents[layer]
        parts = []
        for c, size in enumerate(e.nbytes):
            offset = e.offsets[c][expert]
            parts.append(self.files[e.shards[c][expert]][offset : offset + size])
        return b"".join(parts)

    def check_bytes(self) -> None:
        for layer in range(LAYERS):
            for expert, content in self.slot_bytes(layer).items():
                assert content == self.file_bytes(layer, expert)

    def state(self, layer: int) -> tuple[Any, ...]:
        """All that a failed read must leave alone."""
        r = self.cache.layers[layer].residents
        return {e: r.slot_of(e) for e in r.experts}, r.eviction_order(), self.slot_bytes(layer)


@pytest.fixture
def make_bench(tmp_path: Path) -> Callable[..., Bench]:
    return lambda slots, eviction="lru": Bench(tmp_path, slots, eviction)


MakeBench = Callable[..., Bench]


class TestAFailedRead:
    @pytest.mark.parametrize("action", ["raise", "scribble"])
    @pytest.mark.parametrize("eviction", ["lru", "lfu"])
    def test_leaves_residents_their_order_and_their_bytes_as_they_were(
        self, make_bench: MakeBench, action: str, eviction: str
    ) -> None:
        bench, stats = make_bench(3, eviction), PhaseStats()
        for needed in ([0, 1], [2, 0], [1, 2]):
            bench.acquire(0, needed)
        before = bench.state(0)
        bench.reader.script = [action]
        with pytest.raises(ReadError, match="made up"):
            bench.acquire(0, [5, 6], stats)
        assert bench.state(0) == before
        bench.check_bytes()
        assert (stats.selections, stats.hits, stats.misses, stats.loads, stats.swapped) == (0, 0, 0, 0, 0)

    @pytest.mark.parametrize("action", ["raise", "scribble"])
    def test_may_be_repeated(self, make_bench: MakeBench, action: str) -> None:
        bench, stats = make_bench(3), PhaseStats()
        bench.acquire(0, [0, 1])
        bench.reader.script = [action]
        with pytest.raises(ReadError):
            bench.acquire(0, [5, 6], stats)
        bench.acquire(0, [5, 6], stats)
        assert stats.loads == 2
        assert set(bench.cache.layers[0].residents.experts) == {1, 5, 6}
        bench.check_bytes()

    def test_into_free_slots_reads_nothing_back(self, make_bench: MakeBench) -> None:
        bench = make_bench(3)
        bench.reader.script = ["scribble", "raise"]
        with pytest.raises(ReadError):
            bench.acquire(0, [5, 6])
        assert bench.reader.script == ["raise"]
        assert len(bench.cache.layers[0].residents) == 0

    def test_that_cannot_be_undone_drops_the_victims_and_only_these(self, make_bench: MakeBench) -> None:
        bench = make_bench(3)
        bench.acquire(0, [0, 1])
        bench.acquire(0, [2, 0])
        version = bench.cache.layers[0].residents.version
        bench.reader.script, bench.reader.forever = ["scribble"], "raise"
        with pytest.raises(ReadError):
            bench.acquire(0, [5, 6])
        residents = bench.cache.layers[0].residents
        assert set(residents.experts) == {0}  # 1 and 2 were to leave
        assert residents.version > version  # a mask of residents must not be reused
        bench.check_bytes()

        bench.reader.forever = None
        bench.acquire(0, [1, 2])
        assert set(residents.experts) == {0, 1, 2}
        bench.check_bytes()

    @pytest.mark.parametrize("second", ["ok", "scribble"])
    def test_interrupted_by_ctrl_c_is_undone_and_pressing_it_twice_leaves_no_wrong_bytes(
        self, make_bench: MakeBench, second: str
    ) -> None:
        bench = make_bench(3)
        for needed in ([0, 1], [2, 0]):
            bench.acquire(0, needed)
        before = bench.state(0)
        bench.reader.interruption = KeyboardInterrupt
        bench.reader.script = ["scribble", second]
        with pytest.raises(KeyboardInterrupt):
            bench.acquire(0, [5, 6])
        bench.check_bytes()
        assert second == "scribble" or bench.state(0) == before

    def test_while_growing_to_all_experts_keeps_the_model_right(self, make_bench: MakeBench) -> None:
        bench = make_bench(3)
        bench.acquire(0, [6, 7])
        bench.reader.script = ["scribble"]
        with pytest.raises(ReadError):
            bench.cache.resize(slots=EXPERTS)
        layer = bench.cache.layers[0]
        assert not layer.residents.is_complete
        bench.check_bytes()
        for needed in ([5, 0], [4, 1], [3, 2]):  # experts come one by one, in any order
            bench.acquire(0, needed)
        assert layer.residents.is_complete
        assert [layer.residents.slot_of(e) for e in range(EXPERTS)] == list(range(EXPERTS))
        bench.check_bytes()

    def test_while_growing_to_all_experts_is_made_good_by_the_next_resize(self, make_bench: MakeBench) -> None:
        bench = make_bench(3)
        bench.reader.script = ["raise"]
        with pytest.raises(ReadError):
            bench.cache.resize(slots=EXPERTS)
        bench.cache.resize(slots=EXPERTS)
        assert not bench.cache.has_host_reads
        bench.check_bytes()


class TestAFailedReadUnderAModel:
    @pytest.mark.parametrize("failing", range(0, 20, 2))
    def test_the_repeated_forward_pass_gives_stock_logits(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, failing: int
    ) -> None:
        """One read of a prefill in waves or of a decode step fails; everything is tried again with a new KV cache."""
        path = shelf.checkpoint("mixtral")
        tokens, lengths = random_tokens(1, 20, seed=12), [14] + [1] * 6
        model = OpenedModel(path).load(MemoryOptions(slots=3), CacheOptions(routing="original"))

        def fail_once(n: int, requests: Sequence[ReadRequest]) -> None:
            if n == failing + 1:
                scribble(requests[:3])
                raise ReadError("made up")

        with monkeypatch.context() as patch, pytest.raises(ReadError):
            after_each_read(patch, fail_once)
            run_model(model, tokens, lengths)
        assert same_bits(run_model(model, tokens, lengths), run_model(shelf.stock(path), tokens, lengths))


requests = st.lists(
    st.one_of(
        st.tuples(st.just("acquire"), st.integers(0, LAYERS - 1), st.permutations(range(EXPERTS))),
        st.tuples(st.just("resize"), st.integers(K, EXPERTS), st.integers(K, EXPERTS)),
        st.tuples(st.just("reset"), st.none(), st.none()),
        st.tuples(st.just("fail"), st.sampled_from(["raise", "scribble"]), st.integers(1, 3)),
    ),
    max_size=25,
)


class TestBytesInSlots:
    @given(happened=requests, eviction=st.sampled_from(["lru", "lfu"]))
    def test_are_the_checkpoints_after_any_sequence_of_requests_resizes_and_failures(
        self, tmp_path_factory: pytest.TempPathFactory, happened: list[tuple[str, Any, Any]], eviction: str
    ) -> None:
        bench = Bench(tmp_path_factory.mktemp("bench"), 3, eviction)
        for what, a, b in happened:
            try:
                if what == "acquire":
                    bench.acquire(a, b[:K])
                elif what == "resize":
                    bench.cache.resize(slots=[a, b])
                elif what == "reset":
                    bench.cache.reset()
                else:
                    bench.reader.script = [a] * b
            except ReadError:
                pass
            bench.check_bytes()
        bench.cache.close()


class TestResize:
    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({}, UsageError, "either slots or memory"),
            ({"slots": 3, "memory": "1GB"}, UsageError, "either slots or memory"),
            ({"memory": "1GB"}, UsageError, "without a memory plan"),
            ({"slots": [3]}, UsageError, "1 slot counts for 2 MoE layers"),
            ({"slots": 1}, BudgetError, "1 slots are too few for layers.0: each token uses 2 experts"),
            ({"slots": [4, 1]}, BudgetError, "1 slots are too few for layers.1"),
            ({"slots": 0}, BudgetError, "too few"),
            ({"slots": -3}, BudgetError, "too few"),
        ],
    )
    def test_what_is_refused_changes_nothing(
        self, make_bench: MakeBench, arguments: dict[str, Any], error: type[Exception], said: str
    ) -> None:
        bench = make_bench(3)
        bench.acquire(0, [1, 2])
        before = bench.state(0), bench.cache.slots_per_layer
        with pytest.raises(error) as raised:
            bench.cache.resize(**arguments)
        assert said in str(raised.value) and "\n" not in str(raised.value)
        assert (bench.state(0), bench.cache.slots_per_layer) == before

    def test_numbers_above_the_experts_mean_all_of_them(self, make_bench: MakeBench) -> None:
        bench = make_bench(3)
        bench.cache.resize(slots=1000)
        assert bench.cache.slots_per_layer == [EXPERTS, EXPERTS]
        assert not bench.cache.has_host_reads
        bench.check_bytes()

    def test_bytes_follow_the_slots(self, make_bench: MakeBench) -> None:
        bench = make_bench(3)
        per_expert = sum(c.nbytes for c in COMPONENTS)
        assert bench.cache.nbytes == 2 * 3 * per_expert
        bench.cache.resize(slots=[5, 2])
        assert bench.cache.nbytes == 7 * per_expert

    def test_filling_a_layer_is_nobodys_miss(self, make_bench: MakeBench) -> None:
        bench = make_bench(3)
        bench.cache.resize(slots=EXPERTS)
        assert bench.cache.stats == CacheStats()
        assert bench.reader.bytes_read > 0

    def test_of_a_loaded_model_by_memory_keeps_its_promise(self, shelf: Shelf) -> None:
        model = OpenedModel(shelf.checkpoint("mixtral")).load(
            MemoryOptions(slots=2, max_context=64), CacheOptions(routing="original")
        )
        plan, cache = model.memory_plan, model.expert_cache
        per_slot = sum(x.bytes_per_expert for x in cache.layers)
        fixed = plan.total - plan.slots
        cache.resize(memory=fixed + 5 * per_slot + 10)
        assert cache.slots_per_layer == [5, 5, 5]
        with pytest.raises(BudgetError, match="smallest that works"):
            cache.resize(memory=fixed + per_slot)
        assert cache.slots_per_layer == [5, 5, 5]


class TestClose:
    def test_what_is_resident_stays_and_the_rest_is_a_read_error(self, make_bench: MakeBench) -> None:
        bench = make_bench(3)
        bench.acquire(0, [1, 2])
        bench.acquire(0, [3, 1])
        before = bench.state(0)
        bench.cache.close()
        bench.acquire(0, [1, 2])
        with pytest.raises(ReadError) as error:
            bench.acquire(0, [5, 6])
        assert "closed" in str(error.value) and "\n" not in str(error.value)
        assert bench.state(0)[0] == before[0]
        bench.check_bytes()
        bench.cache.close()  # again does nothing

    def test_a_closed_cache_can_still_shrink(self, make_bench: MakeBench) -> None:
        bench = make_bench(4)
        for needed in ([1, 2], [3, 4]):
            bench.acquire(0, needed)
        bench.cache.close()
        bench.cache.resize(slots=2)
        assert set(bench.cache.layers[0].residents.experts) == {3, 4}
        bench.check_bytes()

    def test_a_model_whose_cache_is_closed_raises_read_error_at_the_next_miss(self, shelf: Shelf) -> None:
        model = OpenedModel(shelf.checkpoint("mixtral")).load(MemoryOptions(slots=2), CacheOptions())
        model.expert_cache.close()
        with pytest.raises(ReadError):
            run_model(model, random_tokens(1, 4), [4])


class TestPhases:
    def test_stated_phases_nest_and_end_also_by_an_error(self, make_bench: MakeBench) -> None:
        cache = make_bench(3).cache
        assert [cache.phase_of(n) for n in (1, 2)] == ["decode", "prefill"]
        with cache.phase("prefill"):
            with pytest.raises(RuntimeError), cache.phase("decode"):
                assert [cache.phase_of(n) for n in (1, 2)] == ["decode", "decode"]
                raise RuntimeError
            assert [cache.phase_of(n) for n in (1, 2)] == ["prefill", "prefill"]
        assert [cache.phase_of(n) for n in (1, 2)] == ["decode", "prefill"]

    def test_only_one_row_at_decode_is_biased(self, make_bench: MakeBench) -> None:
        cache = make_bench(3).cache
        assert not cache.is_biased(1)  # original routing
        cache.strategy = CachePrior()
        assert cache.is_biased(1) and not cache.is_biased(2)
        with cache.phase("decode"):
            assert cache.is_biased(1) and not cache.is_biased(2)
        with cache.phase("prefill"):
            assert not cache.is_biased(1)


class TestStatistics:
    def test_of_a_model_add_up(self, shelf: Shelf) -> None:
        model = OpenedModel(shelf.checkpoint("olmoe")).load(
            MemoryOptions(slots=6), CacheOptions(routing=CachePrior(0.5, 2))
        )
        cache = model.expert_cache
        run_model(model, random_tokens(1, 30), [20] + [1] * 10)
        per_token = 4 * len(cache.layers)
        for phase, count in ((cache.stats.prefill, 20), (cache.stats.decode, 10)):
            assert phase.selections == count * per_token == phase.hits + phase.misses
            assert phase.bytes_read == phase.loads * cache.layers[0].bytes_per_expert
            assert phase.hit_rate == phase.hits / phase.selections
        assert cache.stats.decode.loads == cache.stats.decode.misses
        assert cache.stats.prefill.loads <= 16 * len(cache.layers)  # each expert once per chunk
        assert cache.stats.prefill.hits == 0  # judged before anything was loaded
        assert cache.reader.bytes_read == cache.stats.prefill.bytes_read + cache.stats.decode.bytes_read
        assert cache.stats.decode.swapped_share == cache.stats.decode.swapped / (10 * per_token) > 0

        before = cache.stats.copy()
        run_model(model, random_tokens(1, 3, seed=1), [1] * 3)
        assert (cache.stats - before).decode.selections == 3 * per_token
        assert (cache.stats - before).prefill == PhaseStats()
        cache.reset()
        assert cache.stats == CacheStats() and before != CacheStats()

    def test_without_selections_there_is_no_hit_rate(self) -> None:
        assert PhaseStats().hit_rate is None
        assert PhaseStats().swapped_share == 0.0

    def test_subtraction_is_by_field(self) -> None:
        a = PhaseStats(selections=9, hits=5, misses=4, loads=3, bytes_read=70, read_seconds=0.5, swapped=2)
        b = PhaseStats(selections=4, hits=3, misses=1, loads=1, bytes_read=20, read_seconds=0.25, swapped=1)
        assert a - b == PhaseStats(5, 2, 3, 2, 50, 0.25, 1)
        assert CacheStats(a, b) - CacheStats(b, b) == CacheStats(a - b, PhaseStats())
        assert CacheStats(a, b).swapped == 3
