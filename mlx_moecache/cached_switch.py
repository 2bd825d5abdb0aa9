"""One MoE layer at work: look at what the router selected, make it resident, compute with the slots.

Stands in for the call of mlx-lm's switch once the model is loaded. One evaluation per partly resident layer and call
brings the selected experts to the host; a layer whose experts are all resident runs the original code and never looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .expert_cache import ExpertCache
from .guess import Guess
from .layer_experts import LayerExperts
from .observer import RoutedCall, Scores
from .optimistic import Optimist, Unchecked
from .residents import Load, Wave
from .routing import Original
from .seam import SelectionSeam
from .stats import PhaseStats
from .uses import ranked_uses

if TYPE_CHECKING:
    from .look_ahead import Staged

WAVE_ROWS = 1024  # (token, expert) pairs that are computed at once in prefill: bounds memory, enough for a kernel
Switch = Callable[[mx.array, mx.array], mx.array]


class CachedSwitch:
    """The call of one layer's switch, with the experts of `layer` and the rest of them on disk."""

    def __init__(
        self,
        switch: nn.Module,
        upstream: Switch,
        seam: SelectionSeam | None,
        *,
        cache: ExpertCache,
        layer: LayerExperts,
        number: int,
        output_dims: int,
        bit_exact: bool,
    ) -> None:
        """upstream: the switch's own code, on slot numbers. number: of this layer among MoE layers. bit_exact: the
        cloned router gave bit-equal results, so that it may also observe exact runs."""
        self.switch, self._upstream, self.seam = switch, upstream, seam
        self.cache, self.layer, self.number = cache, layer, number
        self.num_experts, self.output_dims, self.bit_exact = layer.num_experts, output_dims, bit_exact
        self._mask: tuple[int, mx.array] | None = None
        self._table: tuple[int, mx.array] | None = None
        layer.on_resize, layer.seam = self.adopt_pool, seam
        if seam is not None:
            seam.strategy = cache.strategy
            seam.bias_mask = self._bias_mask
        self.adopt_pool()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x [.., D] and expert numbers [.., K] -> [.., K, D], as the upstream switch."""
        layer, cache = self.layer, self.cache
        if cache.journal.open:
            cache.mend()
        k = indices.shape[-1]
        rows = indices.size // k
        if layer.residents.is_complete:
            if cache.observers:
                self._read_host(indices.reshape(rows, k), PhaseStats())
            return self._upstream(x, indices) if rows == 1 else self._in_two_steps(x, indices)
        seen = PhaseStats()
        try:
            return self._partly_resident(x, indices, rows, seen)
        finally:
            cache.count(layer, rows, seen)

    def _partly_resident(self, x: mx.array, indices: mx.array, rows: int, seen: PhaseStats) -> mx.array:
        layer, cache = self.layer, self.cache
        optimist = cache.optimist
        if optimist is not None and rows == 1:
            if optimist.records:
                return self._unchecked(x, indices, optimist)
            optimist.run += 1
        guess = self._guess(x) if rows == 1 else None
        ids, scores, swapped = self._read_host(indices.reshape(rows, -1), seen, guess)
        uses = ranked_uses(ids, scores, self.num_experts)
        needed = [e for e, _ in uses]
        missed = [e for e in needed if e not in layer.residents]
        misses = sum(n for e, n in uses if e not in layer.residents) if rows > 1 else len(missed)
        if rows > 1:
            fits = len(needed) <= layer.residents.capacity
            waves = layer.residents.plan_at_once(needed) if fits else layer.residents.plan_waves(needed)
            y = self._in_waves(x, ids, waves, seen).reshape(*indices.shape, -1)
            layer.residents.touch(uses, rows)
        else:
            y = self._one_token(x, indices.shape, ids.ravel().tolist(), layer.residents.plan(needed), seen, guess)
            layer.residents.touch(uses)
            layer.pool.track(y)
        selections = sum(n for _, n in uses)
        seen.selections += selections
        seen.misses += misses
        seen.hits += selections - misses
        seen.swapped += swapped
        if optimist is not None:
            optimist.missed += bool(missed)
        if cache.listener is not None:
            cache.listener.used(self.number, cache.phase_of(rows), needed, missed)
        return y

    def _unchecked(self, x: mx.array, indices: mx.array, optimist: Optimist) -> mx.array:
        """One token with the experts that are in memory; whether it was right, the host sees later (optimistic.py)."""
        optimist.run += 1
        seen = self.seam.take() if self.seam is not None else None
        ids = indices if seen is None or seen.selected is None else seen.selected.astype(mx.uint32)
        ids = ids.reshape(1, -1)
        arrays = [ids] if seen is None else [ids, mx.take_along_axis(seen.scores, ids, axis=-1)]
        swapped = None if seen is None else seen.swapped
        earlier = self.layer.pool.take_unfenced()
        if seen is not None and seen.mean_range is not None:
            earlier.append(seen.mean_range)
        arrays += [] if swapped is None else [swapped]
        optimist.record(Unchecked(self, arrays, earlier, seen is not None, swapped is not None))
        y = self._upstream(x, mx.take(self._slot_table(), indices))
        self.layer.pool.track(y)
        return y

    def commit(self, chose: Unchecked) -> None:
        """A layer that ran unchecked had all of its experts: account for it as if the host had looked at once."""
        uses = ranked_uses(chose.ids, chose.scores, self.num_experts)
        self.layer.residents.touch(uses)
        self.cache.count(self.layer, 1, PhaseStats(len(uses), len(uses), swapped=chose.swapped))
        if self.cache.listener is not None:
            self.cache.listener.used(self.number, self.cache.phase_of(1), [e for e, _ in uses], [])

    def _slot_table(self) -> mx.array:
        """[E] slot numbers on the device, 0 for experts that are not in memory; kept until the residents change."""
        residents = self.layer.residents
        if self._table is None or self._table[0] != residents.version:
            table = np.zeros(self.num_experts, dtype=np.uint32)
            for e in residents.experts:
                table[e] = residents.slot_of(e)
            self._table = (residents.version, mx.array(table))
        return self._table[1]

    def _one_token(
        self,
        x: mx.array,
        shape: Sequence[int],
        experts: Sequence[int],
        loads: Sequence[Load],
        stats: PhaseStats,
        guess: Guess | None,
    ) -> mx.array:
        """[.., K, D] outputs of `experts` [K] for one token, `shape` [.., K]; `loads` bring the missing ones.

        Those that are there are computed while the others are read, and behind them what is guessed for the next layer.
        """
        layer, cache = self.layer, self.cache
        missing = {x.expert for x in loads}
        late = [i for i, e in enumerate(experts) if e in missing]
        size, hits_count = layer.bytes_per_expert, len(experts) - len(late)
        pays = cache.overlaps and cache.pace.pays(len(loads) * size, hits_count * size)
        if not late or len(late) == len(experts) or not pays:
            with cache.loading(layer, loads, stats, joining=True):
                self._read_ahead(guess, stats)
            return self._upstream(x, self._slots(experts, shape))
        early = [i for i, e in enumerate(experts) if e not in missing]
        with cache.loading(layer, loads, stats):
            self._read_ahead(guess, stats)
            hits = self._upstream(x, self._slots([experts[i] for i in early], [*shape[:-1], len(early)]))
            began = time.perf_counter()
            mx.eval(hits)
            cache.pace.observe_compute(hits_count * size, time.perf_counter() - began)
        misses = self._upstream(x, self._slots([experts[i] for i in late], [*shape[:-1], len(late)]))
        place = sorted(range(len(experts)), key=(early + late).__getitem__)
        return mx.take(mx.concatenate([hits, misses], axis=-2), mx.array(place, dtype=mx.uint32), axis=-2)

    def _guess(self, x: mx.array) -> Guess | None:
        """What the next layer may select, if it pays to know."""
        ahead = self.cache.look_ahead
        if ahead is None or self.cache.observers or (self.cache.optimist and id(self) in self.cache.optimist.known):
            return None
        guesser = ahead.guesser_after(self.number)
        return None if guesser is None else guesser.guess(x)

    def _read_ahead(self, guess: Guess | None, stats: PhaseStats) -> None:
        if guess is not None and self.cache.look_ahead is not None:
            self.cache.look_ahead.begin(guess, stats)

    def _slots(self, experts: Sequence[int], shape: Sequence[int]) -> mx.array:
        """Slot numbers of `experts` as [.., K]; those that compute nothing have weight 0, so any slot will do."""
        residents = self.layer.residents
        slots = [residents.slot_of(e) if e < self.num_experts else 0 for e in experts]
        return mx.array(slots, dtype=mx.uint32).reshape(tuple(shape))

    def _read_host(
        self, indices: mx.array, stats: PhaseStats, guess: Guess | None = None
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32] | None, int]:
        """The layer's only host read: selected experts [T, K], their scores [T, K], number of swapped selections.

        Selections that compute nothing (identity experts, which reach the switch as expert 0 of weight 0) get numbers
        from E on. The same evaluation fences the slots: it completes the outputs of earlier calls, which costs nothing
        in a generation loop, where the indices depend on them anyway.
        """
        seen = self.seam.take() if self.seam is not None else None
        known = self.cache.optimist.known.get(id(self)) if self.cache.optimist is not None else None
        if known is not None:
            return known.ids, known.scores, known.swapped
        earlier = self.layer.pool.take_unfenced()
        if guess is not None:
            earlier += [guess.ids, guess.scores]
        stats.host_reads += 1
        if seen is None:
            self._wait(stats, indices, *earlier)
            ids = np.array(indices)
            self._tell(None, None, ids, ids)
            return ids, None, 0
        if seen.selected is not None:
            indices = seen.selected.astype(mx.uint32)
        scores = mx.take_along_axis(seen.scores, indices, axis=-1)
        watched = self.cache.observers and seen.own is not None
        p = seen.probabilities if watched else None
        lazy = [a for a in (indices, scores, seen.mean_range, seen.swapped, p, seen.own) if a is not None]
        self._wait(stats, *lazy, *earlier)
        ids = np.array(indices)
        if watched:
            self._tell(np.array(seen.scores), np.array(p), np.array(seen.own), ids)
        return ids, np.array(scores), 0 if seen.swapped is None else int(np.array(seen.swapped))

    def _wait(self, stats: PhaseStats, *arrays: mx.array) -> None:
        began = time.perf_counter()
        mx.eval(*arrays)
        stats.host_wait_seconds += time.perf_counter() - began

    def _tell(self, z: Scores | None, p: Scores | None, own: npt.NDArray[Any], used: npt.NDArray[Any]) -> None:
        for observer in self.cache.observers:
            phase = self.cache.phase_of(len(used))
            observer.observe(RoutedCall(self.number, phase, z, p, own.astype(np.int64), used.astype(np.int64)))

    def _in_two_steps(self, x: mx.array, indices: mx.array) -> mx.array:
        """All experts are resident, several tokens: what precedes the experts, then the experts, evaluated.

        In one lazy graph MLX allocates far ahead of what it computes, so that arrays of several layers would coexist.
        """
        mx.eval(indices)
        y = self._upstream(x, indices)
        mx.eval(y)
        return y

    def _in_waves(self, x: mx.array, ids: npt.NDArray[np.uint32], waves: Sequence[Wave], stats: PhaseStats) -> mx.array:
        """[T * K, D] outputs for several tokens, evaluated, computed wave by wave after reading the wave's experts.

        At most WAVE_ROWS rows are computed at once, so that beside the result only the intermediates of these rows
        exist, however long the chunk is.
        """
        layer = self.layer
        k = ids.shape[1]
        rows_of_x = x.reshape(-1, x.shape[-1])
        experts = ids.ravel()
        slot_of = np.zeros(self.num_experts, dtype=np.uint32)
        out: mx.array | None = None
        if not waves:
            out = mx.zeros((experts.size, self.output_dims), dtype=x.dtype)
        with self._read_early(waves, experts.size, stats) as early:
            if waves:
                self.cache.load(layer, waves[0].loads, stats, early=early)
            for wave, following in zip(waves, [*waves[1:], Wave([], [])], strict=True):
                in_wave = np.zeros(max(self.num_experts, int(experts.max()) + 1), dtype=bool)
                for e in wave.experts:
                    in_wave[e], slot_of[e] = True, layer.residents.slot_of(e)
                in_use = {int(slot_of[e]) for e in wave.experts}
                ahead = not any(x.slot in in_use for x in following.loads) and self.cache.overlaps
                with self.cache.loading(layer, following.loads if ahead else [], stats, early=early):
                    if not following.experts:
                        self._read_next(experts.size, stats)
                    positions = np.flatnonzero(in_wave[experts])
                    positions = positions[np.argsort(experts[positions], kind="stable")]
                    for i in range(0, positions.size, WAVE_ROWS):
                        part = positions[i : i + WAVE_ROWS]
                        rows, slots = mx.array((part // k).astype(np.uint32)), mx.array(slot_of[experts[part]])
                        y = self._upstream(rows_of_x[rows], slots[:, None]).squeeze(-2)
                        if out is None:
                            out = mx.zeros((experts.size, y.shape[-1]), dtype=y.dtype)
                        out[mx.array(part.astype(np.uint32))] = y  # in place: nothing else holds `out`
                        del y
                        mx.eval(out)  # a wave after the following one overwrites these slots
                if not ahead:
                    self.cache.load(layer, following.loads, stats, early=early)
        assert out is not None
        return out

    @contextmanager
    def _read_early(self, waves: Sequence[Wave], selections: int, stats: PhaseStats) -> Iterator[dict[int, Staged]]:
        """What was read of `waves` before the layer had selected; nobody else may use it meanwhile."""
        ahead = self.cache.look_ahead
        if ahead is None:
            yield {}
            return
        early = ahead.claim_chunk(self.number, [e for w in waves for e in w.experts], selections, stats)
        try:
            yield early
        finally:
            ahead.release(list(early.values()))

    def _read_next(self, selections: int, stats: PhaseStats) -> None:
        """Nothing more is read for this layer: begin with the next one, behind the computing that is left before it."""
        if self.cache.look_ahead is not None and self.cache.overlaps:
            self.cache.look_ahead.begin_chunk(self.number + 1, selections, stats)

    def _bias_mask(self, rows: int) -> mx.array | None:
        """[E] with 1 for resident experts if this call is biased; kept until the set of residents changes."""
        if not self.cache.is_biased(rows):
            return None
        residents = self.layer.residents
        if self._mask is None or self._mask[0] != residents.version:
            buffer: Any = memoryview(residents.mask)  # the stubs do not tell that this works
            self._mask = (residents.version, mx.array(buffer))
        return self._mask[1]

    def adopt_pool(self) -> None:
        """Put the pool's arrays into the projections and switch the seam on where the host looks anyway."""
        for name, array in self.layer.pool.arrays.items():
            projection, _, tensor = name.rpartition(".")
            self.switch[projection][tensor] = array
        if self.seam is not None:
            biased = not isinstance(self.seam.strategy, Original)
            partly = self.layer.residents.capacity < self.num_experts
            self.seam.watched, self.seam.partly_resident = bool(self.cache.observers), partly
            prunes = biased and not self.seam.strategy.uses_residents
            self.seam.enabled = (partly or prunes or self.seam.watched) and (biased or self.bit_exact)
