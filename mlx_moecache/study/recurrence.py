"""The recurrence of one MoE layer, token by token: route by what is resident, count, then change what is resident.

Plain Python and NumPy, without experts and without a model: scores in, selections and counts out. A cache that this
simulates behaves as the one in moe_block.py, so that a model with all of its experts in memory can be evaluated as if
it had fewer slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..residents import Load, Residents
from ..strategies import Strategy
from .strategies_numpy import Array, select

Ids = npt.NDArray[np.intp]


@dataclass
class Counts:
    """What happened, summed over tokens, and over layers where counts of several are added."""

    tokens: int = 0
    token_layers: int = 0  # tokens times layers
    selections: int = 0  # experts that ran
    misses: int = 0  # of these, not resident before their token
    loads: int = 0
    swapped: int = 0  # selections that are not among the router's own
    all_hit: int = 0  # token-layers without a miss: the host need not wait for a read
    waits: int = 0  # calls of a layer that had to read; a chunk of a prompt is one call
    lives: int = 0  # experts evicted, and how long they were resident, in tokens; those still there do not count
    life_tokens: int = 0
    mass_lost: float = 0.0  # router mass of its own selections less that of those that ran

    def add_call(self, uses: Sequence[tuple[int, int]], rows: int, misses: int, loads: int) -> None:
        """Count one call of a layer with `rows` tokens, which used (expert, count)."""
        self.tokens += rows
        self.token_layers += rows
        self.selections += sum(n for _, n in uses)
        self.misses += misses
        self.loads += loads
        self.all_hit += rows * (misses == 0)
        self.waits += misses > 0

    def __iadd__(self, other: Counts) -> Counts:
        """Add what the same layers did with further tokens."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        return self


def over_layers(counts: Iterable[Counts]) -> Counts:
    """The sum over layers that saw the same tokens: everything adds up but `tokens`."""
    total = Counts()
    for c in counts:
        tokens = max(total.tokens, c.tokens)
        total += c
        total.tokens = tokens
    return total


@dataclass(frozen=True)
class RecurrenceTrace:
    """What `LayerRecurrence.run` did with T tokens.

    ids: [T, K], the experts that ran, K = kept(k). If pruning began later, K = k and its rows end in -1.
    residents: [T, E], before each token. mean_range: [T], D with each token included.
    """

    ids: Ids
    residents: npt.NDArray[np.bool_]
    mean_range: Array


class LayerRecurrence:
    """One layer with E experts, of which k run per token, and S slots.

    accounting: "engine" evicts none of the experts of the running token. "paper" inserts one expert at a time and may
    evict one that the same token needs again; that one is not counted as a miss, since hits are judged by the contents
    before the token. With LRU both give equal contents and counts. Raises UsageError for settings that cannot work.
    """

    def __init__(
        self,
        num_experts: int,
        k: int,
        slots: int,
        strategy: Strategy,
        *,
        eviction: str = "lru",
        accounting: str = "engine",
        ranked: int | None = None,
    ) -> None:
        """ranked: experts that the router ranks; those from `num_experts` on compute nothing and are always there."""
        if accounting not in ("engine", "paper"):
            raise UsageError(f"unknown accounting {accounting!r} (choose engine, paper)")
        if not k <= slots <= num_experts:
            raise UsageError(f"slots must be from {k}, the experts per token, to all {num_experts}, not {slots}")
        self.k, self.strategy, self.accounting = k, strategy, accounting
        self.counts = Counts()
        self.residents = Residents(num_experts, slots, eviction)
        self._mask = np.ones(ranked or num_experts, dtype=np.float32)  # 1 for residents
        self._mask[:num_experts] = 0
        self._born: dict[int, int] = {}  # resident -> the token that loaded it
        self._range_total = np.float32(0)
        self._tokens = 0  # ever seen: the divisor of D and the clock of lives, while counts may be taken and replaced

    @property
    def mean_range(self) -> np.float32:
        """D: the mean of max(z) - min(z) over all tokens so far, without experts that were ruled out."""
        return self._range_total / np.float32(max(1, self._tokens))

    @property
    def range_state(self) -> tuple[float, int]:
        """The sum of the ranges and the number of tokens behind D, to go on with it in another run."""
        return float(self._range_total), self._tokens

    @range_state.setter
    def range_state(self, state: tuple[float, int]) -> None:
        self._range_total, self._tokens = np.float32(state[0]), state[1]

    def reset_cache(self, experts: Sequence[int] = ()) -> None:
        """Make `experts`, the first to be evicted first, the only residents. D and the counts stay.

        Raises UsageError if they are not distinct experts of this layer, or more than there are slots.
        """
        self.residents.seed(experts)
        self._mask[: self.residents.num_experts] = 0
        self._mask[list(experts)] = 1
        self._born = dict.fromkeys(experts, self._tokens + 1)  # as if the next token had brought them

    def step(self, z: Array, p: Array | None, own: npt.ArrayLike, *, biased: bool = True) -> Ids:
        """Route one token and update the cache; returns the experts that ran: `own` itself if the set is the same.

        z: [E] float32, what the router ranks by, -inf for experts it ruled out. p: [E] float32 probabilities; None
        leaves mass_lost at 0 and serves for strategies that do not use p. own: [k], the router's own selection.
        biased: False routes as the router does and only warms the cache and D.
        """
        self._observe(_ranges(z[None])[0])
        return np.array(self._advance(z, p, np.asarray(own).tolist(), self.mean_range, biased), dtype=np.intp)

    def run(self, z: Array, p: Array | None, own: Ids, *, biased_from: int = 0) -> RecurrenceTrace:
        """`step` for T tokens, z and p [T, E], own [T, k], of which those before `biased_from` are not biased."""
        T, E = z.shape
        first = self.k if biased_from else self.strategy.kept(self.k)
        ids = np.full((T, first), -1, dtype=np.intp)
        residents = np.empty((T, E), dtype=np.bool_)
        means = np.empty(T, dtype=np.float32)
        ranges = _ranges(z)
        for t, own_ids in enumerate(own.tolist()):
            residents[t] = self._mask
            self._observe(ranges[t])
            means[t] = D = self.mean_range
            chosen = self._advance(z[t], None if p is None else p[t], own_ids, D, t >= biased_from)
            ids[t, : len(chosen)] = chosen
        return RecurrenceTrace(ids, residents, means)

    def call(self, uses: Sequence[tuple[int, int]], rows: int, z: Array | None = None) -> tuple[list[int], list[Load]]:
        """Serve `rows` tokens that go through the layer together, unbiased, as the engine does: (missing, loads).

        uses: (expert, count), those worth keeping last (see `uses_of`). z: [rows, E] scores; None: D is not needed.
        """
        resident = self.residents
        self._tokens += 1  # experts come with the first of these tokens
        needed = [e for e, _ in uses]
        missing = [e for e in needed if e not in resident]
        misses = sum(n for e, n in uses if e not in resident)
        loads: list[Load] = []
        if len(needed) <= resident.capacity:
            loads = self._load(needed)
        else:
            for wave in resident.plan_waves(needed):
                self._publish(wave.loads)
                loads += wave.loads
        resident.touch(uses, rows)
        self._tokens += rows - 1
        for token_range in _ranges(z) if z is not None else ():
            self._range_total = self._range_total + token_range
        self.counts.add_call(uses, rows, misses, len(loads))
        return missing, loads

    # ---- inside ----

    def _observe(self, token_range: np.float32) -> None:
        self._range_total = self._range_total + token_range
        self._tokens += 1

    def _advance(self, z: Array, p: Array | None, own: list[int], D: np.float32, biased: bool) -> list[int]:
        c, resident = self.counts, self.residents
        ids = self._choose(z, p, own, D) if biased else own
        real = ids if len(self._mask) == resident.num_experts else [e for e in ids if e < resident.num_experts]
        # From the best expert to the worst, so that the best is the oldest of its token: as the paper's author does.
        scores = z[real].tolist()
        touched = [e for _, e in sorted(zip([-s for s in scores], real, strict=True))]
        missing = [e for e in touched if e not in resident]
        c.tokens += 1
        c.token_layers += 1
        c.selections += len(real)
        c.misses += len(missing)
        c.loads += len(missing)
        c.all_hit += not missing
        c.waits += bool(missing)
        if self.accounting == "engine" or not missing:
            if missing:
                self._load(touched)
            resident.touch([(e, 1) for e in touched])
        else:
            self._one_at_a_time(touched)
        return ids

    def _choose(self, z: Array, p: Array | None, own: list[int], D: np.float32) -> list[int]:
        """The strategy's selection, counted; `own` where it selects the same experts."""
        s = self.strategy
        # With a slot for every expert the engine leaves routing alone, from the first token on.
        if s.is_exact or (s.uses_residents and self.residents.capacity == self.residents.num_experts):
            return own
        chosen: list[int] = select(s, z, p, self._mask, D, self.k).tolist()
        new = sum(e not in own for e in chosen)
        if not new and len(chosen) == len(own):
            return own
        self.counts.swapped += new
        if p is not None:
            self.counts.mass_lost += float(p[own].sum() - p[chosen].sum())
        return chosen

    def _load(self, experts: list[int]) -> list[Load]:
        """Make all of `experts` resident."""
        loads = self.residents.plan(experts)
        self._publish(loads)
        return loads

    def _publish(self, loads: Sequence[Load]) -> None:
        """The experts of `loads` are resident; count the lives that this ends."""
        now, c = self._tokens, self.counts
        self.residents.publish(loads)
        for x in loads:
            if x.victim is not None:
                self._mask[x.victim] = 0
                c.lives += 1
                c.life_tokens += now - self._born.pop(x.victim)
            self._mask[x.expert] = 1
            self._born[x.expert] = now

    def _one_at_a_time(self, touched: list[int]) -> None:
        """The paper's order of events; an expert that this very token evicts and inserts again has not left."""
        born, lives, life_tokens = dict(self._born), self.counts.lives, self.counts.life_tokens
        for i, e in enumerate(touched):
            if e not in self.residents:
                self._load([e])
            self.residents.touch([(e, 1)], tokens=int(i == 0))
        for e in self._born:
            self._born[e] = born.get(e, self._tokens)
        gone = [e for e in born if e not in self._born]
        self.counts.lives = lives + len(gone)
        self.counts.life_tokens = life_tokens + sum(self._tokens - born[e] for e in gone)


def _ranges(z: Array) -> Array:
    """max - min of each row of z [T, E], without experts at -inf."""
    low = np.where(z == -np.inf, np.float32(np.inf), z).min(axis=-1)
    return np.asarray(z.max(axis=-1) - low)
