"""Sharing slots among layers: on its curves never worse than equal counts, never more bytes, never below k."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.allocation import (
    MAX_UNITS,
    MissCurve,
    allocate,
    bytes_missed,
    equal_slots,
    total_bytes,
    total_misses,
)
from mlx_moecache.errors import BudgetError


@st.composite
def curves(draw: st.DrawFn, *, sizes: Sequence[int] = (100,), falling: bool = True) -> list[MissCurve]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        experts = draw(st.integers(2, 9))
        misses = draw(st.lists(st.integers(0, 1000), min_size=experts + 1, max_size=experts + 1))
        if falling:
            misses.sort(reverse=True)
        found.append(MissCurve(draw(st.integers(1, min(3, experts))), draw(st.sampled_from(sizes)), tuple(misses)))
    return found


@given(curves(sizes=(64, 100, 7), falling=False), st.integers(3, 10))
def test_it_is_never_worse_and_never_larger_than_equal_counts(made: list[MissCurve], equal: int) -> None:
    slots, uniform = allocate(made, equal), equal_slots(made, equal)
    assert bytes_missed(made, slots) <= bytes_missed(made, uniform)
    assert total_bytes(made, slots) <= total_bytes(made, uniform)
    assert all(c.k <= s <= c.num_experts for c, s in zip(made, slots, strict=True))


@given(curves(), st.integers(3, 10))
def test_experts_of_one_size_keep_the_total(made: list[MissCurve], equal: int) -> None:
    assert sum(allocate(made, equal)) == sum(equal_slots(made, equal))


@given(curves(sizes=(2, 3)), st.integers(3, 6))
def test_nothing_better_exists(made: list[MissCurve], equal: int) -> None:
    budget = total_bytes(made, equal_slots(made, equal))
    choices = product(*(range(c.k, c.num_experts + 1) for c in made))
    best = min(bytes_missed(made, s) for s in choices if total_bytes(made, s) <= budget)
    assert bytes_missed(made, allocate(made, equal)) == best


def test_slots_go_where_they_save_most() -> None:
    flat = MissCurve(2, 10, (9, 9, 9, 9, 9, 9, 0))
    steep = MissCurve(2, 10, (90, 90, 60, 30, 10, 9, 0))
    assert allocate([flat, steep], 3) == (2, 4)
    assert total_misses([flat, steep], (2, 4)) == 19


def test_a_layer_that_can_be_complete_is_completed_if_that_pays() -> None:
    """Neither single steps nor the average of several would find it: every step before the last saves nothing."""
    cliff = MissCurve(1, 10, (50, 50, 50, 50, 50, 0))
    slope = MissCurve(1, 10, (50, 50, 45, 41, 38, 36))
    assert allocate([cliff, slope], 3) == (5, 1)


def test_a_layer_of_small_experts_may_have_more_of_them() -> None:
    small, large = MissCurve(1, 1, (9, 9, 5, 1, 0)), MissCurve(1, 4, (9, 9, 8, 8, 8))
    assert allocate([small, large], 2) == (4, 1)  # 8 bytes of 10


def test_many_bytes_are_shared_in_coarse_steps_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    sizes = [5_000_011, 4_999_999, 5_500_001]  # no common divisor: a unit per byte would never end
    made = [MissCurve(4, n, tuple(sorted(rng.integers(0, 999, 61).tolist(), reverse=True))) for n in sizes]
    slots, budget = allocate(made, 30), total_bytes(made, equal_slots(made, 30))
    assert budget - max(sizes) - budget // MAX_UNITS * 90 <= total_bytes(made, slots) <= budget
    assert bytes_missed(made, slots) < bytes_missed(made, equal_slots(made, 30))


def test_fewer_slots_than_a_token_needs_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"2 slots per layer are too few: .* uses 3 experts .*; use 3"):
        allocate([MissCurve(3, 10, (5, 5, 5, 5, 0))], 2)
