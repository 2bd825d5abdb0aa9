"""What a reply was like: the lines that commands print after it, and the same as one JSON object. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..budget import MemoryPlan, format_bytes
from ..stats import CacheStats, PhaseStats


@dataclass(frozen=True)
class Reply:
    """One reply. Rates are tokens per second, None where nothing was measured."""

    text: str
    finish_reason: str  # "stop" (end of text), "length" (token limit) or "interrupt"
    prompt_tokens: int
    cached_tokens: int  # of a saved prompt, not computed again
    generated_tokens: int
    prompt_tps: float | None
    decode_tps: float | None


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. `peak` is MLX's, reset before loading; `host_buffers` are ours, beside it."""

    peak: int
    resident: int
    slots: int
    kv: int
    host_buffers: int
    not_charged: int | None  # interpreter and libraries, there before loading; None where the system does not say
    footprint: int | None = None  # the most that the system charged the process with, `not_charged` included

    @property
    def measured(self) -> int:
        """What the budget is about, at its peak."""
        return self.peak + self.host_buffers

    @property
    def transients(self) -> int:
        """What the peak holds beside weights, slots and KV cache."""
        return max(0, self.peak - self.resident - self.slots - self.kv)


@dataclass(frozen=True)
class CacheUse:
    """How the expert cache was set up and what it did during the reply."""

    stats: CacheStats
    slots_per_layer: tuple[int, ...]
    experts_per_layer: tuple[int, ...]
    eviction: str
    routing: str
    parameters: dict[str, float]  # of the routing, by the names that users type
    prunes: bool  # it runs fewer experts than the model, which is never exact
    io_mode: str
    io_note: str | None
    resizes: dict[str, int] | None = None  # how often slots moved, by reason; None: they are not elastic

    @property
    def is_exact(self) -> bool:
        """True if routing changed no selection, so that the reply is that of the unchanged model."""
        return self.stats.swapped == 0 and not self.prunes

    @property
    def is_all_resident(self) -> bool:
        return self.slots_per_layer == self.experts_per_layer


def statistics(reply: Reply, memory: MemoryUse, cache: CacheUse, plan: MemoryPlan, *, seed: int | None) -> list[str]:
    """Short lines for people; `seed` is named if given. Bytes are decimal: 1 GB = 1e9."""
    return [
        _tokens_line(reply, memory, seed),
        *_expert_lines(reply, cache),
        *_resize_lines(cache),
        _memory_line(memory, plan),
        _plan_line(memory, plan),
        *([f"not charged: interpreter and libraries {format_bytes(memory.not_charged)}"] if memory.not_charged else []),
        *([cache.io_note] if cache.io_note else []),
    ]


def as_json(reply: Reply, memory: MemoryUse, cache: CacheUse, plan: MemoryPlan) -> dict[str, Any]:
    """The same figures, unrounded; unknown ones are None."""
    return {
        **asdict(reply),
        "peak_memory_bytes": memory.peak,
        "memory": {
            "resident_weights": memory.resident,
            "slots": memory.slots,
            "kv_cache": memory.kv,
            "transients": memory.transients,
            "host_buffers": memory.host_buffers,
        },
        "measured_bytes": memory.measured,
        "footprint_bytes": memory.footprint,
        "not_charged_bytes": memory.not_charged,
        "budget": plan.budget,
        "plan": {**plan.parts(), "total": plan.total, "prefill_step_size": plan.prefill_step_size},
        "resizes": cache.resizes,
        "slots_per_layer": list(cache.slots_per_layer),
        "experts_per_layer": list(cache.experts_per_layer),
        "eviction": cache.eviction,
        "routing": cache.routing,
        "strength": cache.parameters.get("strength"),
        "top_j": cache.parameters.get("j"),
        "routing_parameters": cache.parameters,
        "exact": cache.is_exact,
        "io_mode": cache.io_mode,
        "io_note": cache.io_note,
        "prefill": _phase_json(cache.stats.prefill),
        "decode": {
            **_phase_json(cache.stats.decode),
            "bytes_per_token": _per_token(cache.stats.decode, reply),
        },
    }


def _tokens_line(reply: Reply, memory: MemoryUse, seed: int | None) -> str:
    n = reply.generated_tokens
    parts = [f"{n:,} token{'' if n == 1 else 's'}"]
    if reply.finish_reason == "length":
        parts[0] += " (cut at --max-tokens)"
    elif reply.finish_reason == "interrupt":
        parts[0] += " (interrupted)"
    if reply.decode_tps is not None:
        parts.append(f"{reply.decode_tps:.1f} tok/s")
    prompt = f"{reply.prompt_tokens:,} tokens"
    if reply.cached_tokens:
        prompt += f" after {reply.cached_tokens:,} saved"
    rate = "" if reply.prompt_tps is None else f"{reply.prompt_tps:.1f} tok/s "
    parts += [f"prompt {rate}({prompt})", f"peak {format_bytes(memory.peak)}"]
    if seed is not None:
        parts.append(f"seed {seed}")
    return " · ".join(parts)


def _expert_lines(reply: Reply, cache: CacheUse) -> list[str]:
    layers = f"{_range(cache.slots_per_layer)}/{_range(cache.experts_per_layer)} per layer"
    if cache.is_all_resident:
        return [f"experts  all resident ({layers}) · {_routing(cache) if cache.prunes else 'exact'}"]
    prefill, decode = cache.stats.prefill, cache.stats.decode
    parts = []
    if decode.selections:
        parts.append(f"{_hits(decode)} decode")
        parts.append(f"{format_bytes(round(_per_token(decode, reply) or 0))}/token read")
    if prefill.selections:
        parts.append(f"{_hits(prefill)} prefill")
    read, seconds = prefill.bytes_read + decode.bytes_read, prefill.read_seconds + decode.read_seconds
    if read and seconds:
        parts.append(f"{read / seconds / 1e9:.2g} GB/s")
    first = ["experts  " + " · ".join(parts)] if parts else []
    return [*first, f"cache    {layers}, {cache.eviction} · {_routing(cache)}"]


def _hits(stats: PhaseStats) -> str:
    return f"{stats.hits / stats.selections:.1%} hit ({stats.hits:,}/{stats.selections:,})"


def routing_name(cache: CacheUse) -> str:
    """As in cache-prior λ=0.1 J=2."""
    symbols = {"strength": "λ", "j": "J", "m": "M", "p": "P", "k": "K", "delta": "δ", "epsilon": "ε"}
    return " ".join([cache.routing, *(f"{symbols.get(key, key)}={x:.3g}" for key, x in cache.parameters.items())])


def _routing(cache: CacheUse) -> str:
    if cache.routing == "original":
        return "exact"
    name = routing_name(cache)
    if cache.prunes:
        return name
    if cache.is_exact:
        return f"{name}, nothing swapped: exact"
    return f"{name}, {cache.stats.decode.swapped_share:.1%} of selections swapped"


def _memory_line(memory: MemoryUse, plan: MemoryPlan) -> str:
    parts = [
        f"weights {format_bytes(memory.resident)}",
        f"slots {format_bytes(memory.slots)}",
        f"KV {format_bytes(memory.kv)}",
        f"transients {format_bytes(memory.transients)}",
    ]
    if memory.host_buffers:
        parts.append(f"read buffers {format_bytes(memory.host_buffers)}")
    budget = "" if plan.budget is None else f" · budget {format_bytes(plan.budget)}"
    return "memory   " + " + ".join(parts) + budget


def _plan_line(memory: MemoryUse, plan: MemoryPlan) -> str:
    """The plan beside what was measured: MLX's peak and our read buffers, and what the system saw."""
    overhead = f" and {format_bytes(plan.overhead)} overhead" if plan.overhead else ""
    share = f" ({memory.measured / plan.buffers:.2f} of it)" if plan.buffers else ""
    line = f"plan     {format_bytes(plan.buffers)}{overhead} · measured {format_bytes(memory.measured)}{share}"
    if memory.footprint is None:
        return line
    return f"{line} · process {format_bytes(memory.footprint)}"


def _resize_lines(cache: CacheUse) -> list[str]:
    if not cache.resizes:
        return []
    reasons = {
        "context": "for the KV cache",
        "room": "because there was room",
        "pressure": "under memory pressure",
        "calm": "after it",
    }
    parts = [f"{n} {reasons[reason]}" for reason, n in cache.resizes.items()]
    total = sum(cache.resizes.values())
    return [f"resized  {total} time{'' if total == 1 else 's'}: {', '.join(parts)}"]


def _phase_json(stats: PhaseStats) -> dict[str, Any]:
    return {**asdict(stats), "hit_rate": stats.hit_rate}


def _per_token(decode: PhaseStats, reply: Reply) -> float | None:
    """Bytes read per decode step; the first token comes out of prefill, so there is one step fewer than tokens."""
    steps = reply.generated_tokens - 1
    return decode.bytes_read / steps if steps > 0 else None


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
