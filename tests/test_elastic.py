"""Slots that give way: what pressure takes and gives back, and replies that do not notice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import random_tokens, tiny_config, write_checkpoint

from mlx_moecache.budget import ForwardShape, MemoryPlan
from mlx_moecache.elastic import (
    CALM,
    MOST_CALM,
    SETTLE,
    ElasticSlots,
    PressureGovernor,
    Stage,
    granted,
    stage_contexts,
)
from mlx_moecache.errors import BudgetError, UsageError
from mlx_moecache.generation import stream_generate
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.pressure import Pressure

LEVELS = st.lists(st.sampled_from(list(Pressure)), max_size=200)
N, W, C = Pressure.NORMAL, Pressure.WARNING, Pressure.CRITICAL


def after(levels: Sequence[Pressure], governor: PressureGovernor | None = None) -> PressureGovernor:
    governor = governor or PressureGovernor()
    for level in levels:
        governor.poll(level)
    return governor


class TestGovernor:
    @given(LEVELS)
    def test_the_share_stays_between_nothing_and_all(self, levels: list[Pressure]) -> None:
        assert 0 <= after(levels).share <= 1

    @given(LEVELS, st.sampled_from([(N, W), (W, C), (N, C)]))
    def test_more_pressure_never_leaves_more(self, levels: list[Pressure], pair: tuple[Pressure, Pressure]) -> None:
        less, more = pair
        assert after([*levels, more]).share <= after([*levels, less]).share

    @given(LEVELS)
    def test_it_only_grows_without_pressure_and_only_shrinks_under_it(self, levels: list[Pressure]) -> None:
        governor = PressureGovernor()
        for level in levels:
            before = governor.share
            governor.poll(level)
            assert governor.share <= before if level else governor.share >= before

    @given(LEVELS, st.sampled_from([W, C]))
    def test_lasting_pressure_ends_at_the_minimum(self, levels: list[Pressure], level: Pressure) -> None:
        governor = after([*levels, *[level] * 20 * SETTLE])
        assert governor.share == 0
        assert after([level], governor).share == 0

    @given(LEVELS)
    def test_lasting_calm_ends_with_everything(self, levels: list[Pressure]) -> None:
        governor = after([*levels, *[N] * 20 * MOST_CALM])
        assert governor.share == 1
        assert governor.calm_needed == CALM

    def test_steps_down_wait_for_each_other_unless_it_is_critical(self) -> None:
        shares = []
        governor = PressureGovernor()
        for _ in range(2 * SETTLE):
            governor.poll(W)
            shares.append(governor.share)
        assert shares == [0.75] * SETTLE + [0.75**2] * SETTLE
        assert after([C] * 3).share == 0.5**3

    def test_a_short_calm_changes_nothing(self) -> None:
        governor = after([W, *[N] * (CALM - 1)])
        assert governor.share == 0.75
        assert after([W] + [N] * (CALM - 1), governor).share == 0.75**2
        assert after([N], governor).share == 0.75

    def test_if_growing_brings_the_pressure_back_it_is_tried_less_and_less_often(self) -> None:
        """A system that is under pressure whenever more than half of the slots are taken."""
        governor, moves, share = PressureGovernor(), [], 1.0
        for poll in range(40 * CALM):
            governor.poll(W if governor.share > 0.5 else N)
            if governor.share != share:
                moves.append(poll)
                share = governor.share
        assert governor.calm_needed == MOST_CALM
        first, second = (sum(a <= m < a + 20 * CALM for m in moves) for a in (0, 20 * CALM))
        assert second < first / 2 and second <= 4


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 60)), min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_what_is_granted_is_monotone_and_never_below_the_minimum(
    layers: list[tuple[int, int]], a: float, b: float
) -> None:
    least = [k for k, _ in layers]
    planned = [k + more for k, more in layers]
    few, many = granted(planned, least, min(a, b)), granted(planned, least, max(a, b))
    assert all(k <= x <= y <= p for k, x, y, p in zip(least, few, many, planned, strict=True))
    assert granted(planned, least, 1.0) == tuple(planned) and granted(planned, least, 0.0) == tuple(least)


@given(st.integers(1, 5000), st.integers(1, 20_000))
def test_stages_cover_every_context_and_are_few(first: int, last: int) -> None:
    contexts = stage_contexts(min(first, last), last, 256)
    assert contexts == sorted(set(contexts)) and contexts[-1] == last
    assert all(c % 256 == 0 for c in contexts[:-1])
    assert all(b - a <= max(256, a // 4 + 256) for a, b in pairwise(contexts))
    assert len(contexts) <= 22


FORWARD = ForwardShape(*[0] * 12)


def plan(*slots: int, kv: int = 0) -> MemoryPlan:
    return MemoryPlan(100, 0, kv, 0, 0, sum(slots), slots, 32, FORWARD)


@dataclass
class FakeSource:
    now: Pressure = N
    asked: int = 0

    def level(self) -> Pressure:
        self.asked += 1
        return self.now


@dataclass
class Desk:
    """An ElasticSlots of two layers with its surroundings."""

    source: FakeSource = field(default_factory=FakeSource)
    time: float = 0.0
    applied: list[tuple[MemoryPlan, tuple[int, ...]]] = field(default_factory=list)
    settled: int = 0

    def __post_init__(self) -> None:
        self.stages = [
            Stage(256, plan(20, 20), plan(24, 24)),
            Stage(512, plan(16, 16), plan(18, 18)),
            Stage(768, plan(10, 10), plan(10, 10)),
        ]
        self.elastic = ElasticSlots(
            self.stages, [4, 4], lambda p, s: self.applied.append((p, tuple(s))), self.source, clock=lambda: self.time
        )

    def adjust(self, context: int, phase: Any = "decode", seconds: float = 0.0) -> tuple[int, ...]:
        self.time += seconds
        self.elastic.adjust(context, phase, self.settle)
        return self.applied[-1][1] if self.applied else (20, 20)

    def settle(self) -> None:
        self.settled += 1


class TestStages:
    def test_slots_follow_the_context_down_and_up_again(self) -> None:
        desk = Desk()
        assert desk.adjust(100, "prefill") == (20, 20) and not desk.applied
        assert desk.adjust(101) == (24, 24)
        assert desk.adjust(256) == (24, 24)
        assert desk.adjust(257) == (18, 18)
        assert desk.adjust(600) == desk.adjust(9999) == (10, 10)
        assert desk.adjust(300, "prefill") == (16, 16)
        assert desk.elastic.counts() == {"room": 2, "context": 2}
        assert desk.settled == 4

    def test_the_plan_of_the_stage_becomes_the_models(self) -> None:
        desk = Desk()
        desk.adjust(300)
        assert desk.applied == [(desk.stages[1].decode, (18, 18))]

    def test_growth_that_is_not_worth_a_move_is_left_out_but_its_plan_counts(self) -> None:
        desk = Desk()
        desk.stages[0] = Stage(256, desk.stages[0].prefill, plan(20, 21))
        assert desk.adjust(10) == (20, 20)
        assert desk.applied == [(desk.stages[0].decode, (20, 20))]
        assert not desk.settled and not desk.elastic.resizes


class TestUnderPressure:
    def test_it_is_asked_for_once_per_second_at_most(self) -> None:
        desk = Desk()
        for _ in range(100):
            desk.adjust(10, seconds=0.1)
        assert desk.source.asked in (10, 11)

    def test_slots_shrink_at_once_and_come_back_after_calm(self) -> None:
        desk = Desk()
        desk.adjust(10)
        desk.source.now = W
        assert desk.adjust(11, seconds=1) == (19, 19)
        desk.source.now = N
        assert desk.adjust(12, seconds=1) == (19, 19)
        for _ in range(CALM):
            last = desk.adjust(13, seconds=1)
        assert last == (24, 24)
        assert desk.elastic.counts() == {"room": 1, "pressure": 1, "calm": 1}

    def test_the_minimum_is_kept_however_long_it_lasts(self) -> None:
        desk = Desk()
        desk.source.now = C
        for i in range(60):
            last = desk.adjust(10 + i, seconds=1)
        assert last == (4, 4)

    @given(st.lists(st.tuples(st.sampled_from(list(Pressure)), st.integers(1, 900), st.booleans()), max_size=60))
    def test_never_more_than_the_plan_and_never_less_than_the_minimum(
        self, events: list[tuple[Pressure, int, bool]]
    ) -> None:
        desk = Desk()
        for level, context, prefill in events:
            desk.source.now = level
            phase: Any = "prefill" if prefill else "decode"
            slots = desk.adjust(context, phase, seconds=1)
            planned = next((s for s in desk.stages if s.context >= context), desk.stages[-1]).plan(phase)
            assert all(4 <= s <= p for s, p in zip(slots, planned.slots_per_layer, strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 MB of experts, 6 MB of other weights, 8 KB of KV cache per token."""
    config = tiny_config(
        "qwen2_moe", hidden_size=256, num_attention_heads=8, num_key_value_heads=8, num_experts=24, num_hidden_layers=4
    )
    return write_checkpoint(tmp_path_factory.mktemp("made") / "model", config, tokenizer=True)


@pytest.fixture
def opened(made: Path) -> Iterator[OpenedModel]:
    yield OpenedModel(made)


def reply(model: Any, tokenizer: Any, *, prompt: int, tokens: int, cache: list[Any] | None = None) -> list[int]:
    def no_end(seen: mx.array, logits: mx.array) -> mx.array:
        logits[:, list(tokenizer.eos_token_ids)] = -1e9
        return logits

    responses = stream_generate(
        model,
        tokenizer,
        random_tokens(1, prompt, vocabulary=250)[0],
        max_tokens=tokens,
        logits_processors=[no_end],
        prompt_cache=cache,
    )
    return [r.token for r in responses]


class Unsteady:
    """Pressure that comes and goes."""

    def __init__(self) -> None:
        self.polls = 0

    def level(self) -> Pressure:
        self.polls += 1
        return C if self.polls % 120 == 3 else N


class TestReplies:
    def test_another_budget_holds_for_the_replies_that_follow(self, made: Path, opened: OpenedModel) -> None:
        tokenizer, exact = opened.tokenizer(), CacheOptions(routing="original")
        options = MemoryOptions(memory=24_000_000, max_context=350, max_prompt=20, elastic=True)
        mx.clear_cache()
        others = mx.get_active_memory()
        model = opened.load(options, exact)
        cache, elastic = model.expert_cache, model.elastic_slots
        first = reply(model, tokenizer, prompt=20, tokens=100)
        before, largest = cache.slots_per_layer, elastic.stages[-1].decode.total
        with pytest.raises(BudgetError):
            cache.resize(memory="1MB")
        assert (cache.slots_per_layer, elastic.stages[-1].decode.total) == (before, largest)
        smaller = OpenedModel(made).stages(replace(options, memory=19_000_000))
        cache.resize(memory="19MB")
        mx.reset_peak_memory()
        assert model.memory_plan.budget == 19_000_000
        assert reply(model, tokenizer, prompt=20, tokens=100) == first
        assert model.memory_plan.budget == 19_000_000
        assert [s.decode.slots_per_layer for s in elastic.stages] == [s.decode.slots_per_layer for s in smaller]
        assert cache.slots_per_layer == list(smaller[0].decode.slots_per_layer)
        assert mx.get_peak_memory() - others + cache.reader.host_buffer_bytes <= 19_000_000
        assert sum(cache.slots_per_layer) < sum(before)
        cache.resize(memory="24MB")
        assert cache.slots_per_layer == before

    def test_they_are_the_same_while_slots_move_in_every_way(self, made: Path, opened: OpenedModel) -> None:
        tokenizer = opened.tokenizer()
        exact = CacheOptions(routing="original")
        still = OpenedModel(made).load(MemoryOptions(slots=24), exact)
        expected = reply(still, tokenizer, prompt=20, tokens=330)

        model = opened.load(MemoryOptions(memory=24_000_000, max_context=350, max_prompt=20, elastic=True), exact)
        elastic = model.elastic_slots
        elastic.source, ticks = Unsteady(), count(1)
        elastic.clock = lambda: time.monotonic() + next(ticks)  # a second per token
        assert reply(model, tokenizer, prompt=20, tokens=330) == expected
        assert {"context", "pressure", "calm"} <= set(elastic.counts())
        assert len(elastic.resizes) > 4
        assert min(r.after for r in elastic.resizes) < 0.7 * max(r.before for r in elastic.resizes)

    def test_a_growing_context_stays_in_the_budget_with_more_slots_at_first(
        self, made: Path, opened: OpenedModel
    ) -> None:
        tokenizer, budget = opened.tokenizer(), 25_000_000
        fixed = OpenedModel(made).plan(MemoryOptions(memory=budget, max_context=350, max_prompt=20))
        mx.clear_cache()
        others = mx.get_active_memory()
        mx.reset_peak_memory()
        model = opened.load(MemoryOptions(memory=budget, max_context=350, max_prompt=20, elastic=True), CacheOptions())
        seen = []
        elastic, cache = model.elastic_slots, make_prompt_cache(model)
        apply = elastic.apply
        elastic.apply = lambda p, s: (apply(p, s), seen.append(list(s)))
        assert len(reply(model, tokenizer, prompt=20, tokens=330, cache=cache)) == 330
        assert mx.get_peak_memory() - others + model.expert_cache.reader.host_buffer_bytes <= budget
        assert seen[0][0] > fixed.slots_per_layer[0] + 1
        assert seen[-1][0] >= fixed.slots_per_layer[0]
        assert model.memory_plan is elastic.stages[-1].decode
        # The next, short prompt gets its slots back.
        reply(model, tokenizer, prompt=5, tokens=2)
        assert model.expert_cache.slots_per_layer == seen[0]

    @pytest.mark.parametrize(("before", "after"), [(24, 8), (8, 24), (20, 10), (10, 20)])
    def test_no_more_than_one_tensor_of_one_layer_exists_twice_while_slots_move(
        self, opened: OpenedModel, before: int, after: int
    ) -> None:
        model = opened.load(MemoryOptions(slots=before), CacheOptions())
        reply(model, opened.tokenizer(), prompt=4, tokens=2)  # what is pending must not hold old arrays
        cache = model.expert_cache
        held, largest = cache.nbytes, max(c.nbytes for b in opened.blocks for c in b.components)
        mx.clear_cache()
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        cache.resize(slots=after)
        grown = cache.nbytes - held
        assert abs(mx.get_active_memory() - start - grown) < largest
        assert mx.get_peak_memory() - start <= max(0, grown) + (max(before, after) + 1) * largest

    def test_a_context_that_would_not_fit_in_the_end_is_refused_at_loading(self, opened: OpenedModel) -> None:
        options = MemoryOptions(memory=24_000_000, max_context=9000, max_prompt=20, elastic=True)
        with pytest.raises(BudgetError, match=r"too small for this model; the smallest that works is"):
            opened.load(options, CacheOptions())

    def test_a_number_of_slots_leaves_nothing_to_move(self, opened: OpenedModel) -> None:
        with pytest.raises(UsageError, match="elastic slots need a memory budget"):
            opened.load(MemoryOptions(slots=8, elastic=True), CacheOptions())
