"""The recurrence of one layer: against a plain model of it, step by step and at once, in both accountings, and live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Shelf, experts_per_token, random_tokens, run_model, tiny_config

from mlx_moecache.errors import UsageError
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.moe_block import MoeBlock
from mlx_moecache.routing import (
    BoundedRegret,
    CachePrior,
    CumulativeThreshold,
    MassBudget,
    MaxRank,
    Original,
    Price,
    Pruning,
    RunningRange,
    Strategy,
)
from mlx_moecache.study import strategies_numpy
from mlx_moecache.study.recurrence import Counts, LayerRecurrence, over_layers

E, K = 10, 3
Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]
STRATEGIES: list[Strategy] = [
    *(Original(), CachePrior(0.3, 1), Price(0.1, 1), MassBudget(0.1, 1), BoundedRegret(2, 0.1)),
    *(MaxRank(1, 6), CumulativeThreshold(1, 0.8), Pruning(2)),
]
any_strategy = st.sampled_from(STRATEGIES)
slot_counts = st.integers(K, E)


@dataclass(frozen=True)
class Text:
    """Scores of T tokens with some locality: z, p [T, E], the router's own selections [T, K]."""

    z: Array
    p: Array
    own: Ids


@st.composite
def texts(draw: st.DrawFn, most: int = 24) -> Text:
    T = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = (rng.standard_normal(E) * 2 + rng.standard_normal((T, E)) * 2).astype(np.float32)
    for t in range(T):
        out = rng.permutation(E)[: draw(st.sampled_from([0, 0, 2, E - K]))]
        z[t, out] = -np.inf
    e = np.exp(z - z.max(axis=1, keepdims=True))
    own = np.argsort(-z, axis=1)[:, :K]
    return Text(z, (e / e.sum(axis=1, keepdims=True)).astype(np.float32), rng.permuted(own, axis=1))


@dataclass
class PlainLayer:
    """The same recurrence, written from its description with lists: engine accounting, LRU."""

    slots: int
    strategy: Strategy
    recent: list[int] = field(default_factory=list)  # residents, the least recently used first
    ranges: list[np.float32] = field(default_factory=list)
    born: dict[int, int] = field(default_factory=dict)
    lives: list[int] = field(default_factory=list)

    def step(self, z: Array, p: Array, own: Sequence[int], biased: bool) -> tuple[set[int], int]:
        """The experts that run and how many of them are missing."""
        finite = z[z > -np.inf]
        self.ranges.append(finite.max() - finite.min())
        mean = np.float32(0)
        for x in self.ranges:
            mean = mean + x
        mean = mean / np.float32(len(self.ranges))
        chosen = set(own)
        if biased and self.slots < E:
            resident = np.array([e in self.recent for e in range(E)], dtype=np.float32)
            chosen = set(strategies_numpy.select(self.strategy, z, p, resident, mean, K).tolist())
        elif biased and isinstance(self.strategy, Pruning):
            chosen = set(sorted(own, key=lambda e: -z[e])[: self.strategy.kept(K)])
        missing = chosen - set(self.recent)
        victims = [e for e in self.recent if e not in chosen][: max(0, len(self.recent) + len(missing) - self.slots)]
        now = len(self.ranges)
        self.lives += [now - self.born.pop(e) for e in victims]
        self.born |= dict.fromkeys(missing, now)
        self.recent = [e for e in self.recent if e not in victims and e not in chosen]
        self.recent += sorted(chosen, key=lambda e: -z[e])
        return chosen, len(missing)


class TestAgainstAPlainModel:
    @given(texts(), any_strategy, slot_counts, st.integers(0, 8))
    def test_selections_contents_and_counts_are_the_same(
        self, text: Text, strategy: Strategy, slots: int, biased_from: int
    ) -> None:
        layer, plain, expected = LayerRecurrence(E, K, slots, strategy), PlainLayer(slots, strategy), Counts()
        for t, (z, p, own) in enumerate(zip(text.z, text.p, text.own.tolist(), strict=True)):
            ids = layer.step(z, p, own, biased=t >= biased_from).tolist()
            chosen, missing = plain.step(z, p, own, t >= biased_from)
            assert set(ids) == chosen and len(ids) == len(chosen)
            assert layer.residents.eviction_order() == plain.recent
            lost = float(p[own].sum() - p[list(chosen)].sum()) if chosen != set(own) else 0.0
            expected += Counts(
                *(1, 1, len(chosen), missing, missing, len(chosen - set(own)), int(missing == 0), int(missing > 0)),
                mass_lost=lost,
            )
        expected.lives, expected.life_tokens = len(plain.lives), sum(plain.lives)
        assert replace(layer.counts, mass_lost=0) == replace(expected, mass_lost=0)
        assert layer.counts.mass_lost == pytest.approx(expected.mass_lost, abs=1e-5)

    def test_the_best_expert_of_a_token_is_its_oldest(self) -> None:
        layer = LayerRecurrence(4, 2, 2, Original())
        layer.step(np.array([1, 9, 5, 0], dtype=np.float32), None, [2, 1])
        assert layer.residents.eviction_order() == [1, 2]
        layer.step(np.array([3, 3, 0, 0], dtype=np.float32), None, [1, 0])
        assert layer.residents.eviction_order() == [0, 1]  # equal scores: the lower number first


class TestAtOnceOrStepByStep:
    @given(texts(), any_strategy, slot_counts, st.integers(0, 30), st.data())
    def test_any_split_gives_the_same(
        self, text: Text, strategy: Strategy, slots: int, biased_from: int, data: st.DataObject
    ) -> None:
        whole, split, T = LayerRecurrence(E, K, slots, strategy), LayerRecurrence(E, K, slots, strategy), len(text.z)
        trace = whole.run(text.z, text.p, text.own, biased_from=biased_from)
        t = 0
        while t < T:
            n = data.draw(st.integers(1, T - t))
            part = split.run(
                text.z[t : t + n], text.p[t : t + n], text.own[t : t + n], biased_from=max(0, biased_from - t)
            )
            width = min(part.ids.shape[1], trace.ids.shape[1])
            np.testing.assert_array_equal(part.ids[:, :width], trace.ids[t : t + n, :width])
            np.testing.assert_array_equal(part.residents, trace.residents[t : t + n])
            np.testing.assert_array_equal(part.mean_range, trace.mean_range[t : t + n])
            t += n
        assert split.counts == whole.counts
        single = LayerRecurrence(E, K, slots, strategy)
        for t in range(T):
            ids = single.step(text.z[t], text.p[t], text.own[t], biased=t >= biased_from)
            np.testing.assert_array_equal(ids, trace.ids[t][trace.ids[t] >= 0])
            assert single.mean_range == trace.mean_range[t]
        assert single.counts == whole.counts

    @given(texts(), any_strategy, slot_counts)
    def test_the_trace_explains_the_counts(self, text: Text, strategy: Strategy, slots: int) -> None:
        layer = LayerRecurrence(E, K, slots, strategy)
        trace, c = layer.run(text.z, text.p, text.own), layer.counts
        hit = np.take_along_axis(trace.residents, trace.ids, axis=1)
        assert trace.ids.shape == (len(text.z), strategy.kept(K))
        assert (c.selections, c.misses, c.loads) == (hit.size, (~hit).sum(), (~hit).sum())
        assert c.all_hit == hit.all(axis=1).sum()
        assert c.swapped == sum(
            len(set(a) - set(b)) for a, b in zip(trace.ids.tolist(), text.own.tolist(), strict=True)
        )
        assert c.loads - c.lives == len(layer.residents) <= slots
        assert not trace.residents[0].any()

    @given(texts(), st.integers(0, 24))
    def test_what_is_not_biased_is_the_routers_own_in_its_order(self, text: Text, biased_from: int) -> None:
        for strategy in (CachePrior(5.0, 0), Pruning(1)):
            trace = LayerRecurrence(E, K, K, strategy).run(text.z, text.p, text.own, biased_from=biased_from)
            if biased_from:
                np.testing.assert_array_equal(trace.ids[:biased_from], text.own[:biased_from])
            if isinstance(strategy, Pruning):
                assert ((trace.ids >= 0).sum(axis=1)[biased_from:] == 1).all()

    @given(texts(), st.sampled_from(["lru", "lfu"]), slot_counts)
    def test_weakest_settings_are_original_routing(self, text: Text, eviction: str, slots: int) -> None:
        original = LayerRecurrence(E, K, slots, Original(), eviction=eviction)
        expected = original.run(text.z, None, text.own)
        for s in (CachePrior(0, 1), Price(0, 1), MassBudget(0, 1), BoundedRegret(0, 1.0), MaxRank(1, K), Pruning(K)):
            layer = LayerRecurrence(E, K, slots, s, eviction=eviction)
            np.testing.assert_array_equal(layer.run(text.z, text.p, text.own).ids, expected.ids)
            assert layer.counts == original.counts

    @given(texts(), any_strategy)
    def test_a_slot_for_every_expert_leaves_routing_alone(self, text: Text, strategy: Strategy) -> None:
        layer = LayerRecurrence(E, K, E, strategy)
        layer.run(text.z, text.p, text.own)
        assert layer.counts.swapped == 0
        assert layer.counts.misses <= E  # each is loaded once


class TestAccounting:
    @given(texts(), any_strategy, slot_counts)
    def test_engine_and_paper_agree_in_counts_and_contents(self, text: Text, strategy: Strategy, slots: int) -> None:
        styles: tuple[str, ...] = ("engine", "paper")
        a, b = (LayerRecurrence(E, K, slots, strategy, accounting=s) for s in styles)
        for z, p, own in zip(text.z, text.p, text.own, strict=True):
            np.testing.assert_array_equal(a.step(z, p, own), b.step(z, p, own))
            assert a.residents.eviction_order() == b.residents.eviction_order()
        assert a.counts == b.counts

    def test_paper_evicts_a_hit_of_the_same_token_without_counting_it_again(self) -> None:
        layer = LayerRecurrence(4, 2, 2, Original(), accounting="paper")
        layer.step(np.array([9, 5, 0, 0], dtype=np.float32), None, [0, 1])
        layer.step(np.array([5, 0, 9, 0], dtype=np.float32), None, [0, 2])  # loading 2 evicts 0, which is needed
        assert set(layer.residents.experts) == {0, 2}
        assert (layer.counts.misses, layer.counts.loads, layer.counts.lives) == (3, 3, 1)

    def test_lives_are_those_completed_in_tokens(self) -> None:
        layer = LayerRecurrence(4, 1, 2, Original())
        for e in (0, 1, 0, 2, 3):  # 1 lives from token 2 to 4, 0 from 1 to 5
            layer.step(np.eye(4, dtype=np.float32)[e], None, [e])
        assert (layer.counts.lives, layer.counts.life_tokens) == (2, 2 + 4)

    def test_counts_add_up_over_time_and_over_layers(self) -> None:
        a, b = Counts(tokens=2, token_layers=2, misses=3, mass_lost=0.5), Counts(tokens=2, token_layers=2, misses=4)
        total = over_layers([a, b])
        assert total == Counts(tokens=2, token_layers=4, misses=7, mass_lost=0.5)
        total += total
        assert (total.tokens, total.misses, a.misses) == (4, 14, 3)


class TestBetweenSequences:
    @given(texts(), st.permutations(range(E)), st.integers(0, K))
    def test_reset_replaces_the_contents_and_keeps_range_and_counts(self, text: Text, order: list[int], n: int) -> None:
        layer = LayerRecurrence(E, K, K, CachePrior(0.2, 1))
        layer.run(text.z, text.p, text.own)
        mean, counts = layer.mean_range, replace(layer.counts)
        layer.reset_cache(order[:n])
        assert layer.residents.eviction_order() == order[:n]
        assert layer.mean_range == mean and layer.counts == counts
        trace = layer.run(text.z, text.p, text.own)
        assert np.flatnonzero(trace.residents[0]).tolist() == sorted(order[:n])
        assert layer.counts.tokens == 2 * len(text.z)

    def test_counts_may_be_taken_without_stopping_the_clock_of_lives(self) -> None:
        layer = LayerRecurrence(3, 1, 1, Original())
        for e in (0, 0, 0, 1):
            layer.counts = Counts()
            layer.step(np.eye(3, dtype=np.float32)[e], None, [e])
        assert (layer.counts.lives, layer.counts.life_tokens) == (1, 3)

    @pytest.mark.parametrize("experts", [[0, 0], [E], [-1], list(range(K + 1))])
    def test_impossible_contents_are_refused(self, experts: list[int]) -> None:
        layer = LayerRecurrence(E, K, K, Original())
        with pytest.raises(UsageError):
            layer.reset_cache(experts)

    @pytest.mark.parametrize("slots", [0, K - 1, E + 1])
    def test_impossible_slots_are_refused(self, slots: int) -> None:
        with pytest.raises(UsageError, match=f"slots must be from {K}.* to all {E}, not {slots}"):
            LayerRecurrence(E, K, slots, Original())

    def test_unknown_accounting_and_eviction_are_refused(self) -> None:
        with pytest.raises(UsageError, match="choose engine, paper"):
            LayerRecurrence(E, K, K, Original(), accounting="author")
        with pytest.raises(UsageError, match="fifo"):
            LayerRecurrence(E, K, K, Original(), eviction="fifo")


class TestMeanRange:
    @given(texts())
    def test_it_is_bit_equal_to_the_one_on_the_device(self, text: Text) -> None:
        running = RunningRange()
        trace = LayerRecurrence(E, K, K, Original()).run(text.z, text.p, text.own)
        for z, mean in zip(text.z, trace.mean_range, strict=True):
            assert np.array(running.observe(mx.array(z[None]))) == mean


class TestAgainstTheLiveCache:
    """The engine decodes; its scores then go through the recurrence, which must select, miss and evict the same."""

    @pytest.mark.parametrize("eviction", ["lru", "lfu"])
    @pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
    @pytest.mark.parametrize("model_type", ["qwen2_moe", "phimoe"])
    def test_event_for_event(self, shelf: Shelf, model_type: str, strategy: Strategy, eviction: str) -> None:
        k = experts_per_token(tiny_config(model_type))
        strategy = Pruning(1) if isinstance(strategy, Pruning) else strategy
        opened = OpenedModel(shelf.checkpoint(model_type))
        model = opened.load(MemoryOptions(slots=k + 1), CacheOptions(routing=strategy, eviction=eviction))
        seen: dict[str, list[tuple[Array, Ids]]] = {b.path: [] for b in opened.blocks}

        def listen(block: MoeBlock) -> None:
            assert block.seam is not None
            inner = block._run
            take, scores = block.seam.take, []

            def overheard() -> object:
                observation = take()
                assert observation is not None
                scores.append(observation.scores)
                return observation

            def run(x: mx.array, indices: mx.array) -> mx.array:
                y = inner(x, indices)
                seen[block.path].append((np.array(scores[-1])[0], np.array(indices).reshape(-1).astype(np.intp)))
                return y

            block.seam.take = overheard  # type: ignore[method-assign]
            block._run = run

        for b in opened.blocks:
            listen(b)
        run_model(model, random_tokens(1, 40, seed=3), [1] * 40)
        counts = []
        for b in opened.blocks:
            layer = LayerRecurrence(b.num_experts, k, k + 1, strategy, eviction=eviction)
            for z, ids in seen[b.path]:
                p = np.array(mx.softmax(mx.array(z), precise=True))
                own = np.argsort(-z, kind="stable")[:k]
                assert set(layer.step(z, p, own).tolist()) == set(ids.tolist())
            assert layer.residents.eviction_order() == b.layer.residents.eviction_order()
            counts.append(layer.counts)
        total, live = over_layers(counts), model.expert_cache.stats.decode
        assert (total.selections, total.misses, total.loads) == (live.selections, live.misses, live.loads)
        assert total.swapped == live.swapped
        assert total.tokens == 40 and total.misses > 0
        assert (total.swapped > 0) == strategy.uses_residents
