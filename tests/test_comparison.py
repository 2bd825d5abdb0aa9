"""/ab: both answers start alike, each is what its routing gives, and afterwards nothing has changed."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from chat_models import chat_checkpoint
from chat_sessions import open_session, say
from faulty_reads import after_each_read
from mlx.utils import tree_flatten
from tiny_models import Shelf

from mlx_moecache.console.chat_loop import Console
from mlx_moecache.console.chat_session import ChatSession
from mlx_moecache.console.columns import width_of
from mlx_moecache.console.comparison import Answer, Comparison, ab, compare, comparison_lines
from mlx_moecache.console.interrupt import Interrupt, Interrupted
from mlx_moecache.demo import demo_model
from mlx_moecache.errors import ReadError, UsageError
from mlx_moecache.stats import PhaseStats

STORY = "Once upon a time there was a fox."


@pytest.fixture
def session() -> Iterator[ChatSession]:
    """The demo model with a third of its experts in memory and a strong bias, after one reply."""
    opened = open_session(demo_model(), slots=20)
    say(opened, STORY)
    yield opened
    opened.model.expert_cache.close()


def fingerprint(session: ChatSession) -> dict[str, Any]:
    """Everything that /ab promises to leave alone, slots' bytes by expert included."""
    cache, conversation = session.model.expert_cache, session.conversation
    bytes_of: dict[tuple[int, int], str] = {}
    for number, layer in enumerate(cache.layers):
        for e in layer.residents.experts:
            slot = layer.residents.slot_of(e)
            views = [bytes(layer.pool.view(c, slot)) for c in range(len(layer.extents.nbytes))]
            bytes_of[number, e] = hashlib.sha256(b"".join(views)).hexdigest()
    kv = [np.array(a).tobytes() for _, a in tree_flatten([c.state for c in conversation.kv_cache]) if a is not None]
    return {
        "messages": [dict(m) for m in session.messages],
        "tokens": list(conversation.tokens),
        "exact": conversation.is_exact,
        "kv": [hashlib.sha256(x).hexdigest() for x in kv],
        "contents": [x.experts for x in cache.contents().layers],
        "ranges": [(float(x.range.total), x.range.tokens) for x in cache.layers],
        "bytes": bytes_of,
        "stats": cache.stats.copy(),
        "layer stats": [x.stats.copy() for x in cache.layers],
        "routing": cache.strategy,
        "slots": cache.slots_per_layer,
        "random": np.array(mx.random.state[0]).tolist(),
        "last": session.last_stats,
    }


def resident_set(session: ChatSession) -> list[list[int]]:
    return [sorted(x.residents.experts) for x in session.model.expert_cache.layers]


# ---- the two answers ----


def test_each_answer_is_what_its_routing_gives_from_there(session: ChatSession) -> None:
    session.model.expert_cache.look_ahead.enabled = False  # how much it reads in vain is a matter of time
    result = compare(session, Interrupt())
    cache, conversation = session.model.expert_cache, session.conversation
    kv, contents, biased = conversation.snapshot(), cache.contents(), cache.strategy
    del session.messages[-1]
    prompt = session.prompt_tokens()
    for answer, strategy in ((result.exact, "original"), (result.biased, biased)):
        conversation.restore(kv)
        cache.restore(contents)
        cache.set_strategy(strategy)
        *_, last = responses = list(conversation.stream(prompt, max_tokens=16))
        assert answer.tokens == tuple(r.token for r in responses)
        assert answer.text == "".join(r.text for r in responses)
        seen, expected = answer.decode, last.stats.decode
        assert (seen.hits, seen.misses, seen.swapped, seen.bytes_read) == (
            expected.hits,
            expected.misses,
            expected.swapped,
            expected.bytes_read,
        )
    assert result.exact.decode.swapped == 0 < result.biased.decode.swapped
    assert result.exact.decode.misses > result.biased.decode.misses
    assert result.exact.decode.hit_rate is not None and result.biased.bytes_per_token is not None


def test_the_exact_answer_is_that_of_a_model_that_was_never_biased(session: ChatSession) -> None:
    plain = open_session(demo_model(), slots=20, routing="original")
    result = compare(session, Interrupt())
    assert result.exact.text == say(plain, STORY)
    assert result.exact.routing == "exact", "the KV cache up to the answer holds no biased token"
    assert result.reused > 0 and result.read_again == 1


def test_a_bias_of_nothing_gives_the_same_answer_with_the_same_misses_also_when_sampling() -> None:
    session = open_session(demo_model(), slots=20, routing="cache-prior:strength=0", temp=0.9, max_tokens=30)
    say(session, STORY)
    result = compare(session, Interrupt())
    assert result.exact.tokens == result.biased.tokens and result.first_difference is None
    assert result.exact.decode.misses == result.biased.decode.misses > 0
    assert result.seed == 3
    assert result.exact.text == session.messages[-1]["content"], "the first reply began with the same seed"


def test_after_biased_turns_it_is_exact_only_from_here(session: ChatSession) -> None:
    say(session, "The fox")
    assert compare(session, Interrupt()).exact.routing == "exact from here"


def test_from_exact_routing_the_other_answer_has_the_bias_of_before(session: ChatSession) -> None:
    cache = session.model.expert_cache
    session.biased = cache.strategy
    cache.set_strategy("original")
    result = compare(session, Interrupt())
    assert result.biased.routing == "cache-prior:strength=0.6,j=2"
    assert cache.strategy.name == "original"


def test_an_exact_session_is_compared_with_the_usual_routing() -> None:
    session = open_session(demo_model(), slots=20, routing="original")
    say(session, STORY)
    assert compare(session, Interrupt()).biased.routing.startswith("cache-prior:strength=0.1")
    assert session.model.expert_cache.strategy.name == "original"


def test_a_message_without_an_answer_is_answered_too(session: ChatSession) -> None:
    session.messages.append({"role": "user", "content": "And then?"})
    before = fingerprint(session)
    assert compare(session, Interrupt()).read_again > 1
    assert fingerprint(session) == before


# ---- afterwards ----


@pytest.mark.parametrize("temp", [0.0, 0.9])
def test_afterwards_all_is_as_before_and_the_next_reply_is_what_it_would_have_been(temp: float) -> None:
    replies = []
    for with_ab in (False, True):
        session = open_session(demo_model(), slots=20, temp=temp)
        say(session, STORY)
        mx.eval(mx.random.uniform())  # or two answers of the same length would leave the same key by themselves
        before = fingerprint(session)
        if with_ab:
            compare(session, Interrupt())
            assert fingerprint(session) == before
        say(session, "The bear")
        assert session.last_stats is not None
        counted = session.last_stats.cache.stats
        counters = [(x.hits, x.misses, x.loads, x.evictions, x.swapped) for x in (counted.prefill, counted.decode)]
        replies.append((session.last_stats.reply.text, counters, resident_set(session)))
    assert replies[0] == replies[1]


@pytest.mark.parametrize("model_type", ["qwen3_next", "gpt_oss", "deepseek_v2", "jamba"])
def test_kv_caches_that_cannot_be_trimmed_come_back_too(shelf: Shelf, model_type: str) -> None:
    session = open_session(shelf.checkpoint(model_type), slots=4, routing="original", max_tokens=5)
    say(session, "hello")
    session.biased = None
    before = fingerprint(session)
    cache = session.model.expert_cache
    result = compare(session, Interrupt())
    assert result.exact.text == session.messages[-1]["content"]
    assert fingerprint(session) == before
    assert cache.strategy.name == "original"


@pytest.mark.parametrize("answer", ["exact", "cache-prior"])
def test_a_stop_in_the_middle_puts_everything_back(session: ChatSession, answer: str) -> None:
    before, interrupt = fingerprint(session), Interrupt()
    shown: list[str] = []

    def stop(text: str) -> None:
        shown.append(text)
        interrupt.requested = text.startswith(answer) and text.endswith(": 4 tokens")

    with pytest.raises(Interrupted):
        compare(session, interrupt, stop)
    assert shown[-1].endswith(": 4 tokens") and shown[-1].startswith(answer)
    assert fingerprint(session) == before


def test_a_stop_while_the_prompt_is_read_puts_everything_back(session: ChatSession) -> None:
    before, interrupt = fingerprint(session), Interrupt()
    interrupt.requested = True
    with pytest.raises(Interrupted):
        compare(session, interrupt)
    assert fingerprint(session) == before


def test_a_failed_read_in_the_second_answer_puts_everything_back(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(session)
    second = False
    failed = False

    def progress(text: str) -> None:
        nonlocal second
        second = second or text.startswith("cache-prior")

    def fail(n: int, requests: Sequence[object]) -> None:
        nonlocal failed
        if second and not failed:
            failed = True
            raise ReadError("the disk is gone")

    with monkeypatch.context() as patch, pytest.raises(ReadError):
        after_each_read(patch, fail)
        compare(session, Interrupt(), progress)
    assert failed
    assert fingerprint(session) == before


def test_slots_that_give_way_to_the_kv_cache_come_back() -> None:
    elastic = open_session(demo_model(), memory="20MB", elastic=True, max_context=1024, max_tokens=20)
    say(elastic, " ".join([STORY] * 24))
    assert len(elastic.conversation.tokens) > 256, "or the KV cache has not grown while the reply was written"
    before, moves = fingerprint(elastic), elastic.model.elastic_slots.resizes
    n = len(moves)
    reserved: list[int] = []
    compare(elastic, Interrupt(), lambda _: reserved.append(elastic.model.memory_plan.kv))
    assert {x.reason for x in moves[n:]} == {"room", "context"}
    assert fingerprint(elastic) == before
    held = sum(int(c.nbytes) for c in elastic.conversation.kv_cache)
    assert min(reserved) > held and max(reserved) >= 2 * held, (
        "the KV cache of before is kept beside that of the answer"
    )


def test_elastic_slots_have_no_room_for_two_kv_caches_beyond_the_longest_context() -> None:
    elastic = open_session(demo_model(), memory="15.6MB", elastic=True, max_context=290, max_tokens=20)
    say(elastic, " ".join([STORY] * 24))
    before = fingerprint(elastic)
    with pytest.raises(UsageError, match=r"twice, which takes .* are reserved for it"):
        compare(elastic, Interrupt())
    assert fingerprint(elastic) == before


def test_a_kv_cache_that_does_not_fit_twice_into_the_budget_is_not_copied() -> None:
    session = open_session(demo_model(), memory="16MB", max_context=400, max_tokens=20)
    say(session, STORY)
    compare(session, Interrupt())  # a short conversation does
    say(session, " ".join([STORY] * 28))
    assert len(session.conversation.tokens) > 256
    before = fingerprint(session)
    with pytest.raises(UsageError, match=r"twice, which takes .* are reserved for it"):
        compare(session, Interrupt())
    assert fingerprint(session) == before
    unlimited = open_session(demo_model(), slots=20, max_context=400, max_tokens=20)
    say(unlimited, " ".join([STORY] * 28))
    compare(unlimited, Interrupt())


def test_answers_without_a_limit_may_be_as_long_as_the_context() -> None:
    session = open_session(demo_model(), memory="20MB", max_context=600, max_tokens=20)
    say(session, " ".join([STORY] * 28))
    assert 256 < len(session.conversation.tokens) < 320
    before = fingerprint(session)
    for most in (580, -1):
        session.settings.max_tokens = most
        with pytest.raises(UsageError, match=r"twice, which takes .* are reserved for it"):
            compare(session, Interrupt())
    assert fingerprint(session) == before


# ---- the command ----


def test_ctrl_c_ends_the_command_and_the_line_says_that_all_is_as_before(
    session: ChatSession, capsys: pytest.CaptureFixture[str]
) -> None:
    session.settings.max_tokens = 500
    before = fingerprint(session)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        ab(session, Console())
    finally:
        timer.cancel()
    assert capsys.readouterr().out == "stopped; conversation, cache and routing are as before\n"
    assert fingerprint(session) == before


def test_without_a_message_there_is_nothing_to_compare() -> None:
    session = open_session(demo_model(), slots=20)
    with pytest.raises(UsageError, match="write one first"):
        compare(session, Interrupt())


def test_with_all_experts_in_memory_the_answers_are_not_computed_twice_for_nothing(session: ChatSession) -> None:
    session.model.expert_cache.resize(slots=60)
    with pytest.raises(UsageError, match="/set slots N"):
        compare(session, Interrupt())
    assert session.model.expert_cache.strategy.name == "cache-prior"


def test_pruning_differs_even_with_all_experts_in_memory(shelf: Shelf) -> None:
    session = open_session(chat_checkpoint(shelf), slots=99, routing="pruning:k=1", max_tokens=12)
    say(session, "hello")
    assert compare(session, Interrupt()).first_difference is not None


# ---- showing ----


def result(exact: str, biased: str, a: Sequence[int], b: Sequence[int], seed: int | None = None) -> Comparison:
    counted = PhaseStats(selections=100, hits=77, misses=23, loads=23, bytes_read=9_000_000, swapped=14)
    return Comparison(
        Answer("exact", exact, tuple(a), "stop", 31.4, PhaseStats(selections=100, hits=50, bytes_read=18_000_000)),
        Answer("cache-prior:strength=0.1,j=2", biased, tuple(b), "length", 62.8, counted),
        reused=120,
        read_again=1,
        seed=seed,
    )


def word(tokens: list[int]) -> str:
    return f"w{tokens[0]}"


@pytest.mark.parametrize("width", [20, 40, 79, 80, 100, 200])
def test_every_line_fits_the_terminal(width: int) -> None:
    text = "The fox ran over the hill, " * 9 + "狐狸" * 60 + "\n\n" + "x" * 300
    lines = comparison_lines(result(text, text[5:], range(10), range(10)), word, width)
    assert max(map(width_of, lines)) <= max(width, 21)
    assert any(" | " in line for line in lines) == (width >= 80)


def test_the_columns_hold_text_hits_rate_and_bytes_of_their_own_side() -> None:
    lines = comparison_lines(result("A fox.", "A dog.", range(10), range(10)), word, 80)
    rows = [[part.strip() for part in line.split(" | ")] for line in lines if " | " in line]
    assert rows[0] == ["exact", "cache-prior:strength=0.1,j=2"]
    assert ["A fox.", "A dog."] in rows
    assert ["10 tokens", "10 tokens (cut)"] in rows
    assert ["31.4 tok/s", "62.8 tok/s"] in rows
    assert ["50.0% hit", "77.0% hit"] in rows
    assert ["2.00 MB/token read", "1.00 MB/token read"] in rows
    assert ["", "14.0% swapped"] in rows


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ([1, 2, 3], [1, 2, 3], "no difference: the same 3 tokens"),
        ([1, 2, 3], [1, 9, 3], "first difference: token 2, 'w2' and 'w9'"),
        ([1, 2], [1, 2, 3], "first difference: token 3, the end and 'w3'"),
        ([7], [8], "first difference: token 1, 'w7' and 'w8'"),
    ],
)
def test_the_first_token_that_differs_is_named(a: list[int], b: list[int], says: str) -> None:
    assert says in comparison_lines(result("a", "b", a, b), word, 100)


def test_the_seed_is_named_where_numbers_were_drawn() -> None:
    assert any(x.endswith("seed 7") for x in comparison_lines(result("a", "b", [1], [2], seed=7), word, 100))
    assert not any("seed" in x for x in comparison_lines(result("a", "b", [1], [2]), word, 100))


def test_the_demo_answers_are_shown_with_their_first_difference(
    session: ChatSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    session.settings.max_tokens = 60
    session.model.expert_cache.set_strategy("cache-prior:strength=1,j=0")  # as biased as can be
    ab(session, Console())
    out, err = capsys.readouterr()
    assert "exact" in out.splitlines()[0] and " | cache-prior:strength=1.0,j=0" in out.splitlines()[0]
    assert "first difference: token " in out and "% hit" in out and "/token read" in out
    assert "conversation, cache and routing are as before" in err
