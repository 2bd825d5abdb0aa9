"""Replaying a trace through one pool of slots that all layers share, instead of a cache per layer.

The engine keeps a cache per layer; this says what a shared pool would do. A plain LRU pool that is smaller than one
token's pass through the layers hardly ever hits: it evicts now what the pass needs next. "least-stale" (after SpecMD,
arXiv 2602.03921) evicts what the running pass has already gone past, which is needed again a whole pass later; of these
the least recently used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from ..errors import UsageError
from .simulator import Call, PhaseCounts, calls_of
from .trace import LayerTrace

SHARED_POLICIES = ("lru", "least-stale")


class SharedPool:
    """Which experts of which layers are in `capacity` slots."""

    def __init__(self, layers: int, capacity: int, policy: str) -> None:
        if policy not in SHARED_POLICIES:
            raise UsageError(f"a shared pool has no policy {policy!r} (choose {', '.join(SHARED_POLICIES)})")
        self._policy, self._capacity = policy, capacity
        self._resident: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(layers)]  # expert -> last use
        self._clock = self._size = 0

    def missing(self, layer: int, needed: Sequence[int]) -> list[int]:
        return [e for e in needed if e not in self._resident[layer]]

    def use(self, layer: int, needed: Sequence[int]) -> list[tuple[int, int]]:
        """Make `needed`, in the order of their last use, resident; returns who left, as (layer, expert).

        None of `needed` leaves, unless they are more than there are slots.
        """
        here, left = self._resident[layer], list[tuple[int, int]]()
        kept = frozenset(needed) if len(needed) <= self._capacity else frozenset()
        for expert in needed:
            if expert not in here:
                if self._size == self._capacity:
                    left.append(self._evict(layer, kept))
                self._size += 1
            self._clock += 1
            here[expert] = self._clock
            here.move_to_end(expert)
        return left

    def _evict(self, layer: int, kept: Collection[int]) -> tuple[int, int]:
        """Remove the next victim of a call of `layer`."""
        oldest = []  # per layer: last use, layer, expert
        for i, experts in enumerate(self._resident):
            found = next((e for e in experts if i != layer or e not in kept), None)
            if found is not None:
                oldest.append((experts[found], i, found))
        if self._policy == "least-stale":
            passed = [x for x in oldest if x[1] <= layer]
            oldest = passed or oldest[-1:]  # of what is still ahead, the last layer is needed last
        _, i, expert = min(oldest)
        del self._resident[i][expert]
        self._size -= 1
        return i, expert


def replay_shared(layers: Sequence[LayerTrace], capacity: int, policy: str) -> list[PhaseCounts]:
    """The router's own selections of all layers through one pool of `capacity` slots; counts per layer.

    The pool is empty wherever the recorded caches were. Raises UsageError if one token of a layer does not fit.
    """
    most = max(x.shape.k for x in layers)
    if capacity < most:
        raise UsageError(f"a shared pool of {capacity} slots is too small: one token of a layer needs {most}")
    pool = SharedPool(len(layers), capacity, policy)
    counts = [PhaseCounts() for _ in layers]
    clocks = [0] * len(layers)
    born: dict[tuple[int, int], int] = {}
    cold = {call for x in layers for call, empty in x.sequences if empty}
    for number, i, call in _in_order(layers):
        if i == 0 and number in cold:
            pool, born = SharedPool(len(layers), capacity, policy), {}
        into, needed = counts[i].of(call.decode), call.needed
        missing = frozenset(pool.missing(i, needed))
        born.update(((i, e), clocks[i]) for e in missing)
        for key in pool.use(i, needed):
            into.lives += 1
            into.life_tokens += clocks[key[0]] - born.pop(key)
        misses = sum(n for e, n in call.uses if e in missing)
        into.add_call(call.uses, call.rows, misses, len(missing))
        clocks[i] += call.rows
    return counts


def _in_order(layers: Sequence[LayerTrace]) -> list[tuple[int, int, Call]]:
    """(number of the pass, layer, call) in the order of the forward passes."""
    return sorted(
        ((call.number, i, call) for i, x in enumerate(layers) for call in calls_of(x)), key=lambda c: (c[0], c[1])
    )
