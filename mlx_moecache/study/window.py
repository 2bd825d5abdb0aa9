"""Scoring a known text under a routing strategy: exact token-by-token recurrence at the speed of prefill.

A forward pass takes many tokens through a layer before the next layer begins, while what is resident for a token
depends only on the tokens before it in the same layer. So each layer's seam sees the scores of all tokens, runs the
recurrence over them on the host (recurrence.py), and goes on with the residents that each token would have found. The
caches are simulated: their size does not depend on how many experts the model really holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from ..errors import UnsupportedModelError, UsageError
from ..expert_cache import ExpertCache
from ..layer_experts import LayerExperts
from ..observer import Observer, RoutedCall
from ..routing import Strategy
from ..seam import SelectionSeam
from .belady import Routes
from .recurrence import Counts, over_layers
from .window_recurrence import WindowRecurrence

INITIAL = ("empty", "random", "warm")
Selections = npt.NDArray[np.int32]


class WindowScorer:
    """Scores sequences with `model` as if each layer had `slots` slots; the model's own cache only supplies weights.

    D persists over the sequences of one scorer, as in the paper; the simulated caches begin every sequence as `initial`
    says: empty, with `slots` experts drawn by `seed`, or as the sequence before left them. What is drawn depends on the
    layer and on `sequence`, the number of sequences begun so far, which may be set; not on the strategy.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        *,
        slots: int | Sequence[int],
        eviction: str = "lru",
        accounting: str = "engine",
        initial: str = "empty",
        seed: int = 0,
    ) -> None:
        """slots: for all layers, or one number per layer; more than a layer has experts means all of them.

        Raises UnsupportedModelError if a router cannot be observed, UsageError for values out of range.
        """
        if initial not in INITIAL:
            raise UsageError(f"unknown initial cache {initial!r} (choose {', '.join(INITIAL)})")
        cache: ExpertCache = model.expert_cache
        counts = list(slots) if not isinstance(slots, int) else [slots] * len(cache.layers)
        if len(counts) != len(cache.layers):
            raise UsageError(f"{len(counts)} slot counts for {len(cache.layers)} MoE layers; give one for each")
        self.model, self.strategy, self.initial = model, strategy, initial
        self.seed, self.sequence = seed, 0
        self._layers: list[_Layer] = []
        for number, (x, s) in enumerate(zip(cache.layers, counts, strict=True)):
            seam, slots_here = _seam_of(x), min(s, x.num_experts)
            recurrence = WindowRecurrence(
                x.num_experts, x.k, slots_here, strategy, eviction=eviction, accounting=accounting, ranked=seam.ranked
            )
            self._layers.append(_Layer(number, seam, recurrence))

    def forward(self, tokens: Sequence[int], *, biased_from: int = 0, counted_from: int = 0) -> mx.array:
        """[L, V] float32 logits of a new sequence of L tokens, evaluated.

        Tokens before `biased_from` are routed as the model does; they only warm the caches and D. Those before
        `counted_from` are left out of `take_counts`.
        """
        if not tokens:
            raise UsageError("a sequence needs at least one token")
        for x in self._layers:
            x.begin(self._contents(x), self.model.expert_cache.observers, uncounted=counted_from)
        self.sequence += 1
        kv = make_prompt_cache(self.model)
        parts = []
        with self._observing(), self.model.expert_cache.phase("prefill"):
            for biased, part in ((False, tokens[:biased_from]), (True, tokens[biased_from:])):
                if not len(part):
                    continue
                for x in self._layers:
                    x.biased = biased
                logits = self.model(mx.array(list(part))[None], cache=kv)[0].astype(mx.float32)
                mx.eval(logits)
                parts.append(logits)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def take_counts(self) -> Counts:
        """What the simulated caches did since the last call, summed over layers."""
        taken = over_layers(x.recurrence.counts for x in self._layers)
        for x in self._layers:
            x.recurrence.counts = Counts()
        return taken

    @property
    def ranges(self) -> list[tuple[float, int]]:
        """Per layer, the sum and the number of the ranges behind D: what an interrupted run needs to go on."""
        return [x.recurrence.range_state for x in self._layers]

    @ranges.setter
    def ranges(self, state: Sequence[tuple[float, int]]) -> None:
        for x, s in zip(self._layers, state, strict=True):
            x.recurrence.range_state = s

    @property
    def caches(self) -> str:
        """JSON: `sequence`, and if caches stay warm what each of them holds. With `ranges`, where to go on from."""
        layers = [x.recurrence.cache_state for x in self._layers] if self.initial == "warm" else []
        return json.dumps({"sequence": self.sequence, "layers": layers}, separators=(",", ":"))

    @caches.setter
    def caches(self, text: str) -> None:
        """Raises UsageError if `text` is not of a scorer with the same settings."""
        try:
            state = json.loads(text)
            self.sequence = int(state["sequence"])
            for x, s in zip(self._layers if self.initial == "warm" else [], state["layers"], strict=True):
                x.recurrence.cache_state = s
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"what is noted about the caches of an interrupted run is damaged ({type(error).__name__}: {error}); "
                "measure anew with another --output"
            ) from error

    @property
    def own_selections(self) -> list[Routes]:
        """Per MoE layer, what the router itself selected in the last sequence of L tokens (for Belady's bound).

        [L, k]; where some experts compute nothing, for each token a list of the others.
        """
        return [x.own_selections() for x in self._layers]

    def _contents(self, layer: _Layer) -> list[int] | None:
        """What a cache holds before a sequence; None: what it holds now."""
        residents = layer.recurrence.residents
        if self.initial == "empty":
            return []
        if self.initial == "random":
            rng = np.random.default_rng((self.seed, layer.number, self.sequence))
            drawn: list[int] = rng.permutation(residents.num_experts)[: residents.capacity].tolist()
            return drawn
        return None

    @contextmanager
    def _observing(self) -> Iterator[None]:
        """The seams of the model work for this scorer; afterwards they are as before, also after an error."""
        before = [(x.seam, x.seam.enabled, x.seam.strategy) for x in self._layers]
        try:
            for x in self._layers:
                x.seam.enabled, x.seam.strategy, x.seam.window = True, self.strategy, x.route
            yield
        finally:
            for seam, enabled, strategy in before:
                seam.enabled, seam.strategy, seam.window = enabled, strategy, None
                seam.take()


def _seam_of(layer: LayerExperts) -> SelectionSeam:
    if layer.seam is None:
        raise UnsupportedModelError(
            f"the router of {layer.path} cannot be observed, so this model cannot be scored under a strategy"
        )
    return layer.seam


class _Layer:
    """One layer's recurrence and the seam that feeds it. Observers hear of every token once, from here."""

    def __init__(self, number: int, seam: SelectionSeam, recurrence: WindowRecurrence) -> None:
        self.number, self.seam, self.recurrence = number, seam, recurrence
        self.biased = True
        self.own: list[Selections] = []

    def begin(self, contents: list[int] | None, observers: Sequence[Observer], *, uncounted: int) -> None:
        self.own, self.observers = [], observers
        self.recurrence.uncounted = uncounted
        if contents is not None:
            self.recurrence.reset_cache(contents)

    def own_selections(self) -> Routes:
        own, real = np.concatenate(self.own), self.recurrence.residents.num_experts
        return own if (own < real).all() else [[e for e in row if e < real] for row in own.tolist()]

    def route(self, z: mx.array, p: mx.array, own: mx.array) -> tuple[mx.array, mx.array] | None:
        """Run the recurrence over the tokens of one forward pass (see seam.Window)."""
        mx.eval(z, p, own)
        ids = np.array(own).astype(np.intp)
        self.own.append(ids.astype(np.int32))
        z_host, p_host = np.array(z), np.array(p)
        trace = self.recurrence.run(z_host, p_host, ids, biased_from=0 if self.biased else len(ids))
        phase = "decode" if self.biased else "prefill"
        for observer in self.observers:
            call = RoutedCall(
                self.number, phase, z_host, p_host, ids.astype(np.int64), trace.ids.astype(np.int64), True
            )
            observer.observe(call)
        r = self.recurrence
        complete = r.residents.capacity == r.residents.num_experts and r.strategy.uses_residents
        if not self.biased or r.strategy.is_exact or complete:
            return None
        return mx.array(trace.residents.astype(np.float32)), mx.array(trace.mean_range)[:, None]
