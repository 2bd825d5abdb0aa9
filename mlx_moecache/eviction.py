"""Eviction policies: the order in which resident experts give up their slots. Integers in, integers out.

A policy knows neither slots nor bytes. It is told which experts become resident, leave and are selected, and names
victims. Among equals the least recently selected goes first. ``EVICTION`` maps the names that users give to the
classes. The bound that no policy can pass is in belady.py.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import Protocol

from .errors import UsageError

DEFAULT_DECAY = 0.98  # halves a count in 34 tokens


class EvictionPolicy(Protocol):
    """The contract of a policy of one layer. `victims` needs O(S) at most, everything else O(1) per expert."""

    def advance(self, tokens: int) -> None:
        """`tokens` more tokens of this layer were routed, and the calls of `touch` that follow say what they selected.

        0: more about the same tokens.
        """

    def insert(self, expert: int) -> None:
        """`expert` became resident."""

    def remove(self, expert: int) -> None:
        """The resident `expert` left."""

    def touch(self, expert: int, count: int = 1) -> None:
        """`expert`, resident or not, was selected `count` times."""

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

    def advance(self, tokens: int) -> None:
        pass

    def insert(self, expert: int) -> None:
        self._experts[expert] = None

    def remove(self, expert: int) -> None:
        del self._experts[expert]

    def touch(self, expert: int, count: int = 1) -> None:
        if expert in self._experts:
            self._experts.move_to_end(expert)

    def order(self) -> Iterator[int]:
        return iter(self._experts)


class LFU:
    """Evict the expert selected least often since it became resident."""

    def __init__(self) -> None:
        self._count: dict[int, int] = {}
        self._groups: dict[int, OrderedDict[int, None]] = {}  # count -> its experts, oldest first

    def advance(self, tokens: int) -> None:
        pass

    def insert(self, expert: int) -> None:
        self._place(expert, 0)

    def remove(self, expert: int) -> None:
        count = self._count.pop(expert)
        group = self._groups[count]
        del group[expert]
        if not group:
            del self._groups[count]

    def touch(self, expert: int, count: int = 1) -> None:
        if expert in self._count:
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


class Decay:
    """Evict the expert with the smallest decayed count: each selection counts decay^age, age in tokens of the layer.

    Counts outlive evictions: on the demo model's routes (15 and 30 of 60 slots) that saves 2 to 4 % of the misses.
    The selections of a call with T tokens count as if they were spread evenly over it.
    """

    def __init__(self, decay: float = DEFAULT_DECAY) -> None:
        self._decay = decay
        # Instead of shrinking all counts at each token, what a new selection adds grows by 1 / decay: the order is the
        # same, and no expert but the selected ones needs work.
        self._growth, self._share = 1.0, 1.0
        self._count: dict[int, float] = {}
        self._stamp: dict[int, int] = {}  # residents -> when last selected; larger is later
        self._clock = 0

    def advance(self, tokens: int) -> None:
        if not tokens:
            return
        doublings = -tokens * math.log2(self._decay)
        if doublings > 512:  # nothing is left of earlier counts, and the factor would not fit into a float
            self._count.clear()
            self._growth = 1.0
        else:
            self._growth *= 2.0**doublings
            if self._growth > 2.0**256:
                for expert in self._count:  # by a power of two, so that nothing is rounded
                    self._count[expert] *= 2.0**-512
                self._growth *= 2.0**-512
        d = self._decay
        self._share = 1.0 if d == 1 else (1 - d**tokens) / (tokens * (1 - d))

    def insert(self, expert: int) -> None:
        self._clock += 1
        self._stamp[expert] = self._clock

    def remove(self, expert: int) -> None:
        del self._stamp[expert]

    def touch(self, expert: int, count: int = 1) -> None:
        self._count[expert] = self._count.get(expert, 0.0) + count * self._share * self._growth
        if expert in self._stamp:
            self.insert(expert)

    def order(self) -> Iterator[int]:
        return _ascending([(self._count.get(e, 0.0), stamp, e) for e, stamp in self._stamp.items()])


class LFRU:
    """Evict the expert with the smallest count / (age + 1), age in tokens of the layer since its last selection.

    Counts outlive evictions, as those of `Decay`; here it makes hardly a difference. The experts of a call with
    several tokens count as selected at its end.
    """

    def __init__(self) -> None:
        self._count: dict[int, int] = {}
        self._used: dict[int, tuple[int, int]] = {}  # residents -> (token, stamp) of the last selection
        self._token = self._clock = 0

    def advance(self, tokens: int) -> None:
        self._token += tokens

    def insert(self, expert: int) -> None:
        self._clock += 1
        self._used[expert] = self._token, self._clock

    def remove(self, expert: int) -> None:
        del self._used[expert]

    def touch(self, expert: int, count: int = 1) -> None:
        self._count[expert] = self._count.get(expert, 0) + count
        if expert in self._used:
            self.insert(expert)

    def order(self) -> Iterator[int]:
        return _ascending(
            [(self._count.get(e, 0) / (self._token - t + 1), stamp, e) for e, (t, stamp) in self._used.items()]
        )


def _ascending(keyed: list[tuple[float, int, int]]) -> Iterator[int]:
    """The experts of (key, stamp, expert), smallest first. A heap: usually only the first few are asked for."""
    heapq.heapify(keyed)
    while keyed:
        yield heapq.heappop(keyed)[2]


EVICTION: dict[str, type[LRU] | type[LFU] | type[Decay] | type[LFRU]] = {
    "lru": LRU,
    "lfu": LFU,
    "decay": Decay,
    "lfru": LFRU,
}


def make_policy(spec: str) -> EvictionPolicy:
    """A fresh policy by name, or by "decay:D" with the factor D per token. Raises UsageError for anything else."""
    name, colon, rest = spec.partition(":")
    if name not in EVICTION:
        raise UsageError(f"unknown eviction policy {name!r} (choose {', '.join(EVICTION)})")
    if not colon:
        return EVICTION[name]()
    if name != "decay":
        raise UsageError(f"eviction policy {name} takes no parameter, but {spec!r} gives one; leave {rest!r} out")
    try:
        decay = float(rest)
    except ValueError:
        decay = math.nan
    if not 0 < decay <= 1:
        raise UsageError(
            f"the factor per token of eviction policy decay must be above 0 and at most 1, not {rest!r} "
            f"(usual: 0.97 to 0.995, default: {DEFAULT_DECAY})"
        )
    return Decay(decay)
