"""The expert cache of a model: per layer a set of residents, a slot pool and where the bytes of the others are.

Knows how to make experts resident (plan, fence, read, publish) and counts what happened. It does not know how bytes
move (reader.py), who is evicted (eviction.py), or what is computed with the experts (moe_block.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from .checkpoints.expert_layout import ComponentSpec, LayerExtents
from .checkpoints.read_batch import Pending
from .checkpoints.reader import ExpertReader, ReadRequest
from .contents import CacheContents, LayerContents
from .errors import BudgetError, ReadError, UsageError
from .journal import Journal, Operation
from .observer import Observer, UsageListener
from .read_pace import ReadPace
from .residents import Load, Residents
from .routing import Original, RunningRange, Strategy
from .seam import SelectionSeam
from .slots import SlotPool
from .stats import CacheStats, Phase, PhaseStats

if TYPE_CHECKING:
    from .budget import MemoryPlan
    from .look_ahead import LookAhead, Staged

    Early = dict[int, Staged] | None
    from .optimistic import Optimist

FILL_BATCH = 16  # experts per read while a layer is filled: enough to keep all threads busy


class LayerExperts:
    """Everything about the experts of one MoE layer."""

    def __init__(
        self,
        path: str,
        extents: LayerExtents,
        components: Sequence[ComponentSpec],
        *,
        num_experts: int,
        k: int,
        slots: int,
        eviction: str,
        running_range: RunningRange,
    ) -> None:
        self.path, self.extents, self.num_experts, self.k = path, extents, num_experts, k
        self.residents = Residents(num_experts, slots, eviction)
        self.pool = SlotPool(components, slots)
        self.stats = CacheStats()  # of this layer alone
        self.range = running_range  # of the router's scores, shared with the selection seam
        self.seam: SelectionSeam | None = None  # of its router, set by the MoE block
        self.on_resize: Callable[[], None] = lambda: None  # set by the MoE block: hands the pool's arrays to the model

    @property
    def bytes_per_expert(self) -> int:
        return self.extents.bytes_per_expert

    def requests(self, expert: int, views: Sequence[memoryview]) -> list[ReadRequest]:
        """Reads of `expert` into `views`, one per component."""
        e = self.extents
        return [ReadRequest(e.shards[c][expert], e.offsets[c][expert], view) for c, view in enumerate(views)]

    def requests_into(self, expert: int, slot: int) -> list[ReadRequest]:
        return self.requests(expert, [self.pool.view(c, slot) for c in range(len(self.extents.nbytes))])


class ExpertCache:
    """All MoE layers of one model, their common reader, routing strategy and statistics.

    Not safe for use from several threads; one model serves one request at a time.
    """

    def __init__(self, layers: Sequence[LayerExperts], reader: ExpertReader, strategy: Strategy) -> None:
        self.layers = tuple(layers)
        self.reader = reader
        self.strategy = strategy
        self.stats = CacheStats()
        self.observers: tuple[Observer, ...] = ()
        self.journal = Journal()  # of what is under way with slots
        self.overlaps = True  # compute what is there while the rest is read, where that pays
        self.pace = ReadPace()
        self.optimist: Optimist | None = None  # set by loading
        self.look_ahead: LookAhead | None = None  # set by loading
        self.listener: UsageListener | None = None
        self.choose_strategy: Callable[[Strategy | str], Strategy] | None = None  # set by loading; see set_strategy
        self.plan_slots: Callable[[str | int], MemoryPlan] | None = None  # memory -> plan, set by loading
        self.adopt_plan: Callable[[MemoryPlan], None] = lambda plan: None  # called when the slots are those of the plan
        self._phase: Phase | None = None
        self._closed = False
        for x in self.layers:
            self._fill(x)

    # ---- phases ----

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """State what the forward passes inside are. Outside, one row counts as decode and several as prefill."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def phase_of(self, rows: int) -> Phase:
        """The phase of a call with `rows` tokens."""
        return self._phase or ("decode" if rows == 1 else "prefill")

    def is_biased(self, rows: int) -> bool:
        """True if the strategy may change the selection of a call with `rows` tokens.

        Only a single token at decode is ever biased: the rows of a batch or of a draft under verification would share
        one residency mask though each changes it.
        """
        return rows == 1 and not isinstance(self.strategy, Original) and self.phase_of(rows) == "decode"

    # ---- making experts resident ----

    def count(self, layer: LayerExperts, rows: int, seen: PhaseStats) -> None:
        """Add what a call of `layer` with `rows` tokens did to the counters."""
        phase = self.phase_of(rows)
        self.stats.of(phase).add(seen)
        layer.stats.of(phase).add(seen)

    def load(self, layer: LayerExperts, loads: Sequence[Load], stats: PhaseStats, *, early: Early = None) -> None:
        """Read `loads` into their slots and publish them; what that took is counted in `stats`.

        Raises ReadError; residents, their order and the bytes in the slots are then as they were before.
        """
        with self.loading(layer, loads, stats, joining=True, early=early):
            pass

    @contextmanager
    def loading(
        self,
        layer: LayerExperts,
        loads: Sequence[Load],
        stats: PhaseStats,
        *,
        joining: bool = False,
        early: Early = None,
    ) -> Iterator[None]:
        """The same while the block runs, which may compute with every slot that `loads` do not write.

        joining: the block will not take long. early: what was read ahead for all waves of `layer`, taken out as it is
        used; None: look for it. If the block or a read fails, residents, their order and the bytes in the slots are as
        they were before; if even that is cut off, `mend` has to follow.
        """
        ahead = self.look_ahead
        if early is not None:
            staged = {x.expert: early.pop(x.expert) for x in loads if x.expert in early}
        else:
            staged = {} if ahead is None else ahead.claim(layer, [x.expert for x in loads], stats)
        if not loads:
            yield
            if ahead is not None:
                ahead.ended(layer, 0.0, 0.0)
            return
        undisturbed = ahead is None or not (staged or early or ahead.is_reading)
        try:
            requests = self._prepare(layer, [x for x in loads if x.expert not in staged])
            operation = self.journal.begin(layer, frozenset(x.slot for x in loads))
            pending = self._begin(layer, loads, requests, operation, joining=joining and not staged)
        except BaseException:
            if ahead is not None:
                ahead.release(list(staged.values()))
            raise
        batches = [pending, *(x.pending for x in staged.values())]
        began = returned = time.perf_counter()
        try:
            try:
                yield
            except BaseException:
                pending.cancel()
                raise
            returned = time.perf_counter()
            for batch in batches:
                batch.wait()
            for x in loads:
                if x.expert in staged:
                    staged[x.expert].copy_to(x.slot)
        except BaseException:
            self._restore(layer, loads, operation)
            raise
        finally:
            waited = time.perf_counter() - returned
            if ahead is not None:
                ahead.release(list(staged.values()))
            stats.bytes_read += pending.bytes_read
            stats.read_seconds += sum(x.read_seconds for x in batches)
            stats.wait_seconds += waited
            if undisturbed:
                self.pace.observe(pending.bytes_read, pending.read_seconds)
        if ahead is not None:
            otherwise = self.pace.read_per_byte * layer.bytes_per_expert * len(loads)
            ahead.ended(layer, waited, max(0.0, otherwise - (returned - began)))
        self._publish(layer, loads, stats)
        self.journal.end(operation)

    def _begin(
        self,
        layer: LayerExperts,
        loads: Sequence[Load],
        requests: Sequence[ReadRequest],
        operation: Operation,
        *,
        joining: bool,
    ) -> Pending:
        try:
            return self.reader.start(requests, joining=joining)
        except ReadError:  # the reader is closed
            self.journal.end(operation)
            raise
        except BaseException:
            self._restore(layer, loads, operation)
            raise

    def _prepare(self, layer: LayerExperts, loads: Sequence[Load]) -> list[ReadRequest]:
        """What to read; nothing that is still computed needs the slots any more."""
        if self._closed:
            raise ReadError(f"{layer.path} needs experts from disk, but its cache is closed; load the model again")
        layer.pool.fence()
        return [r for x in loads for r in layer.requests_into(x.expert, x.slot)]

    def mend(self) -> None:
        """Forget what is in slots whose change was cut off, as by Ctrl-C (see journal.py). Any call may follow.

        Every call of a layer and of the methods below does this first.
        """
        if self.journal.open:
            self.journal.mend(self.reader)

    def _publish(self, layer: LayerExperts, loads: Sequence[Load], stats: PhaseStats) -> None:
        layer.residents.publish(loads)
        stats.loads += len(loads)
        stats.evictions += sum(x.victim is not None for x in loads)

    # ---- watching ----

    @contextmanager
    def observed_by(self, *observers: Observer) -> Iterator[None]:
        """Tell `observers` every routing decision made inside; this makes layers that are all resident look, too."""
        before, self.observers = self.observers, (*self.observers, *observers)
        self._update_blocks()
        try:
            yield
        finally:
            self.observers = before
            self._update_blocks()

    def _update_blocks(self) -> None:
        for x in self.layers:
            x.on_resize()

    # ---- routing, while running ----

    def set_strategy(self, strategy: Strategy | str) -> None:
        """Route by `strategy`, or by the one that a spec names, from the next token on. Residents and D stay.

        Raises UsageError for an unknown spec, UnsupportedModelError if a router cannot be biased.
        """
        if self.choose_strategy is not None:
            strategy = self.choose_strategy(strategy)
        elif isinstance(strategy, str):
            raise UsageError("this cache was built without a model; give it a strategy object")
        self.strategy = strategy
        for x in self.layers:
            if x.seam is not None:
                x.seam.strategy = strategy
        self._update_blocks()

    # ---- contents ----

    def contents(self) -> CacheContents:
        """What is resident now, with its history and the running ranges."""
        self.mend()
        return CacheContents(
            tuple(LayerContents(x.residents.copy(), float(x.range.total), x.range.tokens) for x in self.layers)
        )

    def restore(self, contents: CacheContents) -> None:
        """Have exactly `contents` again: residents, their order and history, running ranges. Nothing is counted.

        Raises UsageError if the slots have been resized since, ReadError if experts cannot be read.
        """
        if contents.slots_per_layer != self.slots_per_layer:
            raise UsageError("the slots have been resized since these contents were taken; resize them back first")
        self._exchange([x.experts for x in contents.layers])
        for layer, saved in zip(self.layers, contents.layers, strict=True):
            wanted = set(saved.experts)
            for e in [e for e in layer.residents.experts if e not in wanted]:
                layer.residents.drop(e)
            layer.residents.adopt_history(saved.residents)
            layer.range.set(saved.range_total, saved.range_tokens)

    def warm(self, experts: Sequence[Sequence[int]]) -> int:
        """Make `experts` of each layer resident, the last of each list to be evicted last; of too many, the last ones.

        Returns how many were read, in one batch and without counting them. Raises UsageError if these are not experts
        of this model, ReadError.
        """
        if len(experts) != len(self.layers):
            raise UsageError(f"experts of {len(experts)} layers do not fit a model with {len(self.layers)} MoE layers")
        wanted = []
        for layer, ids in zip(self.layers, experts, strict=True):
            if not all(0 <= e < layer.num_experts for e in ids):
                raise UsageError(f"experts of {layer.path} must be numbers from 0 to {layer.num_experts - 1}")
            wanted.append(list(dict.fromkeys(reversed(ids)))[: layer.residents.capacity][::-1])
        read = self._exchange(wanted)
        for layer, ids in zip(self.layers, wanted, strict=True):
            if ids:  # else its history would age for nothing
                layer.residents.touch([(e, 1) for e in ids])
        return read

    # ---- the whole cache ----

    @property
    def slots_per_layer(self) -> list[int]:
        return [x.residents.capacity for x in self.layers]

    @property
    def experts_per_layer(self) -> list[int]:
        return [x.num_experts for x in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(x.pool.nbytes for x in self.layers)

    @property
    def has_host_reads(self) -> bool:
        """True if some layer is partly resident, so that the host must see its selections."""
        return any(not x.residents.is_complete for x in self.layers)

    def reset(self) -> None:
        """Start as after loading: partly resident layers are empty, running ranges and statistics zero."""
        self.mend()
        for x in self.layers:
            if x.residents.capacity < x.num_experts:
                x.residents.clear()
            x.range.reset()
            x.stats = CacheStats()
        self.stats = CacheStats()

    def resize(self, *, slots: int | Sequence[int] | None = None, memory: str | int | None = None) -> None:
        """Change the number of slots per layer, or fit them to a memory budget; the output does not change.

        slots: one number for all layers or one per layer; numbers above a layer's experts mean all of them.
        Layers that shrink go first, so that while moving at most one tensor of one layer exists twice.
        Raises UsageError, BudgetError or UnsupportedModelError before anything changed, ReadError if a layer that now
        holds all of its experts could not be filled (layers before it have their new size). After a lack of memory the
        layer that was under way has its old size and is empty.
        """
        if (slots is None) == (memory is None):
            raise UsageError("resize takes either slots or memory")
        self.mend()
        plan = None
        if memory is not None:
            if self.plan_slots is None:
                raise UsageError("this cache was built without a memory plan; resize it by slots")
            plan = self.plan_slots(memory)
            slots = plan.slots_per_layer
        assert slots is not None
        wanted = list(slots) if not isinstance(slots, int) else [slots] * len(self.layers)
        if len(wanted) != len(self.layers):
            raise UsageError(f"{len(wanted)} slot counts for {len(self.layers)} MoE layers; give one for each")
        for x, s in zip(self.layers, wanted, strict=True):
            if s < x.k:
                raise BudgetError(
                    f"{s} slots are too few for {x.path}: each token uses {x.k} experts; the minimum is {x.k}"
                )
            x.pool.check_size(min(s, x.num_experts))
        # By the bytes that a layer gains: those that give some back first.
        pairs = [(x, min(s, x.num_experts)) for x, s in zip(self.layers, wanted, strict=True)]
        for x, s in sorted(pairs, key=lambda pair: (pair[1] - pair[0].residents.capacity) * pair[0].bytes_per_expert):
            self._resize_layer(x, s)
        if plan is not None:
            self.adopt_plan(plan)

    def close(self) -> None:
        """Release the files. The model can then use only what is resident."""
        self._closed = True
        self.reader.close()

    # ---- inside ----

    def _exchange(self, wanted: Sequence[Sequence[int]]) -> int:
        """Make `wanted` of each layer resident in one read; the number of experts read."""
        if self._closed:
            raise ReadError("experts are needed from disk, but the cache is closed; load the model again")
        self.mend()
        planned = [(x, x.residents.plan_exchange(ids)) for x, ids in zip(self.layers, wanted, strict=True)]
        for layer, _ in planned:
            layer.pool.fence()
        plans = [(x, loads, self.journal.begin(x, frozenset(y.slot for y in loads))) for x, loads in planned if loads]
        try:
            self.reader.read(
                [r for layer, loads, _ in plans for x in loads for r in layer.requests_into(x.expert, x.slot)]
            )
        except BaseException:
            for plan in plans:
                self._restore(*plan)
            raise
        for layer, loads, operation in plans:
            layer.residents.publish(loads)
            self.journal.end(operation)
        return sum(len(loads) for _, loads, _ in plans)

    def _restore(self, layer: LayerExperts, loads: Sequence[Load], operation: Operation) -> None:
        """Bring victims whose slots may have been overwritten back, so that a failed read changes nothing."""
        if operation not in self.journal.open:  # mended meanwhile: the slots belong to others
            return
        self.reader.give_up()
        lost = {x.victim: x.slot for x in loads if x.victim is not None}
        try:
            for victim, slot in list(lost.items()):
                with suppress(ReadError):
                    self.reader.read(layer.requests_into(victim, slot))
                    del lost[victim]
        finally:
            for victim in lost:  # their bytes are gone, also after a second Ctrl-C: they must not be found again
                layer.residents.drop(victim)
        self.journal.end(operation)

    def _resize_layer(self, layer: LayerExperts, slots: int) -> None:
        if slots != layer.residents.capacity:
            layer.pool.fence()  # what is pending fails here, if at all, while nothing has changed
            operation = self.journal.begin(layer, None)
            try:
                layer.pool.resize(slots, layer.residents.resize(slots), layer.on_resize)
            except BaseException:
                self.mend()
                raise
            self.journal.end(operation)
        self._fill(layer)  # also what an earlier failure left out

    def _fill(self, layer: LayerExperts) -> None:
        """Read what is missing of a layer that has a slot for every expert; nobody asked, so nobody counts it."""
        r = layer.residents
        if r.capacity == layer.num_experts:
            missing = [e for e in range(layer.num_experts) if e not in r]
            for i in range(0, len(missing), FILL_BATCH):
                self.load(layer, r.plan(missing[i : i + FILL_BATCH]), PhaseStats())
