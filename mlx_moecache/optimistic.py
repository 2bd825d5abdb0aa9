"""Optimistic decoding: several layers run with the experts in memory, and the host looks once at what they chose.

Where a layer missed an expert, it and the layers after it ran in vain: their KV caches and running ranges are taken
back, the layer runs again with its experts read, and so do those after it. Nothing of a pass that was given up remains,
so the output is that of looking after every layer. How many layers pay is chosen in span.py.

A decoder layer joins only where its output is, unchanged, the input of the next one (learned from the first token) and
its KV cache can be trimmed by a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .calls import replace_call
from .errors import UnsupportedModelError
from .expert_cache import ExpertCache
from .span import SpanChooser
from .stats import PhaseStats

if TYPE_CHECKING:
    from .cached_switch import CachedSwitch
    from .moe_block import MoeBlock


@dataclass
class Unchecked:
    """What one MoE layer chose for one token, on the device until the host has looked."""

    block: CachedSwitch
    arrays: list[mx.array]  # ids [1, k], then scores [1, k] and the number of swapped selections, if there are any
    earlier: list[mx.array]  # outputs that may still read the layer's slots
    has_scores: bool
    has_swapped: bool
    ids: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros((1, 0), dtype=np.uint32))
    scores: npt.NDArray[np.float32] | None = None
    swapped: int = 0

    def bring(self) -> None:
        """Copy to the host; the arrays have been evaluated."""
        rest = self.arrays[1:]
        self.ids = np.array(self.arrays[0])
        self.scores = np.array(rest.pop(0)) if self.has_scores else None
        self.swapped = int(np.array(rest.pop(0))) if self.has_swapped else 0

    @property
    def missed(self) -> bool:
        """True if an expert was chosen that is not in memory."""
        residents, most = self.block.layer.residents, self.block.num_experts
        return any(e not in residents for e in self.ids.ravel().tolist() if e < most)


@dataclass
class _Call:
    """One decoder layer's part of the pass."""

    number: int
    run: Callable[..., Any]
    args: tuple[Any, ...]  # the first is the residual stream [1, 1, D]
    kwargs: dict[str, Any]
    output: Any = None
    chose: list[Unchecked] = field(default_factory=list)
    ranges: list[tuple[MoeBlock, mx.array, int]] = field(default_factory=list)

    @property
    def kv_caches(self) -> list[Any]:
        return [c for c in (*self.args, *self.kwargs.values()) if hasattr(c, "is_trimmable")]


class Optimist:
    """Runs the decoder layers of one model; see the module. With a span of 1 every layer looks, as without it."""

    def __init__(
        self, layers: Sequence[nn.Module], blocks: Sequence[MoeBlock], cache: ExpertCache, chooser: SpanChooser
    ) -> None:
        self.cache, self.chooser = cache, chooser
        self.enabled = True  # False: every layer looks
        self.known: dict[int, Unchecked] = {}  # id of a block that runs again -> what it chose
        self.missed = self.run = 0  # layers, of the token that is under way
        self._last = len(layers) - 1
        inside = [{id(m) for m in layer.modules()} for layer in layers]
        self._blocks = [[b for b in blocks if id(b.switch) in modules] for modules in inside]
        self._chained: list[bool] | None = None  # whether layer i's input is layer i - 1's output
        self._learned: list[bool] = []
        self._before: Any = None
        self._on = self._recording = False
        self._calls: list[_Call] = []
        self._began: tuple[float, float, int] | None = None  # of this token: time, waited for reads, host reads
        for i, layer in enumerate(layers):
            self._install(i, layer)

    @property
    def records(self) -> bool:
        """True while a layer runs whose choice the host will look at later."""
        return self._recording

    def record(self, chose: Unchecked) -> None:
        self._calls[-1].chose.append(chose)

    # ---- one decoder layer ----

    def _install(self, i: int, layer: nn.Module) -> None:
        upstream, optimist = type(layer).__call__, self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return optimist._layer(_Call(i, lambda *a, **k: upstream(module, *a, **k), args, kwargs))

        replace_call(layer, call)

    def _layer(self, call: _Call) -> Any:
        if call.number == 0:
            self._begin(call)
        if not self._on:
            return call.run(*call.args, **call.kwargs)
        if self._chained is None:
            return self._learn(call)
        joins = self.chooser.span > 1 and self._can_join(call)
        if self._calls:
            if call.args[0] is not self._calls[-1].output:
                raise UnsupportedModelError("the layers of this model changed how they are connected; load it again")
            if self._pending >= self.chooser.span or not joins:
                call.args = (self._settle(), *call.args[1:])
        if not joins:
            output = call.run(*call.args, **call.kwargs)
        else:
            self._run(call)
            leaves = call.number == self._last or not self._chained[call.number + 1]
            output = self._settle() if leaves else call.output
        if call.number == self._last:
            self._on = False
        return output

    def _begin(self, call: _Call) -> None:
        """A forward pass begins: is it one token at decode, and how long did the last one take?"""
        self._calls, self.known, self._recording = [], {}, False
        x = call.args[0] if call.args else None
        single = isinstance(x, mx.array) and x.shape[:2] == (1, 1) and self.cache.phase_of(1) == "decode"
        self._on = self.enabled and single and self.cache.has_host_reads and not self.cache.observers
        if not self._on:
            self._began = None
            return
        now, stats = time.perf_counter(), self.cache.stats.decode
        if self._began is not None and self._chained is not None and self.run:
            began, waited, reads = self._began
            seconds = now - began - (stats.wait_seconds - waited)
            self.chooser.observe(self.missed, self.run, stats.host_reads - reads, seconds)
        self._began = now, stats.wait_seconds, stats.host_reads
        self.missed = self.run = 0

    def _learn(self, call: _Call) -> Any:
        """Run as usual, and see whether the output of each layer is the input of the next one."""
        if call.number == 0:
            self._learned = []
        self._learned.append(bool(call.args) and isinstance(self._before, mx.array) and call.args[0] is self._before)
        self._before = call.run(*call.args, **call.kwargs)
        output = self._before
        if call.number == self._last:
            if len(self._learned) == self._last + 1:
                self._chained = self._learned
            self._before = None
            self._on = False
        return output

    def _can_join(self, call: _Call) -> bool:
        """A KV cache that grows now needs room for its copy, which is there for one layer at a time."""
        return all(c.is_trimmable() and getattr(c, "offset", 1) % getattr(c, "step", 256) for c in call.kv_caches)

    @property
    def _pending(self) -> int:
        return sum(len(c.chose) for c in self._calls)

    # ---- running ahead, looking, running again ----

    def _run(self, call: _Call) -> None:
        call.ranges = [(b, b.running_range.total, b.running_range.tokens) for b in self._blocks[call.number]]
        self._calls.append(call)
        self._recording = True
        try:
            call.output = call.run(*call.args, **call.kwargs)
        finally:
            self._recording = False

    def _settle(self) -> Any:
        """Look at what the layers of this pass chose and run again what missed; the output of the last one."""
        while True:
            calls, self._calls = self._calls, []
            self._look([chose for call in calls for chose in call.chose])
            first = next((i for i, c in enumerate(calls) if any(chose.missed for chose in c.chose)), len(calls))
            for call in calls[:first]:
                for chose in call.chose:
                    chose.block.commit(chose)
            again = calls[first:]
            if not again:
                return calls[-1].output
            for call in again:
                _undo(call)
            x = self._with_what_it_chose(again[0])
            for call in again[1:]:
                self._run(_Call(call.number, call.run, (x, *call.args[1:]), call.kwargs))
                x = self._calls[-1].output
            if not self._calls:
                return x

    def _look(self, chosen: Sequence[Unchecked]) -> None:
        """The one host read of a pass. It also fences the slots of its layers."""
        if not chosen:
            return
        began = time.perf_counter()
        mx.eval([a for chose in chosen for a in (*chose.arrays, *chose.earlier)])
        waited = time.perf_counter() - began
        for chose in chosen:
            chose.bring()
        self.cache.count(chosen[0].block.layer, 1, PhaseStats(host_reads=1, host_wait_seconds=waited))

    def _with_what_it_chose(self, call: _Call) -> Any:
        """Run the first layer that missed: up to its first miss the host knows what it chooses, and need not look."""
        known = []
        for chose in call.chose:
            known.append(chose)
            if chose.missed:
                break
        self.known = {id(chose.block): chose for chose in known}
        try:
            return call.run(*call.args, **call.kwargs)
        finally:
            self.known = {}


def _undo(call: _Call) -> None:
    """Take back what a layer left behind: a token in its KV cache, its scores in D, outputs that nobody will need."""
    for cache in call.kv_caches:
        cache.trim(1)
    for block, total, tokens in call.ranges:
        block.running_range.total, block.running_range.tokens = total, tokens
    for chose in call.chose:
        chose.block.layer.pool.take_unfenced()
