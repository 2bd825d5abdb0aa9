"""The recurrence of one layer as reading windows needs it: tokens that do not count, and caches to go on with later."""

from __future__ import annotations

import numpy as np

from ..eviction import State
from .recurrence import Counts, LayerRecurrence
from .strategies_numpy import Array


class WindowRecurrence(LayerRecurrence):
    """A LayerRecurrence whose next `uncounted` tokens change cache and D as all do, but not `counts`."""

    uncounted = 0

    @property
    def cache_state(self) -> State:
        """As plain numbers, fit for JSON: what is resident, since which token, and what decides who leaves next."""
        state = self.residents.state
        return {**state, "born": [self._born[e] for e in state["residents"]]}

    @cache_state.setter
    def cache_state(self, state: State) -> None:
        """Ages are told by the tokens behind D, so `range_state` has to be set as well."""
        self.reset_cache(state["residents"])
        self.residents.restore(state)
        self._born = dict(zip(state["residents"], state["born"], strict=True))

    def _advance(self, z: Array, p: Array | None, own: list[int], D: np.float32, biased: bool) -> list[int]:
        if not self.uncounted:
            return super()._advance(z, p, own, D, biased)
        self.uncounted -= 1
        counts, self.counts = self.counts, Counts()
        try:
            return super()._advance(z, p, own, D, biased)
        finally:
            self.counts = counts
