"""What a loaded model holds and did, as the reports show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .report import CacheUse, MemoryUse

if TYPE_CHECKING:
    import mlx.nn as nn


def memory_use(model: nn.Module, kv_cache: Sequence[Any], *, not_charged: int | None) -> MemoryUse:
    """MLX's peak since it was last reset, and who holds what. not_charged: bytes of interpreter and libraries."""
    import mlx.core as mx

    from .. import system

    cache = model.expert_cache
    return MemoryUse(
        peak=mx.get_peak_memory(),
        resident=model.memory_plan.resident,
        slots=cache.nbytes,
        kv=sum(int(c.nbytes) for c in kv_cache),
        host_buffers=cache.reader.host_buffer_bytes,
        not_charged=not_charged,
        footprint=system.peak_footprint(),
    )


def cache_use(model: nn.Module) -> CacheUse:
    """A copy of the counters, and the settings behind them."""
    cache = model.expert_cache
    return CacheUse(
        stats=cache.stats.copy(),
        slots_per_layer=tuple(cache.slots_per_layer),
        experts_per_layer=tuple(cache.experts_per_layer),
        eviction=cache.layers[0].residents.eviction,
        routing=cache.strategy.name,
        parameters=dict(cache.strategy.parameters),
        prunes=any(cache.strategy.kept(x.k) < x.k for x in cache.layers),
        io_mode=cache.reader.io_mode,
        io_note=cache.reader.io_note,
        resizes=model.elastic_slots.counts() if model.elastic_slots is not None else None,
    )
