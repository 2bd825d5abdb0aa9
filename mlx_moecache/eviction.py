"""Eviction policies: the order in which resident experts give up their slots. Integers in, integers out.

A policy knows neither slots nor bytes. It is told which experts become resident, leave and are selected, and names
victims. ``EVICTION`` maps the names that users give to the classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import Protocol

from .errors import UsageError


class EvictionPolicy(Protocol):
    """The contract of a policy; all operations are O(1) per expert, `victims` O(n + protected)."""

    def insert(self, expert: int) -> None:
        """`expert` became resident."""

    def remove(self, expert: int) -> None:
        """`expert` left."""

    def touch(self, expert: int, count: int = 1) -> None:
        """The resident `expert` was selected `count` times."""

    def order(self) -> Iterator[int]:
        """Resident experts, the first to be evicted first."""


def victims(policy: EvictionPolicy, n: int, protected: Container[int]) -> list[int]:
    """The next `n` experts to evict, none of them `protected`; fewer if there are not that many. Changes nothing."""
    found: list[int] = []
    if n > 0:
        for expert in policy.order():
            if expert not in protected:
                found.append(expert)
                if len(found) == n:
                    break
    return found


class LRU:
    """Evict the least recently selected expert."""

    def __init__(self) -> None:
        self._experts: OrderedDict[int, None] = OrderedDict()

    def insert(self, expert: int) -> None:
        self._experts[expert] = None

    def remove(self, expert: int) -> None:
        del self._experts[expert]

    def touch(self, expert: int, count: int = 1) -> None:
        self._experts.move_to_end(expert)

    def order(self) -> Iterator[int]:
        return iter(self._experts)


class LFU:
    """Evict the expert selected least often since it became resident; among equals the least recently selected."""

    def __init__(self) -> None:
        self._count: dict[int, int] = {}
        self._groups: dict[int, OrderedDict[int, None]] = {}  # count -> its experts, oldest first

    def insert(self, expert: int) -> None:
        self._place(expert, 0)

    def remove(self, expert: int) -> None:
        count = self._count.pop(expert)
        group = self._groups[count]
        del group[expert]
        if not group:
            del self._groups[count]

    def touch(self, expert: int, count: int = 1) -> None:
        total = self._count[expert] + count
        self.remove(expert)
        self._place(expert, total)

    def order(self) -> Iterator[int]:
        # Sorting the distinct counts, not the experts: there are at most as many counts as slots.
        for count in sorted(self._groups):
            yield from self._groups[count]

    def _place(self, expert: int, count: int) -> None:
        self._count[expert] = count
        self._groups.setdefault(count, OrderedDict())[expert] = None


EVICTION: dict[str, type[LRU] | type[LFU]] = {"lru": LRU, "lfu": LFU}


def make_policy(name: str) -> EvictionPolicy:
    """A fresh policy by name. Raises UsageError for an unknown one."""
    try:
        return EVICTION[name]()
    except KeyError:
        raise UsageError(f"unknown eviction policy {name!r} (choose {', '.join(sorted(EVICTION))})") from None
