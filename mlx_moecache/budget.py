"""The memory budget: one figure for everything that we cause, turned into slots per layer. Numbers only, no arrays.

Charged: resident weights, KV cache, transients of a forward pass, host buffers of the reader, slots, and an overhead of
what is in no array. Not charged: the interpreter and its libraries, which are there before we begin.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from .errors import BudgetError, UsageError

AUTO_SHARE_OF_RAM = 0.7  # what auto uses at most; the rest is for the system, other programs and the page cache
AUTO_RESERVE = 1 / 8  # of RAM, which auto leaves of what is available: experts are read through the page cache
TRANSIENT_SHARE = 0.25  # of what is left beside resident weights and KV: larger chunks are not worth the slots
CHUNKS = (2048, 1024, 512, 256, 128, 64, 32)  # tokens per prefill chunk that the planner may choose
UNLIMITED = 2**62  # bytes
USEFUL_CHUNK = 256  # tokens; all experts are made resident only if a chunk of this size still fits beside them
STATE_STEP = 256  # tokens; mlx-lm's steps through a chunk in Mamba 2, of which two may be under way
MARGIN = 32  # a part so large is added to what a chunk is computed to need; tiny models of some types took 2 % more
AHEAD = 7  # sixteenths of attention's arrays without scores that MLX makes ahead unless it must wait; measured: 7.3 up
SLACK = 2**16  # bytes for what is too small to be named: masks, indices, scalars, rounding
# Bytes that the process grows by beyond arrays and host buffers: threads, Python objects, holes in the C allocator's
# heaps. Measured on Linux with the demo model: up to 2.5 MB above MLX's peak.
OVERHEAD = 3 * 2**20
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_memory(
    memory: str | int,
    *,
    physical: int,
    recommended: int | None,
    available: int | None = None,
    baseline: int = 0,
) -> int:
    """Bytes meant by "6GB", "512 MiB", "60%" (of RAM), "auto" or a number of bytes.

    auto: the least of 0.7 of RAM less `baseline`, the device's recommended working set, and what is `available` now
    less an eighth of RAM (but at least half of it). physical: bytes of RAM; available: bytes that the system could give
    us, None if it does not say; baseline: bytes that this process has already, which count in RAM but not in the
    budget. Raises UsageError if it is not a size.
    """
    if isinstance(memory, int):
        size = memory
    else:
        text = memory.strip().lower()
        if text == "auto":
            sizes = [int(AUTO_SHARE_OF_RAM * physical) - baseline, recommended or physical]
            if available is not None:
                sizes.append(max(available - int(AUTO_RESERVE * physical), available // 2))
            return max(1, min(sizes))
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:(%)|([kmgt]?)(i?)b?)", text)
        if match is None or (match[4] and not match[3]):
            raise UsageError(f"{memory!r} is not a memory size; write 4GB, 512MB, 2GiB, 60% (of RAM) or auto")
        number = Fraction(match[1].rstrip("."))  # exact: a size that was printed must be understood as the same
        if match[2]:
            if number > 100:
                raise UsageError(f"{memory!r} is more than all of RAM; use at most 100%, or a size such as 4GB")
            size = int(number / 100 * physical)
        else:
            size = int(number * (1024 ** (1 + "kmgt".index(match[3])) if match[4] else UNITS[match[3]]))
    if size <= 0:
        raise UsageError(f"the memory budget must be more than 0, not {memory!r}")
    return size


def format_bytes(n: int, *, up: bool = False) -> str:
    """Three significant digits in B, KB, MB or GB (1 GB = 1e9 bytes); `up` never rounds down."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if 10000 * n >= 9995 * size:
            digits = 2 if n < 10 * size else 1 if n < 100 * size else 0
            step = size // 10**digits
            count = -(-n // step) if up else (n + step // 2) // step
            whole, rest = divmod(count, 10**digits)
            return f"{whole}.{rest:0{digits}} {unit}" if digits else f"{whole} {unit}"
    return f"{n} B"


@dataclass(frozen=True)
class LayerShape:
    """What the planner must know of one MoE layer."""

    path: str
    num_experts: int  # E
    k: int  # experts per token, the minimum of slots
    bytes_per_expert: int
    largest_tensor: int = 0  # bytes of the largest tensor of one expert


@dataclass(frozen=True)
class ForwardShape:
    """What a forward pass needs besides weights and KV cache, in bytes (per token of a prefill chunk unless said).

    A layer runs in stages that do not overlap: attention, then the experts, then their combination. Each layer
    is evaluated between them, except at decode if all of its experts are resident (moe_block.py).
    """

    held: int  # what Python and the KV cache keep of a chunk throughout a layer
    attention: int  # projections, rotation, norms and unfused scores over the whole context
    attention_fixed: int  # whatever the chunk: the old buffer of a KV cache that grows, expanded latent keys
    combine: int  # expert outputs, their weighted sum, shared and dense MLPs
    outputs: int  # expert outputs alone, while waves are computed
    pair: int  # intermediates of one (token, expert) pair in a wave
    k: int  # pairs per token
    wave_pairs: int  # pairs that are computed at once, at most
    experts: int  # intermediates of all pairs of a token, computed at once because all experts are resident
    decode: int  # bytes that a decode step needs, sampling included
    decode_ahead: int  # bytes of the next layer, which is under way already where not every layer reads the host
    array: int  # the largest single array
    decode_growth: int = 0  # of decode_ahead, what a growing KV cache takes: partly resident layers do not run on then
    prompt: int | None = None  # tokens of the longest prompt, None: any; one chunk of so many finds no KV cache to grow
    kv_copy: int = 0  # what of attention_fixed is there only while a KV cache grows: its old buffer, zeros behind it
    kv_buffer: int = 0  # an old buffer of a KV cache that grows between forward passes
    kv_reply: int = 0  # of the KV cache, what is there only when the prompt has been read
    keys: int = 0  # tokens that `attention` lets a query see
    key: int = 0  # what of `attention` each of them costs
    row: int = 0  # the largest array of `attention` that does not grow with the keys; 0: not known
    overlaps: bool = False  # attention of a kind that is not planned for by itself: MLX may compute further ahead
    window: int | None = None  # keys that the KV cache of every layer keeps beside the chunk's own; None: all
    square: int = 0  # state-space layers work in steps of STATE_STEP tokens: per token and token of such a step
    held_square: int = 0  # the same, but kept like `held`
    step: int = 0  # tokens by which plain KV caches grow; 0: they are not plain
    kv_step: int = 0  # bytes of all KV caches for so many tokens

    def transient(self, chunk: int, *, complete: bool, partly: bool = True, room: int = UNLIMITED) -> int:
        """Bytes beside the whole KV cache for a chunk of so many tokens, or for decoding if that is more.

        complete: all experts are resident in some layer; partly: in some layer they are not. room: bytes beside the
        whole KV cache above which MLX waits for what is running instead of allocating ahead.
        """
        room += self.kv_reply
        if self.prompt is not None and self.step and (chunk % self.step == 0 or self.step % chunk == 0):
            prefill = self._of_prompt(self.prompt, chunk, complete, partly, room)
        else:
            unseen = 0 if self.window is None else max(0, self.keys - self.window - chunk)
            at_once = self.prompt is not None and chunk >= self.prompt
            kv_copy = 0 if at_once else self.kv_copy
            prefill = self._of_chunk(chunk, complete, partly, room, unseen=unseen, kv_copy=kv_copy)
        ahead = self.decode_ahead if complete else self.decode_ahead - self.decode_growth
        return SLACK + max(self.decode + ahead, prefill - self.kv_reply, self.kv_buffer)

    def _of_prompt(self, prompt: int, chunk: int, complete: bool, partly: bool, room: int) -> int:
        """The last whole chunk sees less than the rest that follows it, and finds a smaller KV cache."""
        end = (prompt - 1) // chunk * chunk  # the last token is a pass of its own
        rest = self._of_chunk(max(1, prompt - 1 - end), complete, partly, room)
        if not end:
            return rest
        later = (-(-prompt // self.step) + -end // self.step) * self.kv_step  # what the KV cache grows by afterwards
        return max(rest, self._of_chunk(chunk, complete, partly, room + later, unseen=self.keys - end) - later)

    def _of_chunk(
        self, chunk: int, complete: bool, partly: bool, room: int, *, unseen: int = 0, kv_copy: int = 0
    ) -> int:
        """unseen: keys less than `keys` that a query sees. kv_copy: while a KV cache grows, beside its new buffer."""
        fixed = self.attention_fixed - self.kv_copy + kv_copy
        step = min(chunk, STATE_STEP)
        steps = step**2 + min(chunk - step, STATE_STEP) ** 2  # two are under way
        attention = chunk * (self.attention - unseen * self.key) + fixed + self.square * steps
        waves = chunk * self.outputs + min(chunk * self.k, self.wave_pairs) * self.pair
        others = max(chunk * self.combine, waves if partly or self.overlaps else 0)
        if complete:
            others = max(others, chunk * self.experts)
            if self.overlaps:
                lazy = min(chunk, self.wave_pairs // self.k)
                others = max(others, lazy * (self.attention + self.experts + self.outputs) + fixed)
        held = chunk * self.held + self.held_square * step**2
        peak = max(attention, others)
        if self.row and not self.overlaps:
            ahead = (chunk * (self.attention - self.keys * self.key)) * AHEAD // 16
            peak = max(attention - ahead, others, min(peak, room - held + chunk * self.row))
        return held + peak + peak // MARGIN


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part and the slots that result."""

    budget: int | None  # None: the slots were given
    resident: int
    kv: int
    transient: int
    host_buffers: int
    slots: int
    slots_per_layer: tuple[int, ...]
    prefill_step_size: int  # tokens per prefill chunk
    forward: ForwardShape  # where `transient` comes from
    overhead: int = 0  # of the process, beside MLX and host buffers

    @property
    def total(self) -> int:
        return self.buffers + self.overhead

    @property
    def buffers(self) -> int:
        """What MLX and the reader hold: the total without the overhead."""
        return self.resident + self.kv + self.transient + self.host_buffers + self.slots

    @property
    def room(self) -> int | None:
        """Bytes of KV cache and transients above which MLX should wait for running operations; None: no budget.

        MLX looks after it has allocated, so the largest array must still fit above, and what is too small to be named.
        """
        return self.room_beside(self.slots)

    def room_beside(self, slots: int) -> int | None:
        """The same if the slots take so many bytes instead of what was planned."""
        if self.budget is None:
            return None
        largest = self.forward.array * self.prefill_step_size
        beside = self.resident + self.host_buffers + self.overhead
        return max(0, self.budget - beside - slots - largest - SLACK)

    def parts(self) -> dict[str, int]:
        return {
            "resident_weights": self.resident,
            "kv_cache": self.kv,
            "transients": self.transient,
            "host_buffers": self.host_buffers,
            "slots": self.slots,
            "overhead": self.overhead,
        }


def plan_memory(
    layers: Sequence[LayerShape],
    forward: ForwardShape,
    *,
    resident: int,
    kv: int,
    host_buffers: int,
    overhead: int = 0,
    budget: int | None = None,
    slots: int | Sequence[int] | None = None,
    prefill_step_size: int | None = None,
    max_chunk: int = CHUNKS[0],
    movable: bool = False,
) -> MemoryPlan:
    """Turn a budget in bytes, or slots (for each layer, or one number for all), into a plan within the budget.

    Every layer gets the same number of slots, at least its k; more budget never means fewer slots. All experts become
    resident if they fit beside a useful prefill chunk. Otherwise a quarter of what weights and KV cache leave is kept
    for transients, unless all of a chunk of `max_chunk` tokens (no prompt is longer) needs less or the shortest chunk
    needs more; then the longest chunk is taken that fits beside the slots. `prefill_step_size`: this chunk, no other.
    movable: the slots will be resized within the budget, one tensor of one layer at a time, between forward passes; the
    copy takes the place of transients.
    Raises BudgetError if not even the minimum (k slots per layer) fits, naming the smallest budget that would.
    """
    sizes = CHUNKS if prefill_step_size is None else (prefill_step_size,)
    chunks = list(dict.fromkeys(min(c, max_chunk) for c in sizes))  # longest first

    def copied(counts: Sequence[int]) -> int:
        return max(s * x.largest_tensor for s, x in zip(counts, layers, strict=True)) if movable else 0

    def finish(counts: Sequence[int], chunk: int) -> MemoryPlan:
        whole = [s == x.num_experts for s, x in zip(counts, layers, strict=True)]

        def transient(room: int = UNLIMITED) -> int:
            needed = forward.transient(chunk, complete=any(whole), partly=not all(whole), room=room)
            return max(needed, copied(counts))

        size = sum(s * x.bytes_per_expert for s, x in zip(counts, layers, strict=True))
        plan = MemoryPlan(
            budget, resident, kv, transient(), host_buffers, size, tuple(counts), chunk, forward, overhead
        )
        if plan.room is None or budget is None or plan.total > budget:
            return plan
        return replace(plan, transient=transient(plan.room - kv))

    if slots is not None:
        wanted = [slots] * len(layers) if isinstance(slots, int) else list(slots)
        if len(wanted) != len(layers):
            raise BudgetError(
                f"{len(wanted)} slot counts do not fit this model, which has {len(layers)} MoE layers; give one number "
                "for all layers, or one for each"
            )
        for x, s in zip(layers, wanted, strict=True):
            if s < x.k:
                raise BudgetError(
                    f"{s} slots per layer are too few: each token of this model uses {x.k} experts in {x.path}; "
                    f"use --slots {max(y.k for y in layers)} or more (all: {max(y.num_experts for y in layers)})"
                )
        return finish([min(s, x.num_experts) for x, s in zip(layers, wanted, strict=True)], chunks[0])

    assert budget is not None
    smallest = finish([x.k for x in layers], chunks[-1])
    if smallest.total > budget:
        parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(n)}" for name, n in smallest.parts().items() if n)
        raise BudgetError(
            f"a memory budget of {format_bytes(budget)} is too small for this model; the smallest that works is "
            f"{format_bytes(smallest.total, up=True)} ({parts}: {max(x.k for x in layers)} slots per layer)"
        )

    def longest_chunk(counts: Sequence[int], least: int) -> MemoryPlan | None:
        plans = (finish(counts, c) for c in chunks if c >= least)
        return next((p for p in plans if p.total <= budget), None)

    everything = longest_chunk([x.num_experts for x in layers], min(USEFUL_CHUNK, chunks[0]))
    if everything is not None:
        return everything

    def partly(s: int) -> list[int]:
        return [max(x.k, min(s, x.num_experts - 1)) for x in layers]

    left = budget - resident - kv - host_buffers - overhead
    complete = any(s == x.num_experts for s, x in zip(partly(0), layers, strict=True))
    least, most = (forward.transient(c, complete=complete) for c in (chunks[-1], chunks[0]))
    room = left - min(max(int(TRANSIENT_SHARE * left), least), max(least, most))
    low, high = 0, max(x.num_experts for x in layers)  # the largest s whose slots fit; k of a layer is always granted
    while low < high:
        middle = (low + high + 1) // 2
        size = sum(s * x.bytes_per_expert for s, x in zip(partly(middle), layers, strict=True))
        if size <= min(room, left - copied(partly(middle))):
            low = middle
        else:
            high = middle - 1
    return longest_chunk(partly(low), 0) or smallest
