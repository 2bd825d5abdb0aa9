"""The yardstick for window scoring: the same contract, met by stepping the real cache, one token per forward pass.

Selections, counts and logits are those of the live path: moe_block.py with `slots` real slots, its residents and its
reads. Slow, and only for layers that are partly resident, with engine accounting and a cache that starts empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.moe_block import MoeBlock
from mlx_moecache.routing import Strategy
from mlx_moecache.stats import PhaseStats
from mlx_moecache.study.recurrence import Counts, over_layers

Ids = npt.NDArray[np.int32]


class StepwiseScorer:
    """A scorer of its own model, opened from `folder`."""

    def __init__(
        self, folder: Path, strategy: Strategy, *, slots: int, eviction: str = "lru", max_context: int = 1024
    ) -> None:
        opened = OpenedModel(folder)
        self.model = opened.load(
            MemoryOptions(slots=slots, max_context=max_context), CacheOptions(routing=strategy, eviction=eviction)
        )
        self.cache = self.model.expert_cache
        self.cache.optimist.enabled = False  # it would look at several layers at once
        self._layers = [_WatchedLayer(b) for b in opened.blocks]

    def forward(self, tokens: Sequence[int], *, biased_from: int = 0) -> mx.array:
        """[L, V] float32: every token a forward pass, those before `biased_from` unbiased, the cache empty at first."""
        for layer in self.cache.layers:
            layer.residents.clear()
        for w in self._layers:
            w.begin()
        kv = make_prompt_cache(self.model)
        rows = []
        for i, token in enumerate(tokens):
            with self.cache.phase("prefill" if i < biased_from else "decode"):
                row = self.model(mx.array([[token]]), cache=kv)[0, -1].astype(mx.float32)
                mx.eval(row)
            rows.append(row)
            for w in self._layers:
                w.after_token()
        return mx.stack(rows)

    def take_counts(self) -> Counts:
        taken = over_layers([w.counts for w in self._layers])
        for w in self._layers:
            w.counts = Counts()
        return taken

    @property
    def own_selections(self) -> list[Ids]:
        return [np.array(w.own, dtype=np.int32) for w in self._layers]

    @property
    def selections(self) -> list[Ids]:
        """Per layer, what ran [T, kept] in the last forward."""
        return [np.array(w.ran, dtype=np.int32) for w in self._layers]

    @property
    def scores(self) -> list[npt.NDArray[np.float32]]:
        """Per layer, z [T, E] of the last forward."""
        return [np.array(w.scores, dtype=np.float32) for w in self._layers]

    @property
    def ranges(self) -> list[tuple[float, int]]:
        return [(float(np.array(x.range.total)), x.range.tokens) for x in self.cache.layers]

    @ranges.setter
    def ranges(self, state: Sequence[tuple[float, int]]) -> None:
        for layer, (total, tokens) in zip(self.cache.layers, state, strict=True):
            layer.range.total, layer.range.tokens = mx.array(total), tokens

    def close(self) -> None:
        self.cache.close()


class _WatchedLayer:
    """Counts what happens to the residents of one layer, from outside, without the code that counts for users."""

    def __init__(self, block: MoeBlock) -> None:
        self.block = block
        self.counts = Counts()
        assert block.seam is not None
        take, read_host = block.seam.take, block.cached._read_host

        def watched_take() -> Any:
            seen = take()
            assert seen is not None, "the seam must observe: the layer has to be partly resident"
            self._z = np.array(seen.scores)[0]
            return seen

        def watched_read(indices: mx.array, stats: PhaseStats, guess: Any = None) -> Any:
            result = read_host(indices, stats, guess)
            self._ids = result[0][0].tolist()
            return result

        block.seam.take = watched_take  # type: ignore[method-assign]
        block.cached._read_host = watched_read  # type: ignore[method-assign]
        self.begin()

    def begin(self) -> None:
        self.own: list[list[int]] = []
        self.ran: list[list[int]] = []
        self.scores: list[npt.NDArray[np.float32]] = []
        self._born: dict[int, int] = {}  # resident -> token at which it came

    def after_token(self) -> None:
        z, ids, now, c = self._z, self._ids, len(self.ran), self.counts
        own = np.argsort(-z, kind="stable")[: self.block.k].tolist()
        self.own.append(own)
        self.ran.append(ids)
        self.scores.append(z)
        residents = set(self.block.layer.residents.experts)
        came, left = residents - self._born.keys(), self._born.keys() - residents
        assert self.block.seam is not None
        bias = getattr(self.block.seam.owner, "e_score_correction_bias", None)
        if bias is None:
            p = np.exp(z - z.max(), dtype=np.float64)
            p /= p.sum()
        else:
            p = np.maximum(z - np.array(bias, dtype=np.float64).mean(), 0)
            p /= p[own].sum()
        c.tokens += 1
        c.token_layers += 1
        c.selections += len(ids)
        c.misses += len(came)
        c.loads += len(came)
        c.swapped += len(set(ids) - set(own))
        c.all_hit += not came
        c.waits += bool(came)
        c.lives += len(left)
        c.life_tokens += sum(now - self._born.pop(e) for e in left)
        c.mass_lost += float(p[own].sum() - p[ids].sum())
        self._born.update(dict.fromkeys(came, now))
