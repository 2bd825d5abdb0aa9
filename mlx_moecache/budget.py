"""The memory budget: one figure for everything that we cause, turned into slots per layer. Numbers only, no arrays.

Charged: resident weights, KV cache, transients of a forward pass, host buffers of the reader, slots. Not charged:
the interpreter and its libraries, which are there before we begin.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import BudgetError, UsageError

AUTO_SHARE_OF_RAM = 0.7
TRANSIENT_SHARE = (
    0.25  # of what is left beside resident weights and KV: larger prefill chunks are not worth the slots
)
CHUNKS = (2048, 1024, 512, 256, 128, 64, 32)  # tokens per prefill chunk that the planner may choose
UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_memory(memory: str | int, *, physical: int, recommended: int | None) -> int:
    """Bytes meant by "6GB", "512 MiB", "60%" (of RAM), "auto" or a number of bytes.

    auto: the smaller of the device's recommended working set and 0.7 of RAM. Raises UsageError if it is not a size.
    """
    if isinstance(memory, int):
        size = memory
    else:
        text = memory.strip().lower()
        if text == "auto":
            size = int(AUTO_SHARE_OF_RAM * physical)
            return min(size, recommended) if recommended else size
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:(%)|([kmgt]?)(i?)b?)", text)
        if match is None:
            raise UsageError(f"{memory!r} is not a memory size; write 4GB, 512MB, 2GiB, 60% (of RAM) or auto")
        number, percent, unit, binary = match.groups()
        if percent:
            size = int(float(number) / 100 * physical)
        elif binary and unit:
            size = int(float(number) * 1024 ** "kmgt".index(unit) * 1024)
        else:
            size = int(float(number) * UNITS[unit])
    if size <= 0:
        raise UsageError(f"the memory budget must be more than 0, not {memory!r}")
    return size


def format_bytes(n: int, *, up: bool = False) -> str:
    """Three significant digits in B, KB, MB or GB (1 GB = 1e9 bytes); `up` never rounds down."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if n >= 0.9995 * size:
            digits = max(0, 2 - int(math.log10(max(1.0, n / size))))
            value = n / size * 10**digits
            return f"{(math.ceil(value - 1e-9) if up else round(value)) / 10**digits:.{digits}f} {unit}"
    return f"{n} B"


@dataclass(frozen=True)
class LayerShape:
    """What the planner must know of one MoE layer."""

    path: str
    num_experts: int  # E
    k: int  # experts per token, the minimum of slots
    bytes_per_expert: int


@dataclass(frozen=True)
class ForwardShape:
    """What a forward pass needs besides weights: `transient(chunk)` bytes for a chunk of so many tokens."""

    bytes_per_token: int  # activations that live at once in the widest layer
    score_bytes_per_token: int  # attention scores of one query token over the whole context, 0 where fused
    fixed: int  # logits, sampling, growth of the KV cache

    def transient(self, chunk: int) -> int:
        return self.fixed + chunk * (self.bytes_per_token + self.score_bytes_per_token)


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

    @property
    def total(self) -> int:
        return self.resident + self.kv + self.transient + self.host_buffers + self.slots

    def parts(self) -> dict[str, int]:
        return {
            "resident_weights": self.resident,
            "kv_cache": self.kv,
            "transients": self.transient,
            "host_buffers": self.host_buffers,
            "slots": self.slots,
        }


def plan_memory(
    layers: Sequence[LayerShape],
    forward: ForwardShape,
    *,
    resident: int,
    kv: int,
    host_buffers: int,
    budget: int | None = None,
    slots: int | None = None,
    prefill_step_size: int | None = None,
    max_chunk: int = CHUNKS[0],
) -> MemoryPlan:
    """Turn a budget in bytes, or a number of slots per layer, into a plan.

    Every layer gets the same number of slots, at most its experts. Without `prefill_step_size` the largest chunk is
    taken whose transients fit into a quarter of what weights and KV cache leave, at most `max_chunk` tokens (no prompt is longer).
    Raises BudgetError if not even the minimum (k slots per layer) fits, naming the smallest budget that would.
    """
    sizes = CHUNKS if prefill_step_size is None else (prefill_step_size,)
    chunks = list(dict.fromkeys(min(c, max_chunk) for c in sizes))

    def finish(per_layer: Sequence[int], chunk: int) -> MemoryPlan:
        counts = tuple(min(s, x.num_experts) for s, x in zip(per_layer, layers, strict=True))
        size = sum(s * x.bytes_per_expert for s, x in zip(counts, layers, strict=True))
        return MemoryPlan(budget, resident, kv, forward.transient(chunk), host_buffers, size, counts, chunk)

    if slots is not None:
        for x in layers:
            if slots < x.k:
                raise BudgetError(
                    f"{slots} slots per layer are too few: each token of this model uses {x.k} experts in {x.path}; "
                    f"use --slots {max(y.k for y in layers)} or more (all: {max(y.num_experts for y in layers)})"
                )
        return finish([slots] * len(layers), chunks[0])

    assert budget is not None
    left = budget - resident - kv - host_buffers
    smallest = finish([x.k for x in layers], chunks[-1])
    if smallest.total > budget:
        parts = ", ".join(
            f"{name.replace('_', ' ')} {format_bytes(n)}" for name, n in smallest.parts().items() if n
        )
        raise BudgetError(
            f"a memory budget of {format_bytes(budget)} is too small for this model; the smallest that works is "
            f"{format_bytes(smallest.total, up=True)} ({parts}: {max(x.k for x in layers)} slots per layer)"
        )
    chunk = next((c for c in chunks if forward.transient(c) <= TRANSIENT_SHARE * left), chunks[-1])
    while chunk != chunks[-1] and left - forward.transient(chunk) < smallest.slots:
        chunk = chunks[chunks.index(chunk) + 1]
    room = left - forward.transient(chunk)
    most = max(x.num_experts for x in layers)
    low, high = 0, most  # the largest s whose slots fit; k of a layer is always granted

    def size(s: int) -> int:
        return sum(min(max(s, x.k), x.num_experts) * x.bytes_per_expert for x in layers)

    while low < high:
        middle = (low + high + 1) // 2
        if size(middle) <= room:
            low = middle
        else:
            high = middle - 1
    return finish([max(low, x.k) for x in layers], chunk)
