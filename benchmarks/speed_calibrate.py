"""Emulated flash that is a multiple of compute: how fast must it be for this model, these slots, this text?"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
from speed_replay import Recording, mapped
from speed_rounds import START, segment
from speed_setup import WARM, Configuration, Flash, Side, slot_count

from mlx_moecache.errors import UsageError
from mlx_moecache.expert_cache import ExpertCache

WARM_UP, TIMED = 4, 16  # tokens


def resolve(
    configurations: list[Configuration], folder: Path, recording: Recording, *, tokens: int, replayed: bool
) -> list[Configuration]:
    """The configurations with speeds in bytes per second.

    "4x": under original routing with LRU and the same slots, the misses of the `tokens` tokens that will be timed take
    four times as long as computing. Computing is measured with reads that are not slowed down, their waiting left out.
    Raises UsageError where nothing is ever read.
    """
    known: dict[str, tuple[float, float]] = {}  # slots -> seconds of compute, bytes per token
    found = []
    for c in configurations:
        flash = c.flash
        if flash is None or flash.times_compute is None:
            found.append(c)
            continue
        if c.slots not in known:
            known[c.slots] = _calibrate(c.slots, folder, recording, tokens, replayed)
        compute, nbytes = known[c.slots]
        if not nbytes:
            raise UsageError(f"with slots={c.slots} nothing is read, so flash={flash.times_compute:g}x has no meaning")
        speed = nbytes / (flash.times_compute * compute)
        found.append(replace(c, flash=Flash(speed, None, flash.latency_seconds)))
    return found


def _calibrate(slots: str, folder: Path, recording: Recording, tokens: int, replayed: bool) -> tuple[float, float]:
    side = Side(Configuration("calibration", slots=slots), folder, recording, context=512, replayed=replayed)
    cache = side.cache
    assert cache is not None
    side.warm()
    side.begin(START, tokens=1 + WARM_UP + TIMED)
    side.advance(1 + WARM_UP)
    each = [segment(side, 1) for _ in range(TIMED)]
    nbytes = _lru_bytes(cache, recording, slots, tokens)
    side.close()
    return float(np.median([s.seconds - s.stats.wait_seconds for s in each])), nbytes


def _lru_bytes(cache: ExpertCache, recording: Recording, slots: str, tokens: int) -> float:
    """Bytes per token that original routing with LRU reads for the tokens to be timed."""
    total = 0
    for i, layer in enumerate(cache.layers):
        z = mapped(recording.z, i, layer.num_experts, layer.k)
        held: OrderedDict[int, None] = OrderedDict()
        capacity, misses = slot_count(slots, layer.num_experts), 0
        for t in range(WARM + START + tokens):
            row = z[t % len(z)]
            for e in np.argsort(row)[::-1][: layer.k].tolist():
                if e in held:
                    held.move_to_end(e)
                    continue
                misses += t >= WARM + START
                held[e] = None
                if len(held) > capacity:
                    held.popitem(last=False)
        total += misses * layer.bytes_per_expert
    return total / tokens
