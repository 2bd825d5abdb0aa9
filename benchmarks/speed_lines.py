"""The figures of a comparison as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from speed_compare import Comparison
from speed_report import COLD, Decode, Prompt


def lines_of(found: Comparison) -> list[str]:
    """Everything that a comparison found."""
    lines = []
    for c in found.configurations:
        if c.flash is not None and c.flash.bytes_per_second is not None:
            lines.append(f"flash of '{c.text}': {c.flash.bytes_per_second / 1e6:.4g} MB/s")
    if found.decode:
        lines += decode_lines(found) + allowed_lines(found.decode, found.perplexity)
    return lines + (prefill_lines(found.prefill) if found.prefill else [])


def decode_lines(found: Comparison) -> list[str]:
    lines, parts = [], found.parts
    if parts is not None:
        lines.append(
            f"parts, ms per token: dense {1e3 * parts.dense:.2f}, experts {1e3 * parts.experts:.2f} "
            f"({parts.layers} layers x {parts.k}); one host read {1e3 * parts.host_read:.3f}"
        )
    low, middle, high = (x / 1e9 for x in found.raw_bytes_per_second)
    lines.append(f"sequential read of the same file: {middle:.2f} GB/s (quartiles {low:.2f} {high:.2f})")
    lines.append(
        f"{'decode':5}{'tok/s':>24}{'/ first':>22}{'ms':>8}{'compute':>9}{'host':>7}{'wait':>8}{'h.reads':>8}"
        f"{'MB':>7}{'GB/s':>7}{'/ raw':>7}{'hidden':>8}{'cold':>6}{'swapped':>8}"
    )
    for i, d in enumerate(found.decode, 1):
        lines.append(f"{i}. {d.name}")
        lines.append(
            f"{'':5}{d.tps.format(2):>24}{d.ratio.format():>22}{_ms(d.seconds):>8}{_ms(d.compute_seconds):>9}"
            f"{_ms(d.host_seconds):>7}{_ms(d.wait_seconds):>8}{d.host_reads:>8.2f}{d.bytes_read / 1e6:>7.2f}"
            f"{_giga(d.bandwidth):>7}{'-' if d.raw_share is None else f'{d.raw_share.value:.2f}':>7}"
            f"{_percent(d.hidden):>8}{'-' if d.cold is None else f'{d.cold:.2f}':>6}{_percent(d.swapped_share):>8}"
        )
        lines += [f"{'':5}{note}" for note in _notes(d)]
    return lines


def _notes(d: Decode) -> list[str]:
    notes = []
    if d.cold is not None and d.cold < COLD:
        notes.append(f"NOT COLD: the device delivered {d.cold:.2f} of the bytes asked for")
    if d.misses_per_layer is not None and d.all_hit_share is not None:
        span = ""
        if d.spans is not None and d.spans[2] > 1:
            span = f", {d.spans[1]:g} layers per look ({d.spans[0]} to {d.spans[2]})"
        notes.append(f"misses per layer {d.misses_per_layer:.3f}, none in {_percent(d.all_hit_share)} of them{span}")
    if d.read_ahead:
        notes.append(f"read ahead {d.read_ahead:.2f} experts per token, of which {d.read_ahead_used:.2f} were needed")
    if d.limit is not None:
        x = d.limit
        overlap = "" if x.overlap is None else f", overlap {x.overlap.format(2)}"
        notes.append(
            f"limit {_ms(x.limit)} ms ({_ms(x.with_late_experts)} with late experts, {_ms(x.in_turn)} in turn): "
            f"over it {x.over.format()} (late {x.over_with_late.format()}){overlap}"
        )
        if x.over_with_idle is not None:
            slower = (
                f"slow down what follows by {_ms(x.idle)} ms" if x.idle else "slow nothing down that can be measured"
            )
            notes.append(f"idle waits {slower}; over the limit with idle waits {x.over_with_idle.format()}")
    return notes


def allowed_lines(figures: Sequence[Decode], prices: dict[str, str]) -> list[str]:
    """Speed-up over the first configuration against what its fewer bytes allow."""
    lines = []
    for d in figures[1:]:
        if d.allowed_ratio is None or d.bytes_read == figures[0].bytes_read:
            continue
        price = prices.get(d.name)
        lines.append(
            f"{d.name}: x {d.ratio.format()}; fewer bytes alone allow x {d.allowed_ratio:.3f}: "
            f"{d.ratio.scaled(1 / d.allowed_ratio).format()} of it" + (f"; perplexity {price}" if price else "")
        )
    return lines


def prefill_lines(figures: Sequence[Prompt]) -> list[str]:
    lines = [
        f"prefill of {figures[0].tokens} tokens",
        f"{'':5}{'first token, s':>24}{'tok/s':>9}{'/ first':>22}{'wait s':>8}{'MB':>9}{'GB/s':>8}{'cold':>6}",
    ]
    for i, p in enumerate(figures, 1):
        lines.append(f"{i}. {p.name}")
        lines.append(
            f"{'':5}{p.first_token_seconds.format():>24}{p.tps:>9.2f}{p.ratio.format():>22}{p.wait_seconds:>8.3f}"
            f"{p.bytes_read / 1e6:>9.1f}{_giga(p.bandwidth, 4):>8}{'-' if p.cold is None else f'{p.cold:.2f}':>6}"
        )
        if p.flash_share is not None and p.reads_over_first is not None:
            lines.append(
                f"{'':5}{p.flash_share.format()} of the flash's bandwidth; its reads take {p.reads_over_first:.2f} "
                "of the first configuration's time"
            )
    return lines


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def _giga(x: float | None, digits: int = 2) -> str:
    return "-" if x is None else f"{x / 1e9:.{digits}f}"


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.0f}%"
