"""Sharing slots among layers by measured miss curves: the same bytes as equal counts, where they save the most misses.

Plain Python and NumPy; where the curves come from does not matter (study/slot_sharing.py measures them from a trace).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import BudgetError

MAX_UNITS = 2**16  # steps in which bytes are shared; layers of equal experts need one per slot


@dataclass(frozen=True)
class MissCurve:
    """How often one layer would have missed with s slots, for every s that it may have."""

    k: int  # experts per token: the fewest slots
    bytes_per_expert: int
    misses: tuple[int, ...]  # [E + 1], by number of slots; entries below k do not count

    @property
    def num_experts(self) -> int:
        return len(self.misses) - 1


def equal_slots(curves: Sequence[MissCurve], slots: int) -> tuple[int, ...]:
    """The same number for every layer, within what it can have."""
    return tuple(max(c.k, min(slots, c.num_experts)) for c in curves)


def total_misses(curves: Sequence[MissCurve], slots: Sequence[int]) -> int:
    return sum(c.misses[s] for c, s in zip(curves, slots, strict=True))


def bytes_missed(curves: Sequence[MissCurve], slots: Sequence[int]) -> int:
    """Bytes that the misses read, which is what they cost."""
    return sum(c.misses[s] * c.bytes_per_expert for c, s in zip(curves, slots, strict=True))


def total_bytes(curves: Sequence[MissCurve], slots: Sequence[int]) -> int:
    return sum(s * c.bytes_per_expert for c, s in zip(curves, slots, strict=True))


def allocate(curves: Sequence[MissCurve], equal: int) -> tuple[int, ...]:
    """Slots per layer that read the fewest bytes on `curves`, in no more bytes than `equal` slots for each layer.

    The optimum, by dynamic programming over bytes (a curve may drop anywhere, most of all where a layer is complete,
    so that neither greedy steps nor convex hulls find it); never worse than equal counts. Slots that save nothing are
    handed out all the same, the layer with the smallest share of its experts first: with curves that never rise and
    experts of one size, the total is that of equal counts. Raises BudgetError if `equal` is below some layer's k.
    """
    for c in curves:
        if equal < c.k:
            raise BudgetError(f"{equal} slots per layer are too few: a layer uses {c.k} experts per token; use {c.k}")
    uniform = equal_slots(curves, equal)
    budget = total_bytes(curves, uniform)
    slots = _optimum(curves, budget)
    _hand_out(curves, slots, budget)
    better = bytes_missed(curves, slots) < bytes_missed(curves, uniform)
    return tuple(slots) if better else uniform


def _optimum(curves: Sequence[MissCurve], budget: int) -> list[int]:
    step = max(math.gcd(*(c.bytes_per_expert for c in curves)), -(-budget // MAX_UNITS))
    sizes = [-(-c.bytes_per_expert // step) for c in curves]  # rounded up, so that the sum stays within the budget
    units = budget // step - sum(c.k * n for c, n in zip(curves, sizes, strict=True))
    if units < 0:  # rounding took more than there is
        return [c.k for c in curves]
    best: npt.NDArray[np.float64] = np.zeros(units + 1)
    chosen = np.zeros(
        (len(curves), units + 1), dtype=np.int32
    )  # slots above k of each layer, if so many units are left
    for layer, (c, n) in enumerate(zip(curves, sizes, strict=True)):
        cost = [float(m * c.bytes_per_expert) for m in c.misses[c.k :]]
        now = np.full(units + 1, np.inf)
        for more in range(min(len(cost) - 1, units // n), -1, -1):  # from most, so that ties keep the larger count
            candidate = best[: units + 1 - more * n] + cost[more]
            part = now[more * n :]
            wins = candidate < part
            part[wins] = candidate[wins]
            chosen[layer, more * n :][wins] = more
        best = now
    slots, left = [0] * len(curves), units
    for layer in range(len(curves) - 1, -1, -1):
        more = int(chosen[layer, left])
        slots[layer] = curves[layer].k + more
        left -= more * sizes[layer]
    return slots


def _hand_out(curves: Sequence[MissCurve], slots: list[int], budget: int) -> None:
    """Add slots that are left and do no harm, in place."""
    left = budget - total_bytes(curves, slots)
    while True:
        open_layers = [
            i
            for i, c in enumerate(curves)
            if slots[i] < c.num_experts and c.bytes_per_expert <= left and c.misses[slots[i] + 1] <= c.misses[slots[i]]
        ]
        if not open_layers:
            return
        i = min(open_layers, key=lambda i: (slots[i] / curves[i].num_experts, i))
        slots[i] += 1
        left -= curves[i].bytes_per_expert
