"""One comparison: load its configurations and the controls, time them in turn, work out the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from speed_calibrate import resolve
from speed_limits import CONTROLS, RESIDENT, Parts, parts
from speed_price import prices
from speed_replay import Recording
from speed_report import Decode, Prompt, decode_figures, prefill_figures
from speed_rounds import START, Round, measure_decode, measure_prefill
from speed_setup import STOCK, WARM, Configuration, Side
from speed_waits import IdleControl


@dataclass(frozen=True)
class Settings:
    """How long to measure, and what."""

    rounds: int
    tokens: int  # per segment
    warm_up: int  # tokens
    prompt: int  # tokens; 0: prefill is not timed
    prompts: int
    decodes: bool  # False: only prefill is timed
    limits: bool  # run the controls, too
    show: bool  # progress

    @property
    def timed(self) -> int:
        """Tokens of a reply of which some are timed."""
        return 1 + self.warm_up + 2 * self.rounds * self.tokens if self.decodes else 0


@dataclass(frozen=True)
class Comparison:
    """Configurations and their figures; ratios are to the first one."""

    layers: int | None  # that have experts; of these four, None if only mlx-lm's own model ran
    experts: int | None
    top_k: int | None
    bytes_per_expert: int | None
    configurations: list[Configuration]
    raw_bytes_per_second: list[float]  # quartiles of sequential reads; empty without decode
    parts: Parts | None
    decode: list[Decode]
    prefill: list[Prompt]
    perplexity: dict[str, str]  # what the bias costs on the demo model


def compare(
    configurations: Sequence[Configuration], settings: Settings, folder: Path, recording: Recording, *, replayed: bool
) -> Comparison:
    """Of the checkpoint in `folder`. Raises UsageError for settings that the engine does not have."""
    resolved = resolve(
        list(configurations),
        folder,
        recording,
        tokens=settings.timed,
        prompt=0 if settings.decodes else settings.prompt,
        replayed=replayed,
    )
    limits = settings.limits and settings.decodes
    controls = [c for c in CONTROLS if c.text not in {w.text for w in resolved}] if limits else []
    context = max(START + settings.timed, settings.prompt) + 2
    sides: list[Side] = []
    rounds: list[Round] = []
    try:
        for c in [*resolved, *controls]:
            sides.append(Side(c, folder, recording, context=context, replayed=replayed))
        ours = sides[: len(resolved)]
        if settings.decodes:
            rounds = measure_decode(
                sides,
                rounds=settings.rounds,
                tokens=settings.tokens,
                warm_up=settings.warm_up,
                shard=sorted(folder.glob("*.safetensors"))[0],
                show=settings.show,
                idle=IdleControl(next(s for s in sides if s.name == RESIDENT.text)) if limits else None,
                idle_for=[s.name for s in ours if s.cache is not None and s.cache.has_host_reads],
            )
        else:
            for side in ours:
                side.warm()
        prompts = (
            measure_prefill(
                ours,
                rounds=settings.prompts,
                prompt=settings.prompt,
                at=WARM + settings.timed,
                show=settings.show,
            )
            if settings.prompt
            else []
        )
    finally:
        for side in sides:
            side.close()
    cached = next((s.cache for s in sides if s.cache is not None), None)
    layer = None if cached is None else cached.layers[0]
    known = parts(rounds, layers=len(cached.layers), k=layer.k) if limits and cached and layer else None
    return Comparison(
        layers=None if cached is None else len(cached.layers),
        experts=None if layer is None else layer.num_experts,
        top_k=None if layer is None else layer.k,
        bytes_per_expert=None if layer is None else layer.bytes_per_expert,
        configurations=resolved,
        raw_bytes_per_second=np.quantile([r.raw for r in rounds], [0.25, 0.5, 0.75]).tolist() if rounds else [],
        parts=known,
        decode=decode_figures(rounds, resolved, known) if rounds else [],
        prefill=prefill_figures(prompts, resolved) if prompts else [],
        perplexity=prices([s for s in ours if s.cache is not None and s.configuration.routing != STOCK]),
    )
