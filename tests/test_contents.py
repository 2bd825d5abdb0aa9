"""Taking what a cache holds and having it again, warm starts, and changing the routing while a model runs."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import Shelf, random_tokens

from mlx_moecache.errors import ReadError, UsageError
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.routing import CachePrior

TOKENS = random_tokens(1, 40)
SLOTS = 6  # of 16 experts; each token uses 4


class Runner:
    """A tiny model that decodes a given text token by token."""

    def __init__(self, shelf: Shelf, *, routing: str = "cache-prior:strength=0.5,j=1", eviction: str = "lru") -> None:
        opened = OpenedModel(shelf.checkpoint("olmoe", "4bit"))
        self.model = opened.load(MemoryOptions(slots=SLOTS), CacheOptions(routing=routing, eviction=eviction))
        self.cache: ExpertCache = self.model.expert_cache

    def decode(self, first: int, last: int) -> mx.array:
        """Logits of tokens first to last - 1 as a text of its own, with the expert cache as it is."""
        kv = make_prompt_cache(self.model)
        out = []
        for i in range(first, last):
            out.append(self.model(TOKENS[:, i : i + 1], cache=kv))
            mx.eval(out[-1])
        return mx.concatenate(out, axis=1)


@pytest.fixture
def runner(shelf: Shelf) -> Runner:
    return Runner(shelf)


class TestContents:
    @pytest.mark.parametrize("eviction", ["lru", "lfu", "decay", "lfru"])
    def test_a_restored_cache_goes_on_with_the_same_hits_evictions_and_biased_logits(
        self, shelf: Shelf, eviction: str
    ) -> None:
        runner = Runner(shelf, eviction=eviction)
        runner.decode(0, 12)
        taken = runner.cache.contents()
        before = runner.cache.stats.copy()
        first = runner.decode(12, 30)
        counted = runner.cache.stats - before
        after = runner.cache.contents().experts
        assert counted.decode.evictions > 0 and counted.decode.swapped > 0
        runner.cache.restore(taken)
        assert runner.cache.contents().experts == taken.experts
        before = runner.cache.stats.copy()
        assert mx.array_equal(runner.decode(12, 30), first)
        again = runner.cache.stats - before
        assert (again.decode.hits, again.decode.misses, again.decode.swapped, again.decode.evictions) == (
            counted.decode.hits,
            counted.decode.misses,
            counted.decode.swapped,
            counted.decode.evictions,
        )
        assert runner.cache.contents().experts == after

    def test_what_was_taken_does_not_change_as_the_cache_goes_on(self, runner: Runner) -> None:
        runner.decode(0, 12)
        taken = runner.cache.contents()
        experts = taken.experts
        runner.decode(12, 30)
        assert taken.experts == experts != runner.cache.contents().experts

    def test_an_empty_cache_can_be_had_again(self, runner: Runner) -> None:
        taken = runner.cache.contents()
        runner.decode(0, 12)
        runner.cache.restore(taken)
        assert runner.cache.contents().experts == taken.experts
        assert not any(taken.experts)

    def test_restoring_counts_nothing(self, runner: Runner) -> None:
        runner.decode(0, 12)
        taken = runner.cache.contents()
        runner.decode(12, 30)
        before = runner.cache.stats.copy()
        runner.cache.restore(taken)
        assert runner.cache.stats == before

    def test_contents_of_other_slots_are_refused(self, runner: Runner) -> None:
        taken = runner.cache.contents()
        runner.cache.resize(slots=SLOTS + 1)
        with pytest.raises(UsageError, match="resized"):
            runner.cache.restore(taken)

    def test_a_closed_cache_cannot_be_restored(self, runner: Runner) -> None:
        runner.decode(0, 12)
        taken = runner.cache.contents()
        runner.decode(12, 30)
        runner.cache.close()
        with pytest.raises(ReadError, match="closed"):
            runner.cache.restore(taken)


class TestWarmStart:
    def test_the_experts_given_are_resident_and_leave_in_their_order(self, runner: Runner) -> None:
        layers = len(runner.cache.layers)
        assert runner.cache.warm([[5, 2, 7]] * layers) == 3 * layers
        assert runner.cache.contents().experts == ((5, 2, 7),) * layers
        assert runner.cache.stats.decode.loads == runner.cache.stats.prefill.loads == 0

    def test_of_too_many_the_last_are_taken(self, runner: Runner) -> None:
        layers = len(runner.cache.layers)
        runner.cache.warm([[0, 1, 5, 2, 7, 3, 4, 9]] * layers)
        assert runner.cache.contents().experts == ((5, 2, 7, 3, 4, 9),) * layers

    def test_what_is_there_already_is_not_read_again(self, runner: Runner) -> None:
        layers = len(runner.cache.layers)
        runner.cache.warm([[5, 2]] * layers)
        assert runner.cache.warm([[2, 6]] * layers) == layers

    def test_a_warm_cache_computes_the_same_with_more_hits(self, shelf: Shelf) -> None:
        cold, warm = (Runner(shelf, routing="original") for _ in range(2))
        logits = cold.decode(0, 6)
        warm.cache.warm(cold.cache.contents().experts)
        assert mx.array_equal(warm.decode(0, 6), logits)
        assert warm.cache.stats.decode.hits > cold.cache.stats.decode.hits

    @pytest.mark.parametrize("experts", [[[0]], [[0, 99], [0]], [[-1], [0]]])
    def test_what_does_not_fit_the_model_is_refused(self, runner: Runner, experts: list[list[int]]) -> None:
        wrong = experts if len(experts) == 1 else experts + [[0]] * (len(runner.cache.layers) - 2)
        with pytest.raises(UsageError):
            runner.cache.warm(wrong)
        assert not any(runner.cache.contents().experts)


class TestChangingTheRouting:
    def test_a_new_strategy_holds_from_the_next_token_on(self, runner: Runner) -> None:
        runner.cache.set_strategy("original")
        runner.decode(0, 12)
        assert runner.cache.stats.swapped == 0
        runner.cache.set_strategy("cache-prior:strength=1,j=0")
        runner.decode(12, 30)
        assert runner.cache.stats.swapped > 0
        assert runner.cache.strategy == CachePrior(1.0, 0)

    def test_exact_after_biased_is_exact(self, shelf: Shelf) -> None:
        changed, exact = Runner(shelf), Runner(shelf, routing="original")
        changed.decode(0, 12)
        changed.cache.set_strategy("original")
        assert mx.array_equal(changed.decode(12, 30), exact.decode(12, 30))

    def test_a_wrong_spec_changes_nothing(self, runner: Runner) -> None:
        before = runner.cache.strategy
        with pytest.raises(UsageError, match="unknown routing"):
            runner.cache.set_strategy("cache-prio")
        with pytest.raises(UsageError, match="top-j"):
            runner.cache.set_strategy(CachePrior(0.1, 99))
        assert runner.cache.strategy == before


class TestCountersOfLayers:
    def test_they_add_up_to_those_of_the_model(self, runner: Runner) -> None:
        runner.decode(0, 12)
        total = runner.cache.stats.decode
        layers = [x.stats.decode for x in runner.cache.layers]
        for name in ("selections", "hits", "misses", "loads", "bytes_read", "swapped", "evictions", "host_reads"):
            assert sum(getattr(x, name) for x in layers) == getattr(total, name) > 0
        assert total.host_reads == 12 * len(layers)
        assert total.host_wait_seconds > 0

    def test_a_listener_hears_of_every_call_what_ran_and_what_was_missing(self, runner: Runner) -> None:
        heard: list[tuple[int, str, list[int], list[int]]] = []

        class Listener:
            def used(self, layer: int, phase: str, experts: list[int], missed: list[int]) -> None:
                heard.append((layer, phase, list(experts), list(missed)))

        runner.cache.listener = Listener()
        runner.decode(0, 12)
        assert [h[0] for h in heard] == list(range(len(runner.cache.layers))) * 12
        assert {h[1] for h in heard} == {"decode"}
        assert sum(len(h[2]) for h in heard) == runner.cache.stats.decode.selections
        assert sum(len(h[3]) for h in heard) == runner.cache.stats.decode.misses
        assert all(set(h[3]) <= set(h[2]) for h in heard)
