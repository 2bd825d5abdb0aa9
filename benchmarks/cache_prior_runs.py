"""The measurements of cache_prior.py: quality and speed of several strengths on the same text, token by token."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import Array, Estimate, bootstrap
from held_out import Ids
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from mlx_moecache.checkpoints.reader import EmulatedFlash
from mlx_moecache.errors import UsageError
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

SEGMENT = 16  # tokens that are timed at once
BLOCK = 2 * SEGMENT  # tokens: one segment forwards through the strengths, one backwards
CALIBRATION = 2  # windows, after one to fill the caches


@dataclass(frozen=True)
class Setup:
    """What all models of a run have in common."""

    folder: Path
    slots: int  # per layer
    context: int  # tokens
    strengths: tuple[float, ...]  # the first is 0: original routing

    def load(self, flash: EmulatedFlash | None = None) -> list[nn.Module]:
        """One model for each strength."""
        return [self._load(strength, flash) for strength in self.strengths]

    def load_original(self) -> nn.Module:
        return self._load(0.0, None)

    def _load(self, strength: float, flash: EmulatedFlash | None) -> nn.Module:
        options = CacheOptions(routing="cache-prior", strength=strength, flash=flash)
        if not strength:
            options = CacheOptions(routing="original", flash=flash)
        return OpenedModel(self.folder).load(MemoryOptions(slots=self.slots, max_context=self.context), options)


def experts_of(model: nn.Module) -> ExpertCache:
    cache: ExpertCache = model.expert_cache
    return cache


def empty(cache: ExpertCache) -> None:
    """Forget the residents only: the paper's running mean of ranges persists over windows, `reset` would drop it."""
    for layer in cache.layers:
        if layer.residents.capacity < layer.num_experts:
            layer.residents.clear()


def decode(model: nn.Module, kv: list[Any], ids: Ids) -> list[mx.array]:
    """Give the model `ids` [N], one decode step each; the logits [V] after every one of them, evaluated."""
    rows = []
    with experts_of(model).phase("decode"):
        for token in mx.array(ids):
            row = model(token[None, None], cache=kv)[0, -1]
            mx.eval(row)
            rows.append(row)
    return rows


# ---- quality ----


@dataclass(frozen=True)
class Quality:
    """Teacher-forced figures of one strength; intervals over windows, paired with original routing."""

    strength: float
    tokens: int  # scored
    perplexity: Estimate
    perplexity_ratio: Estimate  # biased / original
    miss_rate: Estimate  # misses / selections
    misses_ratio: Estimate  # biased / original
    loads_per_token_layer: float
    swapped_share: float  # selections that are not among the router's own top-k
    kl: Estimate  # nats per token
    top1_agreement: Estimate  # share of tokens


NLL, KL, SAME, SELECTIONS, MISSES, LOADS, SWAPPED = range(7)  # columns of a window's sums


def score_window(model: nn.Module, ids: Ids, reference: mx.array | None) -> tuple[Array, mx.array]:
    """Sums over one window [W + 1] and its log-probabilities [W, V]; `reference`: those of original routing."""
    cache = experts_of(model)
    empty(cache)
    before = cache.stats.copy()
    logits = mx.stack(decode(model, make_prompt_cache(model), ids[:-1])).astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    stats = (cache.stats - before).decode
    own = logprobs if reference is None else reference
    nll = -mx.take_along_axis(logprobs, mx.array(ids[1:, None]), axis=-1).sum()
    kl = (mx.exp(own) * (own - logprobs)).sum()
    same = (own.argmax(axis=-1) == logprobs.argmax(axis=-1)).sum()
    mx.eval(logprobs, nll, kl, same)
    counts = [stats.selections, stats.misses, stats.loads, stats.swapped]
    return np.array([float(nll), float(kl), float(same), *counts]), logprobs


def measure_quality(setup: Setup, windows: Ids, show: bool) -> list[Quality]:
    """Score every window at every strength."""
    models = setup.load()
    layers = len(experts_of(models[0]).layers)
    sums: list[list[Array]] = [[] for _ in models]
    for ids in tqdm(windows, desc="quality", unit="window", disable=None if show else True):
        reference = None
        for model, rows in zip(models, sums, strict=True):
            row, logprobs = score_window(model, ids, reference)
            rows.append(row)
            reference = logprobs if reference is None else reference
    for model in models:
        experts_of(model).close()
    original = np.stack(sums[0])
    length = windows.shape[1] - 1
    return [
        summarise_quality(strength, original, np.stack(rows), length, layers)
        for strength, rows in zip(setup.strengths, sums, strict=True)
    ]


def summarise_quality(strength: float, original: Array, biased: Array, length: int, layers: int) -> Quality:
    """`original` and `biased`: sums [N, 7] of N windows of `length` tokens."""
    pairs = np.stack([original, biased], axis=1)
    total = biased.sum(axis=0)
    tokens = len(biased) * length

    def share(column: int, of: int | None = None) -> Estimate:
        return bootstrap(biased, lambda b: b[:, column].sum() / (b[:, of].sum() if of else len(b) * length))

    return Quality(
        strength=strength,
        tokens=tokens,
        perplexity=bootstrap(biased, lambda b: math.exp(b[:, NLL].mean() / length)),
        perplexity_ratio=bootstrap(pairs, lambda p: math.exp((p[:, 1, NLL] - p[:, 0, NLL]).mean() / length)),
        miss_rate=share(MISSES, SELECTIONS),
        misses_ratio=bootstrap(pairs, lambda p: p[:, 1, MISSES].sum() / p[:, 0, MISSES].sum()),
        loads_per_token_layer=total[LOADS] / tokens / layers,
        swapped_share=total[SWAPPED] / total[SELECTIONS],
        kl=share(KL),
        top1_agreement=share(SAME),
    )


# ---- speed ----


@dataclass(frozen=True)
class Speed:
    """Decode speed of one strength at one emulated flash speed; intervals over blocks of two segments."""

    strength: float
    tokens: int  # timed
    tps: Estimate
    ratio: Estimate  # biased / original, tokens per second
    ratio_quartiles: tuple[float, float]  # of single blocks
    loads_per_token_layer: float
    read_share: float  # of the time
    expected_ratio: float  # if nothing changed but the time of reads, in proportion to the misses


@dataclass(frozen=True)
class FlashRun:
    """All strengths at one flash speed."""

    wanted_ratio: float  # read time / compute time of original routing
    bytes_per_second: float
    speeds: list[Speed]


SECONDS, READ, LOADED, BYTES = range(4)  # columns of a timed segment


def timed(model: nn.Module, kv: list[Any], ids: Ids) -> Array:
    """Seconds, seconds of reads, loads and bytes of one segment."""
    stats = experts_of(model).stats.decode
    reads, loads, nbytes = stats.read_seconds, stats.loads, stats.bytes_read
    began = time.perf_counter()
    decode(model, kv, ids)
    seconds = time.perf_counter() - began
    return np.array([seconds, stats.read_seconds - reads, stats.loads - loads, stats.bytes_read - nbytes])


def calibrate(setup: Setup, windows: Ids) -> Array:
    """Seconds of compute and bytes to read of one token under original routing with warm caches."""
    model = setup.load_original()
    ids = list(itertools.islice(itertools.cycle(windows[:, :-1]), 1 + CALIBRATION))
    decode(model, make_prompt_cache(model), ids[0])
    rows = [timed(model, make_prompt_cache(model), window) for window in ids[1:]]
    experts_of(model).close()
    row = np.sum(rows, axis=0) / sum(map(len, ids[1:]))
    return np.array([row[SECONDS] - row[READ], row[BYTES]])


def timed_blocks(models: Sequence[nn.Module], ids: Ids) -> Iterator[Array]:
    """Sums [models, 4] of one block after the other of a window `ids`, with a fresh context and warm expert caches."""
    kvs = [make_prompt_cache(model) for model in models]
    forwards = range(len(models))
    for block in ids[: len(ids) // BLOCK * BLOCK].reshape(-1, 2, SEGMENT):
        sums = np.zeros((len(models), 4))
        # Forwards through the strengths, then backwards: none always comes after the same other.
        for segment, order in zip(block, (forwards, reversed(forwards)), strict=True):
            for i in order:
                sums[i] += timed(models[i], kvs[i], segment)
        yield sums


def measure_speed(
    setup: Setup, windows: Ids, flash_ratio: float, calibration: Array, tokens: int, show: bool
) -> FlashRun:
    """Time `tokens` tokens at every strength; original routing reads about `flash_ratio` times as long as it computes.

    `calibration` comes from `calibrate`. Raises UsageError if nothing is ever read.
    """
    compute, nbytes = calibration
    if not nbytes:
        raise UsageError("no expert had to be read, so there is no speed to compare; use fewer --slots")
    flash = EmulatedFlash(bytes_per_second=nbytes / (flash_ratio * compute))
    models = setup.load(flash)
    texts = itertools.cycle(windows[:, :-1])
    warm_up = next(texts)
    for model in models:
        decode(model, make_prompt_cache(model), warm_up)
    blocks = itertools.chain.from_iterable(timed_blocks(models, ids) for ids in texts)
    wanted = range(-(-tokens // BLOCK))
    bar = tqdm(wanted, desc=f"speed, flash x{flash_ratio:g}", unit="block", disable=None if show else True)
    table = np.stack([next(blocks) for _ in bar])
    layers = len(experts_of(models[0]).layers)
    for model in models:
        experts_of(model).close()
    speeds = [summarise_speed(s, table[:, 0], table[:, i], layers) for i, s in enumerate(setup.strengths)]
    return FlashRun(flash_ratio, flash.bytes_per_second, speeds)


def summarise_speed(strength: float, original: Array, biased: Array, layers: int) -> Speed:
    """`original` and `biased`: sums [N, 4] of N blocks of two segments."""
    tokens = len(biased) * BLOCK
    before, total = original.sum(axis=0), biased.sum(axis=0)
    pairs = np.stack([original, biased], axis=1)
    ratios = original[:, SECONDS] / biased[:, SECONDS]
    expected_seconds = before[SECONDS] - before[READ] + before[READ] * total[LOADED] / max(1.0, before[LOADED])
    return Speed(
        strength=strength,
        tokens=tokens,
        tps=bootstrap(biased, lambda b: len(b) * BLOCK / b[:, SECONDS].sum()),
        ratio=bootstrap(pairs, lambda p: p[:, 0, SECONDS].sum() / p[:, 1, SECONDS].sum()),
        ratio_quartiles=(float(np.quantile(ratios, 0.25)), float(np.quantile(ratios, 0.75))),
        loads_per_token_layer=total[LOADED] / tokens / layers,
        read_share=total[READ] / total[SECONDS],
        expected_ratio=before[SECONDS] / expected_seconds,
    )
