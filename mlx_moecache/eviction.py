"""Eviction policies: the order in which resident experts give up their slots. Integers in, integers out.

A policy knows neither slots nor bytes. It is told which experts become resident, leave and are selected, and names
victims. Among equals the least recently selected goes first. ``EVICTION`` maps the names that users give to the
classes. The bound that no policy can pass is in belady.py.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Container, Iterator
from itertools import islice
from typing import Any, Protocol

from .errors import UsageError
from .rising_heap import Key, RisingHeap

FEW_LOW, MANY_LOW = 8, 32  # experts whose values LFRU compares
PATIENCE = 64  # tokens between two times that LFRU chooses these anew because they are too many
CERTAIN = 1 - 1e-9  # a value this much below a limit is below it however sums were rounded
DEFAULT_DECAY = 0.98  # halves a count in 34 tokens

State = dict[str, Any]  # plain numbers and lists, fit for JSON


class EvictionPolicy(Protocol):
    """The contract of a policy of one layer of S slots.

    `first` costs O(log S) at most for each expert that it names or passes over, everything else but `order` O(1) per
    expert, all amortised over calls.
    """

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

    def first(self, n: int, protected: Collection[int]) -> list[int]:
        """The first `n` of `order` that are not `protected`."""

    def order(self) -> Iterator[int]:
        """Resident experts, the first to be evicted first."""

    @property
    def state(self) -> State:
        """What `restore` needs; "residents" are in the order of their last selection."""

    def restore(self, state: State) -> None:
        """Go on as the policy that had this `state`; only for a policy that was told nothing yet."""


def victims(policy: EvictionPolicy, n: int, protected: Collection[int]) -> list[int]:
    """The next `n` experts to evict, none of them `protected`; fewer if there are not that many. Changes nothing."""
    return policy.first(n, protected) if n > 0 else []


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

    def first(self, n: int, protected: Container[int]) -> list[int]:
        return list(islice((e for e in self._experts if e not in protected), n))

    def order(self) -> Iterator[int]:
        return iter(self._experts)

    @property
    def state(self) -> State:
        return {"residents": list(self._experts)}

    def restore(self, state: State) -> None:
        self._experts = OrderedDict.fromkeys(state["residents"])


class LFU:
    """Evict the expert selected least often since it became resident."""

    def __init__(self) -> None:
        self._count: dict[int, int] = {}  # residents -> selections
        self._stamp: dict[int, int] = {}  # residents -> when last selected; larger is later
        self._heap = RisingHeap()
        self._clock = 0

    def advance(self, tokens: int) -> None:
        pass

    def insert(self, expert: int) -> None:
        self._clock += 1
        self._count[expert], self._stamp[expert] = 0, self._clock
        self._heap.add(expert, (0, self._clock))

    def remove(self, expert: int) -> None:
        del self._count[expert], self._stamp[expert]
        self._heap.remove(expert)

    def touch(self, expert: int, count: int = 1) -> None:
        if expert in self._count:
            self._clock += 1
            self._count[expert] += count
            self._stamp[expert] = self._clock

    def first(self, n: int, protected: Container[int]) -> list[int]:
        return self._heap.smallest(n, self._key, protected)

    def order(self) -> Iterator[int]:
        return iter(sorted(self._count, key=self._key))

    @property
    def state(self) -> State:
        residents = sorted(self._stamp, key=self._stamp.__getitem__)
        return {"residents": residents, "counts": [self._count[e] for e in residents]}

    def restore(self, state: State) -> None:
        for expert, count in zip(state["residents"], state["counts"], strict=True):
            self.insert(expert)
            self.touch(expert, count)

    def _key(self, expert: int) -> Key:
        return self._count[expert], self._stamp[expert]


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
        self._heap = RisingHeap()
        self._clock = 0

    def advance(self, tokens: int) -> None:
        if not tokens:
            return
        doublings = -tokens * math.log2(self._decay)
        if doublings > 512:  # nothing is left of earlier counts, and the factor would not fit into a float
            self._count.clear()
            self._growth = 1.0
            self._heap.rebuild(self._key)
        else:
            self._growth *= 2.0**doublings
            if self._growth > 2.0**256:
                for expert in self._count:  # by a power of two, so that nothing is rounded
                    self._count[expert] *= 2.0**-512
                self._growth *= 2.0**-512
                self._heap.rebuild(self._key)
        d = self._decay
        self._share = 1.0 if d == 1 else (1 - d**tokens) / (tokens * (1 - d))

    def insert(self, expert: int) -> None:
        self._clock += 1
        self._stamp[expert] = self._clock
        self._heap.add(expert, self._key(expert))

    def remove(self, expert: int) -> None:
        del self._stamp[expert]
        self._heap.remove(expert)

    def touch(self, expert: int, count: int = 1) -> None:
        self._count[expert] = self._count.get(expert, 0.0) + count * self._share * self._growth
        if expert in self._stamp:
            self._clock += 1
            self._stamp[expert] = self._clock

    def first(self, n: int, protected: Container[int]) -> list[int]:
        return self._heap.smallest(n, self._key, protected)

    def order(self) -> Iterator[int]:
        return iter(sorted(self._stamp, key=self._key))

    @property
    def state(self) -> State:
        residents = sorted(self._stamp, key=self._stamp.__getitem__)
        return {"residents": residents, "growth": self._growth, "counts": list(self._count.items())}

    def restore(self, state: State) -> None:
        self._growth, self._count = state["growth"], dict(state["counts"])
        for expert in state["residents"]:
            self.insert(expert)

    def _key(self, expert: int) -> Key:
        return self._count.get(expert, 0.0), self._stamp[expert]


class LFRU:
    """Evict the expert with the smallest count / (age + 1), age in tokens of the layer since its last selection.

    Counts outlive evictions, as those of `Decay`; here it makes hardly a difference. The experts of a call with
    several tokens count as selected at its end.
    """

    def __init__(self) -> None:
        self._count: dict[int, int] = {}
        self._used: dict[int, tuple[int, int]] = {}  # residents -> (token, stamp) of the last selection
        self._token = self._clock = 0
        # Values fall as time passes, each at its own pace, so no order of them lasts. But when an expert will fall to a
        # fixed value is known, and using it only puts that off: those at or below `_limit` wait in `_low`, the others
        # in a heap by that time. `_low` is short, and only there values are compared.
        self._limit, self._drawn = math.inf, 0
        self._low: set[int] = set()
        self._heap = RisingHeap()

    def advance(self, tokens: int) -> None:
        self._token += tokens

    def insert(self, expert: int) -> None:
        self._clock += 1
        self._used[expert] = self._token, self._clock
        self._low.add(expert)

    def remove(self, expert: int) -> None:
        del self._used[expert]
        if expert in self._low:
            self._low.remove(expert)
        else:
            self._heap.remove(expert)

    def touch(self, expert: int, count: int = 1) -> None:
        self._count[expert] = self._count.get(expert, 0) + count
        if expert in self._used:
            self._clock += 1
            self._used[expert] = self._token, self._clock

    def first(self, n: int, protected: Collection[int]) -> list[int]:
        self._low.update(self._heap.pop_below(self._token, self._falls))
        ranked = []
        for expert in tuple(self._low):
            key = self._key(expert)
            if key[0] > self._limit:
                self._low.remove(expert)
                self._heap.add(expert, self._falls(expert))
            elif key[0] < self._limit * CERTAIN or self._limit == math.inf:
                ranked.append((key, expert))
        ranked.sort()
        found = [expert for _, expert in ranked if expert not in protected][:n]
        # Many equal values, as a long prompt leaves, would crowd it again at once: hence the patience.
        crowded = len(self._low) > MANY_LOW + 2 * (n + len(protected)) and self._token >= self._drawn + PATIENCE
        if crowded or (len(found) < n and len(self._heap)):
            order = list(self.order())
            self._draw_limit(order, n + len(protected) + FEW_LOW)
            found = [expert for expert in order if expert not in protected][:n]
        return found

    def order(self) -> Iterator[int]:
        return iter(sorted(self._used, key=self._key))

    @property
    def state(self) -> State:
        residents = sorted(self._used, key=self._used.__getitem__)
        used = [self._used[e][0] for e in residents]
        return {"residents": residents, "used": used, "token": self._token, "counts": list(self._count.items())}

    def restore(self, state: State) -> None:
        self._count = dict(state["counts"])
        for expert, self._token in zip(state["residents"], state["used"], strict=True):
            self.insert(expert)
        self._token = state["token"]

    def _key(self, expert: int) -> Key:
        token, stamp = self._used[expert]
        return self._count.get(expert, 0) / (self._token - token + 1), stamp

    def _falls(self, expert: int) -> Key:
        """The token at which the value will have fallen to `_limit`."""
        token, stamp = self._used[expert]
        return token - 1 + self._count.get(expert, 0) / self._limit, stamp

    def _draw_limit(self, order: list[int], n: int) -> None:
        """Let the first `n` of `order` be those at or below the limit."""
        self._limit = max(self._key(order[n])[0], 1e-12) if n < len(order) else math.inf
        self._drawn = self._token
        self._low, self._heap = set(order[:n]), RisingHeap()
        for expert in order[n:]:
            self._heap.add(expert, self._falls(expert))


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
