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

from ..residents import Load
from ..strategies import Original, Strategy
from ..uses import uses_of
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
        yield Call(i, first, end - first, phase, uses_of(rows[first:end]))


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
    recurrence, counts = _recurrence(layer, slots, eviction, Original()), PhaseCounts()
    for call in calls_of(layer):
        if call.number in starts:
            recurrence.reset_cache(starts[call.number])
        recurrence.counts = counts.of(call.decode)
        missing, loads = recurrence.call(call.uses, call.rows)
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
        into.add_call(call.uses, call.rows, misses, len(missing))
    return counts


def replay_strategy(
    layer: LayerTrace, scores: tuple[Floats, Floats], slots: int, eviction: str, strategy: Strategy, starts: Starts
) -> PhaseCounts:
    """Route the recorded scores (z, p) of one layer again under a strategy: only single tokens at decode are biased.

    An approximation: other routes would have led to other scores.
    """
    recurrence, total = _recurrence(layer, slots, eviction, strategy), PhaseCounts()
    calls = list(calls_of(layer))
    for i, j, at_once in _stretches(layer, starts):
        if i in starts:
            recurrence.reset_cache(starts[i])
        recurrence.counts = total.of(calls[i].decode)
        rows = slice(int(layer.calls[i]), int(layer.calls[j]))
        z, p = (x[rows] for x in scores)
        if at_once:
            recurrence.call(calls[i].uses, calls[i].rows, z)
        else:
            recurrence.run(z, p, layer.own[rows], biased_from=0 if calls[i].decode else len(z))
    return total


def _recurrence(layer: LayerTrace, slots: int, eviction: str, strategy: Strategy) -> LayerRecurrence:
    shape = layer.shape
    slots = min(slots, shape.experts)
    return LayerRecurrence(shape.experts, shape.k, slots, strategy, eviction=eviction, ranked=shape.ranked)


def _stretches(layer: LayerTrace, starts: Starts) -> Iterator[tuple[int, int, bool]]:
    """(first call, end, at once): a call of several tokens, or the longest stretch of calls with one token.

    A stretch is of one phase and without a new start.
    """
    several = np.diff(layer.calls) > 1
    changes = np.flatnonzero(np.diff(layer.decode) | several[1:] | several[:-1]) + 1
    bounds = [*sorted({0, *starts, *changes.tolist()}), len(layer.decode)]
    for i, j in pairwise(bounds):
        yield i, j, bool(several[i])
