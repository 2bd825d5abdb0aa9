"""Belady's bound: the fewest loads with which any eviction could have served a trace of selections that is known whole.

On a miss, the resident expert whose next use lies farthest ahead gives way. Two variants: "engine" never evicts an
expert that the running call selected, since all of them must be in memory when it computes; "paper" is that of the
paper's author, which may evict an expert that was inserted for this very token, so it is the lower of the two where
slots are few (equal above about 2 k slots).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import numpy.typing as npt

Variant = Literal["engine", "paper"]
Routes = npt.NDArray[np.integer] | Sequence[Sequence[int]]  # for each token of a layer, its experts


class Belady:
    """The optimal cache of one layer, stepped through a known list of calls."""

    def __init__(
        self, calls: Sequence[Sequence[int]], slots: int, *, variant: Variant = "engine", initial: Sequence[int] = ()
    ) -> None:
        """calls: per call its distinct experts, in the order of their last use. initial: experts that are resident."""
        self._calls, self._slots, self._variant = calls, slots, variant
        self._places = [0, *accumulate(map(len, calls))]  # uses before each call
        self._never = self._places[-1]
        self._next: list[list[int]] = [[]] * len(calls)  # per call and expert: the place of its next use
        following: dict[int, int] = {}
        for i in range(len(calls) - 1, -1, -1):
            self._next[i] = [following.get(e, self._never) for e in calls[i]]
            following.update((e, self._places[i] + n) for n, e in enumerate(calls[i]))
        self._at = 0
        self.restart(initial)

    def restart(self, initial: Sequence[int] = ()) -> None:
        """The next call finds exactly `initial` in memory."""
        self._resident = dict.fromkeys(initial, self._never)
        if initial:  # their next uses, seen from here
            for i in range(len(self._calls) - 1, self._at - 1, -1):
                for n, e in enumerate(self._calls[i]):
                    if e in self._resident:
                        self._resident[e] = self._places[i] + n

    def __contains__(self, expert: int) -> bool:
        return expert in self._resident

    def step(self) -> tuple[list[int], list[int]]:
        """Serve the next call: (experts loaded, experts that left)."""
        needed, following = self._calls[self._at], self._next[self._at]
        self._at += 1
        resident = self._resident
        missing = [e for e in needed if e not in resident]
        before = set(resident) if missing else set()
        if self._variant == "paper" and len(needed) <= self._slots:
            for e, ahead in zip(needed, following, strict=True):
                if e not in resident and len(resident) >= self._slots:
                    del resident[max(resident, key=resident.__getitem__)]
                resident[e] = ahead
        else:
            resident.update(zip(needed, following, strict=True))
            over = len(resident) - self._slots
            if over > 0:
                # A chunk with more experts than slots is served in waves and may leave any of them behind.
                kept = frozenset(needed) if len(needed) <= self._slots else frozenset()
                others = [e for e in resident if e not in kept]
                if over == 1:
                    del resident[max(others, key=resident.__getitem__)]
                else:
                    for e in sorted(others, key=resident.__getitem__)[-over:]:
                        del resident[e]
        return missing, [e for e in before if e not in resident]


def belady_misses(selections: Routes, slots: int, *, variant: Variant = "engine", initial: Sequence[int] = ()) -> int:
    """Misses of the optimal eviction over one layer's `selections` by T tokens, one token at a time."""
    calls: Sequence[Sequence[int]] = selections.tolist() if isinstance(selections, np.ndarray) else selections
    cache = Belady(calls, slots, variant=variant, initial=initial)
    return sum(len(cache.step()[0]) for _ in calls)
