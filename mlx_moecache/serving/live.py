"""What the live page shows: which experts are in memory and in use, and how the reply at hand goes.

The thread that computes writes here; threads of the HTTP server read. Each value has one writer and is replaced as a
whole or changed in place, so there are no locks, and nothing that is read here is an MLX array.
"""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..console.report import MemoryUse
from ..stats import CacheStats, PhaseStats

if TYPE_CHECKING:
    import mlx.nn as nn

    from ..generation import Response
    from ..layer_experts import LayerExperts

MEASURE_EVERY = 0.25  # seconds between measurements of memory while a reply runs
OVERLAP = 0.005  # seconds by which snapshots overlap: a call that is being noted while one is taken is not lost


@dataclass(frozen=True)
class Progress:
    """Where the reply at hand is, or how the last one ended. Rates in tokens per second, None: not known yet."""

    state: str = "idle"  # or "prompt", "reply"
    prompt_done: int = 0
    prompt_tokens: int = 0  # that have to be computed
    tokens: int = 0  # generated
    prompt_tps: float | None = None
    tps: float | None = None
    before: CacheStats = field(default_factory=CacheStats)  # counters when the reply began


class LiveView:
    """A `UsageListener` that remembers when each expert was last used and missed, and how a reply goes.

    One reply: ``began()``, then ``read(...)`` per prompt chunk and ``wrote(...)`` per token, then ``ended(...)``, all
    on the thread that computes. ``snapshot()`` and ``changes`` may be used from any thread.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "",
        has_template: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """name: of the model, for people. has_template: whether the model can be given messages."""
        self._model, self._cache = model, model.expert_cache
        self._name, self._has_template = name, has_template
        self._clock = clock
        counts = self._cache.experts_per_layer
        self._used = [array("d", [-1.0]) * n for n in counts]  # per expert when it was last used, -1: never
        self._missed = [array("d", [-1.0]) * n for n in counts]
        self._resident: list[tuple[int, str]] = [(-1, "")] * len(counts)  # per layer a version and its bitmap
        self._progress = Progress(before=self._cache.stats.copy())
        self._memory: MemoryUse | None = None
        self._measured_at = 0.0
        self.changes = 0  # grows whenever there is something new to show

    # ---- on the thread that computes ----

    def start(self) -> None:
        """Listen to the expert cache from now on, and measure what is there already."""
        self._cache.listener = self
        self._measure(())

    def stop(self) -> None:
        """Listen no more."""
        if self._cache.listener is self:
            self._cache.listener = None

    def used(self, layer: int, phase: str, experts: Sequence[int], missed: Sequence[int]) -> None:
        """Note which experts a layer used."""
        now = self._clock()
        at = self._used[layer]
        for e in experts:
            at[e] = now
        if missed:
            at = self._missed[layer]
            for e in missed:
                at[e] = now
        self.changes += 1

    def began(self) -> None:
        """A request's turn has come."""
        self._show(Progress("prompt", before=self._cache.stats.copy()))

    def read(self, done: int, total: int, kv_cache: Sequence[Any]) -> None:
        """`done` of `total` prompt tokens are computed."""
        self._show(replace(self._progress, prompt_done=done, prompt_tokens=total))
        self._measure(kv_cache, at_most_every=MEASURE_EVERY)

    def wrote(self, response: Response, kv_cache: Sequence[Any]) -> None:
        """A token of the reply is there."""
        n = response.generation_tokens
        tps = response.generation_tps if n > 1 else None
        self._show(replace(self._progress, state="reply", tokens=n, prompt_tps=response.prompt_tps, tps=tps))
        self._measure(kv_cache, at_most_every=MEASURE_EVERY)

    def ended(self, kv_cache: Sequence[Any]) -> None:
        """The reply is complete, or was given up."""
        self._show(replace(self._progress, state="idle"))
        self._measure(kv_cache)

    def _show(self, progress: Progress) -> None:
        self._progress = progress
        self.changes += 1

    def _measure(self, kv_cache: Sequence[Any], *, at_most_every: float = 0.0) -> None:
        now = self._clock()
        if at_most_every and now - self._measured_at < at_most_every:
            return
        from ..console.usage import memory_use

        self._measured_at = now
        self._memory = memory_use(self._model, kv_cache, not_charged=None)
        self.changes += 1

    # ---- on any thread ----

    def snapshot(self, since: float = 0.0) -> dict[str, Any]:
        """Everything that the page shows, ready for JSON; what was used after `since`, the `time` of an earlier one.

        Bitmaps are base64 of ceil(E / 8) bytes per layer; expert e is bit e % 8 of byte e // 8, the lowest first.
        """
        now = self._clock()
        cache, p = self._cache, self._progress
        stats = cache.stats - p.before
        return {
            "time": now,
            "model": self._name,
            "has_template": self._has_template,
            "experts": cache.experts_per_layer,
            "slots": cache.slots_per_layer,
            "active": [x.k for x in cache.layers],
            "resident": [self._resident_bitmap(i, x) for i, x in enumerate(cache.layers)],
            "used": [_later(x, since - OVERLAP) for x in self._used],
            "missed": [_later(x, since - OVERLAP) for x in self._missed],
            "state": p.state,
            "prompt": {"done": p.prompt_done, "tokens": p.prompt_tokens, "tps": p.prompt_tps},
            "reply": {"tokens": p.tokens, "tps": p.tps, "bytes_per_token": _per_token(stats.decode, p.tokens)},
            "prefill": _counters(stats.prefill),
            "decode": _counters(stats.decode),
            "routing": {
                "name": cache.strategy.name,
                "parameters": dict(cache.strategy.parameters),
                # Of the reply at hand alone; what was kept of earlier turns may have been biased.
                "exact": stats.swapped == 0 and all(cache.strategy.kept(x.k) >= x.k for x in cache.layers),
            },
            "memory": self._memory_parts(),
        }

    def _resident_bitmap(self, number: int, layer: LayerExperts) -> str:
        """What is resident in the layer, encoded again only after a change."""
        residents = layer.residents
        version = residents.version
        if self._resident[number][0] != version:
            bits = np.zeros(layer.num_experts, dtype=bool)
            bits[_copy(residents.experts)] = True
            self._resident[number] = (version, _base64(bits))
        return self._resident[number][1]

    def _memory_parts(self) -> dict[str, Any] | None:
        """Bytes by part, the budget (None: slots were given) and the plan; None before the first measurement."""
        use, plan = self._memory, self._model.memory_plan
        if use is None:
            return None
        return {
            "parts": {
                "weights": use.resident,
                "expert slots": use.slots,
                "KV cache": use.kv,
                "transients": use.transients,
                "read buffers": use.host_buffers,
            },
            "peak": use.measured,
            "budget": plan.budget,
            "plan": plan.total,
        }


def _copy(experts: Any) -> list[int]:
    # The other thread may load experts meanwhile. CPython copies a dict's keys in one go, which no standard promises.
    while True:
        try:
            return list(experts)
        except RuntimeError:  # changed while it was read
            continue


def _later(times: array[float], since: float) -> str:
    return _base64(np.frombuffer(times) > max(since, 0.0))


def _base64(bits: np.ndarray[Any, np.dtype[np.bool_]]) -> str:
    return base64.b64encode(np.packbits(bits, bitorder="little").tobytes()).decode("ascii")


def _counters(stats: PhaseStats) -> dict[str, Any]:
    return {**asdict(stats), "hit_rate": stats.hit_rate, "swapped_share": stats.swapped_share}


def _per_token(decode: PhaseStats, tokens: int) -> float | None:
    """Bytes read per decode step; the first token comes out of the prompt, so there is one step fewer than tokens."""
    return decode.bytes_read / (tokens - 1) if tokens > 1 else None
