"""The expert cache of a model: all of its MoE layers, with their phases, counters, contents and sizes.

How experts become resident is in slot_loading.py. It does not know how bytes move (reader.py), who is evicted
(eviction.py), or what is computed with the experts (moe_block.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .checkpoints.reader import ExpertReader
from .contents import CacheContents, LayerContents
from .errors import BudgetError, UsageError
from .layer_experts import LayerExperts
from .observer import Observer, UsageListener
from .routing import Original, Strategy
from .slot_loading import SlotLoading
from .stats import CacheStats, Phase, PhaseStats

if TYPE_CHECKING:
    from .budget import MemoryPlan
    from .optimistic import Optimist

FILL_BATCH = 16  # experts per read while a layer is filled: enough to keep all threads busy


class ExpertCache(SlotLoading):
    """All MoE layers of one model, their common reader, routing strategy and statistics.

    Not safe for use from several threads; one model serves one request at a time.
    """

    def __init__(self, layers: Sequence[LayerExperts], reader: ExpertReader, strategy: Strategy) -> None:
        super().__init__(layers, reader)
        self.strategy = strategy
        self.stats = CacheStats()
        self.observers: tuple[Observer, ...] = ()
        self.optimist: Optimist | None = None  # set by loading
        self.listener: UsageListener | None = None
        self.choose_strategy: Callable[[Strategy | str], Strategy] | None = None  # set by loading; see set_strategy
        self.plan_slots: Callable[[str | int], MemoryPlan] | None = None  # memory -> plan, set by loading
        self.adopt_plan: Callable[[MemoryPlan], None] = lambda plan: None  # called when the slots are those of the plan
        self._phase: Phase | None = None
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

    def count(self, layer: LayerExperts, rows: int, seen: PhaseStats) -> None:
        """Add what a call of `layer` with `rows` tokens did to the counters."""
        phase = self.phase_of(rows)
        self.stats.of(phase).add(seen)
        layer.stats.of(phase).add(seen)

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
            others = [e for e in layer.residents.experts if e not in wanted]
            with self.journal.changing(layer, [layer.residents.slot_of(e) for e in others]):
                for e in others:
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
                with self.journal.changing(x, range(x.residents.capacity)):
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
