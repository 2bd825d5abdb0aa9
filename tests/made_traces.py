"""Traces made up for tests: selections given or drawn, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_moecache.study.trace import LayerTrace, Trace, TraceWriter, read_trace
from mlx_moecache.study.trace_format import TracedLayer, TraceHeader

E, K = 10, 3  # experts, and experts per token
Ids = npt.NDArray[np.int64]


def header(layers: int = 2, experts: int = E, **changes: Any) -> TraceHeader:
    shapes = tuple(TracedLayer(experts, K, 100 + i, 5, experts) for i in range(layers))
    values = {
        "model": "tiny",
        "model_type": "qwen2_moe",
        "config_sha256": "0" * 64,
        "routing": "original",
        "eviction": "lru",
    }
    return TraceHeader(layers=shapes, **{**values, **changes})


def scores(rows: int, seed: int, experts: int = E) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, experts)).astype(np.float32)


def top(z: npt.NDArray[np.float32], k: int = K) -> Ids:
    """The k best of each row, best first."""
    return np.argsort(-z, axis=-1, kind="stable")[:, :k]


def traced(
    folder: Path, rows: Sequence[Sequence[int]] | npt.NDArray[np.int64], *, sequences: Sequence[int] = (), k: int = K
) -> LayerTrace:
    """A layer whose router selected `rows`, one token at a time; a new, cold sequence before each of `sequences`."""
    head = TraceHeader("m", "t", "", (TracedLayer(E, k, 7, 5, E),), "original", "lru")
    path = folder / "t.trace"
    path.unlink(missing_ok=True)
    with TraceWriter(path, head) as writer:
        for i, row in enumerate(rows):
            if i in sequences:
                writer.begin_sequence()
            own = np.array([row])
            writer.record(0, "decode", None, own, own)
    return read_trace(path).layers[0]


def scored(folder: Path, lengths: Sequence[int], seed: int = 0, layers: int = 2) -> Trace:
    """A trace whose scores drift, so that experts are used in spells; calls of several tokens are prefill."""
    path = folder / "scored.trace"
    path.unlink(missing_ok=True)
    rng, drift = np.random.default_rng(seed), np.zeros((layers, E))
    with TraceWriter(path, header(layers)) as writer:
        for n in lengths:
            for layer in range(layers):
                drift[layer] = 0.9 * drift[layer] + rng.standard_normal(E)
                z = (drift[layer] + rng.standard_normal((n, E))).astype(np.float32)
                writer.record(layer, "prefill" if n > 1 else "decode", z, top(z), top(z))
    return read_trace(path)


def shared(folder: Path, selected: Sequence[Sequence[Sequence[int]]]) -> Sequence[LayerTrace]:
    """Layers that selected selected[token][layer]."""
    path = folder / "shared.trace"
    path.unlink(missing_ok=True)
    with TraceWriter(path, header(len(selected[0]))) as writer:
        for token in selected:
            for layer, row in enumerate(token):
                writer.record(layer, "decode", None, np.array([row]), np.array([row]))
    return read_trace(path).layers
