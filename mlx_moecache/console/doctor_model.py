"""What the doctor checks with a model: equal to stock mlx-lm, slots equal to the shards, memory within its budget."""

from __future__ import annotations

import gc
import mmap
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.generate import generate_step as stock_generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from .. import footprint, system
from ..budget import format_bytes
from ..expert_cache import ExpertCache
from ..generation import StepOptions, generate_step, stream_generate
from ..layer_experts import LayerExperts
from ..loading import CacheOptions, MemoryOptions, OpenedModel
from .doctor_check import Check, Figure, Show, State

EXACT = CacheOptions(routing="original")
ROUNDING = 1e-3  # of the largest logit; GPUs may add in another order and multiply with fewer bits than float32 has
CHUNK = 64  # tokens of prefill at once: given, so that the budget means half of the experts
DEVICE_EVERY = 100  # tokens between comparisons of the slots as the device sees them

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """How far logits are from those they should equal."""

    identical: bool  # bit for bit
    largest: float  # difference; inf if something is not finite
    scale: float  # largest logit

    @classmethod
    def of(cls, got: Floats, want: Floats) -> Difference:
        finite = bool(np.isfinite(got).all() and np.isfinite(want).all())
        largest = float(np.abs(got - want).max()) if finite else float("inf")
        return cls(got.tobytes() == want.tobytes() and finite, largest, float(np.abs(want).max()))

    @classmethod
    def none(cls) -> Difference:
        return cls(True, 0.0, 0.0)

    def figures(self) -> dict[str, Figure]:
        return {"identical": self.identical, "largest_difference": self.largest if isfinite(self.largest) else None}

    def joined(self, other: Difference) -> Difference:
        return Difference(
            self.identical and other.identical, max(self.largest, other.largest), max(self.scale, other.scale)
        )

    @property
    def state(self) -> State:
        """Equal bits are promised on the CPU; on a GPU rounding may differ."""
        small = self.largest <= ROUNDING * self.scale and not system.on_cpu()
        return "ok" if self.identical or small else "FAILED"

    def __str__(self) -> str:
        if self.identical:
            return "bit-identical"
        close = "equal within rounding" if self.largest <= ROUNDING * self.scale else "NOT EQUAL"
        return f"{close} (up to {self.largest:.1e} of {self.scale:.1f} apart)"


@contextmanager
def loaded(folder: Path, memory: MemoryOptions, cache: CacheOptions = EXACT) -> Iterator[nn.Module]:
    """A model of ours, and its memory free again afterwards."""
    model = OpenedModel(folder).load(memory, cache)
    try:
        yield model
    finally:
        model.expert_cache.close()


def check_exact(folder: Path, prompt: int, reply: int, show: Show) -> Check:
    """Logits and greedy tokens against stock mlx-lm, with the fewest slots that work and with half of the experts.

    prompt, reply: tokens of random text that are prefilled, and that are then decoded.
    """
    show("exact: stock mlx-lm")
    stock, config = load_model(folder)
    tokens = _random_tokens(prompt, config)
    replied = [int(t) for t, _ in stock_generate_step(mx.array(tokens), stock, max_tokens=reply)]
    want = _logits(stock, tokens, replied)
    del stock
    experts, k = _sizes(folder)
    slots = (k, experts // 2)
    total, tie = Difference.none(), False
    for s in slots:
        show(f"exact: {s} of {experts} slots")
        with loaded(folder, MemoryOptions(slots=s, max_context=prompt + reply)) as model:
            ours = [t for t, _ in generate_step(mx.array(tokens), model, StepOptions(max_tokens=reply))]
            got = _logits(model, tokens, replied)
        found = Difference.of(got, want)
        total = total.joined(found)
        where = f"with {s} of {experts} slots"
        if found.state == "FAILED":
            return Check("exact", "FAILED", f"logits {found} to mlx-lm's {where}", total.figures())
        at = parting(ours, replied)
        if at is not None:
            row = want[prompt - 1 + at]
            tie = float(row[replied[at]] - row[ours[at]]) <= 2 * found.largest
            if not tie:
                text = f"tokens differ from mlx-lm's from number {at + 1} on {where}"
                return Check("exact", "FAILED", text, {**total.figures(), "tokens_equal": False})
    text = f"logits {total} to mlx-lm's with {slots[0]} and {slots[1]} of {experts} slots"
    figures = {**total.figures(), "tokens_equal": not tie}
    if tie:
        return Check("exact", "warning", f"{text}; replies part where two tokens tie", figures)
    return Check("exact", "ok", f"{text}, tokens equal ({prompt} + {reply})", figures)


def check_slots(folder: Path, tokens: int, show: Show) -> Check:
    """Decode random tokens with few slots: after each, all slots equal the shard, and logits those of a full twin.

    The shard is read by MLX here, not by our reader. Slots are compared by checksum through the views that are written,
    and now and then on the device against the twin's, which would show that it does not see what was written.
    """
    experts, k = _sizes(folder)
    slots = min(2 * k, experts - 1)
    with (
        loaded(folder, MemoryOptions(slots=slots, max_context=tokens)) as model,
        loaded(folder, MemoryOptions(slots=experts, max_context=tokens)) as twin,
    ):
        ours, full = model.expert_cache, twin.expert_cache
        checksums = _checksums(folder, ours.layers)
        caches = make_prompt_cache(model), make_prompt_cache(twin)
        total = Difference.none()
        for n, token in enumerate(_random_tokens(tokens, OpenedModel(folder).config), start=1):
            if n % 10 == 1:
                show(f"slots: {n - 1:,} of {tokens:,} tokens")
            got, want = (_last(m(mx.array([[token]]), cache=c)) for m, c in zip((model, twin), caches, strict=True))
            # A slot that was empty costs no eviction.
            evictions = ours.stats.decode.loads - sum(len(x.residents) for x in ours.layers)
            found = Difference.of(got, want)
            total = total.joined(found)
            figures = {"tokens": n, "slots": slots, "evictions": evictions, **total.figures()}
            broken = _broken_slot(ours, checksums)
            if broken is None and (n % DEVICE_EVERY == 0 or n == tokens):
                broken = _broken_on_device(ours, full)
            after = f"after token {n:,} and {evictions:,} evictions"
            if broken is not None:
                return Check("slots", "FAILED", f"{broken} {after}", figures)
            if found.state == "FAILED":
                return Check("slots", "FAILED", f"logits {found} to those with all experts in memory {after}", figures)
    text = f"{tokens:,} tokens, {evictions:,} evictions: slots equal the shard, logits {total} to a full twin's"
    return Check("slots", "ok", text, figures)


def check_budget(folder: Path, prompt: int, reply: int, show: Show) -> Check:
    """The peak of one reply, from loading on, against the budget that it was given (half of the experts fit)."""
    show("budget: loading")
    experts, _ = _sizes(folder)
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()
    mx.reset_peak_memory()
    opened = OpenedModel(folder)
    tokenizer = opened.tokenizer()
    options = MemoryOptions(max_context=prompt + reply, max_prompt=prompt, prefill_step_size=CHUNK)
    budget = opened.plan(replace(options, slots=experts // 2)).total
    model = opened.load(replace(options, memory=budget), CacheOptions())
    # Metal hands memory out in whole pages.
    arrays = sum(1 for _ in footprint.model_arrays(model))
    rounding = 0 if system.on_cpu() else mmap.PAGESIZE * arrays
    try:
        for r in stream_generate(model, tokenizer, _random_tokens(prompt, opened.config), max_tokens=reply):
            show(f"budget: {r.generation_tokens} of {reply} tokens")
        cache = model.expert_cache
        peak = mx.get_peak_memory() - others + cache.reader.host_buffer_bytes
        slots = cache.slots_per_layer[0]
    finally:
        model.expert_cache.close()
    figures: dict[str, Figure] = {"peak_bytes": peak, "budget_bytes": budget, "slots": slots}
    text = (
        f"peak {format_bytes(peak)} of {format_bytes(budget)} ({slots} of {experts} slots, {prompt} + {reply} tokens)"
    )
    state = state_of_peak(peak, budget, rounding)
    if state != "ok":
        text = f"{format_bytes(peak - budget, up=True)} over the budget: {text}"
    return Check("budget", state, text, figures)


def parting(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Where two replies of the same length begin to differ, None if nowhere."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def state_of_peak(peak: int, budget: int, rounding: int) -> State:
    """rounding: bytes by which a device that hands out whole pages may exceed the budget with a warning only."""
    if peak <= budget:
        return "ok"
    return "warning" if peak <= budget + rounding else "FAILED"


def _sizes(folder: Path) -> tuple[int, int]:
    """Experts per layer and experts per token."""
    shapes = OpenedModel(folder).layer_shapes
    return min(x.num_experts for x in shapes), max(x.k for x in shapes)


def _random_tokens(count: int, config: dict[str, Any]) -> list[int]:
    """Random text makes routing jump, so that many experts come and go."""
    ids = np.random.default_rng(0).integers(1, int(config["vocab_size"]), count)
    return [int(i) for i in ids]


def _logits(model: nn.Module, prompt: Sequence[int], reply: Sequence[int]) -> Floats:
    """Logits [L, V] of prompt and reply: two chunks of prefill, then token by token."""
    cache, half = make_prompt_cache(model), len(prompt) // 2
    parts = [prompt[:half], prompt[half:], *([t] for t in reply)]
    rows = []
    for part in parts:
        logits = model(mx.array([list(part)]), cache=cache)[0].astype(mx.float32)
        mx.eval(logits)
        rows.append(np.array(logits))
    return np.concatenate(rows)


def _last(logits: mx.array) -> Floats:
    return np.array(logits[0, -1].astype(mx.float32))


def _checksums(folder: Path, layers: Sequence[LayerExperts]) -> list[list[int]]:
    """CRC of each expert of each layer, all its tensors joined, as MLX itself reads the (stacked) checkpoint."""
    weights: dict[str, mx.array] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        weights.update(mx.load(str(shard)))  # type: ignore[arg-type]  # typed as the union of all file formats
    result = []
    for x in layers:
        tensors = [np.array(weights[f"{x.path}.{c.name}"].view(mx.uint8)) for c in x.pool.components]
        crcs = [0] * x.num_experts
        for e in range(x.num_experts):
            for tensor in tensors:
                crcs[e] = zlib.crc32(tensor[e], crcs[e])
        result.append(crcs)
    return result


def _broken_slot(cache: ExpertCache, checksums: Sequence[Sequence[int]]) -> str | None:
    """Which slot does not hold its expert's bytes, if any."""
    for x, expected in zip(cache.layers, checksums, strict=True):
        for e in x.residents.experts:
            slot, crc = x.residents.slot_of(e), 0
            for c in range(len(x.pool.components)):
                crc = zlib.crc32(x.pool.view(c, slot), crc)
            if crc != expected[e]:
                return f"slot {slot} of {x.path} does not hold the bytes of expert {e}"
    return None


def _broken_on_device(ours: ExpertCache, full: ExpertCache) -> str | None:
    """As `_broken_slot`, but as the device sees the slots; of the twin, expert e is in slot e."""
    for x, all_of_it in zip(ours.layers, full.layers, strict=True):
        experts = sorted(x.residents.experts)
        slots = [x.residents.slot_of(e) for e in experts]
        for name, array in x.pool.arrays.items():
            got, want = array[mx.array(slots)], all_of_it.pool.arrays[name][mx.array(experts)]
            if not mx.array_equal(got.view(mx.uint8), want.view(mx.uint8)).item():
                return f"the device sees other bytes in {name} of {x.path}"
    return None
