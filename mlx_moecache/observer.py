"""What others may watch while a model runs: every routing decision of every MoE layer, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RoutedCall:
    """One call of a MoE layer with T tokens; E counts what the router ranks.

    z: [T, E], what it ranks by, -inf for experts that it ruled out; None if this router cannot be observed.
    p: [T, E] its probabilities, None like z. own: [T, k], its own selection. used: [T, k'], the experts that ran.
    steps: the tokens were routed one after the other though they went through the layer together.
    """

    layer: int  # number of the MoE layer
    phase: str  # "prefill" or "decode"
    z: Scores | None
    p: Scores | None
    own: Ids
    used: Ids
    steps: bool = False


class UsageListener(Protocol):
    """Learns which experts ran, for displays; cheaper than an observer, and layers that are all resident say nothing.

    Called after each call of a layer, on the thread that computes: it must take microseconds.
    """

    def used(self, layer: int, phase: str, experts: Sequence[int], missed: Sequence[int]) -> None:
        """The call used `experts`, distinct, of which `missed` were not in memory when it began."""


class Observer(Protocol):
    """Receives the calls in the order in which they happen."""

    def observe(self, call: RoutedCall) -> None: ...
