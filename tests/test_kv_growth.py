"""KV caches that were made longer beforehand are those that mlx-lm would have made, for one old buffer at a time."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, ConcatenateKVCache, KVCache, QuantizedKVCache, RotatingKVCache
from tiny_models import build_model, random_tokens, tiny_config

from mlx_moecache import kv_growth
from mlx_moecache.kv_growth import install_growth, largest_buffer, make_room

HEADS, DIMS = 2, 64


def update(cache: Any, tokens: int, start: int = 0) -> None:
    values = mx.arange(start, start + HEADS * tokens * DIMS, dtype=mx.float32).reshape(1, HEADS, tokens, DIMS)
    cache.update_and_fetch(mx.sin(values), mx.cos(values))


def arrays(cache: Any) -> list[mx.array]:
    return [a for _, a in tree_flatten([cache.keys, cache.values])]


def same(a: Any, b: Any) -> bool:
    pairs = list(zip(arrays(a), arrays(b), strict=True))
    return a.offset == b.offset and all(x.dtype == y.dtype and mx.array_equal(x, y) for x, y in pairs)


class TestMakeRoom:
    @pytest.mark.parametrize("make", [KVCache, lambda: QuantizedKVCache(64, 4), lambda: QuantizedKVCache(32, 8)])
    @given(steps=st.lists(st.tuples(st.integers(1, 600), st.integers(0, 300)), min_size=1, max_size=5))
    @settings(max_examples=25, deadline=None)
    def test_gives_the_buffers_that_an_update_would_have_made(self, make: Any, steps: list[tuple[int, int]]) -> None:
        """Steps: tokens that come, and then tokens that are taken back."""
        ours, stock = make(), make()
        for number, (tokens, back) in enumerate(steps):
            make_room([ours], tokens)
            update(ours, tokens, number)
            update(stock, tokens, number)
            assert same(ours, stock)
            ours.trim(back)
            stock.trim(back)

    def test_has_the_room_before_the_update(self) -> None:
        cache = KVCache()
        make_room([cache], 300)
        assert cache.empty()
        update(cache, 256)
        make_room([cache], 1)
        assert cache.keys.shape == cache.values.shape == (1, HEADS, 512, DIMS)
        keys = cache.keys
        make_room([cache], 256)
        assert cache.keys is keys  # enough already

    def test_never_holds_more_than_one_old_buffer_beside_the_new_ones(self) -> None:
        caches = [KVCache() for _ in range(3)]
        for c in caches:
            update(c, 4096)
            mx.eval(c.keys, c.values)
        gc.collect()
        mx.clear_cache()
        before, old = mx.get_active_memory(), caches[0].keys.nbytes
        assert largest_buffer(caches[0]) == old
        mx.reset_peak_memory()
        make_room(caches, 1)
        grown = mx.get_active_memory()
        assert grown - before == 6 * old // 16
        assert mx.get_peak_memory() <= grown + old + 4096

    def test_of_a_quantised_cache_keeps_numbers_scales_and_biases_of_one_kind(self) -> None:
        cache = KVCache()
        update(cache, 4096)
        quantised = cache.to_quantized(group_size=32, bits=4)
        del cache
        mx.eval(quantised.keys, quantised.values)
        gc.collect()
        mx.clear_cache()
        old = sum(a.nbytes for a in quantised.keys)
        assert largest_buffer(quantised) == old
        mx.reset_peak_memory()
        make_room([quantised], 1)
        grown = mx.get_active_memory()
        assert grown + old - 4096 <= mx.get_peak_memory() <= grown + old + 4096

    def test_that_was_interrupted_is_made_good_by_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ours, stock = KVCache(), KVCache()
        update(ours, 256)
        update(stock, 256)
        longer, calls = kv_growth._longer, 0

        def interrupted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            return longer(*args)

        monkeypatch.setattr(kv_growth, "_longer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_room([ours], 1)
        make_room([ours], 1)
        update(ours, 1, 5)
        update(stock, 1, 5)
        assert same(ours, stock)

    def test_reaches_the_parts_of_a_list_and_leaves_other_kinds_alone(self) -> None:
        inner, rotating, joined = KVCache(), RotatingKVCache(max_size=300), ConcatenateKVCache()
        for c in (inner, rotating, joined):
            update(c, 256)
        before = rotating.keys, joined.keys
        make_room([CacheList(inner, rotating), joined], 1)
        assert inner.keys.shape[2] == 512
        assert (rotating.keys, joined.keys) == before
        assert largest_buffer(rotating) == 0


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2", "glm_moe_dsa"])
@pytest.mark.parametrize("lengths", [[255, 1, 1, 1], [300, 200, 12, 1, 1], [40, 600]])
def test_the_model_computes_the_same(model_type: str, lengths: Sequence[int]) -> None:
    model = build_model(tiny_config(model_type, num_hidden_layers=2))
    tokens = random_tokens(1, sum(lengths))[0]

    def logits() -> list[mx.array]:
        found, done, cache = [], 0, model.make_cache() if hasattr(model, "make_cache") else None
        cache = cache or [KVCache() for _ in model.layers]
        for n in lengths:
            found.append(model(mx.array([tokens[done : done + n]]), cache=cache))
            mx.eval(found[-1])
            done += n
        return found

    expected = logits()
    install_growth(model)
    assert all(mx.array_equal(a, b) for a, b in zip(logits(), expected, strict=True))


def test_a_model_without_caches_is_called_as_before() -> None:
    model = build_model(tiny_config("qwen2_moe", num_hidden_layers=2))
    tokens = mx.array([[1, 2, 3]])
    expected = model(tokens)
    install_growth(model)
    assert mx.array_equal(model(tokens), expected)
    assert mx.array_equal(model(tokens, None), expected)
