"""What the server did so far and what it holds, as one value that other threads may read."""

from __future__ import annotations

from dataclasses import dataclass

from ..console.report import MemoryUse
from ..stats import CacheStats


@dataclass(frozen=True)
class EngineState:
    """Counters since the start."""

    stats: CacheStats
    prompt_tokens: int  # computed
    cached_tokens: int  # of prompts, found in the KV cache
    completion_tokens: int
    prompt_seconds: float
    decode_seconds: float
    decode_tps: float | None  # of the last reply
    memory: MemoryUse
    slots: int  # of all layers
    experts: int
