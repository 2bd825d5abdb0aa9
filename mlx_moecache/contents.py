"""What an expert cache holds, taken at one moment, so that it can be had again: for comparisons and for warm starts."""

from __future__ import annotations

from dataclasses import dataclass

from .residents import Residents


@dataclass(frozen=True)
class LayerContents:
    """One layer: who is resident, in which order they would leave and why, and the running range D of its router."""

    residents: Residents  # a copy that nobody changes
    range_total: float
    range_tokens: int

    @property
    def experts(self) -> tuple[int, ...]:
        """The resident experts, the first to be evicted first."""
        return tuple(self.residents.eviction_order())


@dataclass(frozen=True)
class CacheContents:
    """All layers. Taken by `ExpertCache.contents`, given back to `ExpertCache.restore`."""

    layers: tuple[LayerContents, ...]

    @property
    def experts(self) -> tuple[tuple[int, ...], ...]:
        """Per layer the resident experts, the first to be evicted first."""
        return tuple(x.experts for x in self.layers)

    @property
    def slots_per_layer(self) -> list[int]:
        return [x.residents.capacity for x in self.layers]
