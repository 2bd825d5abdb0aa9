"""With original routing the logits are those of stock mlx-lm, bit for bit, whatever is in memory."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tiny_models import (
    IN_PLACE_RAW,
    MODEL_TYPES,
    Layout,
    Shelf,
    experts_per_token,
    num_experts,
    random_tokens,
    run_model,
    same_bits,
    tiny_config,
)

from mlx_moecache.errors import UnsupportedModelError
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.routing import CachePrior, Strategy

# Chunks of 32 tokens have at least 64 indices, which the switch sorts, and the last one of 11 has fewer; then decode.
LENGTHS = [32, 32, 11] + [1] * 16
TOKENS = random_tokens(1, sum(LENGTHS))
TEXT = random_tokens(1, 80, seed=1)
CASES: list[tuple[str, Layout]] = [(t, layout) for t in MODEL_TYPES for layout in ("float32", "4bit")]
CASES += [(t, "raw") for t in IN_PLACE_RAW]
CASES += [("gpt_oss", "mxfp4")]
SLOTS = ("minimum", "half", "all")


def slot_count(model_type: str, slots: str) -> int:
    config = tiny_config(model_type)
    return {"minimum": experts_per_token(config), "half": num_experts(config) // 2, "all": num_experts(config)}[slots]


def load(shelf: Shelf, model_type: str, layout: Layout, slots: str, routing: str | Strategy = "original") -> nn.Module:
    opened = OpenedModel(shelf.checkpoint(model_type, layout))
    return opened.load(MemoryOptions(slots=slot_count(model_type, slots)), CacheOptions(routing=routing))


def cache_of(model: nn.Module) -> ExpertCache:
    cache = model.expert_cache
    assert isinstance(cache, ExpertCache)
    return cache


@pytest.fixture(scope="module")
def stock_logits(shelf: Shelf) -> dict[tuple[str, Layout], mx.array]:
    return {case: run_model(shelf.stock(shelf.checkpoint(*case)), TOKENS, LENGTHS) for case in CASES}


@pytest.fixture(scope="module")
def stock_scores(shelf: Shelf) -> mx.array:
    """Logits of TEXT, token by token."""
    return run_model(shelf.stock(shelf.checkpoint("qwen2_moe")), TEXT, [1] * TEXT.shape[1])


@pytest.fixture(scope="module")
def tokenizer(shelf: Shelf) -> TokenizerWrapper:
    return load_tokenizer(shelf.checkpoint("qwen2_moe"))


class TestPrefillInChunksAndDecode:
    @pytest.mark.parametrize("slots", SLOTS)
    @pytest.mark.parametrize(("model_type", "layout"), CASES)
    def test_original_routing_gives_stock_logits(
        self,
        shelf: Shelf,
        stock_logits: dict[tuple[str, Layout], mx.array],
        model_type: str,
        layout: Layout,
        slots: str,
    ) -> None:
        model = load(shelf, model_type, layout, slots)
        assert same_bits(run_model(model, TOKENS, LENGTHS), stock_logits[model_type, layout])
        stats = cache_of(model).stats
        if slots == "all":
            assert stats.prefill.selections == stats.decode.selections == 0
        else:
            tokens = 16 * experts_per_token(tiny_config(model_type)) * len(cache_of(model).layers)
            assert stats.decode.selections == tokens
            assert stats.decode.misses > 0 and stats.prefill.loads > 0
        assert stats.swapped == 0

    @pytest.mark.parametrize(("model_type", "layout"), CASES)
    def test_cache_prior_of_strength_0_gives_stock_logits(
        self, shelf: Shelf, stock_logits: dict[tuple[str, Layout], mx.array], model_type: str, layout: Layout
    ) -> None:
        model = load(shelf, model_type, layout, "minimum", CachePrior(strength=0.0, top_j=1))
        assert same_bits(run_model(model, TOKENS, LENGTHS), stock_logits[model_type, layout])
        assert cache_of(model).stats.swapped == 0 < cache_of(model).stats.decode.misses

    @pytest.mark.parametrize("eviction", ["lru", "lfu"])
    def test_neither_eviction_nor_direct_reads_change_anything(
        self, shelf: Shelf, stock_logits: dict[tuple[str, Layout], mx.array], eviction: str
    ) -> None:
        opened = OpenedModel(shelf.checkpoint("qwen2_moe", "4bit"))
        options = CacheOptions(routing="original", eviction=eviction, direct_io=True)
        model = opened.load(MemoryOptions(slots=6), options)
        assert same_bits(run_model(model, TOKENS, LENGTHS), stock_logits["qwen2_moe", "4bit"])

    def test_raw_gpt_oss_is_refused_with_the_convert_command(self, shelf: Shelf) -> None:
        path = shelf.checkpoint("gpt_oss", "raw")
        logits = run_model(shelf.stock(path), TOKENS[:, :5], [5])
        assert np.isfinite(np.array(logits)).all()  # mlx-lm itself reads this checkpoint
        with pytest.raises(UnsupportedModelError) as error:
            OpenedModel(path)
        assert f"mlx_lm.convert --hf-path {path}" in str(error.value)
        assert "\n" not in str(error.value)


class TestUnderTheGenerationOfMlxLm:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_stream_generate_gives_the_tokens_of_stock(
        self, shelf: Shelf, tokenizer: TokenizerWrapper, model_type: str
    ) -> None:
        prompt = TOKENS[0, :40].tolist()
        ours = load(shelf, model_type, "4bit", "half")
        stock = shelf.stock(shelf.checkpoint(model_type, "4bit"))
        replies = [
            [
                (r.token, r.text, r.finish_reason)
                for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=12, prefill_step_size=16)
            ]
            for model in (ours, stock)
        ]
        assert replies[0] == replies[1] and len(replies[0]) > 1
        assert cache_of(ours).stats.decode.misses > 0

    def test_generate_gives_the_text_of_stock(self, shelf: Shelf, tokenizer: TokenizerWrapper) -> None:
        ours = load(shelf, "mixtral", "float32", "minimum")
        stock = shelf.stock(shelf.checkpoint("mixtral"))
        texts = [mlx_lm.generate(m, tokenizer, prompt="Once upon", max_tokens=24) for m in (ours, stock)]
        assert texts[0] == texts[1] != ""

    def test_batch_generate_gives_the_texts_of_stock(self, shelf: Shelf, tokenizer: TokenizerWrapper) -> None:
        prompts = [TOKENS[0, a:b].tolist() for a, b in ((0, 7), (7, 30), (30, 34))]
        ours, stock = load(shelf, "qwen3_moe", "4bit", "minimum"), shelf.stock(shelf.checkpoint("qwen3_moe", "4bit"))
        texts = [mlx_lm.batch_generate(m, tokenizer, prompts, max_tokens=6).texts for m in (ours, stock)]
        assert texts[0] == texts[1]


def score_lazily(model: nn.Module, tokens: mx.array, between: Callable[[], None] = lambda: None) -> mx.array:
    """Logits of a known text, token by token, none evaluated before all steps are built; `between` runs before each."""
    kv = make_prompt_cache(model)
    lazy = []
    for i in range(tokens.shape[1]):
        between()
        lazy.append(model(tokens[:, i : i + 1], cache=kv))
    return mx.concatenate(lazy, axis=1)


class TestLazyScoringOfAKnownText:
    """A raw write is seen by pending operations; nobody here evaluates logits, so only the fence protects them."""

    @pytest.mark.parametrize(
        ("slots", "routing"),
        [
            ([4, 4, 4], "original"),
            ([11, 11, 11], "original"),
            ([11, 11, 11], "cache-prior:strength=0"),
            ([15, 15, 15], "original"),
            ([4, 16, 16], "original"),  # later layers never look at the host
        ],
    )
    def test_slots_are_not_overwritten_under_pending_readers(
        self, shelf: Shelf, stock_scores: mx.array, slots: list[int], routing: str
    ) -> None:
        model = load(shelf, "qwen2_moe", "float32", "minimum", routing)
        cache_of(model).resize(slots=slots)
        assert same_bits(score_lazily(model, TEXT), stock_scores)

    def test_resize_and_reset_between_pending_steps(self, shelf: Shelf, stock_scores: mx.array) -> None:
        model = load(shelf, "qwen2_moe", "float32", "minimum")
        cache, rng = cache_of(model), np.random.default_rng(2)

        def change() -> None:
            if rng.random() < 0.3:
                cache.reset()
            elif rng.random() < 0.6:
                cache.resize(slots=[int(s) for s in rng.choice([4, 5, 9, 16], 3)])

        assert same_bits(score_lazily(model, TEXT, change), stock_scores)

    @pytest.mark.parametrize("model_type", ["phimoe", "deepseek_v2", "gpt_oss"])
    def test_other_routers_with_resizes(self, shelf: Shelf, model_type: str) -> None:
        text = TEXT[:, :40]
        expected = run_model(shelf.stock(shelf.checkpoint(model_type)), text, [1] * 40)
        model = load(shelf, model_type, "float32", "minimum")
        cache, E = cache_of(model), num_experts(tiny_config(model_type))
        sizes = iter([4, E, 5, E - 1, 4] * 8)
        assert same_bits(score_lazily(model, text, lambda: cache.resize(slots=next(sizes))), expected)


class TestSeveralRows:
    """Batches and drafts under verification share a residency mask that each row changes, so they stay exact."""

    @pytest.mark.parametrize("rows", [2, 3])
    @pytest.mark.parametrize("model_type", ["qwen2_moe", "phimoe", "olmoe", "gpt_oss"])
    def test_a_batch_is_exact_at_prefill_and_decode_even_with_a_strong_bias(
        self, shelf: Shelf, model_type: str, rows: int
    ) -> None:
        tokens, lengths = random_tokens(rows, 30, seed=rows), [22] + [1] * 8
        model = load(shelf, model_type, "float32", "minimum", CachePrior(strength=1.0, top_j=1))
        expected = run_model(shelf.stock(shelf.checkpoint(model_type)), tokens, lengths)
        assert same_bits(run_model(model, tokens, lengths), expected)
        assert cache_of(model).stats.swapped == 0

    def test_a_draft_of_several_tokens_is_exact_even_with_a_strong_bias(self, shelf: Shelf) -> None:
        lengths = [20, 3, 2, 4, 3]
        tokens = TOKENS[:, : sum(lengths)]
        model = load(shelf, "deepseek_v2", "float32", "minimum", CachePrior(strength=1.0))
        with cache_of(model).phase("decode"):
            logits = run_model(model, tokens, lengths)
        assert same_bits(logits, run_model(shelf.stock(shelf.checkpoint("deepseek_v2")), tokens, lengths))
        assert cache_of(model).stats.swapped == 0
