"""One MoE layer's experts: which are resident, the slots that they are in, and where the bytes of the others are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .checkpoints.expert_layout import ComponentSpec, LayerExtents
from .checkpoints.reader import ReadRequest
from .residents import Residents
from .routing import RunningRange
from .seam import SelectionSeam
from .slots import SlotPool
from .stats import CacheStats


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
