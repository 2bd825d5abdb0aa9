"""Our generation step against mlx-lm's: the same tokens, but each is handed out before the next is computed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.generate import generate_step as mlx_lm_step
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tiny_models import EOS, MODEL_TYPES, Shelf, random_tokens, same_bits

from mlx_moecache import generate, stream_generate
from mlx_moecache.checkpoints.reader import ExpertReader
from mlx_moecache.errors import ReadError, UsageError
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.generation import Response, StepOptions, generate_step
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.routing import CachePrior

PROMPT = random_tokens(1, 43, seed=21)[0]
TEXT = "Once upon a time there was a fox."
Steps = list[tuple[int, mx.array]]


def load(shelf: Shelf, model_type: str = "qwen2_moe", slots: int = 5, routing: Any = "original") -> nn.Module:
    options = MemoryOptions(slots=slots, max_context=256)
    return OpenedModel(shelf.checkpoint(model_type)).load(options, CacheOptions(routing=routing))


def stock_of(shelf: Shelf, model_type: str = "qwen2_moe") -> nn.Module:
    return shelf.stock(shelf.checkpoint(model_type))


def same_steps(ours: Steps, theirs: Steps) -> bool:
    return [t for t, _ in ours] == [t for t, _ in theirs] and all(
        same_bits(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)
    )


@pytest.fixture
def tokenizer(shelf: Shelf) -> TokenizerWrapper:
    """A fresh one: tests add end tokens."""
    return load_tokenizer(shelf.checkpoint("qwen2_moe"), eos_token_ids=[EOS])


def streamed(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """The text of tokens that arrive one by one (random bytes are not always the same text when decoded at once)."""
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text)


class CountedForwards:
    """Counts the forward passes of one model by their number of tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.lengths: list[int] = []
        cls, counted = type(model), self

        def call(module: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
            counted.lengths.append(inputs.shape[1])
            return cls.__call__(module, inputs, *args, **kwargs)

        model.__class__ = type(cls.__name__, (cls,), {"__call__": call})


class TestTokensAreThoseOfMlxLm:
    @pytest.mark.parametrize("slots", ["few", "all"])
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_greedy(self, shelf: Shelf, model_type: str, slots: str) -> None:
        model = load(shelf, model_type, 5 if slots == "few" else 16)
        assert model.expert_cache.has_host_reads == (slots == "few")
        ours = list(generate_step(PROMPT, model, StepOptions(max_tokens=12, prefill_step_size=16)))
        theirs = list(mlx_lm_step(PROMPT, stock_of(shelf, model_type), max_tokens=12, prefill_step_size=16))
        assert same_steps(ours, theirs) and len(ours) == 12

    @pytest.mark.parametrize(
        "options",
        [
            {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
            {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 50},  # begins while tokens are generated
            {"max_kv_size": 16},
            {"prefill_step_size": 1},
            {"prefill_step_size": 42},
        ],
    )
    @pytest.mark.parametrize("slots", [4, 16])
    def test_with_the_options_of_the_kv_cache(self, shelf: Shelf, options: dict[str, Any], slots: int) -> None:
        options = {"prefill_step_size": 16, "max_tokens": 12, **options}
        ours = list(generate_step(PROMPT, load(shelf, slots=slots), StepOptions(**options)))
        assert same_steps(ours, list(mlx_lm_step(PROMPT, stock_of(shelf), **options)))

    @pytest.mark.parametrize(
        "penalties", [{"repetition_penalty": 1.8, "repetition_context_size": 60}, {"logit_bias": {7: 100.0}}]
    )
    def test_with_logits_processors(self, shelf: Shelf, penalties: dict[str, Any]) -> None:
        seen: list[list[list[int]]] = [[], []]

        def run(n: int, step: Callable[[Sequence[Any]], Any]) -> Steps:
            def remember(tokens: mx.array, logits: mx.array) -> mx.array:
                seen[n].append(tokens.tolist())
                return logits

            return list(step([*make_logits_processors(**penalties), remember]))

        model, stock = load(shelf), stock_of(shelf)
        ours = run(
            0,
            lambda p: generate_step(
                PROMPT, model, StepOptions(max_tokens=10, prefill_step_size=16, logits_processors=p)
            ),
        )
        theirs = run(1, lambda p: mlx_lm_step(PROMPT, stock, max_tokens=10, prefill_step_size=16, logits_processors=p))
        assert same_steps(ours, theirs)
        assert seen[0] == seen[1][:10]  # mlx-lm's look-ahead may ask once more
        assert seen[0][0] == PROMPT.tolist()

    @pytest.mark.parametrize("slots", [4, 16])
    @pytest.mark.parametrize("seed", [0, 7])
    def test_sampled_with_the_same_seed(self, shelf: Shelf, tokenizer: TokenizerWrapper, slots: int, seed: int) -> None:
        model, stock, prompt = load(shelf, slots=slots), stock_of(shelf), PROMPT.tolist()
        mx.random.seed(seed)
        ours = list(stream_generate(model, tokenizer, prompt, max_tokens=16, sampler=make_sampler(0.9, top_p=0.95)))
        mx.random.seed(seed)
        theirs = list(
            mlx_lm.stream_generate(stock, tokenizer, prompt, max_tokens=16, sampler=make_sampler(0.9, top_p=0.95))
        )
        assert [(r.token, r.text, r.finish_reason) for r in ours] == [
            (r.token, r.text, r.finish_reason) for r in theirs
        ]
        assert len({r.token for r in ours}) > 5

    def test_text(self, shelf: Shelf, tokenizer: TokenizerWrapper) -> None:
        text = generate(load(shelf), tokenizer, TEXT, max_tokens=20)
        assert text == mlx_lm.generate(stock_of(shelf), tokenizer, TEXT, max_tokens=20) != ""


class TestOrderOfForwards:
    @pytest.mark.parametrize("slots", [4, 16])
    def test_the_first_token_comes_before_a_second_decode_step_is_computed(self, shelf: Shelf, slots: int) -> None:
        model = load(shelf, slots=slots)
        counted = CountedForwards(model)
        steps = generate_step(PROMPT, model, StepOptions(max_tokens=4, prefill_step_size=16))
        next(steps)
        assert counted.lengths == [16, 16, 10, 1]  # the prompt, and nothing else

    def test_no_forward_is_wasted_while_layers_read_the_host(self, shelf: Shelf) -> None:
        model = load(shelf, slots=4)
        counted = CountedForwards(model)
        list(generate_step(PROMPT[:3], model, StepOptions(max_tokens=5)))
        assert counted.lengths == [2, 1, 1, 1, 1, 1]
        assert model.expert_cache.stats.decode.selections == 4 * 3 * 4  # tokens x layers x k

    def test_with_all_experts_resident_it_looks_ahead_but_not_beyond_the_last_token(self, shelf: Shelf) -> None:
        model = load(shelf, slots=16)
        counted = CountedForwards(model)
        steps = generate_step(PROMPT[:3], model, StepOptions(max_tokens=5))
        at_each_token = [len(counted.lengths) for _ in steps]
        assert at_each_token == [2, 4, 5, 6, 6]
        assert len(counted.lengths) == 6

    def test_progress_is_told_for_each_chunk(self, shelf: Shelf) -> None:
        told: list[tuple[int, int]] = []
        options = StepOptions(max_tokens=1, prefill_step_size=16, prompt_progress=lambda n, of: told.append((n, of)))
        list(generate_step(PROMPT, load(shelf), options))
        assert told == [(0, 43), (16, 43), (32, 43), (42, 43), (43, 43)]


class TestTheEndOfAReply:
    @pytest.mark.parametrize("slots", [4, 16])
    @pytest.mark.parametrize("max_tokens", [0, 1, 2, 7])
    def test_max_tokens(self, shelf: Shelf, slots: int, max_tokens: int) -> None:
        model = load(shelf, slots=slots)
        kv = make_prompt_cache(model)
        steps = generate_step(PROMPT, model, StepOptions(max_tokens=max_tokens, prompt_cache=kv))
        tokens = [t for t, _ in steps]
        assert tokens == [t for t, _ in mlx_lm_step(PROMPT, stock_of(shelf), max_tokens=max_tokens)]
        assert kv[0].offset == PROMPT.size + max(0, max_tokens - 1)

    def test_minus_one_is_no_limit(self, shelf: Shelf) -> None:
        steps = generate_step(PROMPT[:2], load(shelf, slots=16), StepOptions(max_tokens=-1))
        assert len([next(steps) for _ in range(260)]) == 260  # the default would end at 256

    def test_stopping_early_leaves_the_prompt_and_all_tokens_but_the_last_in_the_kv_cache(self, shelf: Shelf) -> None:
        for slots, ahead in ((4, 0), (16, 1)):
            model = load(shelf, slots=slots)
            kv = make_prompt_cache(model)
            steps = generate_step(PROMPT, model, StepOptions(max_tokens=20, prompt_cache=kv))
            for _ in range(6):
                next(steps)
            steps.close()
            assert kv[0].offset == PROMPT.size + 5 + ahead

    def test_a_kv_cache_goes_on_as_mlx_lm_would(self, shelf: Shelf) -> None:
        model, stock = load(shelf, slots=4), stock_of(shelf)
        ours, theirs = make_prompt_cache(model), make_prompt_cache(stock)
        more = random_tokens(1, 9, seed=22)[0]
        for prompt in (PROMPT, more):
            reply = list(generate_step(prompt, model, StepOptions(max_tokens=1, prompt_cache=ours)))
            logits = stock(prompt[None, :-1], cache=theirs)
            logits = stock(prompt[None, -1:], cache=theirs)[:, -1, :]
            assert same_bits(reply[0][1], (logits - mx.logsumexp(logits, keepdims=True)).squeeze(0))

    def test_kinds_of_kv_cache(self, shelf: Shelf) -> None:
        model = load(shelf)
        kv = make_prompt_cache(model)
        options = StepOptions(max_tokens=2, prompt_cache=kv, kv_bits=8, kv_group_size=32, quantized_kv_start=0)
        list(generate_step(PROMPT, model, options))
        assert all(isinstance(c, QuantizedKVCache) for c in kv)
        kv = make_prompt_cache(model, max_kv_size=16)
        list(generate_step(PROMPT, model, StepOptions(max_tokens=9, prompt_cache=kv)))
        assert all(isinstance(c, RotatingKVCache) and c.size() <= 16 for c in kv)

    def test_an_end_token_stops_and_is_not_part_of_the_text(self, shelf: Shelf, tokenizer: TokenizerWrapper) -> None:
        prompt, model = PROMPT.tolist(), load(shelf)
        tokens = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=30)]
        stop = next(i for i, t in enumerate(tokens) if i > 2 and t < EOS and t not in tokens[:i])
        tokenizer.add_eos_token(str(tokens[stop]))
        assert tokens[stop] in tokenizer.eos_token_ids
        replies = [
            list(stream(m, tokenizer, prompt, max_tokens=30))
            for stream, m in ((stream_generate, model), (mlx_lm.stream_generate, stock_of(shelf)))
        ]
        ours, theirs = ([(r.token, r.text, r.finish_reason) for r in reply] for reply in replies)
        assert ours == theirs
        assert [r.token for r in replies[0]] == tokens[: stop + 1]
        assert replies[0][-1].finish_reason == "stop"
        assert "".join(r.text for r in replies[0]) == streamed(tokenizer, tokens[:stop])


class TestResponses:
    def test_the_last_one_says_why_and_all_of_them_count(self, shelf: Shelf, tokenizer: TokenizerWrapper) -> None:
        model = load(shelf, routing=CachePrior(1.0, 2))
        list(stream_generate(model, tokenizer, TEXT, max_tokens=3))  # counters are those of one reply
        replies = list(stream_generate(model, tokenizer, TEXT, max_tokens=6))
        assert all(isinstance(r, Response) for r in replies)
        assert [r.generation_tokens for r in replies] == list(range(1, 7))
        assert [r.finish_reason for r in replies] == [None] * 5 + ["length"]
        assert {r.prompt_tokens for r in replies} == {len(TEXT)}
        assert [r.stats.decode.selections for r in replies] == [12 * n for n in range(6)]
        assert {r.stats.prefill.selections for r in replies} == {12 * len(TEXT)}
        assert replies[-1].stats.decode.swapped > 0 == replies[-1].stats.prefill.swapped
        assert replies[0].prompt_tps > 0 == replies[0].generation_tps and replies[-1].generation_tps > 0
        assert "".join(r.text for r in replies) == streamed(tokenizer, [r.token for r in replies])

    def test_prompts_may_be_text_token_lists_or_arrays(self, shelf: Shelf, tokenizer: TokenizerWrapper) -> None:
        model, ids = load(shelf), tokenizer.encode(TEXT)
        replies = [
            [r.token for r in stream_generate(model, tokenizer, p, max_tokens=3)] for p in (TEXT, ids, mx.array(ids))
        ]
        assert replies[0] == replies[1] == replies[2]

    @pytest.mark.parametrize("prompt", ["", [], mx.array([], dtype=mx.uint32)])
    def test_an_empty_prompt_is_refused(self, shelf: Shelf, tokenizer: TokenizerWrapper, prompt: Any) -> None:
        with pytest.raises(UsageError, match="prompt is empty"):
            next(stream_generate(load(shelf), tokenizer, prompt))

    @pytest.mark.parametrize("max_tokens", [0, -2])
    def test_a_reply_without_tokens_is_refused(
        self, shelf: Shelf, tokenizer: TokenizerWrapper, max_tokens: int
    ) -> None:
        with pytest.raises(UsageError, match="at least 1, or -1 for no limit"):
            next(stream_generate(load(shelf), tokenizer, TEXT, max_tokens=max_tokens))

    def test_a_model_of_mlx_lm_is_refused(self, shelf: Shelf, tokenizer: TokenizerWrapper) -> None:
        with pytest.raises(UsageError, match=r"load it with mlx_moecache\.load"):
            next(stream_generate(stock_of(shelf), tokenizer, TEXT))


class TestFailure:
    @pytest.mark.parametrize("after", [0, 3])
    def test_a_failed_read_ends_the_reply_and_the_next_one_is_right(
        self, shelf: Shelf, tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch, after: int
    ) -> None:
        def fail(self: ExpertReader, requests: object, **how: bool) -> None:
            raise ReadError("made up")

        model = load(shelf, slots=4)
        replies = stream_generate(model, tokenizer, TEXT, max_tokens=30)
        with monkeypatch.context() as patch, pytest.raises(ReadError, match="made up"):
            for _ in range(after):
                next(replies)
            patch.setattr(ExpertReader, "start", fail)
            for _ in replies:
                pass
        cache = model.expert_cache
        assert isinstance(cache, ExpertCache) and cache.phase_of(1) == "decode"  # the stated phase has ended
        assert generate(model, tokenizer, TEXT, max_tokens=8) == mlx_lm.generate(
            stock_of(shelf), tokenizer, TEXT, max_tokens=8
        )

    def test_a_shard_that_changes_is_noticed_by_the_next_reply(
        self, shelf: Shelf, tokenizer: TokenizerWrapper, tmp_path: Path
    ) -> None:
        path = Path(shutil.copytree(shelf.checkpoint("qwen2_moe"), tmp_path / "copy"))
        model = OpenedModel(path).load(MemoryOptions(slots=4, max_context=256), CacheOptions(routing="original"))
        assert generate(model, tokenizer, TEXT, max_tokens=3)
        shard = path / "model-00002-of-00002.safetensors"
        content, before = shard.read_bytes(), shard.stat().st_mtime_ns
        shard.write_bytes(content[:-100] + bytes(100))
        assert shard.stat().st_mtime_ns > before
        with pytest.raises(ReadError, match=f"{shard} was changed since the model was loaded"):
            generate(model, tokenizer, TEXT, max_tokens=3)

    def test_a_shard_of_which_nothing_is_read_any_more_may_change(
        self, shelf: Shelf, tokenizer: TokenizerWrapper, tmp_path: Path
    ) -> None:
        path = Path(shutil.copytree(shelf.checkpoint("qwen2_moe"), tmp_path / "copy"))
        model = OpenedModel(path).load(MemoryOptions(slots=16, max_context=256), CacheOptions(routing="original"))
        os.utime(path / "model-00002-of-00002.safetensors")
        assert generate(model, tokenizer, TEXT, max_tokens=3)

    def test_resizing_between_tokens_changes_no_token(self, shelf: Shelf, tokenizer: TokenizerWrapper) -> None:
        model, sizes = load(shelf, slots=4), [4, 16, 9, 16, 16, 5, 4, 16, 7]
        ours = []
        for r, slots in zip(stream_generate(model, tokenizer, TEXT, max_tokens=9), sizes, strict=True):
            ours.append(r.token)
            model.expert_cache.resize(slots=slots)
        assert ours == [r.token for r in mlx_lm.stream_generate(stock_of(shelf), tokenizer, TEXT, max_tokens=9)]
