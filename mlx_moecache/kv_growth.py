"""KV caches grow between forward passes, one tensor at a time.

mlx-lm's caches grow inside of a pass: the old buffers of a layer's keys and values, the zeros put behind them and the
new ones then stand beside everything else that the pass needs. Made longer before the pass, they cost one old buffer
more for a moment, at a time when nothing else is there. Their contents and sizes are those that mlx-lm gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache

from .calls import replace_call

GROWN = (KVCache, QuantizedKVCache)  # these very classes: others move or drop what they hold


def install_growth(model: nn.Module) -> None:
    """From now on the caches of ``model(tokens, cache=...)`` have room for the tokens before the pass begins."""
    upstream = type(model).__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        caches = kwargs.get("cache", args[1] if len(args) > 1 else None)
        if args and caches:
            make_room(caches, args[0].shape[1])
        return upstream(module, *args, **kwargs)

    replace_call(model, call)


def make_room(caches: Sequence[Any], tokens: int) -> None:
    """Lengthen every cache that has no room for so many more tokens as its next update would; evaluates them.

    A cache that is still empty is left alone: it makes its first buffer when it knows its shape.
    """
    for cache in flat(caches):
        if type(cache) not in GROWN or cache.empty():
            continue
        length = _buffers(cache.keys)[0].shape[-2]
        if cache.offset + tokens > length:
            kept = cache.offset if cache.offset % cache.step else length
            extra = -(-tokens // cache.step) * cache.step
            # Keys last: it is their length that is asked about, so after an interrupt in between both are made again.
            cache.values = _longer(cache.values, kept, extra)
            cache.keys = _longer(cache.keys, kept, extra)


def flat(caches: Sequence[Any]) -> Iterator[Any]:
    """The KV caches of all layers, those of layers with several one by one."""
    for cache in caches:
        yield from cache.caches if isinstance(cache, CacheList) else (cache,)


def largest_buffer(cache: Any) -> int:
    """The most bytes of old tensors that `make_room` keeps while their copies are made: those of keys or of values."""
    if type(cache) not in GROWN or cache.empty():
        return 0
    return max(sum(int(a.nbytes) for a in _buffers(held)) for held in (cache.keys, cache.values))


def _buffers(held: Any) -> Sequence[mx.array]:
    """A quantised cache keeps three tensors: numbers, scales, biases."""
    return [held] if isinstance(held, mx.array) else held


def _longer(held: Any, kept: int, extra: int) -> Any:
    """The first `kept` tokens of each buffer [.., length, dims] with zeros for `extra` more; evaluated one by one."""
    grown = []
    for buffer in _buffers(held):
        widths = [(0, 0)] * (buffer.ndim - 2) + [(0, extra), (0, 0)]
        grown.append(mx.pad(buffer[..., :kept, :], widths))
        mx.eval(grown[-1])
    return grown[0] if isinstance(held, mx.array) else type(held)(grown)
