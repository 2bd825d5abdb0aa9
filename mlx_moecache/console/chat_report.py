"""What a person is told about a chat: the banner, one line after each reply, the long ones on request. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..budget import MemoryPlan, format_bytes
from .report import CacheUse, MemoryUse, routing_name, statistics

if TYPE_CHECKING:
    from .chat_session import Turn


def banner(name: str, k: Sequence[int], cache: CacheUse, plan: MemoryPlan, slots_bytes: int, width: int) -> list[str]:
    """Model, experts x layers x top-k, slots, budget, routing. k: of each MoE layer."""
    experts = f"{span(cache.experts_per_layer)} experts x {len(cache.experts_per_layer)} layers, top-{span(k)}"
    budget = f"plan {format_bytes(plan.total)}" if plan.budget is None else f"budget {format_bytes(plan.budget)}"
    slots = f"{span(cache.slots_per_layer)}/{span(cache.experts_per_layer)} slots per layer"
    routing = (
        "exact" if cache.routing == "original" or (cache.is_all_resident and not cache.prunes) else routing_name(cache)
    )
    lines = [[name, experts], [f"{slots} ({format_bytes(slots_bytes)})", cache.eviction, budget, routing]]
    return [line for parts in lines for line in fitted(parts, width)]


def turn_line(turn: Turn, width: int) -> list[str]:
    """`42 tokens · 31.4 tok/s · 71.3% hit · 4.1 MB/token read · exact`, in as many lines as `width` needs."""
    n, cache = turn.reply.generated_tokens, turn.cache
    parts = [f"{n:,} token{'' if n == 1 else 's'}" + _ending(turn)]
    if turn.reply.decode_tps is not None:
        parts.append(f"{turn.reply.decode_tps:.1f} tok/s")
    decode = cache.stats.decode
    if cache.is_all_resident:
        parts.append("all resident")
    elif decode.selections:
        parts.append(f"{decode.hits / decode.selections:.1%} hit")
        parts.append(f"{format_bytes(round(decode.bytes_read / max(1, n - 1)))}/token read")
    lines = fitted([*parts, _exactness(turn)], width)
    # The strategy's name stands in the banner, too: it is left out where the line would not fit with it.
    return lines if len(lines) == 1 else fitted([*parts, _exactness(turn).removeprefix(f"{cache.routing}, ")], width)


def long_lines(turn: Turn, memory: MemoryUse, plan: MemoryPlan, seed: int | None) -> list[str]:
    """All statistics, as `generate` prints them."""
    lines = statistics(turn.reply, memory, turn.cache, plan, seed=seed)
    return [*lines, f"chat     {_exactness(turn)}"]


def fitted(parts: Sequence[str], width: int) -> list[str]:
    """`parts` joined by dots, broken between parts where a line would be longer than `width`."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines


def span(values: Sequence[int]) -> str:
    """As in 30 or 28-35."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _ending(turn: Turn) -> str:
    if turn.reply.finish_reason == "length":
        return " (cut: context full)" if turn.cut_by_context else " (cut at max-tokens)"
    return {"interrupt": " (interrupted)", "error": " (ended by an error)"}.get(turn.reply.finish_reason, "")


def _exactness(turn: Turn) -> str:
    """What routing changed in this reply; exact only if nothing before it was changed either."""
    if not turn.cache.is_exact:
        name = turn.cache.routing
        return name if turn.cache.prunes else f"{name}, {turn.cache.stats.decode.swapped_share:.1%} swapped"
    return "exact" if turn.is_exact else "exact from here"
