"""Miss curves from a trace, and slots per layer that are trained on its first half and judged on the second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..allocation import MissCurve, allocate, equal_slots, total_bytes, total_misses
from ..budget import format_bytes
from ..residents import Load
from .simulator import Call, calls_of, replay_layer, starts_of
from .trace import LayerTrace, Trace

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class LayerHalves:
    """One layer's misses by number of slots, in both halves; the caches are warm from the first in the second."""

    training: MissCurve
    held_out: MissCurve
    selections: int  # of the second half


@dataclass(frozen=True)
class Sharing:
    """Equal counts against allocated ones, in as many bytes. Misses are those of the second half."""

    equal: tuple[int, ...]
    allocated: tuple[int, ...]
    equal_misses: int
    allocated_misses: int
    layer_misses: tuple[tuple[int, int], ...]  # (equal, allocated) of each layer
    selections: int
    bytes: int

    @property
    def helps(self) -> bool:
        """True if the allocation wins on text that it was not made from."""
        return self.allocated_misses < self.equal_misses

    @property
    def chosen(self) -> tuple[int, ...]:
        return self.allocated if self.helps else self.equal


def halves(trace: Trace, eviction: str, *, progress: Progress | None = None) -> list[LayerHalves]:
    """Measure every layer. Decode alone counts; where the trace has none, prefill.

    LRU needs one pass per layer, since what s slots hold is always part of what s + 1 hold; other policies are
    replayed for every number of slots. Raises UsageError for an unknown policy.
    """
    decode = any(bool(x.decode.any()) for x in trace.layers)
    found = []
    for n, layer in enumerate(trace.layers):
        split = _middle(layer, decode)
        count = _lru_misses if eviction == "lru" else _replayed_misses
        first, second = count(layer, eviction, split, decode)
        k, size = layer.shape.k, layer.shape.bytes_per_expert
        selections = sum(
            sum(times for _, times in c.uses) for c in calls_of(layer) if c.number >= split and c.decode == decode
        )
        found.append(LayerHalves(MissCurve(k, size, first), MissCurve(k, size, second), selections))
        if progress is not None:
            progress(n + 1, len(trace.layers))
    return found


def share(layers: Sequence[LayerHalves], slots: int) -> Sharing:
    """Allocate what `slots` for each layer take. Raises BudgetError if a layer needs more."""
    training, held_out = [x.training for x in layers], [x.held_out for x in layers]
    allocated, equal = allocate(training, slots), equal_slots(training, slots)
    return Sharing(
        equal,
        allocated,
        total_misses(held_out, equal),
        total_misses(held_out, allocated),
        tuple((c.misses[s], c.misses[t]) for c, s, t in zip(held_out, equal, allocated, strict=True)),
        sum(x.selections for x in layers),
        total_bytes(training, equal),
    )


def lines(results: Sequence[Sharing]) -> list[str]:
    """For people: what to pass to --slots, and what it saves."""
    text = ["slots per layer by miss curves of the first half, judged on the second", ""]
    for r in results:
        text.append(
            f"equal      {_range(r.equal)} per layer, {format_bytes(r.bytes)} in all: {_misses(r.equal_misses, r)}"
        )
        if r.allocated == r.equal:
            text.append("allocated  the same: no other counts would have missed less in the first half")
        else:
            verdict = _change(r) if r.helps else f"{_change(r)}: keep equal counts"
            text.append(
                f"allocated  {_range(r.allocated)} per layer, as large: {_misses(r.allocated_misses, r)}, {verdict}"
            )
        if r.helps:
            text.append(f"           --slots {','.join(map(str, r.allocated))}")
        text.append("")
    return text[:-1]


def as_json(results: Sequence[Sharing]) -> list[dict[str, Any]]:
    return [
        {
            "slot_bytes": r.bytes,
            "selections": r.selections,
            "equal": {"slots": list(r.equal), "misses": r.equal_misses, "layers": [m for m, _ in r.layer_misses]},
            "allocated": {
                "slots": list(r.allocated),
                "misses": r.allocated_misses,
                "layers": [m for _, m in r.layer_misses],
            },
            "helps": r.helps,
        }
        for r in results
    ]


def _middle(layer: LayerTrace, decode: bool) -> int:
    """The call at which the second half begins: where a text begins, if one does near the middle."""
    rows = np.diff(layer.calls) * (layer.decode == decode)
    done = np.concatenate([[0], np.cumsum(rows)])
    middle = int(np.searchsorted(done, done[-1] / 2))
    starts = [call for call, _ in layer.sequences if done[-1] / 4 <= done[call] <= 3 * done[-1] / 4]
    return min(starts, key=lambda call: abs(int(done[call]) - int(done[middle])), default=middle)


def _lru_misses(layer: LayerTrace, eviction: str, split: int, decode: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """By stack distances: with s slots an expert is there if fewer than s others were used since it was.

    Exact for calls that s slots can serve at once; the state after a longer prefill may differ by a few experts.
    """
    experts = layer.shape.experts
    farther = np.zeros((2, experts + 2), dtype=np.int64)  # selections by distance; absent: as far as can be
    recent: list[int] = []  # the most recently used last
    cold = {call for call, is_cold in layer.sequences if is_cold}
    for call in calls_of(layer):
        if call.number in cold:
            recent.clear()
        if call.decode == decode:
            half, place = int(call.number >= split), {e: i for i, e in enumerate(reversed(recent))}
            for e, times in call.uses:
                farther[half, place.get(e, experts) + 1] += times
        used = set(call.needed)
        recent = [*(e for e in recent if e not in used), *call.needed]
    # With s slots those at distance s or more are missed: sum over indices above s.
    misses = farther.sum(axis=1, keepdims=True) - np.cumsum(farther, axis=1)
    misses[:, experts] = 0  # a layer with a slot for each expert is filled before the first token
    first, second = misses[:, : experts + 1].tolist()
    return tuple(first), tuple(second)


def _replayed_misses(
    layer: LayerTrace, eviction: str, split: int, decode: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    calls: list[Call] = list(calls_of(layer))
    counted = np.zeros((2, layer.shape.experts + 1), dtype=np.int64)
    for slots in range(layer.shape.k, layer.shape.experts):

        def watch(number: int, missing: Sequence[int], loads: Sequence[Load], slots: int = slots) -> None:
            call = calls[number]
            if call.decode == decode and missing:
                absent = set(missing)
                counted[int(number >= split), slots] += sum(times for e, times in call.uses if e in absent)

        replay_layer(layer, slots, eviction, starts_of(layer, slots, "empty"), watch=watch)
    first, second = counted.tolist()
    return tuple(first), tuple(second)


def _misses(misses: int, r: Sharing) -> str:
    share = f" ({misses / r.selections:.2%})" if r.selections else ""
    return f"{misses:,} misses{share}"


def _change(r: Sharing) -> str:
    if not r.equal_misses:
        return "no change"
    change = 1 - r.allocated_misses / r.equal_misses
    return f"{abs(change):.1%} {'fewer' if change >= 0 else 'more'}"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
