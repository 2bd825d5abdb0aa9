"""Long prompts and replies under a fixed budget, with the smaller KV caches that mlx-lm offers.

In each case the budget is too small for the same context with a plain KV cache, so that it is the smaller cache that
makes it work. The full length takes minutes: `python -m pytest -m matrix tests/test_long_context.py`.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache
from tiny_models import random_tokens, tiny_config, write_checkpoint

from mlx_moecache.errors import BudgetError
from mlx_moecache.footprint import KVOptions
from mlx_moecache.generation import stream_generate
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

VOCABULARY = 1000


@dataclass(frozen=True)
class Length:
    prompt: int  # tokens
    reply: int  # tokens
    memory: int  # bytes


SHORT = Length(1200, 60, 9_200_000)
LONG = Length(16_000, 1000, 24_000_000)
LENGTHS = [pytest.param(SHORT, id="short"), pytest.param(LONG, id="16,000 + 1,000", marks=pytest.mark.matrix)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 MB of experts, 2 MB of everything else, and positions for 32,768 tokens."""
    config = tiny_config(
        "qwen2_moe",
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=24,
        moe_intermediate_size=112,
        shared_expert_intermediate_size=128,
        max_position_embeddings=32_768,
    )
    return write_checkpoint(tmp_path_factory.mktemp("long") / "model", config, tokenizer=True)


def options(length: Length, kv: KVOptions) -> MemoryOptions:
    return MemoryOptions(
        memory=length.memory, max_context=length.prompt + length.reply, max_prompt=length.prompt, kv=kv
    )


def generate(path: Path, length: Length, kv: KVOptions) -> tuple[int, int, list[Any]]:
    """Answer a random prompt; returns the peak in bytes, the tokens made and the KV cache."""
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()  # models of other tests
    mx.reset_peak_memory()
    opened = OpenedModel(path)
    tokenizer = opened.tokenizer()
    model = opened.load(options(length, kv), CacheOptions())
    experts, cache = model.expert_cache, make_prompt_cache(model, max_kv_size=kv.max_size)
    assert experts.has_host_reads  # experts come and go

    def no_end(tokens: mx.array, logits: mx.array) -> mx.array:
        logits[:, list(tokenizer.eos_token_ids)] = -1e9
        return logits

    responses = stream_generate(
        model,
        tokenizer,
        random_tokens(1, length.prompt, vocabulary=VOCABULARY)[0],
        max_tokens=length.reply,
        logits_processors=[no_end],
        prompt_cache=cache,
        kv_bits=kv.bits,
        kv_group_size=kv.group_size,
        quantized_kv_start=kv.quantized_start,
    )
    made = sum(1 for _ in responses)
    peak = mx.get_peak_memory() - others + experts.reader.host_buffer_bytes
    experts.close()
    return peak, made, cache


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "kv",
    [
        KVOptions(bits=8, group_size=32, quantized_start=0),
        KVOptions(bits=4, group_size=32, quantized_start=500),
        KVOptions(max_size=512),
    ],
    ids=["8 bits", "4 bits from token 500", "rotating"],
)
def test_the_peak_stays_within_the_budget(model: Path, length: Length, kv: KVOptions) -> None:
    if kv.max_size and length is LONG:
        length = replace(length, memory=9_000_000)  # a rotating cache is so small that all experts would fit
    peak, made, cache = generate(model, length, kv)
    assert peak <= length.memory
    assert made == length.reply
    assert all(isinstance(c, QuantizedKVCache if kv.bits else RotatingKVCache) for c in cache)
    # The last token of a reply is not fed back.
    assert {c.offset for c in cache} == {length.prompt + length.reply - 1}


def test_a_plain_cache_of_so_many_tokens_would_not_fit(model: Path) -> None:
    with pytest.raises(BudgetError, match="the smallest that works is"):
        OpenedModel(model).plan(options(LONG, KVOptions()))
