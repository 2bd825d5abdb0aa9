"""The planner: sizes as users write them, and plans that keep within the budget."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_moecache.budget import (
    CHUNKS,
    SLACK,
    USEFUL_CHUNK,
    ForwardShape,
    LayerShape,
    MemoryPlan,
    format_bytes,
    parse_memory,
    plan_memory,
)
from mlx_moecache.errors import BudgetError, UsageError

RAM = 16 * 2**30


def parse(memory: str | int, *, physical: int = RAM, recommended: int | None = None) -> int:
    return parse_memory(memory, physical=physical, recommended=recommended)


class TestParseMemory:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("4GB", 4 * 10**9),
            ("4 gb", 4 * 10**9),
            (" 4g ", 4 * 10**9),
            ("4.35GB", 4_350_000_000),  # exact: the nearest float is below
            (".5GB", 500_000_000),
            ("2.GB", 2 * 10**9),
            ("1.5 TB", 1_500 * 10**9),
            ("700MB", 700 * 10**6),
            ("512MiB", 512 * 2**20),
            ("2GiB", 2 * 2**30),
            ("3kib", 3 * 2**10),
            ("123456789", 123_456_789),
            ("123456789B", 123_456_789),
            ("60%", int(0.6 * RAM)),
            ("100 %", RAM),
            (10**9, 10**9),
        ],
    )
    def test_sizes_as_people_write_them(self, text: str | int, size: int) -> None:
        assert parse(text) == size

    @pytest.mark.parametrize(
        "text",
        [
            "4 potatoes",
            "",
            "GB",
            "nan",
            "inf",
            "1e3GB",
            "-1",
            "-4GB",
            "4GBB",
            "4 G B",
            "1,5GB",
            "4ib",
            "%",
            "٤GB",
            "0x10",
        ],
    )
    def test_what_is_not_a_size_is_named_with_examples(self, text: str) -> None:
        with pytest.raises(UsageError, match=re.escape(repr(text)) + r" is not a memory size; write 4GB, .* or auto"):
            parse(text)

    @pytest.mark.parametrize("nothing", ["0", "0GB", "0%", "0.0001B", 0, -1])
    def test_nothing_is_not_a_budget(self, nothing: str | int) -> None:
        with pytest.raises(UsageError, match="more than 0"):
            parse(nothing)

    def test_a_share_above_all_of_ram_is_refused(self) -> None:
        with pytest.raises(UsageError, match="'101%' is more than all of RAM"):
            parse("101%")

    def test_an_absurd_number_of_digits_is_a_size_like_any_other(self) -> None:
        assert parse("9" * 400 + "GB") == int("9" * 400) * 10**9

    def test_auto_leaves_room_for_the_system_and_its_page_cache(self) -> None:
        def auto(available: int, baseline: int = 0) -> int:
            return parse_memory("auto", physical=RAM, recommended=None, available=available, baseline=baseline)

        assert auto(RAM // 2) == RAM // 2 - RAM // 8
        assert auto(RAM // 8) == RAM // 16  # half of what there is, however little
        assert auto(0) == 1  # the planner then says what the model needs
        assert auto(RAM) == int(0.7 * RAM)
        assert auto(RAM, baseline=10**9) == int(0.7 * RAM) - 10**9

    def test_what_is_available_bears_on_auto_alone(self) -> None:
        def parse(memory: str) -> int:
            return parse_memory(memory, physical=RAM, recommended=1, available=1, baseline=1)

        assert parse("4GB") == 4 * 10**9 and parse("50%") == RAM // 2

    def test_auto_is_the_smaller_of_working_set_and_seven_tenths_of_ram(self) -> None:
        share = int(0.7 * RAM)
        assert parse("auto", recommended=None) == share
        assert parse("auto", recommended=share - 1) == share - 1
        assert parse("AUTO", recommended=share + 1) == share


class TestFormatBytes:
    @pytest.mark.parametrize(
        ("n", "text", "up"),
        [
            (0, "0 B", "0 B"),
            (999, "999 B", "999 B"),
            (1000, "1.00 KB", "1.00 KB"),
            (1_234_000, "1.23 MB", "1.24 MB"),
            (23_400_001, "23.4 MB", "23.5 MB"),
            (999_499_999, "999 MB", "1000 MB"),
            (999_500_000, "1.00 GB", "1.00 GB"),
            (4_000_000_000, "4.00 GB", "4.00 GB"),
            (4_000_000_001, "4.00 GB", "4.01 GB"),
            (123_456_789_000, "123 GB", "124 GB"),
        ],
    )
    def test_three_digits(self, n: int, text: str, up: str) -> None:
        assert (format_bytes(n), format_bytes(n, up=True)) == (text, up)

    @given(st.integers(1, 10**14))
    @example(4_350_000_000)
    @example(9_999_999_999)
    def test_a_size_that_was_rounded_up_is_enough_when_typed_back(self, n: int) -> None:
        assert n <= parse(format_bytes(n, up=True)) <= 1.011 * n

    @given(st.integers(1, 10**14))
    def test_otherwise_it_is_the_nearest(self, n: int) -> None:
        assert abs(parse(format_bytes(n)) - n) <= 0.0051 * n


FORWARD = ForwardShape(
    held=1000,
    attention=20_000,
    attention_fixed=50_000,
    combine=9000,
    outputs=3000,
    pair=4000,
    k=4,
    wave_pairs=1024,
    experts=15_000,
    decode=400_000,
    decode_ahead=50_000,
    array=12_000,
)
MB = 10**6

layer_shapes = st.lists(
    st.tuples(st.integers(2, 64), st.integers(1, 8), st.integers(1, 3 * MB)).filter(lambda x: x[1] <= x[0]),
    min_size=1,
    max_size=6,
).map(lambda rows: [LayerShape(f"layers.{i}", e, k, size) for i, (e, k, size) in enumerate(rows)])
forward_shapes = st.builds(
    ForwardShape,
    held=st.integers(0, 20_000),
    attention=st.integers(0, 200_000),
    attention_fixed=st.integers(0, MB),
    combine=st.integers(0, 100_000),
    outputs=st.integers(0, 50_000),
    pair=st.integers(0, 50_000),
    k=st.integers(1, 8),
    wave_pairs=st.integers(8, 4096),
    experts=st.integers(0, 200_000),
    decode=st.integers(0, 10 * MB),
    decode_ahead=st.integers(0, MB),
    array=st.integers(0, 50_000),
)
prefill_step_sizes = st.none() | st.integers(1, 4096)
max_chunks = st.integers(1, 5000)


def plan(
    layers: list[LayerShape],
    forward: ForwardShape = FORWARD,
    *,
    budget: int | None = None,
    slots: int | None = None,
    step: int | None = None,
    max_chunk: int = CHUNKS[0],
) -> MemoryPlan:
    return plan_memory(
        layers,
        forward,
        resident=5 * MB,
        kv=2 * MB,
        host_buffers=300_000,
        budget=budget,
        slots=slots,
        prefill_step_size=step,
        max_chunk=max_chunk,
    )


def smallest_of(error: pytest.ExceptionInfo[BudgetError]) -> str:
    found = re.search(r"the smallest that works is ([\d.]+ [KMG]?B) \(", str(error.value))
    assert found is not None, error.value
    return found[1]


def refused_at(budget: int, layers: list[LayerShape], forward: ForwardShape, step: int | None, max_chunk: int) -> str:
    with pytest.raises(BudgetError) as error:
        plan(layers, forward, budget=budget, step=step, max_chunk=max_chunk)
    return smallest_of(error)


class TestPlanMemory:
    @given(layer_shapes, forward_shapes, prefill_step_sizes, max_chunks, st.integers(0, 300 * MB))
    def test_a_plan_is_within_its_budget_and_grants_every_layer_its_k(
        self, layers: list[LayerShape], forward: ForwardShape, step: int | None, max_chunk: int, extra: int
    ) -> None:
        budget = parse(refused_at(1, layers, forward, step, max_chunk)) + extra
        made = plan(layers, forward, budget=budget, step=step, max_chunk=max_chunk)
        assert made.total <= budget
        assert made.total == sum(made.parts().values())
        assert all(x.k <= s <= x.num_experts for x, s in zip(layers, made.slots_per_layer, strict=True))
        assert made.slots == sum(x.bytes_per_expert * s for x, s in zip(layers, made.slots_per_layer, strict=True))
        assert made.prefill_step_size == (min(step, max_chunk) if step else made.prefill_step_size) <= max_chunk

    @given(layer_shapes, forward_shapes, prefill_step_sizes, max_chunks, st.integers(0, 300 * MB), st.integers(1, MB))
    def test_more_budget_never_means_fewer_slots(
        self, layers: list[LayerShape], forward: ForwardShape, step: int | None, max_chunk: int, extra: int, more: int
    ) -> None:
        budget = parse(refused_at(1, layers, forward, step, max_chunk)) + extra
        small, large = (
            plan(layers, forward, budget=n, step=step, max_chunk=max_chunk) for n in (budget, budget + 20 * more)
        )
        assert all(a <= b for a, b in zip(small.slots_per_layer, large.slots_per_layer, strict=True))

    @given(layer_shapes, forward_shapes, prefill_step_sizes, max_chunks)
    def test_the_smallest_budget_that_an_error_names_works_and_one_percent_less_does_not(
        self, layers: list[LayerShape], forward: ForwardShape, step: int | None, max_chunk: int
    ) -> None:
        named = refused_at(1, layers, forward, step, max_chunk)
        made = plan(layers, forward, budget=parse(named), step=step, max_chunk=max_chunk)
        assert made.total <= parse(named)
        assert refused_at(int(0.99 * parse(named)) - 1, layers, forward, step, max_chunk) == named

    def test_the_error_says_what_the_smallest_budget_is_made_of(self) -> None:
        with pytest.raises(BudgetError) as error:
            plan([LayerShape("layers.0", 60, 4, MB)], budget=3 * MB)
        message = str(error.value)
        assert "\n" not in message
        assert message.startswith("a memory budget of 3.00 MB is too small for this model")
        assert "resident weights 5.00 MB, kv cache 2.00 MB, transients " in message
        assert "host buffers 300 KB, slots 4.00 MB: 4 slots per layer" in message

    def test_each_layer_keeps_its_own_k(self) -> None:
        layers = [LayerShape("a", 16, 2, MB), LayerShape("b", 32, 8, MB), LayerShape("c", 4, 1, MB)]
        named = refused_at(1, layers, FORWARD, None, 2048)
        assert plan(layers, budget=parse(named)).slots_per_layer == (2, 8, 1)

    def test_layers_with_fewer_experts_leave_the_rest_to_others(self) -> None:
        layers = [LayerShape("a", 8, 2, MB), LayerShape("b", 64, 2, MB)]
        made = plan(layers, budget=50 * MB, max_chunk=64)
        assert made.slots_per_layer[0] == 7 < made.slots_per_layer[1]

    def test_all_experts_become_resident_as_soon_as_they_fit_beside_a_useful_chunk(self) -> None:
        layers = [LayerShape("a", 16, 4, MB)]
        others = 5 * MB + 2 * MB + 300_000
        enough = 16 * MB + others + FORWARD.transient(USEFUL_CHUNK, complete=True)
        assert plan(layers, budget=enough).slots_per_layer == (16,)
        assert plan(layers, budget=enough).prefill_step_size == USEFUL_CHUNK
        assert plan(layers, budget=enough - 1).slots_per_layer == (15,)

    def test_a_chunk_is_as_long_as_what_the_slots_leave_allows(self) -> None:
        layers = [LayerShape("a", 60, 4, MB) for _ in range(12)]
        for budget in range(30 * MB, 900 * MB, 7 * MB):
            try:
                made = plan(layers, budget=budget)
            except BudgetError:
                continue
            longer = [c for c in CHUNKS if c > made.prefill_step_size]
            complete = made.slots_per_layer[0] == 60
            left = budget - made.total + made.transient
            assert all(FORWARD.transient(c, complete=complete) > left for c in longer)

    def test_no_chunk_is_longer_than_the_longest_prompt(self) -> None:
        layers = [LayerShape("a", 16, 4, MB)]
        assert plan(layers, budget=10**9, max_chunk=100).prefill_step_size == 100
        assert plan(layers, budget=10**9, max_chunk=20).prefill_step_size == 20

    def test_given_slots_are_kept_up_to_all_experts(self) -> None:
        layers = [LayerShape("a", 16, 4, MB), LayerShape("b", 60, 4, MB)]
        made = plan(layers, slots=30)
        assert made.slots_per_layer == (16, 30)
        assert made.budget is None

    def test_fewer_slots_than_a_token_needs_are_refused(self) -> None:
        layers = [LayerShape("a", 16, 2, MB), LayerShape("b", 60, 4, MB)]
        with pytest.raises(BudgetError, match=r"3 slots .* uses 4 experts in b; use --slots 4 or more \(all: 60\)"):
            plan(layers, slots=3)


class TestForwardShape:
    @given(forward_shapes, st.integers(1, 4000), st.booleans())
    def test_a_longer_chunk_never_needs_less(self, forward: ForwardShape, chunk: int, complete: bool) -> None:
        assert forward.transient(chunk, complete=complete) <= forward.transient(chunk + 1, complete=complete)

    @given(forward_shapes, st.integers(1, 4000))
    def test_all_experts_at_once_never_need_less_than_waves(self, forward: ForwardShape, chunk: int) -> None:
        assert forward.transient(chunk, complete=False) <= forward.transient(chunk, complete=True)

    @given(forward_shapes, st.integers(1, 4000), st.booleans(), st.integers(0, 20 * MB), st.integers(1, 20 * MB))
    def test_waiting_saves_what_would_be_made_ahead_and_no_more(
        self, forward: ForwardShape, chunk: int, complete: bool, room: int, more: int
    ) -> None:
        forward = replace(forward, row=forward.attention // 8)

        def needed(room: int) -> int:
            return forward.transient(chunk, complete=complete, room=room)

        unlimited = forward.transient(chunk, complete=complete)
        assert needed(room) <= needed(room + more) <= unlimited == needed(10**12)
        assert unlimited - needed(0) <= chunk * forward.attention // 2
        assert replace(forward, row=0).transient(chunk, complete=complete, room=room) == unlimited

    def test_decoding_is_an_alternative_to_a_chunk_not_an_addition(self) -> None:
        idle, busy = replace(FORWARD, decode=0), replace(FORWARD, decode=10**9)
        assert FORWARD.transient(512, complete=False) == idle.transient(512, complete=False)
        assert busy.transient(512, complete=False) == busy.transient(32, complete=False) >= 10**9


class TestRoom:
    def test_without_a_budget_there_is_no_limit(self) -> None:
        assert plan([LayerShape("a", 16, 4, MB)], slots=8).room is None

    def test_the_largest_array_still_fits_above_it(self) -> None:
        made = plan([LayerShape("a", 60, 4, MB)], budget=60 * MB)
        assert made.room is not None
        kept = made.resident + made.slots + made.host_buffers
        assert kept + made.room + FORWARD.array * made.prefill_step_size + SLACK == 60 * MB
