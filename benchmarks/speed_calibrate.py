"""Emulated flash that is a multiple of compute: how fast must it be for this model, these slots, this text?"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
from speed_replay import Recording, mapped
from speed_rounds import START, measure_prefill, segment
from speed_setup import WARM, Configuration, Flash, Side, slot_count

from mlx_moecache.errors import UsageError
from mlx_moecache.expert_cache import ExpertCache

WARM_UP, TIMED = 4, 16  # tokens


def resolve(
    configurations: list[Configuration],
    folder: Path,
    recording: Recording,
    *,
    tokens: int,
    prompt: int = 0,
    replayed: bool,
) -> list[Configuration]:
    """The configurations with speeds in bytes per second.

    "4x": under original routing with LRU and the same slots, the misses of the `tokens` tokens that will be timed take
    four times as long as computing. Computing is measured with reads that are not slowed down, their waiting left out.
    With a `prompt` of so many tokens, the reads and the computing are those of a prompt instead.
    Raises UsageError where nothing is ever read.
    """
    known: dict[str, tuple[float, float]] = {}  # slots -> seconds of compute, bytes; per token or prompt
    found = []
    for c in configurations:
        flash = c.flash
        if flash is None or flash.times_compute is None:
            found.append(c)
            continue
        if c.slots not in known:
            side = Side(
                Configuration("calibration", slots=c.slots),
                folder,
                recording,
                context=max(512, prompt),
                replayed=replayed,
            )
            try:
                side.warm()
                known[c.slots] = _prompt(side, prompt) if prompt else _token(side, recording, c.slots, tokens)
            finally:
                side.close()
        compute, nbytes = known[c.slots]
        if not nbytes:
            raise UsageError(f"with slots={c.slots} nothing is read, so flash={flash.times_compute:g}x has no meaning")
        speed = nbytes / (flash.times_compute * compute)
        found.append(replace(c, flash=Flash(speed, None, flash.latency_seconds)))
    return found


def _token(side: Side, recording: Recording, slots: str, tokens: int) -> tuple[float, float]:
    assert side.cache is not None
    side.begin(START, tokens=1 + WARM_UP + TIMED)
    side.advance(1 + WARM_UP)
    each = [segment(side, 1) for _ in range(TIMED)]
    nbytes = _lru_bytes(side.cache, recording, slots, tokens)
    return float(np.median([s.seconds - s.stats.wait_seconds for s in each])), nbytes


def _prompt(side: Side, prompt: int) -> tuple[float, float]:
    (found,) = measure_prefill([side], rounds=1, prompt=prompt, at=WARM, show=False)
    run = found[side.name]
    return run.seconds - run.stats.wait_seconds, float(run.stats.bytes_read)


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
