"""Which expert of one layer sits in which slot, what has to be loaded, and in which order. Plain Python, no arrays.

Planning changes nothing; `publish` and `drop` do. So a read that fails between the two leaves everything as it was.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice

from .errors import UsageError
from .eviction import State, make_policy, victims

LEAST_IN_TURN = 8  # usable slots; with fewer, half waves would be too small to compute at a good speed


@dataclass(frozen=True)
class Load:
    """Read `expert` into `slot`, where `victim` (None: nobody) is now."""

    expert: int
    slot: int
    victim: int | None


@dataclass(frozen=True)
class Wave:
    """Experts that are computed together after `loads` have landed."""

    experts: list[int]
    loads: list[Load]


class Residents:
    """The experts of one layer that are in memory: at most `capacity` of `num_experts`."""

    def __init__(self, num_experts: int, capacity: int, eviction: str) -> None:
        self.num_experts, self.capacity, self.eviction = num_experts, capacity, eviction
        self.version = 0  # changes whenever the set of resident experts does
        self.mask = array("f", bytes(4 * num_experts))  # [E], 1.0 for residents: kept, since scanning all costs O(E)
        self._slot_of: dict[int, int] = {}
        self._free = _stack(range(capacity))
        self._policy = make_policy(eviction)

    def __contains__(self, expert: int) -> bool:
        return expert in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def experts(self) -> Collection[int]:
        """The resident experts, in no particular order."""
        return self._slot_of.keys()

    @property
    def is_complete(self) -> bool:
        """True if every expert has a slot of its own and is in it."""
        return len(self._slot_of) == self.num_experts

    def slot_of(self, expert: int) -> int:
        return self._slot_of[expert]

    def eviction_order(self) -> list[int]:
        """The resident experts, the first to be evicted first."""
        return list(self._policy.order())

    def plan(self, needed: Sequence[int]) -> list[Load]:
        """Loads that make all of `needed` (distinct, at most `capacity`) resident without evicting one of them."""
        missing = [e for e in needed if e not in self._slot_of]
        if not missing:
            return []
        if self.capacity == self.num_experts:
            return [Load(e, e, None) for e in missing]  # once all are there, expert numbers are slot numbers
        wanted = len(missing) - len(self._free)
        out = victims(self._policy, wanted, frozenset(needed))
        if len(out) < wanted:  # an interrupt inside the policy made it lose experts
            self._renew_policy()
            out = victims(self._policy, wanted, frozenset(needed))
        slots: list[tuple[int, int | None]] = [(s, None) for s in islice(reversed(self._free), len(missing))]
        slots += [(self._slot_of[v], v) for v in out]
        return [Load(e, s, v) for e, (s, v) in zip(missing, slots, strict=False)]

    def plan_at_once(self, needed: Sequence[int]) -> list[Wave]:
        """`needed` (distinct, at most `capacity`) as waves: first what is there, while the others are read."""
        loads = self.plan(needed)
        missing = {x.expert for x in loads}
        present = [e for e in needed if e not in missing]
        waves = [Wave(present, [])] if present else []
        return waves + ([Wave([x.expert for x in loads], loads)] if loads else [])

    def plan_waves(self, touched: Sequence[int]) -> list[Wave]:
        """Serve many experts, each read at most once.

        `touched` is distinct and ordered, those worth keeping last (see `hottest_last`). Residents are served first,
        without reads. Then the missing ones follow through the slots of experts that are not among the last `capacity`,
        so that these end up resident. If there are hardly any such slots, a quarter of the capacity is
        given up as well: one expert at a time would cost one evaluation for each. Where there are enough, a wave takes
        half of them and the next one the other half, so that it can be read while this one is computed.
        """
        touched_set, keep = set(touched), set(touched[-self.capacity :])
        present = [e for e in touched if e in self._slot_of]
        missing = [e for e in touched if e not in self._slot_of]
        old = [e for e in self.eviction_order() if e not in touched_set]
        passed = [e for e in present if e not in keep]
        usable: list[tuple[int, int | None]] = [(s, None) for s in reversed(self._free)]
        usable += [(self._slot_of[e], e) for e in old + passed]
        least = min(len(missing), max(1, self.capacity // 4))
        if len(usable) < least:
            kept = [e for e in present if e in keep]
            usable += [(self._slot_of[e], e) for e in kept[: least - len(usable)]]
        in_turn = len(usable) >= LEAST_IN_TURN
        width = len(usable) // 2 if in_turn else len(usable)
        waves = [Wave(present, [])] if present else []
        if missing and passed and in_turn and len(passed) < len(present):
            waves = [Wave(passed, []), Wave([e for e in present if e in keep], [])]  # whose slots are taken goes first
        first = len(missing) % width or width  # so that the last waves fill all usable slots
        start = 0
        while start < len(missing):
            end = start + (first if start == 0 else width)
            loads = []
            for i in range(start, min(end, len(missing))):
                slot, occupant = usable[i % len(usable)]
                loads.append(Load(missing[i], slot, occupant))
                usable[i % len(usable)] = slot, missing[i]
            waves.append(Wave(missing[start:end], loads))
            start = end
        return waves

    def plan_exchange(self, wanted: Collection[int]) -> list[Load]:
        """Loads after which all of `wanted` (distinct, at most `capacity`) are resident, in the places of others.

        Others stay where no place is needed.
        """
        missing = [e for e in wanted if e not in self._slot_of]
        if self.capacity == self.num_experts:
            return [Load(e, e, None) for e in missing]
        leaving = [e for e in self.eviction_order() if e not in wanted]
        places: list[tuple[int, int | None]] = [(s, None) for s in reversed(self._free)]
        places += [(self._slot_of[e], e) for e in leaving]
        return [Load(e, s, v) for e, (s, v) in zip(missing, places, strict=False)]

    def adopt_history(self, other: Residents) -> None:
        """Order and counts of evictions from now on as in `other`, which has the same residents."""
        self._policy = deepcopy(other._policy)

    @property
    def state(self) -> State:
        """As plain numbers, fit for JSON: who is resident and what decides who leaves next, but not who is where."""
        return self._policy.state

    def restore(self, state: State) -> None:
        """Hold and evict what residents with this `state` would; no bytes are read. Raises UsageError as `seed`."""
        self.seed(state["residents"])
        self._policy = make_policy(self.eviction)
        self._policy.restore(state)

    def copy(self) -> Residents:
        """An independent copy."""
        return deepcopy(self)

    def publish(self, loads: Sequence[Load]) -> None:
        """The bytes of `loads` have landed: their victims are gone, their experts resident."""
        for x in loads:
            if x.victim is not None:
                del self._slot_of[x.victim]
                self.mask[x.victim] = 0.0
                self._policy.remove(x.victim)
            else:
                del self._free[x.slot]
            self._slot_of[x.expert] = x.slot
            self.mask[x.expert] = 1.0
            self._policy.insert(x.expert)
        self.version += bool(loads)

    def drop(self, expert: int) -> None:
        """The bytes of a resident expert are lost: its slot is free."""
        self._free[self._slot_of.pop(expert)] = None
        self._policy.remove(expert)
        self.mask[expert] = 0.0
        self.version += 1

    def touch(self, uses: Sequence[tuple[int, int]], tokens: int = 1) -> None:
        """Record what `tokens` more tokens selected: (expert, count), resident or not, those worth keeping last.

        0 tokens: further selections of the tokens of the last call.
        """
        self._policy.advance(tokens)
        for expert, count in uses:
            self._policy.touch(expert, count)

    def seed(self, experts: Sequence[int]) -> None:
        """Make `experts`, the first to be evicted first, the only residents, without history. Their bytes are not read.

        Raises UsageError if they are not distinct experts of this layer, or more than there are slots.
        """
        if len(set(experts)) != len(experts) or not all(0 <= e < self.num_experts for e in experts):
            raise UsageError(f"initial residents must be distinct numbers from 0 to {self.num_experts - 1}")
        if len(experts) > self.capacity:
            raise UsageError(f"{len(experts)} initial residents are too many for {self.capacity} slots")
        self.clear()
        for e in experts:
            self.publish(self.plan([e]))

    def forget(self, slots: Collection[int]) -> None:
        """What is in `slots` is not known any more: they are free. Mends whatever a call left that was cut off.

        The history of the others is lost but for their order.
        """
        self._slot_of = {e: s for e, s in self._slot_of.items() if s not in slots}
        used = set(self._slot_of.values())
        self._free = _stack(s for s in range(self.capacity) if s not in used)
        self.mask = array("f", (float(e in self._slot_of) for e in range(self.num_experts)))
        self._renew_policy()
        self.version += 1

    def _renew_policy(self) -> None:
        try:
            order = [e for e in self._policy.order() if e in self._slot_of]
        except LookupError:  # cut off half-way, too
            order = []
        policy = make_policy(self.eviction)
        for e in dict.fromkeys([*order, *self._slot_of]):
            policy.insert(e)
        self._policy = policy

    def clear(self, capacity: int | None = None) -> None:
        """Forget all residents and their history. capacity: slots from now on, None: as many as before."""
        self.capacity = self.capacity if capacity is None else capacity
        self._slot_of.clear()
        self.mask = array("f", bytes(4 * self.num_experts))
        self._free = _stack(range(self.capacity))
        self._policy = make_policy(self.eviction)
        self.version += 1

    def resize(self, capacity: int) -> dict[int, int]:
        """Change the number of slots, keeping those experts that would be evicted last.

        Returns old slot -> new slot of the experts kept. A layer that can hold all experts puts expert e into slot e,
        so that expert numbers are slot numbers.
        """
        order = self.eviction_order()
        whole = capacity == self.num_experts
        moves, slot_of = {}, {}
        for expert in order[:-capacity]:
            self._policy.remove(expert)
            self.mask[expert] = 0.0
        for i, expert in enumerate(order[-capacity:]):
            slot_of[expert] = expert if whole else i
            moves[self._slot_of[expert]] = slot_of[expert]
        used = set(slot_of.values())
        self.capacity, self._slot_of = capacity, slot_of
        self._free = _stack(s for s in range(capacity) if s not in used)
        self.version += 1
        return moves


def _stack(slots: Iterable[int]) -> dict[int, None]:
    """Free slots, the next to be used last. A dict, because any one of them may be taken out."""
    return dict.fromkeys(reversed(list(slots)))
