"""One layer's slot tensors: preallocated MLX arrays [S, ...] and zero-copy writable views of each slot.

Knows arrays and bytes; does not know which expert belongs where. Bytes are written through the buffer protocol, never
with ``pool[i] = x``, which copies the whole array whenever a pending operation still holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from .checkpoints.expert_layout import ComponentSpec
from .errors import UnsupportedModelError

MAX_ELEMENTS = 2**31 - 1  # MLX shapes are int32


class SlotPool:
    """S slots for one expert each; every tensor of an expert (a component) has one array [S, *shape].

    The fence: a raw write is seen by operations that are still pending, so every output computed from the pool is
    handed to `track` and must be evaluated before the first write that follows. The layer's next host read evaluates
    what `take_unfenced` gives it on the way; `fence` evaluates what is left, before any write.
    """

    def __init__(self, components: Sequence[ComponentSpec], slots: int) -> None:
        self.components = tuple(components)
        self.slots = slots
        self.arrays: dict[str, mx.array] = {}
        self._views: list[memoryview] = []
        self._unfenced: list[mx.array] = []
        for c in self.components:
            self.arrays[c.name], view = _allocate(c, slots)
            self._views.append(view)

    @property
    def nbytes(self) -> int:
        return self.slots * sum(c.nbytes for c in self.components)

    def view(self, component: int, slot: int) -> memoryview:
        """Writable bytes of one component of the expert in `slot`."""
        n = self.components[component].nbytes
        return self._views[component][slot * n : (slot + 1) * n]

    def track(self, output: mx.array) -> None:
        """Remember a lazy `output` that reads the slots, until it is taken or fenced."""
        self._unfenced.append(output)

    def take_unfenced(self) -> list[mx.array]:
        """The outputs tracked since the last fence; the caller evaluates them at once."""
        outputs, self._unfenced = self._unfenced, []
        return outputs

    def fence(self) -> None:
        """Evaluate every output that may still read a slot. Call before writing."""
        if self._unfenced:
            mx.eval(*self._unfenced)
            self._unfenced.clear()

    def check_size(self, slots: int) -> None:
        """Raise UnsupportedModelError if MLX cannot have arrays of so many slots."""
        for c in self.components:
            _check_size(c, slots)

    def resize(self, slots: int, moves: Mapping[int, int], adopt: Callable[[], None] = lambda: None) -> None:
        """Change to `slots` slots; `moves` says which old slot's bytes go to which new slot, the others are dropped.

        `adopt` hands the arrays to whoever computes with them; it is called after each component, so that its old array
        is free before the next one moves: no more than one component exists twice. Pending outputs are evaluated first,
        as they would keep the old arrays. Raises UnsupportedModelError before anything changed.
        """
        self.check_size(slots)
        self.fence()
        for i, c in enumerate(self.components):
            self._move(i, c, slots, moves)
            adopt()
            mx.clear_cache()  # on Metal the old buffer would stay with MLX
        self.slots = slots

    def rebuild(self, slots: int) -> None:
        """Have `slots` slots whatever a `resize` left that was cut off; what they hold is not known afterwards."""
        for i, c in enumerate(self.components):
            if len(self.arrays[c.name]) != slots or self._views[i].nbytes != slots * c.nbytes:
                self.arrays[c.name], self._views[i] = _allocate(c, slots)
        self.slots = slots

    def _move(self, i: int, c: ComponentSpec, slots: int, moves: Mapping[int, int]) -> None:
        array, view = _allocate(c, slots)
        n, old = c.nbytes, self._views[i]
        for source, target in moves.items():
            view[target * n : (target + 1) * n] = old[source * n : (source + 1) * n]
        self.arrays[c.name], self._views[i] = array, view


def _check_size(c: ComponentSpec, slots: int) -> None:
    if slots * math.prod(c.shape) > MAX_ELEMENTS:
        raise UnsupportedModelError(
            f"{slots} slots of {c.name} {c.shape} exceed MLX's limit of 2^31 elements in one array; use fewer --slots"
        )


def _allocate(c: ComponentSpec, slots: int) -> tuple[mx.array, memoryview]:
    _check_size(c, slots)
    array = mx.zeros((slots, *c.shape), dtype=getattr(mx, c.dtype))
    mx.eval(array)  # a lazy array has no buffer yet
    buffer: Any = array  # the stubs do not tell that arrays support the buffer protocol
    return array, memoryview(buffer).cast("B")
