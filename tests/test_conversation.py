"""Conversations: what a KV cache holds between replies, also after those that ended early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import pytest
from faulty_reads import after_each_read
from mlx_lm.models.cache import QuantizedKVCache
from tiny_models import Shelf, random_tokens

from mlx_moecache.conversation import ContextFullError, Conversation
from mlx_moecache.errors import ReadError, UsageError
from mlx_moecache.footprint import KVOptions
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

PROMPT: list[int] = [int(t) for t in random_tokens(1, 40, seed=5)[0]]
MORE: list[int] = [int(t) for t in random_tokens(1, 9, seed=6)[0]]
PLAIN, WINDOWS, STATES = "qwen2_moe", "gpt_oss", "qwen3_next"  # caches that can be trimmed, and that cannot


def make(
    shelf: Shelf,
    model_type: str = PLAIN,
    *,
    slots: int = 5,
    routing: Any = "original",
    max_context: int = 400,
    **how: Any,
) -> Conversation:
    """A conversation with a tiny model that never ends a reply by itself."""
    opened = OpenedModel(shelf.checkpoint(model_type))
    model = opened.load(MemoryOptions(slots=slots, max_context=max_context), CacheOptions(routing=routing))
    tokenizer = opened.tokenizer()
    tokenizer.eos_token_ids = []
    return Conversation(model, tokenizer, max_context=max_context, **how)


def answer(c: Conversation, prompt: Sequence[int], n: int = 6, **how: Any) -> list[int]:
    return [r.token for r in c.stream(prompt, max_tokens=n, **how)]


def fresh(c: Conversation, prompt: Sequence[int], n: int = 6) -> list[int]:
    """What a conversation that remembers nothing would answer."""
    return answer(Conversation(c.model, c.tokenizer, max_context=c.max_context), prompt, n)


def offsets(c: Conversation) -> set[int]:
    return {int(x.offset) for x in c.kv_cache if hasattr(x, "offset")}


@pytest.mark.parametrize("model_type", [PLAIN, WINDOWS, STATES])
@pytest.mark.parametrize("slots", [5, 64], ids=["partly resident", "all resident"])
def test_the_next_turn_computes_only_what_is_new_and_says_the_same(shelf: Shelf, model_type: str, slots: int) -> None:
    c = make(shelf, model_type, slots=slots)
    first = answer(c, PROMPT)
    assert c.tokens == (PROMPT + first)[: len(c.tokens)] and len(c.tokens) >= len(PROMPT) + 5
    assert offsets(c) == {len(c.tokens)}
    turn = [*PROMPT, *first, *MORE]
    held = len(c.tokens)
    second = answer(c, turn)
    assert c.reused == held
    assert second == fresh(c, turn)


def test_a_changed_past_is_trimmed_to_what_is_common(shelf: Shelf) -> None:
    c = make(shelf)
    answer(c, PROMPT)
    other = PROMPT[:25] + MORE
    assert answer(c, other) == fresh(c, other) and c.reused == 25


@pytest.mark.parametrize("model_type", [WINDOWS, STATES])
def test_what_cannot_be_trimmed_starts_again(shelf: Shelf, model_type: str) -> None:
    c = make(shelf, model_type)
    answer(c, PROMPT)
    answer(c, [*PROMPT, *MORE])  # longer than the window, and not what was answered
    other = PROMPT[:25] + MORE
    assert answer(c, other) == fresh(c, other) and c.reused == 0


def test_the_same_prompt_again_computes_its_last_token_only(shelf: Shelf) -> None:
    c = make(shelf)
    assert answer(c, PROMPT) == answer(c, PROMPT)
    assert c.reused == len(PROMPT) - 1


@pytest.mark.parametrize("model_type", [PLAIN, WINDOWS, STATES])
@pytest.mark.parametrize("slots", [5, 64], ids=["partly resident", "all resident"])
@pytest.mark.parametrize("taken", [1, 2, 5])
def test_tokens_are_true_after_a_reply_that_was_closed(shelf: Shelf, model_type: str, slots: int, taken: int) -> None:
    c = make(shelf, model_type, slots=slots)
    responses = c.stream(PROMPT, max_tokens=50)
    got = [next(responses).token for _ in range(taken)]
    responses.close()  # type: ignore[attr-defined]
    assert offsets(c) == {len(c.tokens)} and c.tokens == (PROMPT + got)[: len(c.tokens)]
    turn = PROMPT + got + MORE
    assert answer(c, turn) == fresh(c, turn)
    assert c.reused >= len(PROMPT) + taken - 1


def test_tokens_are_true_after_an_interrupt_in_the_prompt(shelf: Shelf) -> None:
    c = make(shelf, prefill_step_size=16)

    def stop(done: int, total: int) -> None:
        if done == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(c, PROMPT, prompt_progress=stop)
    assert c.tokens == PROMPT[:32] and offsets(c) == {32}
    assert answer(c, PROMPT) == fresh(c, PROMPT)


@pytest.mark.parametrize("model_type", [PLAIN, WINDOWS, STATES])
@pytest.mark.parametrize("batch", [1, 2, 9, 14])
def test_a_failed_read_leaves_a_conversation_that_goes_on(
    shelf: Shelf, model_type: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = make(shelf, model_type)

    def fail(n: int, requests: object) -> None:
        if n == batch:
            raise ReadError("the disk is gone")

    got: list[int] = []
    with monkeypatch.context() as patch, pytest.raises(ReadError, match="the disk is gone"):
        after_each_read(patch, fail)
        for r in c.stream(PROMPT, max_tokens=50):
            got.append(r.token)
    assert c.tokens == (PROMPT + got)[: len(c.tokens)] and offsets(c) == {len(c.tokens)}
    turn = PROMPT + got + MORE
    assert answer(c, turn) == fresh(c, turn)


def test_the_reply_is_cut_to_what_fits_and_a_full_context_says_its_numbers(shelf: Shelf) -> None:
    c = make(shelf, max_context=len(PROMPT) + 3)
    responses = list(c.stream(PROMPT, max_tokens=50))
    assert len(responses) == 3 and responses[-1].finish_reason == "length"
    assert len(answer(c, PROMPT, -1)) == 3  # -1: what fits
    held = list(c.tokens)
    with pytest.raises(ContextFullError, match=r"49 tokens, and 43 were reserved.*larger --max-context") as e:
        c.stream([*PROMPT, *MORE], max_tokens=50)
    assert (e.value.tokens, e.value.max_context) == (49, 43)
    assert c.tokens == held


def test_an_empty_prompt_is_refused(shelf: Shelf) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        make(shelf).stream([], max_tokens=1)


def test_clear_forgets_everything(shelf: Shelf) -> None:
    c = make(shelf)
    first = answer(c, PROMPT)
    c.clear()
    assert c.tokens == [] and c.is_exact and offsets(c) == {0}
    assert answer(c, PROMPT) == first and c.reused == 0


def test_exact_until_a_selection_is_swapped_and_again_when_that_token_is_gone(shelf: Shelf) -> None:
    c = make(shelf, routing="cache-prior:strength=3,j=0")
    swapped = []
    for r in c.stream(PROMPT, max_tokens=30):
        swapped.append(r.stats.swapped)
    assert swapped[0] == 0 and swapped[-1] > 0, "the prompt is exact, and such a strength swaps"
    assert not c.is_exact
    first = next(i for i, n in enumerate(swapped) if n)  # response i comes from the token before it
    reply = c.tokens[len(PROMPT) :]
    exact = [*PROMPT, *reply[: first - 1]]
    answer(c, [*exact, reply[first - 1], 1], 1)  # keeps the token that made the swap
    assert not c.is_exact
    answer(c, [*exact, (reply[first - 1] + 1) % 256], 1)
    assert c.is_exact and c.reused == len(exact)


def test_pruned_experts_are_not_exact(shelf: Shelf) -> None:
    c = make(shelf, routing="pruning:k=1")
    answer(c, PROMPT, 1)
    assert c.is_exact, "only the prompt was computed, which is never pruned"
    answer(c, PROMPT, 2)
    assert not c.is_exact


@pytest.mark.parametrize("model_type", [PLAIN, WINDOWS, STATES])
def test_a_snapshot_can_be_returned_to_more_than_once(shelf: Shelf, model_type: str) -> None:
    c = make(shelf, model_type, routing="cache-prior:strength=3,j=0", slots=64)
    first = answer(c, PROMPT)
    s = c.snapshot()
    held = list(c.tokens)
    turn = PROMPT + first + MORE
    second = answer(c, turn)
    for _ in range(2):
        c.restore(s)
        assert c.tokens == held and offsets(c) == {len(held)}
        assert answer(c, turn) == second and c.reused == len(held)


def test_a_snapshot_remembers_exactness(shelf: Shelf) -> None:
    c = make(shelf, routing="cache-prior:strength=3,j=0")
    answer(c, PROMPT, 1)
    s = c.snapshot()
    answer(c, PROMPT, 30)
    assert not c.is_exact
    biased = c.snapshot()
    c.restore(s)
    assert c.is_exact
    c.restore(biased)
    assert not c.is_exact


def test_logits_processors_see_the_whole_conversation(shelf: Shelf) -> None:
    c = make(shelf)
    seen: list[list[int]] = []

    def watch(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append([int(t) for t in tokens.tolist()])
        return logits

    first = answer(c, PROMPT, 3, logits_processors=[watch])
    turn = PROMPT + first + MORE
    answer(c, turn, 2, logits_processors=[watch])
    assert c.reused > 0 and seen[0] == PROMPT and seen[3] == turn


def test_rotating_and_quantised_caches(shelf: Shelf) -> None:
    for kv in (KVOptions(max_size=24), KVOptions(bits=8, group_size=32, quantized_start=0)):
        c = make(shelf, kv=kv)
        turn = PROMPT + answer(c, PROMPT) + MORE
        held = len(c.tokens)
        answer(c, turn)
        assert c.reused == held
        answer(c, PROMPT[:20] + MORE)
        assert c.reused == (0 if kv.max_size else 20)  # what has rotated is gone


def test_a_short_conversation_is_not_answered_from_what_a_long_one_has_quantised(shelf: Shelf) -> None:
    kv = KVOptions(bits=2, group_size=32, quantized_start=60)
    c = make(shelf, kv=kv)
    first = answer(c, PROMPT)
    answer(c, [*PROMPT, *MORE, *PROMPT])
    assert any(isinstance(x, QuantizedKVCache) for x in c.kv_cache)
    assert answer(c, PROMPT) == first == fresh(c, PROMPT) and c.reused == 0
    assert not any(isinstance(x, QuantizedKVCache) for x in c.kv_cache)
    # A long one that goes on keeps what it has.
    long = [*PROMPT, *MORE, *PROMPT]
    answer(c, long)
    answer(c, [*long[:70], *MORE])
    assert c.reused == 70


def test_a_reply_that_nobody_began_changes_nothing(shelf: Shelf) -> None:
    c = make(shelf)
    answer(c, PROMPT)
    held = list(c.tokens)
    responses: Iterator[Any] = c.stream(MORE, max_tokens=5)
    responses.close()  # type: ignore[attr-defined]
    assert c.tokens == held
