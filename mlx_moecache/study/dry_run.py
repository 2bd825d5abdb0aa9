"""A dry run of a routing strategy beside exact routing: what it would have swapped, and which reads that would save.

Two shadow caches per layer see the same scores, one routed as the model does and one by the strategy. That is an
estimate: had the strategy really routed, later scores would differ. Plain Python and NumPy; no reply changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..observer import RoutedCall
from ..residents import Residents
from ..strategies import Original, Strategy
from ..uses import ranked_uses
from .recurrence import LayerRecurrence, over_layers
from .trace_format import softmax


@dataclass(frozen=True)
class DryRunEstimate:
    """Decode only, summed over tokens and over the layers that are partly resident."""

    routing: str  # spec of the strategy
    tokens: int
    selections: int
    swapped: int  # selections that the strategy would have changed
    misses_exact: int  # of the shadow cache that is routed as the model does
    misses_biased: int
    mass_lost: float  # router mass given up, summed over tokens and layers

    @property
    def saved(self) -> int:
        """Misses, and so reads, that the strategy would have saved."""
        return self.misses_exact - self.misses_biased


class DryRun:
    """Shadow caches for all MoE layers of a model; an observer of its calls (see ExpertCache.observed_by).

    Layers whose experts all fit are left out, as in the statistics.
    """

    def __init__(self, strategy: Strategy, layers: Sequence[tuple[int, Residents]]) -> None:
        """layers: k of each, and what it holds, from which the shadow caches begin as copies.

        Raises UsageError for settings that cannot work.
        """
        self.strategy = strategy
        self._start = [(k, residents.copy()) for k, residents in layers]
        self._ranked = [r.num_experts for _, r in layers]  # experts that the router ranks, as far as is known
        self._pairs = [self._pair(i) if r.capacity < r.num_experts else () for i, (_, r) in enumerate(layers)]

    def observe(self, call: RoutedCall) -> None:
        """One call of a layer. Only single tokens at decode are routed by the strategy, as in a real run.

        Layers whose router cannot be observed are left out.
        """
        pair = self._pairs[call.layer]
        if not pair or call.z is None:
            return
        if call.z.shape[-1] != self._ranked[call.layer]:  # some experts compute nothing, which only a call shows
            self._ranked[call.layer] = call.z.shape[-1]
            pair = self._pairs[call.layer] = self._pair(call.layer)
        p = softmax(call.z) if call.p is None else call.p
        alone = call.steps or len(call.z) == 1
        for recurrence in pair:
            before = replace(recurrence.counts)
            if alone:
                biased_from = 0 if call.phase == "decode" else len(call.z)
                recurrence.run(call.z, p, call.own.astype(np.intp), biased_from=biased_from)
            else:
                scores = np.take_along_axis(call.z, call.own, axis=-1)
                uses = ranked_uses(call.own, scores, recurrence.residents.num_experts)
                recurrence.call(uses, len(call.z), call.z)
            if call.phase != "decode":
                recurrence.counts = before  # the prompt warms the caches and is not counted

    def _pair(self, layer: int) -> tuple[LayerRecurrence, ...]:
        """Shadow caches of one layer: routed as the model does, and by the strategy."""
        k, start = self._start[layer]
        pair = tuple(
            LayerRecurrence(
                start.num_experts, k, start.capacity, s, eviction=start.eviction, ranked=self._ranked[layer]
            )
            for s in (Original(), self.strategy)
        )
        for recurrence in pair:
            recurrence.reset_cache(start.eviction_order())
            recurrence.residents.adopt_history(start)
        return pair

    def estimate(self) -> DryRunEstimate:
        """What was seen so far."""
        pairs = [x for x in self._pairs if x]
        exact = over_layers(x[0].counts for x in pairs)
        biased = over_layers(x[1].counts for x in pairs)
        return DryRunEstimate(
            self.strategy.spec,
            biased.tokens,
            biased.selections,
            biased.swapped,
            exact.misses,
            biased.misses,
            biased.mass_lost,
        )
