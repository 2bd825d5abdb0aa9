"""Completions of the server: the text goes on where the prompt ended, and nothing that was asked before changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from chat_sessions import open_session
from made_tokenizers import llama_like

from mlx_moecache.demo import demo_model
from mlx_moecache.generation import Response
from mlx_moecache.loading import OpenedModel
from mlx_moecache.serving.engine import Engine
from mlx_moecache.serving.events import Delta, Finished
from mlx_moecache.serving.formats import Reply
from mlx_moecache.serving.prompts import Prompt, Prompts
from mlx_moecache.serving.requests import Kind, Request
from mlx_moecache.stats import CacheStats

GIRL = "Once upon a time, there was a little girl"
LIT = "Once upon a time, there was a lit"  # ends in the middle of a word


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    session = open_session(demo_model(), slots=60, routing="original")
    yield Engine(session.conversation, Prompts(session.tokenizer))
    session.model.expert_cache.close()


@dataclass(frozen=True)
class Made:
    """One completion as both kinds of clients get it."""

    text: str
    logprobs: Any
    chunks: list[Any]  # choices
    end: Finished


def complete(engine: Engine, prompt: Any, **asked: Any) -> Made:
    *deltas, end = engine.reply(Request("text", prompt=prompt, **asked), lambda: None, 0.0)
    assert isinstance(end, Finished)
    words = [d for d in deltas if isinstance(d, Delta)]
    choice = Reply("text", "m").whole(words, end)["choices"][0]
    stream = Reply("text", "m")
    chunks = [stream.chunk(d)["choices"][0] for d in words]
    assert "".join(c["text"] for c in chunks) == choice["text"]
    if choice["logprobs"] is not None:
        for name in choice["logprobs"]:
            streamed = [x for c in chunks if c["logprobs"] for x in c["logprobs"][name]]
            assert streamed == choice["logprobs"][name], name
    return Made(choice["text"], choice["logprobs"], chunks, end)


def test_no_earlier_request_changes_how_a_prompt_is_cut(engine: Engine) -> None:
    alone = complete(engine, GIRL, max_tokens=12)
    for other in ("x", LIT, "Once upon a time, there w"):
        complete(engine, other, max_tokens=8)
        again = complete(engine, GIRL, max_tokens=12)
        assert (again.text, again.end.prompt_tokens) == (alone.text, alone.end.prompt_tokens)


def test_a_prompt_that_goes_on_from_an_earlier_reply_is_cut_as_a_whole(engine: Engine) -> None:
    begin = "The friends pla"
    first = complete(engine, begin, max_tokens=2)
    for rest in ("", " and", "<|endoftext|>The"):
        tokens = engine._tokenizer.encode(begin + first.text + rest)
        assert complete(engine, begin + first.text + rest, max_tokens=1).end.prompt_tokens == len(tokens)
        if not rest:
            assert len(tokens) != first.end.prompt_tokens + 2, "or the reply's own tokens would be the same"


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_without_a_template_no_reply_is_remembered(kind: Kind) -> None:
    t = llama_like()
    t.add_tokens(["\n"])
    prompts = Prompts(t)

    def of(text: str) -> Prompt:
        return prompts.of(Request(kind, prompt=text, messages=({"role": "user", "content": text},)))

    prompts.remember(of("once up"), "on", t.convert_tokens_to_ids(["o", "n"]))
    assert of("once upon\na").tokens == list(t.encode("once upon\na"))


def test_the_blank_between_prompt_and_reply_is_there(engine: Engine) -> None:
    made = complete(engine, "Once", max_tokens=6, top_logprobs=0)
    assert made.text == " upon a time, there was"
    assert made.logprobs["tokens"] == [" upon", " a", " time", ",", " there", " was"]
    assert made.logprobs["text_offset"] == [0, 5, 7, 12, 13, 19]
    again = complete(engine, "Once" + made.text, max_tokens=1)
    assert again.end.cached_tokens >= 6, "the KV cache knows the text as it was written"


def test_a_stop_string_may_begin_with_that_blank(engine: Engine) -> None:
    made = complete(engine, "Once", max_tokens=6, stop=(" upon",))
    assert (made.text, made.end.reason, made.end.completion_tokens) == ("", "stop", 1)
    assert complete(engine, "Once", max_tokens=6, stop=(" time",)).text == " upon a"


def test_what_is_held_back_for_a_stop_string_moves_no_offset(engine: Engine) -> None:
    made = complete(engine, "Once", max_tokens=6, stop=(" upon a dog",), top_logprobs=0)
    assert made.logprobs["text_offset"] == [0, 5, 7, 12, 13, 19]
    assert made.chunks[0]["text"] == ""


def test_a_chat_still_begins_without_a_blank(engine: Engine) -> None:
    messages = ({"role": "user", "content": "Tell me a story."},)
    *deltas, _ = engine.reply(Request("chat", messages=messages, max_tokens=4), lambda: None, 0.0)
    text = "".join(d.content for d in deltas if isinstance(d, Delta))
    assert text and not text.startswith(" ")


# ---- each place where a text may be cut ----


class Says:
    """Stands in for a conversation: gives `tokens`, then the end of text, whatever it is asked."""

    def __init__(self, tokenizer: Any, tokens: list[int], *, ends: bool) -> None:
        self.tokenizer, self.says, self.ends = tokenizer, tokens, ends
        self.model = SimpleNamespace(expert_cache=SimpleNamespace(stats=CacheStats(), has_host_reads=True))
        self.kv_cache: list[Any] = []
        self.reused, self.is_exact = 0, True

    def stream(self, prompt: Any, **options: Any) -> Iterator[Response]:
        detokenizer: Any = self.tokenizer.detokenizer
        logprobs = mx.zeros(len(self.tokenizer))
        tokens = self.says + ([min(self.tokenizer.eos_token_ids)] if self.ends else [])
        for n, token in enumerate(tokens, start=1):
            finish = None if n < len(tokens) else "stop" if self.ends else "length"
            if finish != "stop":
                detokenizer.add_token(token)
            if finish is not None:
                detokenizer.finalize()
            text = detokenizer.last_segment
            yield Response(text, token, logprobs, False, len(prompt), 9.0, n, 8.0, 0.0, finish)


TEXTS: dict[str, tuple[Callable[[], Any], str]] = {
    "demo": (lambda: OpenedModel(demo_model()).tokenizer(), "Once upon a  time 🙂 é,   there. 🙂🙂 \n\n  two "),
    "llama": (llama_like, "once upon  a time, a   hi\n once user:hi "),
}


@pytest.mark.parametrize("ends", [False, True], ids=["cut", "ended"])
@pytest.mark.parametrize("name", list(TEXTS))
def test_prompt_and_text_are_the_whole_text_wherever_it_is_cut(name: str, ends: bool) -> None:
    make, whole = TEXTS[name]
    t = make()
    tokens = [int(x) for x in t.encode(whole)]
    assert t.decode(tokens) == whole
    for n in range(1, len(tokens)):
        prompt = t.decode(tokens[:n])
        if not whole.startswith(prompt):  # in the middle of a character
            continue
        talk = Says(t, tokens[n:], ends=ends)
        made = complete(Engine(talk, Prompts(t)), tuple(tokens[:n]), top_logprobs=0)  # type: ignore[arg-type]
        assert prompt + made.text == whole, (n, prompt)
        at = made.logprobs["text_offset"]
        for token, begin, end in zip(made.logprobs["tokens"], at, [*at[1:], len(made.text)], strict=True):
            assert "\ufffd" in token or made.text[begin:end] == token, (n, token, begin, end)


def test_behind_the_beginning_of_text_there_is_no_blank_that_the_tokenizer_did_not_mean() -> None:
    t = llama_like()
    once = t.convert_tokens_to_ids(["▁once", "▁upon"])
    talk = Says(t, once, ends=True)
    assert complete(Engine(talk, Prompts(t)), (t.bos_token_id,)).text == "once upon"  # type: ignore[arg-type]
