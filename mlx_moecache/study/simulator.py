"""Replaying a trace through simulated caches: any eviction policy, number of slots and routing. Plain Python, no files.

Selections of a trace of original routing do not depend on the cache, so replaying them is exact: the calls go through
the same Residents as in the engine, event for event. A strategy that prefers residents would have changed hidden
states, and so later scores; replaying it on recorded scores is an approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from ..residents import Load, Residents, hottest_last
from ..strategies import Strategy
from .belady import Belady
from .recurrence import Counts, LayerRecurrence
from .trace import LayerTrace
from .trace_format import Floats

BOUNDS = ("belady", "belady-paper")
Initial = Literal["empty", "random", "warm"]
Starts = Mapping[int, Sequence[int]]  # call at which the cache starts anew -> its contents there
# Told of every call: its number, the experts that were missing, the loads in order.
Watch = Callable[[int, Sequence[int], Sequence[Load]], None]


@dataclass
class PhaseCounts:
    """What one layer counted, prefill and decode apart."""

    prefill: Counts = field(default_factory=Counts)
    decode: Counts = field(default_factory=Counts)

    def of(self, decode: bool) -> Counts:
        return self.decode if decode else self.prefill


@dataclass(frozen=True)
class Call:
    """One call of a layer: what it selected, and the rows of the trace that it stands for."""

    number: int
    first: int
    rows: int
    decode: bool
    uses: list[tuple[int, int]]  # (expert, selections), those that the cache keeps longest last

    @property
    def needed(self) -> list[int]:
        return [e for e, _ in self.uses]


def calls_of(layer: LayerTrace) -> Iterator[Call]:
    """The calls of a layer with the router's own selections."""
    rows, bounds, decode = layer.own.tolist(), layer.calls.tolist(), layer.decode.tolist()
    if layer.shape.ranked > layer.shape.experts:  # what computes nothing is never loaded
        rows = [[e for e in row if e < layer.shape.experts] for row in rows]
    for i, phase in enumerate(decode):
        first, end = bounds[i], bounds[i + 1]
        if end - first == 1:
            uses = [(e, 1) for e in rows[first]]
        else:
            counts: dict[int, int] = {}
            for row in rows[first:end]:
                for e in row:
                    counts[e] = counts.pop(e, 0) + 1  # to the end: the order is that of the last use
            uses = hottest_last(list(counts.items()))
        yield Call(i, first, end - first, phase, uses)


def starts_of(layer: LayerTrace, slots: int, initial: Initial, *, seed: int = 0) -> dict[int, list[int]]:
    """Where the layer's cache starts anew, and with which experts, the first to be evicted first.

    empty: as after loading. random: drawn for each start from `seed`. warm: the experts that the whole trace uses most,
    as a cache that was saved earlier might hold them.
    """
    experts = layer.shape.experts
    slots = min(slots, experts)
    starts: dict[int, list[int]] = {}
    frequent = np.argsort(np.bincount(layer.own.ravel(), minlength=experts)[:experts], kind="stable")[-slots:].tolist()
    for n, (call, cold) in enumerate(layer.sequences):
        if not cold:
            continue
        if initial == "random":
            starts[call] = np.random.default_rng((seed, layer.number, n)).permutation(experts)[:slots].tolist()
        else:
            starts[call] = frequent if initial == "warm" else []
    return starts


def replay_layer(
    layer: LayerTrace,
    slots: int,
    eviction: str,
    starts: Starts,
    *,
    watch: Watch | None = None,
) -> PhaseCounts:
    """Replay the router's own selections of one layer under a policy, as the engine would serve them.

    Raises UsageError for an unknown policy.
    """
    residents = Residents(layer.shape.experts, min(slots, layer.shape.experts), eviction)
    counts, born, clock = PhaseCounts(), dict[int, int](), 0
    for call in calls_of(layer):
        if call.number in starts:
            residents.seed(starts[call.number])
            born = dict.fromkeys(starts[call.number], clock)
        into, needed = counts.of(call.decode), call.needed
        missing = [e for e in needed if e not in residents]
        misses, loads = len(missing), list[Load]()
        if missing:
            if call.rows > 1:
                misses = sum(n for e, n in call.uses if e not in residents)
            if len(needed) <= residents.capacity:
                loads = residents.plan(needed)
                residents.publish(loads)
            else:
                for wave in residents.plan_waves(needed):
                    residents.publish(wave.loads)
                    loads += wave.loads
            for x in loads:
                if x.victim is not None:
                    into.lives += 1
                    into.life_tokens += clock - born.pop(x.victim)
                born[x.expert] = clock
        residents.touch(call.uses, call.rows)
        clock += call.rows
        add_call(into, call, misses, len(loads))
        if watch is not None:
            watch(call.number, missing, loads)
    return counts


def replay_bound(layer: LayerTrace, slots: int, bound: str, starts: Starts) -> PhaseCounts:
    """The fewest loads with which any policy could have served the layer; `bound` is one of BOUNDS."""
    calls = list(calls_of(layer))
    cache = Belady(
        [c.needed for c in calls],
        min(slots, layer.shape.experts),
        variant="paper" if bound == "belady-paper" else "engine",
    )
    counts, born, clock = PhaseCounts(), dict[int, int](), 0
    for call in calls:
        if call.number in starts:
            cache.restart(starts[call.number])
            born = dict.fromkeys(starts[call.number], clock)
        into = counts.of(call.decode)
        misses = sum(n for e, n in call.uses if e not in cache)
        missing, left = cache.step()
        born.update(dict.fromkeys(missing, clock))
        for e in left:
            into.lives += 1
            into.life_tokens += clock - born.pop(e)
        clock += call.rows
        add_call(into, call, misses, len(missing))
    return counts


def replay_strategy(
    layer: LayerTrace, scores: tuple[Floats, Floats], slots: int, eviction: str, strategy: Strategy, starts: Starts
) -> PhaseCounts:
    """Route the recorded scores (z, p) of one layer again under a strategy, one token at a time; prefill is unbiased.

    An approximation: other routes would have led to other scores.
    """
    shape = layer.shape
    slots = min(slots, shape.experts)
    recurrence = LayerRecurrence(shape.experts, shape.k, slots, strategy, eviction=eviction, ranked=shape.ranked)
    total = PhaseCounts()
    for first, end, decode, start in _stretches(layer, starts):
        if start is not None:
            recurrence.reset_cache(start)
        recurrence.counts = total.of(decode)
        z, p = (x[first:end] for x in scores)
        recurrence.run(z, p, layer.own[first:end], biased_from=0 if decode else end - first)
    return total


def _stretches(layer: LayerTrace, starts: Starts) -> Iterator[tuple[int, int, bool, Sequence[int] | None]]:
    """The longest stretches of rows in one phase and without a new start: (first row, end, decode, contents)."""
    changes = {0, *starts, *(np.flatnonzero(np.diff(layer.decode)) + 1).tolist()}
    bounds = [*sorted(changes), len(layer.decode)]
    for i, j in pairwise(bounds):
        yield int(layer.calls[i]), int(layer.calls[j]), bool(layer.decode[i]), starts.get(i)


def add_call(into: Counts, call: Call, misses: int, loads: int) -> None:
    """Count one call."""
    into.tokens += call.rows
    into.token_layers += call.rows
    into.selections += sum(n for _, n in call.uses)
    into.misses += misses
    into.loads += loads
    into.all_hit += call.rows * (misses == 0)
