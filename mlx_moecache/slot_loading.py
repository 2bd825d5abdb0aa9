"""How experts become resident: plan, fence, read into slots, publish. What fails on the way leaves all as it was.

A change of slots stands in the journal until the host's records are right again; what is cut off in between, as by
Ctrl-C, is mended before the slots are used next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from .checkpoints.read_batch import Pending
from .checkpoints.reader import ExpertReader, ReadRequest
from .errors import ReadError
from .journal import Journal, Operation
from .layer_experts import LayerExperts
from .read_pace import ReadPace
from .residents import Load
from .stats import PhaseStats

if TYPE_CHECKING:
    from .look_ahead import LookAhead, Staged

    Early = dict[int, Staged] | None


class SlotLoading:
    """The part of an expert cache that fills slots from the shards."""

    def __init__(self, layers: Sequence[LayerExperts], reader: ExpertReader) -> None:
        self.layers = tuple(layers)
        self.reader = reader
        self.journal = Journal()  # of what is under way with slots
        self.overlaps = True  # compute what is there while the rest is read, where that pays
        self.pace = ReadPace()
        self.look_ahead: LookAhead | None = None  # set by loading.py
        self._closed = False

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
        if operation not in self.journal.open:  # mended from elsewhere: the slots may belong to others
            raise ReadError(f"the experts of {layer.path} were given up while they were read; try again")
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
