"""What state-space and linear-attention layers need in a forward pass, from the shapes of their weights and states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from . import system

SCAN_ARRAYS = 12  # [chunk, channels, state] float32 arrays of a token-by-token scan (Mamba 1), measured: 11
SQUARES = 3  # [heads, step, step] float32 arrays of Mamba 2 in each of two steps under way, measured: 2.6 to 3.0
LOOP_AHEAD = 6  # states that a loop of plain operations makes beyond one per token, measured: up to 5
KERNEL_HEAD = 32  # mlx-lm's Metal kernel for the delta rule takes keys of multiples of this size


@dataclass(frozen=True)
class RecurrentShape:
    """Bytes of recurrent layers in a forward pass; all 0 for a model that has none."""

    held: int = 0  # per token of a chunk, of all layers, until the chunk ends
    token: int = 0  # per token of a chunk, of the widest layer
    square: int = 0  # per token and token of a step of that layer (budget.STATE_STEP)
    held_square: int = 0  # the same of all layers, until the chunk ends
    fixed: int = 0  # whatever the chunk


def recurrent_shape(model: nn.Module, size: int, *, mamba2: bool) -> RecurrentShape:
    """size: bytes of an activation.

    The state that a layer hands on is the last rows of a convolution's input, or (Mamba 1) the last of all states. It
    is a view of the whole array, or not computed before the end of the pass; either way the whole array stays. Mamba 2
    computes its last state that late too, from the inputs of all tokens and the decay within the last step. A
    recurrence that is a loop of plain operations leaves its state of every token, as MLX runs ahead.
    """
    channels = sum(m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Conv1d))
    scanned = [4 * a.size for a in _decays(model) if a.ndim == 2]  # Mamba 1: channels x state
    held = size * channels + sum(scanned)
    if scanned:
        return RecurrentShape(held, SCAN_ARRAYS * max(scanned))
    states = list(_states(model))
    if mamba2 and states:
        _, heads, width, state = max((s.shape for s in states), key=lambda shape: shape[1])
        inputs = size * channels + sum(4 * s.shape[1] * (s.shape[2] + 1) for s in states)
        return RecurrentShape(
            held + inputs,
            4 * heads * (2 * width + 3 * state),
            4 * SQUARES * heads,
            held_square=sum(4 * s.shape[1] for s in states),
        )
    looped = max((s.nbytes for s in states if not _has_kernel(model, s)), default=0)
    return RecurrentShape(held, looped, fixed=LOOP_AHEAD * looped)


def _decays(model: nn.Module) -> Iterator[mx.array]:
    """The decay rates of state-space and delta-rule layers: per channel and state, or per head."""
    for module in model.modules():
        if isinstance(module.get("A_log"), mx.array):
            yield module["A_log"]


def _states(model: nn.Module) -> Iterator[mx.array]:
    """The states [B, heads, width, state] that recurrent layers hand on, not computed."""
    caches = make_prompt_cache(model)
    if any(isinstance(c, ArraysCache) for c in caches):
        model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    for cache in caches:
        if isinstance(cache, ArraysCache):
            yield from (a for a in cache.cache if a is not None and a.ndim == 4)


def _has_kernel(model: nn.Module, state: mx.array) -> bool:
    return not system.on_cpu() and next(_decays(model), None) is not None and state.shape[-1] % KERNEL_HEAD == 0
