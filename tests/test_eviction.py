"""Eviction policies against list-based references, and victims."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.errors import UsageError
from mlx_moecache.eviction import EVICTION, EvictionPolicy, make_policy, victims

EXPERTS = 8


class ListLRU:
    """The experts in a list, the least recently selected first."""

    def __init__(self) -> None:
        self.experts: list[int] = []

    def insert(self, expert: int) -> None:
        self.experts.append(expert)

    def remove(self, expert: int) -> None:
        self.experts.remove(expert)

    def touch(self, expert: int, count: int) -> None:
        self.experts.remove(expert)
        self.experts.append(expert)

    def order(self) -> list[int]:
        return self.experts


class ListLFU:
    """(selections since it became resident, time of the last one, expert), sorted whenever somebody asks."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int]] = []
        self.clock = 0

    def insert(self, expert: int) -> None:
        self.clock += 1
        self.rows.append((0, self.clock, expert))

    def remove(self, expert: int) -> None:
        self.rows = [row for row in self.rows if row[2] != expert]

    def touch(self, expert: int, count: int) -> None:
        before = next(n for n, _, e in self.rows if e == expert)
        self.remove(expert)
        self.clock += 1
        self.rows.append((before + count, self.clock, expert))

    def order(self) -> list[int]:
        return [e for _, _, e in sorted(self.rows)]


REFERENCES: dict[str, Callable[[], ListLRU | ListLFU]] = {"lru": ListLRU, "lfu": ListLFU}
events = st.lists(st.tuples(st.integers(0, EXPERTS - 1), st.sampled_from(["use", "leave"]), st.integers(1, 5)))


def replay(policy: EvictionPolicy, reference: ListLRU | ListLFU, happened: list[tuple[int, str, int]]) -> set[int]:
    """Feed both with the same events and compare them after each; return the experts that are there at the end."""
    there: set[int] = set()
    for expert, what, count in happened:
        if what == "use" and expert not in there:
            there.add(expert)
            policy.insert(expert)
            reference.insert(expert)
        if what == "use":
            policy.touch(expert, count)
            reference.touch(expert, count)
        elif expert in there:
            there.remove(expert)
            policy.remove(expert)
            reference.remove(expert)
        assert list(policy.order()) == reference.order()
    return there


@pytest.mark.parametrize("name", sorted(EVICTION))
class TestEveryPolicy:
    @given(happened=events)
    def test_the_order_is_that_of_its_reference(self, name: str, happened: list[tuple[int, str, int]]) -> None:
        there = replay(make_policy(name), REFERENCES[name](), happened)
        assert len(there) <= EXPERTS

    @given(happened=events, n=st.integers(-1, EXPERTS + 1), protected=st.frozensets(st.integers(0, EXPERTS - 1)))
    def test_victims_come_in_order_and_are_never_protected(
        self, name: str, happened: list[tuple[int, str, int]], n: int, protected: frozenset[int]
    ) -> None:
        policy, reference = make_policy(name), REFERENCES[name]()
        there = replay(policy, reference, happened)
        found = victims(policy, n, protected)
        assert found == [e for e in reference.order() if e not in protected][: max(n, 0)]
        assert set(policy.order()) == there  # naming victims changes nothing

    def test_an_expert_that_comes_back_has_no_history(self, name: str) -> None:
        policy = make_policy(name)
        for expert in (0, 1):
            policy.insert(expert)
            policy.touch(expert, 9)
        policy.remove(0)
        policy.insert(0)
        policy.touch(0)
        assert list(policy.order()) == ([1, 0] if name == "lru" else [0, 1])


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown eviction policy 'fifo' \(choose lfu, lru\)"):
        make_policy("fifo")
