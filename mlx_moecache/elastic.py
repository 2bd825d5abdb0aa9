"""Slots that give way: to a KV cache that grows, and to a system that runs short of memory. Plain Python, no arrays.

Nothing is decided here about who is evicted, and nothing changes inside of a layer: generation asks between forward
passes, and the expert cache moves. Which slots a context leaves is planned at loading, by the function that plans
budgets (budget.py): one plan per stage of the context. Pressure only ever takes from what the plan grants.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .budget import MemoryPlan
from .pressure import Pressure, PressureSource
from .stats import Phase

KEPT = {Pressure.WARNING: 0.75, Pressure.CRITICAL: 0.5}  # of the slots beyond the minimum, at each step down
REGROWTH = 1 / KEPT[Pressure.WARNING]
SETTLE = 3  # polls after a step down before the next one: what was freed has to show first
CALM = 30  # polls without pressure before a step up
MOST_CALM = 16 * CALM
SMALLEST_SHARE = 1 / 32  # less is nothing
WORTH_MOVING = 1.05  # every move copies the slots: growth by less than this is left out
POLL_SECONDS = 1.0


@dataclass
class PressureGovernor:
    """Which share of the slots beyond the minimum the system lets us have; polled at even intervals.

    Down at once, and again every SETTLE polls while pressure lasts (at every poll if it is critical); up by one step
    after CALM polls without any. If pressure comes back before it had been calm for long, our own growth may be the
    reason: each time, the calm that is asked for doubles.
    """

    share: float = 1.0
    calm_needed: int = CALM
    _calm: int = 0  # polls
    _since_down: int = SETTLE  # polls
    _grew: bool = False  # the last step was up

    def poll(self, level: Pressure) -> None:
        self._since_down += 1
        if level is Pressure.NORMAL:
            self._calm += 1
            if self._calm >= self.calm_needed:
                self._calm = 0
                self._grew = self.share < 1
                if self.share == 1:
                    self.calm_needed = CALM  # all is back and has been for long: forget
                self.share = min(1.0, max(self.share, SMALLEST_SHARE) * REGROWTH)
            return
        self._calm = 0
        if self._since_down >= (1 if level is Pressure.CRITICAL else SETTLE):
            self._since_down = 0
            if self._grew:
                self.calm_needed = min(MOST_CALM, 2 * self.calm_needed)
                self._grew = False
            self.share *= KEPT[level]
            if self.share < SMALLEST_SHARE:
                self.share = 0.0


def granted(planned: Sequence[int], least: Sequence[int], share: float) -> tuple[int, ...]:
    """Slots per layer: the least, and `share` (0 to 1) of what is planned beyond them."""
    return tuple(k + int(share * max(0, p - k)) for p, k in zip(planned, least, strict=True))


@dataclass(frozen=True)
class Stage:
    """The plans for a KV cache of up to `context` tokens: while a prompt is read, and while a reply is written."""

    context: int
    prefill: MemoryPlan
    decode: MemoryPlan

    def plan(self, phase: Phase) -> MemoryPlan:
        return self.prefill if phase == "prefill" else self.decode


def stage_contexts(first: int, last: int, step: int) -> list[int]:
    """Tokens at which stages end: multiples of `step`, by which KV caches grow, each a quarter above the one before."""
    found, context = [], -(-first // step) * step
    while context < last:
        found.append(context)
        context = max(context + step, -(-5 * context // (4 * step)) * step)
    return [*found, last]


@dataclass(frozen=True)
class Resize:
    """One change of the slots."""

    reason: Literal["context", "room", "pressure", "calm"]
    before: int  # slots of all layers
    after: int
    context: int  # tokens


@dataclass
class ElasticSlots:
    """Keeps the slots of a model at what stage and pressure allow. `apply` makes a plan the model's, and resizes."""

    stages: Sequence[Stage]  # in the order of their contexts
    least: Sequence[int]  # k of each layer
    apply: Callable[[MemoryPlan, Sequence[int]], None]
    source: PressureSource
    clock: Callable[[], float] = time.monotonic
    governor: PressureGovernor = field(default_factory=PressureGovernor)
    resizes: list[Resize] = field(default_factory=list)
    beside: int = 0  # tokens of room in another KV cache, which is kept meanwhile

    def __post_init__(self) -> None:
        self._last: tuple[int, Phase] = (0, "prefill")  # context and phase
        self._adopt(self.plan_in(self.stages))  # what the model was loaded with
        self._share = self.governor.share
        self._next_poll = self.clock()

    def plan_in(self, stages: Sequence[Stage]) -> MemoryPlan:
        """The plan that `stages` have for the context of the last `adjust`."""
        context, phase = self._last
        return next((s for s in stages if s.context >= context), stages[-1]).plan(phase)

    def replan(self, stages: Sequence[Stage]) -> None:
        """From now on keep to `stages`, as of another budget; the model has just got the slots of `plan_in(stages)`."""
        self.stages = stages
        self._adopt(self.plan_in(stages))
        self._share = 1.0  # pressure that lasts takes its part at the next `adjust`

    def _adopt(self, plan: MemoryPlan) -> None:
        self._plan, self._slots = plan, tuple(plan.slots_per_layer)

    def adjust(self, context: int, phase: Phase, settle: Callable[[], None] = lambda: None) -> None:
        """Make room for a KV cache of `context` tokens; call it before the forward pass that makes it so long.

        settle: called before slots move; it must complete what is still computed with them. Beyond the last stage its
        plan stays. A resize by hand holds until the next change here. Raises ReadError if a layer that now holds all
        of its experts could not be filled.
        """
        now = self.clock()
        if now >= self._next_poll:
            self.governor.poll(self.source.level())
            self._next_poll = now + POLL_SECONDS
        self._last = context + self.beside, phase
        plan, share = self.plan_in(self.stages), self.governor.share
        if plan is self._plan and share == self._share:
            return
        slots = granted(plan.slots_per_layer, self.least, share)
        if share == self._share and self._is_small_growth(slots):
            slots = self._slots
        before = sum(self._slots)
        if slots != self._slots:
            settle()
        self.apply(plan, slots)
        if slots != self._slots:
            fewer = sum(slots) < before
            if share != self._share:
                reason: Literal["context", "room", "pressure", "calm"] = "pressure" if share < self._share else "calm"
            else:
                reason = "context" if fewer else "room"
            self.resizes.append(Resize(reason, before, sum(slots), context))
        self._plan, self._slots, self._share = plan, slots, share

    def counts(self) -> dict[str, int]:
        """How many resizes there were, by reason."""
        return dict(Counter(r.reason for r in self.resizes))

    def _is_small_growth(self, slots: Sequence[int]) -> bool:
        grows = all(new >= old for new, old in zip(slots, self._slots, strict=True))
        return grows and sum(slots) < WORTH_MOVING * sum(self._slots)
