"""From rounds to figures per configuration, as a table and as a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from common import Array, Estimate, bootstrap
from speed_limits import Limit, Parts, limit
from speed_rounds import Prefill, Round, Segment

from mlx_moecache.stats import PhaseStats

COLD = 0.95  # of the bytes asked for, which the device must have delivered


@dataclass(frozen=True)
class Decode:
    """One configuration at decode; seconds and counts are per token, intervals over rounds."""

    name: str
    tokens: int
    tps: Estimate
    ratio: Estimate  # to the first configuration, tokens per second, paired by round
    seconds: float
    compute_seconds: float  # what is left of the token
    host_seconds: float | None  # of its host reads; None without controls
    wait_seconds: float  # nothing could be computed until experts had come
    read_seconds: float  # experts were on their way
    host_wait_seconds: float  # in evaluations that bring choices to the host, computation before them included
    host_reads: float
    loads: float
    bytes_read: float
    hit_rate: float | None
    swapped_share: float
    bandwidth: float | None  # bytes per second while reading
    raw_share: Estimate | None  # of a sequential read of the same file; None with emulated flash or too few bytes
    hidden: float | None  # 1 - waiting / reading
    cold: float | None  # bytes that the device delivered per byte asked for
    allowed_ratio: float | None  # to the first, if nothing changed but its waiting, in proportion to bytes
    limit: Limit | None


@dataclass(frozen=True)
class Prompt:
    """One configuration at prefill."""

    name: str
    tokens: int
    first_token_seconds: Estimate
    tps: float
    ratio: Estimate
    wait_seconds: float  # per prompt
    read_seconds: float
    bytes_read: float
    bandwidth: float | None
    cold: float | None


def per_token(segments: Sequence[Segment], name: str) -> float:
    return float(sum(getattr(s.stats, name) for s in segments) / sum(s.tokens for s in segments))


def decode_figures(
    rounds: Sequence[Round], names: Sequence[str], parts: Parts | None, emulated: set[str]
) -> list[Decode]:
    """Of every configuration; `emulated` are those whose flash is."""
    first = [r.decode[names[0]] for r in rounds]
    return [_decode(rounds, name, first, parts, name in emulated) for name in names]


def _decode(
    rounds: Sequence[Round], name: str, first: Sequence[Segment], parts: Parts | None, emulated: bool
) -> Decode:
    segments = [r.decode[name] for r in rounds]
    seconds = np.array([s.seconds / s.tokens for s in segments])
    base = np.array([s.seconds / s.tokens for s in first])
    total = _sum([s.stats for s in segments])
    found = None if parts is None else limit(rounds, name, parts)
    middle, waiting = float(np.median(seconds)), per_token(segments, "wait_seconds")
    asked = np.array([s.stats.bytes_read for s in segments], dtype=float)
    reading = np.array([s.stats.read_seconds for s in segments])
    raw = np.array([r.raw for r in rounds])
    share = None
    if not emulated and asked.sum():
        some = asked > 0
        share = bootstrap(asked[some] / reading[some] / raw[some], _median)
    before, now = per_token(first, "bytes_read"), per_token(segments, "bytes_read")
    waited, one = per_token(first, "wait_seconds"), float(np.median(base))
    allowed = one / (one - waited + waited * now / before) if before and waited else None
    host = None if found is None else found.host
    return Decode(
        name=name,
        tokens=sum(s.tokens for s in segments),
        tps=bootstrap(seconds, lambda x: 1 / _median(x)),
        ratio=bootstrap(base / seconds, _median),
        seconds=middle,
        compute_seconds=middle - waiting - (host or 0.0),
        host_seconds=host,
        wait_seconds=waiting,
        read_seconds=per_token(segments, "read_seconds"),
        host_wait_seconds=per_token(segments, "host_wait_seconds"),
        host_reads=per_token(segments, "host_reads"),
        loads=per_token(segments, "loads"),
        bytes_read=now,
        hit_rate=total.hit_rate,
        swapped_share=total.swapped_share,
        bandwidth=float(asked.sum() / reading.sum()) if reading.sum() else None,
        raw_share=share,
        hidden=1 - float(total.wait_seconds / total.read_seconds) if total.read_seconds else None,
        cold=coldness([(s.device_bytes, s.stats.bytes_read) for s in segments]),
        allowed_ratio=allowed,
        limit=found,
    )


def prefill_figures(rounds: Sequence[dict[str, Prefill]], names: Sequence[str]) -> list[Prompt]:
    found = []
    base = np.array([r[names[0]].seconds for r in rounds])
    for name in names:
        runs = [r[name] for r in rounds]
        seconds = np.array([x.seconds for x in runs])
        total = _sum([x.stats for x in runs])
        found.append(
            Prompt(
                name=name,
                tokens=runs[0].tokens,
                first_token_seconds=bootstrap(seconds, _median),
                tps=runs[0].tokens / _median(seconds),
                ratio=bootstrap(base / seconds, _median),
                wait_seconds=total.wait_seconds / len(runs),
                read_seconds=total.read_seconds / len(runs),
                bytes_read=total.bytes_read / len(runs),
                bandwidth=total.bytes_read / total.read_seconds if total.read_seconds else None,
                cold=coldness([(x.device_bytes, x.stats.bytes_read) for x in runs]),
            )
        )
    return found


def coldness(runs: Sequence[tuple[int | None, int]]) -> float | None:
    """Bytes from the device per byte asked for, over runs of (fetched, asked); None where it is not known."""
    known = [(fetched, asked) for fetched, asked in runs if fetched is not None]
    asked = sum(a for _, a in known)
    return sum(f for f, _ in known) / asked if asked else None


def _sum(stats: Sequence[PhaseStats]) -> PhaseStats:
    total = PhaseStats()
    for s in stats:
        total.add(s)
    return total


def _median(values: Array) -> float:
    return float(np.median(values))


# ---- lines ----


def decode_lines(figures: Sequence[Decode], parts: Parts | None, raw: Array) -> list[str]:
    lines = []
    if parts is not None:
        lines.append(
            f"parts, ms per token: dense {1e3 * parts.dense:.2f}, experts {1e3 * parts.experts:.2f} "
            f"({parts.layers} layers x {parts.k}); one host read {1e3 * parts.host_read:.3f}"
        )
    lines.append(f"sequential read of the same file: {np.median(raw) / 1e9:.2f} GB/s (quartiles {_quartiles(raw)})")
    lines.append(
        f"{'decode':5}{'tok/s':>24}{'/ first':>22}{'ms':>8}{'compute':>9}{'host':>7}{'wait':>8}{'h.reads':>8}"
        f"{'MB':>7}{'GB/s':>7}{'/ raw':>7}{'hidden':>8}{'cold':>6}{'swapped':>8}"
    )
    for i, d in enumerate(figures, 1):
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
    if d.limit is not None:
        x = d.limit
        overlap = "" if x.overlap is None else f", overlap {x.overlap.format(2)}"
        notes.append(
            f"limit {_ms(x.limit)} ms ({_ms(x.with_late_experts)} with late experts, {_ms(x.in_turn)} in turn): "
            f"over it {x.over.format()} (late {x.over_with_late.format()}){overlap}"
        )
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
        f"{'':5}{'first token, s':>24}{'tok/s':>9}{'/ first':>22}{'wait s':>8}{'MB':>9}{'GB/s':>7}{'cold':>6}",
    ]
    for i, p in enumerate(figures, 1):
        lines.append(f"{i}. {p.name}")
        lines.append(
            f"{'':5}{p.first_token_seconds.format():>24}{p.tps:>9.2f}{p.ratio.format():>22}{p.wait_seconds:>8.3f}"
            f"{p.bytes_read / 1e6:>9.1f}{_giga(p.bandwidth):>7}{'-' if p.cold is None else f'{p.cold:.2f}':>6}"
        )
    return lines


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def _giga(x: float | None) -> str:
    return "-" if x is None else f"{x / 1e9:.2f}"


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.0f}%"


def _quartiles(values: Array) -> str:
    low, high = np.quantile(values, [0.25, 0.75])
    return f"{low / 1e9:.2f} {high / 1e9:.2f}"
