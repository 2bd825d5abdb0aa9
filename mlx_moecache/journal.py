"""Operations that change slots and have not ended, and what to do about them when something came in between.

Ctrl-C, or a lack of memory or of threads, may come between any two lines: after bytes have landed and before the host
knows, or when half of the arrays have moved. So whoever is about to write slots says so here first, and again when the
host's records are right. What is still open when the cache is used next was cut off: nobody knows what its slots hold,
so their experts are forgotten and will be read again. Plain Python, no arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checkpoints.reader import ExpertReader

if TYPE_CHECKING:
    from .layer_experts import LayerExperts


@dataclass(eq=False, frozen=True)
class Operation:
    """Of one layer."""

    layer: LayerExperts
    slots: frozenset[int] | None  # that are written; None: their number changes
    capacity: int  # before


class Journal:
    """Of one cache; nearly always empty."""

    def __init__(self) -> None:
        self.open: list[Operation] = []

    def begin(self, layer: LayerExperts, slots: frozenset[int] | None) -> Operation:
        """`slots` of `layer` are about to be written (None: all of them will move)."""
        operation = Operation(layer, slots, layer.residents.capacity)
        self.open.append(operation)
        return operation

    def end(self, operation: Operation) -> None:
        """What the host says about these slots is true again."""
        if operation in self.open:
            self.open.remove(operation)

    @contextmanager
    def changing(self, layer: LayerExperts, slots: Iterable[int]) -> Iterator[None]:
        """What the host says about `slots` of `layer` changes inside; nothing is written."""
        operation = self.begin(layer, frozenset(slots))
        yield
        self.end(operation)  # not after an exception: what it cut off has to be mended

    def mend(self, reader: ExpertReader) -> None:
        """Make sure that nothing lands any more, and forget what operations that were cut off may have touched.

        May be cut off itself: what is left is mended the next time. A layer whose slots were to change in number has
        as many as before, all empty.
        """
        reader.give_up()
        while self.open:
            operation = self.open[-1]
            layer = operation.layer
            if operation.slots is None:
                layer.residents.clear(operation.capacity)
                layer.pool.rebuild(operation.capacity)
                layer.on_resize()
            else:
                layer.residents.forget(operation.slots)
            self.open.remove(operation)
