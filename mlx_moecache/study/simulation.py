"""What to replay of a trace, and what came out: settings, results, and the time per token that they predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..eviction import EVICTION, make_policy
from ..routing import parse_routing
from ..strategies import Original, Strategy
from .recurrence import Counts, over_layers
from .shared_pool import SHARED_POLICIES, replay_shared
from .simulator import BOUNDS, Initial, PhaseCounts, replay_bound, replay_layer, replay_strategy, starts_of
from .trace import Trace

Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Device:
    """What a token costs. Reads do not overlap with computing: they must end before their layer can compute."""

    flash: float | None = None  # bytes per second; None: times are not predicted
    latency: float = 0.0  # seconds per layer that has to read
    compute: float = 0.0  # seconds per token without any read

    def seconds(self, counts: Counts, bytes_read: int) -> float | None:
        """Predicted seconds for all tokens of `counts`."""
        if self.flash is None:
            return None
        return counts.tokens * self.compute + counts.waits * self.latency + bytes_read / self.flash


@dataclass(frozen=True)
class Setting:
    """One simulated cache."""

    strategy: Strategy
    eviction: str  # a policy, or one of BOUNDS
    slots: int  # per layer; of a shared pool: its share of each layer

    @property
    def is_bound(self) -> bool:
        return self.eviction in BOUNDS


@dataclass(frozen=True)
class Result:
    """One replayed setting, summed over the layers."""

    setting: Setting
    is_exact: bool  # a cache like this would have seen this trace
    counts: PhaseCounts
    bytes_read: tuple[int, int]  # prefill, decode

    def metrics(self, decode: bool, device: Device) -> dict[str, Any]:
        """Figures of one phase; None where nothing was counted or, for times, no device was given."""
        c, read = self.counts.of(decode), self.bytes_read[decode]
        seconds = device.seconds(c, read) if c.tokens else None
        return {
            "tokens": c.tokens,
            "selections": c.selections,
            "misses": c.misses,
            "loads": c.loads,
            "miss_rate": _share(c.misses, c.selections),
            "loads_per_token": _share(c.loads, c.tokens),
            "all_hit_share": _share(c.all_hit, c.token_layers),
            "expert_lifetime": _share(c.life_tokens, c.lives),
            "swapped_share": _share(c.swapped, c.selections),
            "bytes_per_token": _share(read, c.tokens),
            "ms_per_token": None if seconds is None else 1000 * seconds / c.tokens,
            "tokens_per_second": c.tokens / seconds if seconds else None,
        }


def settings(trace: Trace, routings: Sequence[str], evictions: Sequence[str], slots: Sequence[int]) -> list[Setting]:
    """All combinations that make sense: a bound only with original routing. Raises UsageError for unknown names."""
    least, most = check_slots(trace, slots)
    for eviction in evictions:
        if eviction not in BOUNDS and eviction.partition(":")[0] not in EVICTION:
            raise UsageError(f"unknown eviction policy {eviction!r} (choose {', '.join((*EVICTION, *BOUNDS))})")
        if eviction not in BOUNDS:
            make_policy(eviction)
    chosen = []
    for routing in routings:
        for n in slots:
            strategy = parse_routing(routing, strength=None, top_j=None, k=least, slots=n, experts=most)
            chosen += [Setting(strategy, e, n) for e in evictions if strategy.is_exact or e not in BOUNDS]
    if not chosen:
        raise UsageError("belady is the bound of original routing only; add another --eviction, or --routing original")
    return chosen


def shared_settings(trace: Trace, evictions: Sequence[str], slots: Sequence[int]) -> list[Setting]:
    """All combinations for a pool that the layers share. Raises UsageError."""
    check_slots(trace, slots)
    for eviction in evictions:
        if eviction not in SHARED_POLICIES:
            raise UsageError(f"a shared pool has no policy {eviction!r} (choose {', '.join(SHARED_POLICIES)})")
    return [Setting(Original(), e, n) for n in slots for e in evictions]


def check_slots(trace: Trace, slots: Sequence[int]) -> tuple[int, int]:
    """The largest k and the largest number of experts of the layers. Raises UsageError for slots beyond them."""
    least, most = max(x.shape.k for x in trace.layers), max(x.shape.experts for x in trace.layers)
    for n in slots:
        if not least <= n <= most:
            raise UsageError(f"slots must be from {least}, the experts per token, to all {most} of a layer, not {n}")
    return least, most


def simulate(
    trace: Trace,
    chosen: Sequence[Setting],
    *,
    initial: Initial = "empty",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Result]:
    """Replay every setting on every layer. Raises UsageError if a strategy needs scores that the trace lacks."""
    per_layer: list[list[PhaseCounts]] = [[] for _ in chosen]
    needs_scores = any(not s.strategy.is_exact for s in chosen)
    for i, layer in enumerate(trace.layers):  # outermost, so that the scores of one layer at a time are unpacked
        scores = layer.scores() if needs_scores else None
        for j, s in enumerate(chosen):
            starts = starts_of(layer, s.slots, initial, seed=seed)
            if s.is_bound:
                counts = replay_bound(layer, s.slots, s.eviction, starts)
            elif s.strategy.is_exact or scores is None:
                counts = replay_layer(layer, s.slots, s.eviction, starts)
            else:
                counts = replay_strategy(layer, scores, s.slots, s.eviction, s.strategy, starts)
            per_layer[j].append(counts)
            if progress is not None:
                progress(i * len(chosen) + j + 1, len(trace.layers) * len(chosen))
    return [_result(trace, s, counts) for s, counts in zip(chosen, per_layer, strict=True)]


def simulate_shared(trace: Trace, chosen: Sequence[Setting], *, progress: Progress | None = None) -> list[Result]:
    """Replay original routing through one pool that is as large as `slots` in every layer. Raises UsageError."""
    results = []
    for n, s in enumerate(chosen):
        capacity = sum(min(s.slots, x.shape.experts) for x in trace.layers)
        results.append(_result(trace, s, replay_shared(trace.layers, capacity, s.eviction)))
        if progress is not None:
            progress(n + 1, len(chosen))
    return results


def _result(trace: Trace, setting: Setting, layers: Sequence[PhaseCounts]) -> Result:
    sizes = [x.shape.bytes_per_expert for x in trace.layers]
    return Result(
        setting,
        trace.is_original and setting.strategy.is_exact,
        PhaseCounts(over_layers(x.prefill for x in layers), over_layers(x.decode for x in layers)),
        (
            sum(x.prefill.loads * n for x, n in zip(layers, sizes, strict=True)),
            sum(x.decode.loads * n for x, n in zip(layers, sizes, strict=True)),
        ),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
