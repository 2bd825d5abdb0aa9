"""What an expert cache did, as a small picture: a bar per layer, and the figures behind it. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..budget import format_bytes
from ..stats import CacheStats, PhaseStats
from .chat_report import span

BARS = "▁▂▃▄▅▆▇█"
UNCOUNTED = "·"
DIGITS = "0123456789"  # tenths, where the encoding has no bars
UNCOUNTED_PLAIN = "-"
INDENT = 10  # columns of the labels


@dataclass(frozen=True)
class LayerPicture:
    """One MoE layer, as /cache shows it. Layers whose experts are all resident count nothing."""

    slots: int
    experts: int
    taken: int  # slots that hold an expert
    stats: CacheStats


def cache_lines(
    layers: Sequence[LayerPicture], *, eviction: str, slot_bytes: int, width: int, plain: bool
) -> list[str]:
    """Hit rate by layer for decode and prefill, bytes read, evictions, slots; no line needs more than 40 columns.

    width: columns of the terminal, for the bars of models with many layers. plain: digits instead of bars.
    """
    slots, experts = [x.slots for x in layers], [x.experts for x in layers]
    held = f"{format_bytes(slot_bytes)}, {sum(x.taken for x in layers):,} of {sum(slots):,} taken"
    lines = [
        *_phase("decode", [x.stats.decode for x in layers], width, plain),
        *_phase("prefill", [x.stats.prefill for x in layers], width, plain),
        f"{'slots':<{INDENT}}{span(slots)} of {span(experts)} per layer, {eviction}",
        f"{'':<{INDENT}}{held}",
    ]
    if slots == experts:
        return [f"{'experts':<{INDENT}}all in memory: nothing to count", *lines[-2:]]
    if any(x.stats.decode.selections or x.stats.prefill.selections for x in layers):
        scale = "0: below 10%, 9: 90% or more" if plain else f"{BARS[0]} 0% to {BARS[-1]} 100% hit"
        lines.append(f"{'layers':<{INDENT}}{scale}")
        if any(x.slots == x.experts for x in layers):
            lines.append(f"{'':<{INDENT}}{UNCOUNTED_PLAIN if plain else UNCOUNTED} nothing counted")
    return lines


def sparkline(rates: Sequence[float | None], *, plain: bool) -> str:
    """A character for each rate from 0 to 1; None: nothing was counted."""
    levels, missing = (DIGITS, UNCOUNTED_PLAIN) if plain else (BARS, UNCOUNTED)
    n = len(levels)
    return "".join(missing if r is None else levels[min(n - 1, int(r * n))] for r in rates)


def _phase(name: str, layers: Sequence[PhaseStats], width: int, plain: bool) -> list[str]:
    total = PhaseStats()
    for x in layers:
        total.add(x)
    if total.hit_rate is None:
        return [f"{name:<{INDENT}}nothing yet"]
    rates = [x.hit_rate for x in layers]
    room = max(8, width - INDENT - 1)
    bars = sparkline(rates, plain=plain)
    rate, number = min((r, i) for i, r in enumerate(rates, start=1) if r is not None)
    texts = [
        f"{total.hit_rate:.1%} of {total.selections:,} hit",
        *(bars[i : i + room] for i in range(0, len(bars), room)),
        f"lowest {rate:.1%}, layer {number} of {len(layers)}",
        f"{format_bytes(total.bytes_read)} read",
        f"{total.evictions:,} evicted",
    ]
    return [f"{name if i == 0 else '':<{INDENT}}{text}" for i, text in enumerate(texts)]
