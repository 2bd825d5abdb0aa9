"""From rounds to figures per configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from common import Array, Estimate, bootstrap
from speed_limits import Limit, Parts, limit
from speed_rounds import Prefill, Round, Segment
from speed_setup import Configuration

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
    misses_per_layer: float | None  # None: it never looks
    all_hit_share: float | None  # of the layers, those that missed nothing
    hit_rate: float | None
    swapped_share: float
    read_ahead: float  # experts read before their layer had selected
    read_ahead_used: float  # of them, those that it then missed
    spans: tuple[int, float, int] | None  # layers that shared a look at the device: least, median, most over rounds
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
    flash_share: Estimate | None  # bytes / seconds to the first token / bandwidth of the emulated flash
    reads_over_first: float | None  # seconds that the flash needs for the bytes / seconds of the first configuration
    cold: float | None


def per_token(segments: Sequence[Segment], name: str) -> float:
    return float(sum(getattr(s.stats, name) for s in segments) / sum(s.tokens for s in segments))


def decode_figures(
    rounds: Sequence[Round], configurations: Sequence[Configuration], parts: Parts | None
) -> list[Decode]:
    """Of every configuration, ratios to the first."""
    first = [r.decode[configurations[0].text] for r in rounds]
    return [_decode(rounds, c, first, parts) for c in configurations]


def _decode(rounds: Sequence[Round], c: Configuration, first: Sequence[Segment], parts: Parts | None) -> Decode:
    name = c.text
    segments = [r.decode[name] for r in rounds]
    seconds = np.array([s.seconds / s.tokens for s in segments])
    base = np.array([s.seconds / s.tokens for s in first])
    total = _sum([s.stats for s in segments])
    found = None if parts is None else limit(rounds, name, parts, host_read=c.host_read)
    middle, waiting = float(np.median(seconds)), per_token(segments, "wait_seconds")
    asked = np.array([s.stats.bytes_read for s in segments], dtype=float)
    reading = np.array([s.stats.read_seconds for s in segments])
    raw = np.array([r.raw for r in rounds])
    share = None
    if c.flash is None and asked.sum():
        some = asked > 0
        share = bootstrap(asked[some] / reading[some] / raw[some], _median)
    before, now = per_token(first, "bytes_read"), per_token(segments, "bytes_read")
    waited, one = per_token(first, "wait_seconds"), float(np.median(base))
    allowed = one / (one - waited + waited * now / before) if before and waited else None
    host = None if found is None else found.host
    calls = [call for s in segments for call in s.calls]
    spans = [s.span for s in segments if s.span is not None]
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
        misses_per_layer=sum(missed for _, missed in calls) / len(calls) if calls else None,
        all_hit_share=sum(not missed for _, missed in calls) / len(calls) if calls else None,
        hit_rate=total.hit_rate,
        swapped_share=total.swapped_share,
        read_ahead=per_token(segments, "read_ahead"),
        read_ahead_used=per_token(segments, "read_ahead_used"),
        spans=(min(spans), float(np.median(spans)), max(spans)) if spans else None,
        bandwidth=float(asked.sum() / reading.sum()) if reading.sum() else None,
        raw_share=share,
        hidden=1 - float(total.wait_seconds / total.read_seconds) if total.read_seconds else None,
        cold=coldness([(s.device_bytes, s.stats.bytes_read) for s in segments]),
        allowed_ratio=allowed,
        limit=found,
    )


def prefill_figures(rounds: Sequence[dict[str, Prefill]], configurations: Sequence[Configuration]) -> list[Prompt]:
    """Of every configuration, ratios to the first."""
    first = [r[configurations[0].text] for r in rounds]
    return [_prompt(c, [r[c.text] for r in rounds], first) for c in configurations]


def _prompt(c: Configuration, runs: Sequence[Prefill], first: Sequence[Prefill]) -> Prompt:
    seconds, base = (np.array([x.seconds for x in rows]) for rows in (runs, first))
    asked = np.array([x.stats.bytes_read for x in runs], dtype=float)
    total = _sum([x.stats for x in runs])
    speed = None if c.flash is None else c.flash.bytes_per_second
    return Prompt(
        name=c.text,
        tokens=runs[0].tokens,
        first_token_seconds=bootstrap(seconds, _median),
        tps=runs[0].tokens / _median(seconds),
        ratio=bootstrap(base / seconds, _median),
        wait_seconds=total.wait_seconds / len(runs),
        read_seconds=total.read_seconds / len(runs),
        bytes_read=float(asked.mean()),
        bandwidth=total.bytes_read / total.read_seconds if total.read_seconds else None,
        flash_share=None if speed is None else bootstrap(asked / seconds / speed, _median),
        reads_over_first=None if speed is None else float(asked.mean()) / speed / _median(base),
        cold=coldness([(x.device_bytes, x.stats.bytes_read) for x in runs]),
    )


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
