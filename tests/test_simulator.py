"""Simulated caches: the live cache, event for event; bounds, strategies, chunks, initial contents, shared pools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_traces import E, K, header, scored, scores, shared, top, traced
from tiny_models import Shelf, random_tokens, run_model

from mlx_moecache.errors import UsageError
from mlx_moecache.eviction import EVICTION
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.layer_experts import LayerExperts
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.observer import RoutedCall
from mlx_moecache.residents import Load
from mlx_moecache.routing import CachePrior, Original
from mlx_moecache.study.recurrence import Counts, LayerRecurrence
from mlx_moecache.study.shared_pool import SHARED_POLICIES, replay_shared
from mlx_moecache.study.simulation import Device, Result, Setting, settings, simulate
from mlx_moecache.study.simulator import PhaseCounts, calls_of, replay_bound, replay_layer, replay_strategy, starts_of
from mlx_moecache.study.trace import Trace, TraceWriter, describe_run, read_trace
from mlx_moecache.study.trace_format import TracedLayer, TraceHeader
from mlx_moecache.uses import uses_of

Event = tuple[list[int], list[Load]]


class Recorder:
    """An observer of a live model that remembers, per layer and call, what was missing and what was loaded."""

    def __init__(self, cache: ExpertCache, patch: pytest.MonkeyPatch) -> None:
        self.layers, self.events = cache.layers, list[list[Event]]([] for _ in cache.layers)
        publish = ExpertCache._publish

        def publish_and_remember(self_: ExpertCache, layer: LayerExperts, loads: Sequence[Load], stats: Any) -> None:
            self.events[self.layers.index(layer)][-1][1].extend(loads)
            publish(self_, layer, loads, stats)

        patch.setattr(ExpertCache, "_publish", publish_and_remember)

    def observe(self, call: RoutedCall) -> None:
        resident = self.layers[call.layer].residents
        self.events[call.layer].append(([e for e in np.unique(call.used).tolist() if e not in resident], []))


@pytest.mark.parametrize("slots", [4, 5, 9, 15])
@pytest.mark.parametrize("eviction", [*EVICTION, "decay:0.6"])
def test_every_hit_miss_and_eviction_is_that_of_the_live_cache(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eviction: str, slots: int
) -> None:
    folder = shelf.checkpoint("qwen2_moe")
    model = OpenedModel(folder).load(MemoryOptions(slots=slots), CacheOptions(routing="original", eviction=eviction))
    cache: ExpertCache = model.expert_cache
    lengths = (9, *[1] * 10, 5, *[1] * 5)
    with TraceWriter(tmp_path / "t", describe_run(folder, "tiny", cache)) as writer, monkeypatch.context() as patch:
        live = Recorder(cache, patch)
        with cache.observed_by(writer, live):
            for seed in range(2):
                writer.begin_sequence(cold=seed == 0)
                run_model(model, random_tokens(1, sum(lengths), seed), lengths)
    total = PhaseCounts()
    trace = read_trace(tmp_path / "t")
    assert trace.is_original and [x.shape.slots for x in trace.layers] == [slots] * len(cache.layers)
    for layer, events in zip(trace.layers, live.events, strict=True):
        replayed: list[Event] = []

        def watch(call: int, missing: Sequence[int], loads: Sequence[Load], into: list[Event] = replayed) -> None:
            assert call == len(into)
            into.append((sorted(missing), list(loads)))

        counts = replay_layer(layer, slots, eviction, starts_of(layer, slots, "empty"), watch=watch)
        assert replayed == [(sorted(missing), loads) for missing, loads in events]
        assert any(x.victim is not None for _, loads in replayed for x in loads)
        total.prefill += counts.prefill
        total.decode += counts.decode
    for simulated, counted in ((total.prefill, cache.stats.prefill), (total.decode, cache.stats.decode)):
        assert (simulated.selections, simulated.misses, simulated.loads) == (
            counted.selections,
            counted.misses,
            counted.loads,
        )
        assert simulated.loads * cache.layers[0].bytes_per_expert == counted.bytes_read


# ---- caches of one layer ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


rows = st.lists(st.permutations(range(E)).map(lambda p: list(p[:K])), min_size=1, max_size=30)


class TestAnyPolicy:
    @given(rows, st.integers(K, E), st.sampled_from(list(EVICTION)))
    def test_needs_at_least_what_the_bound_needs_and_that_at_least_what_was_never_there(
        self, folder: Path, selected: list[list[int]], slots: int, eviction: str
    ) -> None:
        layer = traced(folder, selected)
        starts = starts_of(layer, slots, "empty")
        found = replay_layer(layer, slots, eviction, starts).decode
        bound, paper = (replay_bound(layer, slots, b, starts).decode for b in ("belady", "belady-paper"))
        assert len({e for row in selected for e in row}) <= paper.misses <= bound.misses <= found.misses
        assert found.loads == found.misses and found.selections == K * len(selected)
        assert (found.tokens, found.token_layers) == (len(selected), len(selected))

    @given(rows, st.integers(K, E), st.sampled_from(list(EVICTION)))
    def test_counts_as_the_recurrence_of_original_routing_does(
        self, folder: Path, selected: list[list[int]], slots: int, eviction: str
    ) -> None:
        layer = traced(folder, selected)
        recurrence = LayerRecurrence(E, K, slots, Original(), eviction=eviction)
        for row in selected:
            z = np.zeros(E, dtype=np.float32)
            z[row] = range(K, 0, -1)
            recurrence.step(z, None, row)
        assert replay_layer(layer, slots, eviction, starts_of(layer, slots, "empty")).decode == recurrence.counts

    @given(rows)
    def test_lru_with_more_slots_never_misses_more(self, folder: Path, selected: list[list[int]]) -> None:
        layer = traced(folder, selected)
        misses = [replay_layer(layer, s, "lru", starts_of(layer, s, "empty")).decode.misses for s in range(K, E + 1)]
        assert misses == sorted(misses, reverse=True)

    def test_lives_end_by_eviction_and_are_counted_in_tokens(self, folder: Path) -> None:
        layer = traced(folder, [[0, 1, 2], [0, 1, 3], [0, 1, 4], [2, 3, 4]])
        counts = replay_layer(layer, 3, "lru", {0: []}).decode
        # 2 lives for one token, 3 for one; then 2 and 3 come back for 0 and 1, who were there for three
        assert (counts.lives, counts.life_tokens) == (4, 1 + 1 + 3 + 3)
        assert (counts.misses, counts.all_hit) == (7, 0)


class TestInitialContents:
    def test_are_given_wherever_the_recorded_cache_was_empty(self, folder: Path) -> None:
        layer = traced(folder, [[0, 1, 2], [0, 1, 2], [5, 6, 7], [5, 6, 9]], sequences=(2,))
        assert starts_of(layer, 4, "empty") == {0: [], 2: []}
        counts = replay_layer(layer, 4, "lru", {0: [0, 1, 2], 2: [5, 6, 7]}).decode
        assert (counts.misses, counts.all_hit) == (1, 3)
        bound = replay_bound(layer, 4, "belady", {0: [0, 1, 2], 2: [5, 6, 7]}).decode
        assert bound.misses == 1

    def test_warm_are_the_most_used_and_the_best_of_them_leaves_last(self, folder: Path) -> None:
        layer = traced(folder, [[0, 1, 2], [0, 1, 3], [0, 4, 5]])
        assert starts_of(layer, 2, "warm") == {0: [1, 0]}

    def test_random_differ_by_seed_and_by_start_and_hold_those_of_fewer_slots(self, folder: Path) -> None:
        layer = traced(folder, [[0, 1, 2]] * 4, sequences=(2,))
        six, again, other = (starts_of(layer, 6, "random", seed=s) for s in (1, 1, 2))
        assert six == again != other and six[0] != six[2]
        assert all(len(set(x)) == 6 and set(x) <= set(range(E)) for x in six.values())
        assert starts_of(layer, 4, "random", seed=1) == {call: x[:4] for call, x in six.items()}

    def test_beyond_the_experts_of_a_layer_are_all_of_them(self, folder: Path) -> None:
        layer = traced(folder, [[0, 1, 2]])
        assert sorted(starts_of(layer, 99, "random")[0]) == list(range(E))
        assert replay_layer(layer, 99, "lru", starts_of(layer, 99, "random")).decode.misses == 0


class TestChunks:
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(K, E), st.sampled_from(list(EVICTION)))
    def test_load_each_expert_once_and_count_every_selection(
        self, folder: Path, lengths: list[int], slots: int, eviction: str
    ) -> None:
        path = folder / "chunks.trace"
        path.unlink(missing_ok=True)
        with TraceWriter(path, header(1)) as writer:
            for i, n in enumerate(lengths):
                z = scores(n, i)
                writer.record(0, "prefill" if n > 1 else "decode", z, top(z), top(z))
        (layer,) = read_trace(path).layers
        there, calls = set[int](), list(calls_of(layer))
        expected = {True: 0, False: 0}

        def watch(call: int, missing: Sequence[int], loads: Sequence[Load]) -> None:
            selected = layer.own[layer.calls[call] : layer.calls[call + 1]].ravel().tolist()
            by_last_use = [e for i, e in enumerate(selected) if e not in selected[i + 1 :]]
            assert calls[call].needed == sorted(by_last_use, key=selected.count)  # those selected most often last
            assert set(missing) == set(selected) - there
            assert sorted(x.expert for x in loads) == sorted(missing)
            expected[calls[call].decode] += sum(e not in there for e in selected)
            for x in loads:
                if x.victim is not None:
                    there.remove(x.victim)
                there.add(x.expert)
            assert len(there) <= slots

        counts = replay_layer(layer, slots, eviction, {0: []}, watch=watch)
        assert {True: counts.decode.misses, False: counts.prefill.misses} == expected
        bound = replay_bound(layer, slots, "belady", {0: []})
        assert bound.prefill.loads + bound.decode.loads <= counts.prefill.loads + counts.decode.loads


# ---- strategies ----


class TestStrategies:
    def test_are_replayed_by_the_recurrence_on_decode_tokens_only(self, folder: Path) -> None:
        trace, strategy = scored(folder, [20, *[1] * 30, 9, *[1] * 5]), CachePrior(0.3, 1)
        for layer in trace.layers:
            counts = replay_strategy(layer, layer.scores(), 5, "lfru", strategy, {0: [1, 2]})
            recurrence = LayerRecurrence(E, K, 5, strategy, eviction="lfru")
            recurrence.reset_cache([1, 2])
            z, p = layer.scores()
            for first, end in zip(layer.calls, layer.calls[1:], strict=False):
                if end - first > 1:
                    recurrence.call(uses_of(layer.own[first:end].tolist()), end - first, z[first:end])
                else:
                    recurrence.step(z[first], p[first], layer.own[first])
            total = Counts()
            total += counts.prefill
            total += counts.decode
            assert total.mass_lost == pytest.approx(recurrence.counts.mass_lost)
            total.mass_lost = recurrence.counts.mass_lost
            assert total == recurrence.counts
            assert (counts.prefill.tokens, counts.decode.tokens) == (29, 35)
            assert counts.prefill.swapped == 0 < counts.decode.swapped

    @pytest.mark.parametrize("slots", [3, 5, 9])
    @pytest.mark.parametrize("eviction", EVICTION)
    def test_one_that_changes_nothing_counts_what_original_routing_counts(
        self, folder: Path, eviction: str, slots: int
    ) -> None:
        """Also the lives, the prompts' chunks (of more experts than slots) and what these leave for decoding."""
        trace = scored(folder, [20, *[1] * 30, 9, *[1] * 5])
        for layer in trace.layers:
            for starts in ({0: []}, {0: [1, 2], 30: [3]}):
                original = replay_layer(layer, slots, eviction, starts)
                for strategy in (Original(), CachePrior(0.0, 1)):
                    assert replay_strategy(layer, layer.scores(), slots, eviction, strategy, starts) == original
                assert original.decode.misses > 0 < original.prefill.misses

    def test_that_prefer_residents_miss_less_and_are_called_approximate(self, folder: Path) -> None:
        trace = scored(folder, [1] * 60)
        chosen = settings(trace, ["original", "cache-prior:strength=0.2,j=1", "cache-prior:strength=0"], ["lru"], [5])
        original, biased, zero = simulate(trace, chosen)
        assert original.is_exact and zero.is_exact and not biased.is_exact
        assert biased.counts.decode.misses < original.counts.decode.misses == zero.counts.decode.misses
        assert biased.counts.decode.swapped > 0 == original.counts.decode.swapped

    def test_a_trace_that_was_recorded_under_one_replays_the_routers_own_selections_approximately(
        self, folder: Path
    ) -> None:
        path = folder / "biased.trace"
        path.unlink(missing_ok=True)
        z = scores(8, 0)
        with TraceWriter(path, header(1, routing="cache-prior:strength=0.1,j=2")) as writer:
            swapped = np.concatenate([top(z)[:, :2], top(z, K + 1)[:, K:]], axis=1)
            writer.record(0, "decode", z, top(z), swapped, steps=True)
        trace = read_trace(path)
        (result,) = simulate(trace, settings(trace, ["original"], ["lru"], [5]))
        assert not result.is_exact
        assert result.counts.decode == replay_layer(traced(folder, top(z)), 5, "lru", {0: []}).decode

    def test_cannot_be_replayed_without_scores(self, folder: Path) -> None:
        layer = traced(folder, [[0, 1, 2]])
        trace = Trace(Path("t"), header(1), (layer,), None)
        with pytest.raises(UsageError, match=r"no router scores .* only original routing can be replayed"):
            simulate(trace, settings(trace, ["cache-prior"], ["lru"], [5]))

    def test_know_experts_that_compute_nothing_and_are_never_loaded(self, folder: Path) -> None:
        path, z = folder / "identity.trace", scores(20, 0, E + 1)
        z[0, E] = 99
        path.unlink(missing_ok=True)
        shape = TracedLayer(E, K, 7, 5, E + 1)
        with TraceWriter(path, TraceHeader("m", "longcat_flash", "", (shape,), "original", "lru")) as writer:
            writer.record(0, "decode", z, top(z), top(z), steps=True)
        trace = read_trace(path)
        original, biased = simulate(trace, settings(trace, ["original", "cache-prior:strength=0.5,j=1"], ["lru"], [5]))
        assert original.counts.decode.selections == (trace.layers[0].own < E).sum() < 20 * K
        assert biased.counts.decode.misses < original.counts.decode.misses


# ---- a pool for all layers ----


class ListPool:
    """(layer, expert) in a list, the least recently used first."""

    def __init__(self, capacity: int, policy: str) -> None:
        self.capacity, self.policy, self.there = capacity, policy, list[tuple[int, int]]()

    def use(self, layer: int, needed: Sequence[int]) -> int:
        keys = [(layer, e) for e in needed]
        misses = sum(key not in self.there for key in keys)
        for key in keys:
            if key in self.there:
                self.there.remove(key)
            elif len(self.there) == self.capacity:
                free = [x for x in self.there if x not in keys]
                passed = [x for x in free if x[0] <= layer]
                ahead = [x for x in free if x[0] == max(y[0] for y in free)]
                self.there.remove((free if self.policy == "lru" else passed or ahead)[0])
            self.there.append(key)
        return misses


class TestSharedPool:
    @pytest.mark.parametrize("policy", SHARED_POLICIES)
    @given(
        selected=st.lists(
            st.lists(st.permutations(range(E)).map(lambda p: list(p[:K])), min_size=3, max_size=3),
            min_size=1,
            max_size=12,
        ),
        capacity=st.integers(K, 20),
    )
    def test_does_as_its_reference(
        self, folder: Path, policy: str, selected: list[list[list[int]]], capacity: int
    ) -> None:
        pool, misses = ListPool(capacity, policy), [0, 0, 0]
        for token in selected:
            for layer, row in enumerate(token):
                misses[layer] += pool.use(layer, row)
        counts = replay_shared(shared(folder, selected), capacity, policy)
        assert [c.decode.misses for c in counts] == misses

    def test_under_lru_never_hits_if_a_pass_does_not_fit_and_least_stale_does(self, folder: Path) -> None:
        layers = shared(folder, [[[0, 1, 2]] * 4] * 20)  # the same experts for every token: a pass needs 12
        misses = {p: sum(c.decode.misses for c in replay_shared(layers, 9, p)) for p in SHARED_POLICIES}
        assert misses["lru"] == 4 * K * 20
        assert misses["least-stale"] < 0.6 * misses["lru"]

    def test_is_empty_at_cold_sequences_and_refuses_what_no_token_fits_in(self, folder: Path) -> None:
        layer = traced(folder, [[0, 1, 2], [0, 1, 2]], sequences=(1,))
        (counts,) = replay_shared([layer], 5, "lru")
        assert counts.decode.misses == 6
        with pytest.raises(UsageError, match="a shared pool of 2 slots is too small: one token of a layer needs 3"):
            replay_shared([layer], 2, "lru")


# ---- results ----


def test_a_chunk_of_a_prompt_waits_once_in_each_layer(folder: Path) -> None:
    for layer in scored(folder, [40, 1, 1]).layers:
        for strategy in (Original(), CachePrior(0.1, 1)):
            counts = replay_strategy(layer, layer.scores(), 5, "lru", strategy, {0: []})
            assert (counts.prefill.waits, counts.prefill.all_hit) == (1, 0)
            assert counts.decode.waits == counts.decode.token_layers - counts.decode.all_hit


def test_time_per_token_is_computing_plus_a_wait_per_reading_layer_plus_the_bytes() -> None:
    counts = PhaseCounts(decode=Counts(10, 20, selections=60, misses=12, loads=12, all_hit=15, waits=5))
    result = Result(Setting(Original(), "lru", 5), True, counts, (0, 12_000))
    m = result.metrics(True, Device(flash=1e6, latency=1e-3, compute=2e-3))
    assert m["ms_per_token"] == pytest.approx(2 + 0.5 + 1.2)
    assert m["tokens_per_second"] == pytest.approx(1000 / 3.7)
    assert (m["miss_rate"], m["loads_per_token"], m["all_hit_share"], m["bytes_per_token"]) == (0.2, 1.2, 0.75, 1200)
    unknown = result.metrics(True, Device())
    assert unknown["ms_per_token"] is unknown["tokens_per_second"] is unknown["expert_lifetime"] is None
    assert result.metrics(False, Device(flash=1e6))["miss_rate"] is None
