"""The answer of `mlx_moecache plan` as one screen of at most 80 columns, and as one JSON object. Plain Python."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..budget import MemoryPlan, format_bytes
from ..checkpoints.reader import EmulatedFlash
from ..devices import DEVICES, WITHOUT_ENTITLEMENT, Device
from ..study.published import LEAST_SHARE, SOURCE
from .emulation import Emulation, reserve

if TYPE_CHECKING:
    from ..study.simulation import Result
    from .model_summary import ModelSummary

WIDTH = 80
_LABEL = 20  # columns of the labels on the left
_NAMES = {"resident_weights": "weights", "kv_cache": "KV", "host_buffers": "read buffers"}

Range = tuple[float, float]  # from the most hits to the fewest


@dataclass(frozen=True)
class Machine:
    """Whose memory it is, and how much of it is ours."""

    title: str
    budget: int  # bytes for what we cause
    not_charged: int | None  # bytes of interpreter and libraries, where the limit counts them
    device: Device | None
    flash: EmulatedFlash | None  # None: no times
    has_tokenizer: bool = True  # part of not_charged


@dataclass(frozen=True)
class Expectation:
    """What a decoded token will find and read under one routing. Pairs: best and worst; the same if replayed."""

    routing: str
    hit_rate: Range
    bytes_per_token: Range
    reading_layers: Range  # per token: those that wait for at least one read
    is_exact: bool  # a replay of what the model itself chose

    @classmethod
    def from_hits(cls, routing: str, hits: Range, layers: Sequence[tuple[int, int]]) -> Expectation:
        """hits: lowest and highest. layers: (experts per token, bytes per expert).

        A layer of k experts waits with a chance of 1 - h^k, as if hits were independent of each other.
        """
        low, high = hits
        size = sum(k * nbytes for k, nbytes in layers)
        waits = [sum(1 - h**k for k, _ in layers) for h in (high, low)]
        return cls(routing, (high, low), ((1 - high) * size, (1 - low) * size), (waits[0], waits[1]), False)

    @classmethod
    def from_replay(cls, result: Result) -> Expectation:
        c, read = result.counts.of(True), result.bytes_read[True]
        hits = 1 - c.misses / max(1, c.selections)
        size, waits = read / max(1, c.tokens), c.waits / max(1, c.tokens)
        return cls(result.setting.strategy.name, (hits, hits), (size, size), (waits, waits), result.is_exact)

    def seconds(self, flash: EmulatedFlash) -> Range:
        """Of reads per token."""
        best, worst = (
            size / flash.bytes_per_second + waits * flash.latency_seconds
            for size, waits in zip(self.bytes_per_token, self.reading_layers, strict=True)
        )
        return best, worst


@dataclass(frozen=True)
class Plan:
    """Everything that the command found out. Bytes."""

    name: str
    summary: ModelSummary
    machine: Machine
    max_context: int
    memory: MemoryPlan | None  # None: it does not run
    least: MemoryPlan  # of the smallest budget that works
    complete: int  # budget that holds all experts
    expectations: tuple[Expectation, ...]
    trace: Path | None
    compute_seconds: float | None

    @property
    def smallest(self) -> int:
        """The smallest budget that works."""
        return self.least.total

    @property
    def share(self) -> float:
        """Of all experts, in memory."""
        slots = 0 if self.memory is None else sum(self.memory.slots_per_layer)
        return slots / sum(layer.experts for layer in self.summary.layers)

    @property
    def basis(self) -> str:
        """Where the hit rates come from."""
        if self.share == 1:
            return "all experts in memory: nothing is read"
        if self.trace is not None:
            slots = min(self.memory.slots_per_layer) if self.memory else 0
            return f"{self.trace.name}, replayed with {slots} slots, as cold at its start as the run was"
        note = f"; below {LEAST_SHARE:.0%} of the experts nothing is published" if self.share < LEAST_SHARE else ""
        return f"{SOURCE} at this share of the experts{note}; a --trace says more"

    @property
    def chunk_bytes(self) -> int:
        """The most that one chunk of a prompt reads: it may displace the experts that later layers' tokens need."""
        return 0 if self.share == 1 else self.summary.experts

    @property
    def devices_that_run_it(self) -> list[str]:
        taken = self.machine.not_charged or 0
        return [
            d.name
            for d in DEVICES.values()
            if not d.name.endswith(WITHOUT_ENTITLEMENT)
            and d.app_limit_bytes - reserve(d.app_limit_bytes) - taken >= self.smallest
        ]


def screen(plan: Plan) -> list[str]:
    """Lines for people. Bytes are decimal: 1 GB = 1e9."""
    layers = plan.summary.layers
    experts, k = _range([x.experts for x in layers]), _range([x.k for x in layers])
    return [
        *_wrapped("model", f"{plan.name} ({plan.summary.model_type})"),
        *_wrapped(
            "", f"{len(layers)} MoE layers, {experts} experts, {k} per token, {format_bytes(plan.summary.total)}"
        ),
        *_machine_lines(plan),
        *_wrapped("context", f"{plan.max_context:,} tokens"),
        "",
        *(_failure(plan) if plan.memory is None else _success(plan, plan.memory)),
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The same, unrounded; what is unknown or not so is null."""
    machine, memory, flash = plan.machine, plan.memory, plan.machine.flash
    emulation = None if flash is None else Emulation(machine.device, flash)
    return {
        "model": plan.name,
        "model_type": plan.summary.model_type,
        "runs": memory is not None,
        "machine": machine.title,
        "emulation": None if emulation is None else emulation.as_json(),
        "budget": machine.budget,
        "not_charged_bytes": machine.not_charged,
        "smallest_budget": plan.smallest,
        "smallest_plan": plan.least.parts(),
        "budget_for_all_experts": plan.complete,
        "max_context": plan.max_context,
        "slots_per_layer": None if memory is None else list(memory.slots_per_layer),
        "experts_per_layer": [x.experts for x in plan.summary.layers],
        "share_in_memory": plan.share,
        "plan": None
        if memory is None
        else {**memory.parts(), "total": memory.total, "prefill_step_size": memory.prefill_step_size},
        "prefill_bytes_per_chunk": None if memory is None else plan.chunk_bytes,
        "hit_rates_from": None if memory is None else plan.basis,
        "expectations": [_expectation_json(plan, e) for e in plan.expectations],
        "devices_that_run_it": plan.devices_that_run_it,
    }


def _expectation_json(plan: Plan, e: Expectation) -> dict[str, Any]:
    seconds = None if plan.machine.flash is None else e.seconds(plan.machine.flash)
    total = None
    if seconds is not None and plan.compute_seconds is not None:
        total = [plan.compute_seconds + s for s in seconds]
    return {
        "routing": e.routing,
        "exact": e.is_exact,
        "hit_rate": list(e.hit_rate),
        "bytes_per_token": list(e.bytes_per_token),
        "reading_layers_per_token": list(e.reading_layers),
        "read_seconds_per_token": None if seconds is None else list(seconds),
        "seconds_per_token": total,
    }


def _machine_lines(plan: Plan) -> list[str]:
    machine = plan.machine
    lines = _wrapped("memory of", machine.title)
    budget = format_bytes(machine.budget)
    if machine.device is not None:
        limit = format_bytes(machine.device.app_limit_bytes)
        taken = ""
        if machine.not_charged is not None:
            taken = f", {format_bytes(machine.not_charged)} of it for the interpreter"
            taken += "" if machine.has_tokenizer else "; a run also holds the tokenizer"
        budget += f" of the {limit} that one app may have{taken}"
    lines += _wrapped("budget", budget)
    if machine.flash is not None:
        lines += _wrapped("flash", Emulation(machine.device, machine.flash).speed)
    if machine.device is not None and machine.device.estimates:
        lines += _wrapped("estimated", ", ".join(machine.device.estimates).replace("_", " "))
    return lines


def _success(plan: Plan, memory: MemoryPlan) -> list[str]:
    experts = _range([x.experts for x in plan.summary.layers])
    in_memory = "all experts" if plan.share == 1 else f"{_range(memory.slots_per_layer)} of {experts} experts per layer"
    chunk = f"{memory.prefill_step_size:,} tokens per chunk"
    if plan.chunk_bytes:
        chunk += f", each may read all experts: {format_bytes(plan.chunk_bytes)}"
        if plan.machine.flash is not None:
            chunk += f", {_time(plan.chunk_bytes / plan.machine.flash.bytes_per_second)}"
    return [
        *_wrapped("verdict", f"it runs, with {in_memory} in memory ({plan.share:.0%})"),
        *_wrapped("memory", f"{_parts(memory)} = {format_bytes(memory.total)}"),
        *_wrapped("prompt", chunk),
        "",
        *_expectation_lines(plan),
        *_wrapped("smallest budget", f"{format_bytes(plan.smallest, up=True)}; all experts: {_up(plan.complete)}"),
    ]


def _expectation_lines(plan: Plan) -> list[str]:
    if plan.share == 1:
        return _wrapped("reads", plan.basis)
    flash, compute = plan.machine.flash, plan.compute_seconds
    lines = [f"{'a decoded token':<{_LABEL}}{'hit rate':<15}{'reads':<22}{'reads take' if flash else ''}".rstrip()]
    for e in plan.expectations:
        name = e.routing + ("" if e.is_exact or plan.trace is None else " ~")
        hits = _span(f"{100 * e.hit_rate[1]:.0f}", f"{100 * e.hit_rate[0]:.0f}") + "%"
        size = _span(*(format_bytes(round(n)) for n in e.bytes_per_token))
        time = "" if flash is None else _span(*(_time(s) for s in e.seconds(flash)))
        lines.append(f"{name:<{_LABEL}}{hits:<15}{size:<22}{time}".rstrip())
        if flash is not None and compute is not None:
            rates = [compute + s for s in e.seconds(flash)]
            speed = _span(*(f"{1 / s:.1f}" if s else "-" for s in reversed(rates)))
            lines.append(f"{'':<{_LABEL}}{speed} tok/s with {_time(compute)} of computing")
    lines += _wrapped("hit rates from", plan.basis)
    if flash is None:
        lines += _wrapped("times", "unknown without the speed of the disk: --flash, such as --flash 2GB/s")
    elif compute is None:
        lines += _wrapped("times", "those of the reads alone; --compute-ms adds the rest")
    return lines


def _failure(plan: Plan) -> list[str]:
    missing = plan.smallest - plan.machine.budget
    others = plan.devices_that_run_it
    slots = _range([x.k for x in plan.summary.layers])
    return [
        *_wrapped("verdict", f"it does not run: {format_bytes(missing, up=True)} are missing"),
        *_wrapped("smallest budget", f"{_up(plan.smallest)} ({slots} of its experts per layer in memory)"),
        *_wrapped("", _parts(plan.least)),
        *_wrapped("try", "a smaller --max-context, or the model quantised to fewer bits"),
        *_wrapped("it would run on", _smallest_of_each(others) or "none of the devices that we know"),
    ]


def _smallest_of_each(names: Sequence[str]) -> str:
    """Of each kind of device the one with the least memory."""
    kinds: dict[str, str] = {}
    for name in sorted(names, key=lambda n: DEVICES[n].app_limit_bytes):
        kinds.setdefault(name.partition("-")[0], name)
    return ", ".join(kinds.values()) + (" and larger ones" if kinds else "")


def _parts(memory: MemoryPlan) -> str:
    parts = {_NAMES.get(name, name): n for name, n in memory.parts().items() if n}
    return " + ".join(f"{name} {format_bytes(n)}" for name, n in parts.items())


def _up(n: int) -> str:
    return format_bytes(n, up=True)


def _time(seconds: float) -> str:
    for unit, size, digits in (("s", 1.0, 1), ("ms", 1e-3, 1)):
        if seconds >= size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def _span(low: str, high: str) -> str:
    """ "12 to 40 ms", or one of them if they are the same."""
    if low == high:
        return low
    number, _, unit = low.partition(" ")
    same = unit and unit == high.partition(" ")[2]
    return f"{number if same else low} to {high}"


def _range(values: Sequence[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return str(low) if low == high else f"{low}-{high}"


def _wrapped(label: str, text: str) -> list[str]:
    """`text` beside `label`, on as many lines as it needs; a number stays with its unit."""
    joined = re.sub(r"(\d) (?=[KMG]?B|[mu]?s\b)", "\\1\0", text)
    lines = textwrap.wrap(joined, WIDTH - _LABEL, break_on_hyphens=False)
    return [f"{label if i == 0 else '':<{_LABEL}}{line}".replace("\0", " ") for i, line in enumerate(lines)]
