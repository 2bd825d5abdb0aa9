"""Simulation results as a table and as JSON. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from ..budget import format_bytes
from .simulation import Device, Result
from .trace import Trace

HEADINGS = ("slots", "eviction", "miss %", "loads/token", "all hit %", "lifetime", "read/token", "ms/token", "tok/s")
APPROXIMATE = "~ an approximation: other routes would have led to other scores"
NOT_ORIGINAL = "~ an approximation: the trace was recorded under a routing that changed selections"


def table(trace: Trace, results: Sequence[Result], device: Device, *, shared: bool = False) -> list[str]:
    """Lines for people: what the trace is, then one block per routing."""
    decode = _tokens(trace, decode=True) > 0
    columns = len(HEADINGS) if device.flash is not None else len(HEADINGS) - 2
    lines = describe(trace, decode)
    if shared:
        lines.append("one pool for all layers, of slots x layers experts; this engine has a cache per layer")
    lines.append("")
    for (spec, is_exact), block in groupby(results, key=lambda r: (r.setting.strategy.spec, r.is_exact)):
        rows = [HEADINGS[:columns], *(_row(r, decode, device)[:columns] for r in block)]
        widths = [max(len(row[i]) for row in rows) for i in range(columns)]
        lines.append(f"{'' if is_exact else '~ '}{spec}")
        for row in rows:
            cells = [f"{c:<{w}}" if i == 1 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  " + "  ".join(cells).rstrip())
        lines.append("")
    if not trace.is_original:
        lines.append(NOT_ORIGINAL)
    elif not all(r.is_exact for r in results):
        lines.append(APPROXIMATE)
    if any(r.setting.is_bound for r in results):
        lines.append("belady: the fewest misses that any eviction could reach on these routes")
    if device.flash is not None and not device.compute:
        lines.append("times are those of the reads alone; --compute-ms adds what a token takes beside")
    if lines[-1] == "":
        lines.pop()
    return lines


def as_json(trace: Trace, results: Sequence[Result], device: Device) -> dict[str, Any]:
    """The same figures and those of prefill, unrounded."""
    return {
        "format": "mlx_moecache.simulation",
        "trace": {
            **asdict(trace.header),
            "tokens": {"prefill": _tokens(trace, decode=False), "decode": _tokens(trace, decode=True)},
            "sequences": len(trace.layers[0].sequences),
            "original": trace.is_original,
            "note": trace.note,
        },
        "device": {
            "flash_bytes_per_second": device.flash,
            "latency_seconds": device.latency,
            "compute_seconds": device.compute,
        },
        "results": [
            {
                "routing": r.setting.strategy.spec,
                "eviction": r.setting.eviction,
                "slots": r.setting.slots,
                "exact": r.is_exact,
                "bound": r.setting.is_bound,
                "prefill": r.metrics(False, device),
                "decode": r.metrics(True, device),
            }
            for r in results
        ],
    }


def describe(trace: Trace, decode: bool) -> list[str]:
    """What the trace is, in two lines."""
    h, layers = trace.header, trace.layers
    experts = _range([x.shape.experts for x in layers])
    k = _range([x.shape.k for x in layers])
    phase = "decode" if decode else "prefill"
    tokens, n = _tokens(trace, decode=decode), len(layers[0].sequences)
    sequences = f"{n:,} sequence{'s' if n != 1 else ''}"
    return [
        f"{h.model}: {len(layers)} MoE layers, {experts} experts, {k} per token",
        f"{tokens:,} tokens of {phase} in {sequences}, recorded with {h.routing} routing",
    ]


def _row(result: Result, decode: bool, device: Device) -> tuple[str, ...]:
    m = result.metrics(decode, device)
    read = m["bytes_per_token"]
    return (
        str(result.setting.slots),
        result.setting.eviction,
        _number(m["miss_rate"], 2, 100),
        _number(m["loads_per_token"], 2),
        _number(m["all_hit_share"], 1, 100),
        _number(m["expert_lifetime"], 1),
        "-" if read is None else format_bytes(round(read)),
        _number(m["ms_per_token"], 2),
        _number(m["tokens_per_second"], 1),
    )


def _number(value: float | None, digits: int, scale: float = 1) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _tokens(trace: Trace, *, decode: bool) -> int:
    """Tokens of one phase in the layer that saw most of them."""
    return max(int((x.calls[1:] - x.calls[:-1])[x.decode == decode].sum()) for x in trace.layers)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
