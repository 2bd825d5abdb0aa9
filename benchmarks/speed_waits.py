"""Waiting that is added on purpose: longer looks at the device, and a control that only waits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from speed_replay import before_call

from mlx_moecache.cached_switch import CachedSwitch
from mlx_moecache.expert_cache import ExpertCache

if TYPE_CHECKING:
    from speed_rounds import Segment
    from speed_setup import Side

SPIN_SECONDS = 0.1e-3  # of a wait: a sleep ends later than asked for, by about half of this


def pause(seconds: float) -> float:
    """Wait so long, asleep for most of it, so that other threads run; the seconds that it took."""
    began = time.perf_counter()
    if seconds > SPIN_SECONDS:
        time.sleep(seconds - SPIN_SECONDS)
    while (now := time.perf_counter()) < began + seconds:
        pass
    return now - began


class SlowHostReads:
    """Each look of one model at what its layers chose takes `seconds` more, as on a device that answers later.

    What chooses the span is told, as it would have measured it.
    """

    def __init__(self, seconds: float, cache: ExpertCache, switches: Sequence[CachedSwitch]) -> None:
        self.seconds = seconds
        self.slept = 0.0
        for switch in switches:
            self._lengthen(switch, "_wait")
        if cache.optimist is not None:
            self._lengthen(cache.optimist, "_look")
            cache.optimist.chooser.host_read += seconds

    def _lengthen(self, owner: object, name: str) -> None:
        look = getattr(owner, name)

        def lengthened(first: Any, *rest: Any) -> None:
            look(first, *rest)
            if rest or first:  # a pass in which no layer chose anything does not look
                self.slept += pause(self.seconds)

        setattr(owner, name, lengthened)


class IdleControl:
    """The all-resident side with the waits of another one: evaluated before the experts of each layer, then idle.

    Nothing is read and no cache works, so what a token takes beyond its waits, compared with the same evaluations and
    no waits, is what idling costs: a core that was halted, caches that others have used meanwhile.
    """

    def __init__(self, side: Side) -> None:
        """side: a slot for every expert. It stays as it is for whoever else times it."""
        self._side = side
        self._replies: dict[str | None, Iterator[Any]] = {}  # None: no waits
        self._waits: Iterator[float] | None = None  # of the layers to come; None: not our turn
        self._slept = 0.0
        for switch in side.switches:
            before_call(switch, self._stop)

    def begin(self, names: Sequence[str], prompt: int, *, warm_up: int, tokens: int) -> None:
        """Start a reply for each of `names`, of which up to `tokens` tokens will be timed."""
        for name in (None, *names):
            self._replies[name] = self._side.reply(prompt, tokens=1 + warm_up + 2 * tokens + 1)
            for _ in range(1 + warm_up):
                next(self._replies[name])
        mx.synchronize()

    def excess(self, segments: dict[str, Segment]) -> dict[str, float]:
        """Seconds per token that idling as in `segments` costs beyond the waits themselves, of those that waited."""
        waiting = {name: s for name, s in segments.items() if name in self._replies and sum(s.waits)}
        if not waiting:
            return {}
        most = max(s.tokens for s in waiting.values())
        first = self._seconds(None, most, ())
        taken = {name: self._seconds(name, s.tokens, s.waits) for name, s in waiting.items()}
        without = (first + self._seconds(None, most, ())) / 2
        return {name: x - without for name, x in taken.items()}

    def _seconds(self, name: str | None, tokens: int, waits: Sequence[float]) -> float:
        """Per token, the waits left out."""
        self._waits, self._slept = iter(waits), 0.0
        began = time.perf_counter()
        try:
            for _ in range(tokens):
                next(self._replies[name])
            mx.synchronize()
        finally:
            self._waits = None
        return (time.perf_counter() - began - self._slept) / tokens

    def _stop(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._waits is None:
            return
        mx.eval(args, kwargs)
        wait = next(self._waits, 0.0)
        if wait:
            self._slept += pause(wait)
