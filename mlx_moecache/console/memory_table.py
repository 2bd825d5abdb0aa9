"""Which memory budget gives how many slots: a few budgets from the smallest that works up to all experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..budget import MemoryPlan, plan_memory
from ..errors import BudgetError
from ..loading import MemoryOptions, OpenedModel, budget_here

ROUND_SIZES = 5  # rows between the smallest budget and that for all experts


@dataclass(frozen=True)
class BudgetRow:
    """A budget in bytes and its plan; None: too small."""

    label: str  # "smallest", "all experts", "auto on this machine", a size that was asked for, or ""
    budget: int
    plan: MemoryPlan | None


def budget_rows(opened: OpenedModel, *, max_context: int, asked: Sequence[str]) -> list[BudgetRow]:
    """Rows by rising budget, KV cache for `max_context` tokens included.

    Round sizes, or the budgets that are `asked` for ("4GB", "60%", "auto"), stand between the smallest that works and
    the smallest that holds all experts. Raises UsageError for what is not a size.
    """
    layers = opened.layer_shapes
    most = max(layer.num_experts for layer in layers)
    everything = opened.plan(MemoryOptions(slots=most, max_context=max_context))

    def plan(budget: int) -> MemoryPlan | None:
        try:
            return plan_memory(
                layers,
                everything.forward,
                resident=everything.resident,
                kv=everything.kv,
                host_buffers=everything.host_buffers,
                overhead=everything.overhead,
                budget=budget,
                max_chunk=max_context,
            )
        except BudgetError:
            return None

    def holds_all(budget: int) -> bool:
        found = plan(budget)
        return found is not None and found.slots_per_layer == everything.slots_per_layer

    smallest = _least(everything.total, lambda budget: plan(budget) is not None)
    complete = _least(everything.total, holds_all)
    sizes = [("smallest", smallest), ("all experts", complete)]
    if asked:
        sizes += [(text, budget_here(text)) for text in asked]
    else:
        sizes += [("", n) for n in _round_sizes(smallest, complete)]
        sizes.append(("auto on this machine", budget_here("auto")))
    return [BudgetRow(label, budget, plan(budget)) for label, budget in sorted(sizes, key=lambda size: size[1])]


def _least(start: int, works: Callable[[int], bool]) -> int:
    """The least number of bytes for which the monotone `works` is true."""
    high = max(1, start)
    while not works(high):
        high *= 2
    low = 0  # does not work: no model fits into nothing
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def _round_sizes(low: int, high: int) -> list[int]:
    """Up to ROUND_SIZES round numbers between `low` and `high`, evenly spaced on a logarithmic scale."""
    ratio = (high / low) ** (1 / (ROUND_SIZES + 1))
    exact = [low * ratio**i for i in range(1, ROUND_SIZES + 1)]
    # A step of at most half the way to the next one keeps them apart.
    rounded = [_multiple(n, _step((ratio - 1) * n / 2)) for n in exact]
    return [n for n in dict.fromkeys(rounded) if low < n < high]


def _step(at_most: float) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is not above `at_most`, but at least 1."""
    scale = 10 ** max(0, len(str(int(at_most))) - 1)
    return max((m * scale for m in (1, 2, 5) if m * scale <= at_most), default=1)


def _multiple(n: float, step: int) -> int:
    return round(n / step) * step
