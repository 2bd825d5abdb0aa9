"""Belady's bound against exhaustive search, against every policy, and the two variants against each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.eviction import EVICTION
from mlx_moecache.residents import Residents
from mlx_moecache.study.belady import Belady, Variant, belady_misses

EXPERTS, K = 6, 2


def traces(most: int, experts: int = EXPERTS, k: int = K) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.permutations(range(experts)).map(lambda p: list(p[:k])), min_size=1, max_size=most)


def fewest(trace: Sequence[Sequence[int]], slots: int, initial: frozenset[int]) -> int:
    """The fewest misses of any engine: after a token, all of its experts are there, and others only if they were."""
    cost = {initial: 0}
    for needed in trace:
        following: dict[frozenset[int], int] = {}
        for contents, misses in cost.items():
            misses += sum(e not in contents for e in needed)
            others = contents - set(needed)
            for kept in combinations(others, min(len(others), slots - len(needed))):
                after = frozenset(kept) | frozenset(needed)
                following[after] = min(misses, following.get(after, misses))
        cost = following
    return min(cost.values())


def fewest_one_by_one(trace: Sequence[Sequence[int]], slots: int) -> int:
    """The fewest loads if the experts of a token are requested one after the other."""
    return fewest([[e] for needed in trace for e in needed], slots, frozenset())


def misses_of(trace: Sequence[Sequence[int]], slots: int, eviction: str, experts: int = EXPERTS) -> int:
    r, misses = Residents(experts, slots, eviction), 0
    for needed in trace:
        loads = r.plan(needed)
        misses += len(loads)
        r.publish(loads)
        r.touch([(e, 1) for e in needed])
    return misses


@given(traces(9), st.integers(K, EXPERTS - 1), st.frozensets(st.integers(0, EXPERTS - 1), max_size=K))
def test_no_engine_could_do_better_and_one_could_do_as_well(
    trace: list[list[int]], slots: int, initial: frozenset[int]
) -> None:
    assert belady_misses(np.array(trace), slots, initial=sorted(initial)) == fewest(trace, slots, initial)


@given(traces(9), st.integers(K, EXPERTS - 1))
def test_the_papers_variant_is_the_optimum_for_one_expert_at_a_time(trace: list[list[int]], slots: int) -> None:
    assert belady_misses(np.array(trace), slots, variant="paper") == fewest_one_by_one(trace, slots)


long_traces = traces(60, 10, 3)


@pytest.mark.parametrize("eviction", list(EVICTION))
@given(trace=long_traces, slots=st.integers(3, 10))
def test_is_a_bound_for_every_policy_and_at_least_the_cold_misses(
    eviction: str, trace: list[list[int]], slots: int
) -> None:
    selections = np.array(trace)
    paper, engine = (belady_misses(selections, slots, variant=v) for v in ("paper", "engine"))
    assert len(np.unique(selections)) <= paper <= engine <= misses_of(trace, slots, eviction, 10)


@pytest.mark.parametrize("variant", ["engine", "paper"])
@given(trace=long_traces)
def test_more_slots_never_cost_misses(variant: Variant, trace: list[list[int]]) -> None:
    counts = [belady_misses(np.array(trace), slots, variant=variant) for slots in range(3, 11)]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("variant", ["engine", "paper"])
@given(calls=st.lists(st.permutations(range(10)).flatmap(lambda p: st.integers(1, 10).map(lambda n: p[:n]))))
def test_contents_never_exceed_the_slots_and_hold_what_just_ran(variant: Variant, calls: list[list[int]]) -> None:
    cache, there = Belady(calls, 4, variant=variant), set[int]()
    for needed in calls:
        missing, left = cache.step()
        assert set(missing) == set(needed) - there
        assert set(left) <= there | set(needed)
        there = {e for e in range(10) if e in cache}
        assert len(there) <= 4
        if variant == "engine" and len(needed) <= 4:
            assert there >= set(needed)


def test_a_restart_forgets_everything_but_what_it_is_given() -> None:
    calls = [[0, 1], [2, 3], [0, 1], [2, 3], [4, 0]]
    cache = Belady(calls, 3)
    assert [len(cache.step()[0]) for _ in range(2)] == [2, 2]
    cache.restart([2, 4, 0])
    # 4 is needed again, later than 2; of what is left at the end, all of it never.
    assert [cache.step() for _ in range(2)] == [([1], [4]), ([3], [1])]
    assert cache.step()[0] == [4] and 0 in cache
