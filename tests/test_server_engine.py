"""What the engine makes of a model's tokens, with a model that says what the test wants."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_moecache.generation import Response
from mlx_moecache.serving.api_errors import RequestError
from mlx_moecache.serving.engine import Engine
from mlx_moecache.serving.events import Delta, Finished
from mlx_moecache.serving.prompts import Prompts
from mlx_moecache.serving.requests import Request
from mlx_moecache.stats import CacheStats

END = 0
VOCABULARY = 300


class Tokenizer:
    """A token per character; template, tools and reasoning as a model for agents has them."""

    has_chat_template = has_thinking = has_tool_calling = True
    think_start, think_end = "<think>", "</think>"
    tool_call_start, tool_call_end = "<call>", "</call>"
    bos_token = None
    eos_token_ids = (END,)

    def __init__(self) -> None:
        self.templates: list[dict[str, Any]] = []

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        self.templates.append({"messages": messages, **options})
        if messages[0]["content"] == "refuse me":
            raise ValueError("roles must\nalternate")
        return "".join(m["content"] for m in messages) + ("<think>" if options.get("thinks") else ":")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return "".join(map(chr, tokens))

    def tool_parser(self, text: str, tools: list[Any]) -> Any:
        return json.loads(text)


class Conversation:
    """Answers with a given text, one character per token, then the end-of-text token."""

    def __init__(self, says: str) -> None:
        self.says = says
        self.tokenizer = Tokenizer()
        stats = CacheStats()
        self.model = SimpleNamespace(expert_cache=SimpleNamespace(stats=stats, has_host_reads=True))
        self.kv_cache: list[Any] = []
        self.reused, self.is_exact = 0, True
        self.closed = 0

    def stream(self, prompt: Sequence[int], *, max_tokens: int, prompt_progress: Any, **options: Any) -> Any:
        self.options = options

        def responses() -> Iterator[Response]:
            prompt_progress(0, len(prompt))
            tokens = [*map(ord, self.says), END][:max_tokens]
            try:
                for n, token in enumerate(tokens, start=1):
                    logprobs = mx.log(mx.arange(1, VOCABULARY + 1) / VOCABULARY)
                    finish = "stop" if token == END else "length" if n == max_tokens else None
                    text = chr(token) if token else ""
                    yield Response(text, token, logprobs, False, len(prompt), 9.0, n, 8.0, 0.0, finish)
            finally:
                self.closed += 1

        return responses()


def answer(says: str, **asked: Any) -> tuple[list[Delta], Finished, Conversation]:
    request = Request("chat", **{"messages": ({"role": "user", "content": "Hi"},), **asked})
    talk = Conversation(says)
    engine = Engine(talk, Prompts(talk.tokenizer))  # type: ignore[arg-type]
    *deltas, end = engine.reply(request, lambda: None, 0.25)
    return deltas, end, talk  # type: ignore[return-value]


def joined(deltas: list[Delta]) -> tuple[str, str]:
    return "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas)


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = '{"name": "f", "arguments": {"x": "ä"}}'


def test_reasoning_is_apart_and_marks_do_not_show() -> None:
    deltas, end, _ = answer("<think>hm</think>yes")
    assert joined(deltas) == ("yes", "hm")
    assert (end.reason, end.completion_tokens, end.timings.waiting_seconds) == ("stop", 21, 0.25)
    deltas, _, talk = answer("hm</think>yes", template_options=(("thinks", True),))
    assert joined(deltas) == ("yes", "hm")
    assert talk.tokenizer.templates[0]["thinks"] is True


def test_a_tool_call_is_parsed_and_is_the_reason_for_the_end() -> None:
    deltas, end, talk = answer(f"so: <call>{CALL}</call>", tools=(TOOL,))
    call = next(c for d in deltas for c in d.tool_calls)
    assert (call.name, json.loads(call.arguments)) == ("f", {"x": "ä"})
    assert call.id.startswith("call_")
    assert (joined(deltas)[0], end.reason) == ("so: ", "tool_calls")
    assert talk.tokenizer.templates[0]["tools"] == [TOOL]


def test_what_is_no_call_is_not_lost() -> None:
    deltas, end, _ = answer("<call>not json</call>", tools=(TOOL,))
    assert (joined(deltas)[0], end.reason) == ("not json", "stop")
    deltas, end, _ = answer(f"<call>{CALL}", tools=(TOOL,), max_tokens=12)
    assert (joined(deltas)[0], end.reason) == (CALL[:6], "length")
    deltas, _, _ = answer(f"<call>{CALL}</call>")  # nobody asked for calls
    assert joined(deltas)[0] == f"<call>{CALL}</call>"


def test_a_stop_string_ends_the_generation_and_not_only_the_text() -> None:
    deltas, end, talk = answer("one, two, three", stop=("tw", "x"))
    assert joined(deltas)[0] == "one, "
    assert (end.reason, end.completion_tokens, talk.closed) == ("stop", 7, 1)


def test_logprobs_are_those_of_the_tokens_and_of_none_at_the_end() -> None:
    deltas, _, _ = answer("ab", top_logprobs=2)
    logprobs = [x for d in deltas for x in d.logprobs]
    assert [x.chosen.token for x in logprobs] == ["a", "b"]
    assert logprobs[0].chosen.logprob == pytest.approx(float(mx.log(mx.array(98 / VOCABULARY))), abs=1e-5)
    assert [t.token for t in logprobs[0].top] == [chr(VOCABULARY - 1), chr(VOCABULARY - 2)]


def test_penalties_and_biases_become_processors_only_where_they_are_asked_for() -> None:
    from mlx_moecache.serving.requests import Penalties

    assert answer("a")[2].options["logits_processors"] == []
    processors = answer("a", penalties=Penalties(logit_bias=((5, 3.0),)))[2].options["logits_processors"]
    assert processors[0](mx.array([1]), mx.zeros((1, 8)))[0, 5].item() == 3.0


def test_a_template_that_refuses_is_an_error_of_one_line() -> None:
    with pytest.raises(RequestError, match="refuses these messages") as caught:
        answer("x", messages=({"role": "user", "content": "refuse me"},))
    assert "\n" not in caught.value.message
    with pytest.raises(RequestError, match="no tokens"):
        talk = Conversation("x")
        list(Engine(talk, Prompts(talk.tokenizer)).reply(Request("text"), lambda: None, 0.0))  # type: ignore[arg-type]


def test_giving_up_closes_the_stream() -> None:
    talk = Conversation("abc" * 10)
    engine = Engine(talk, Prompts(talk.tokenizer))  # type: ignore[arg-type]
    calls = 0

    def watch() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        list(engine.reply(Request("text", prompt="x"), watch, 0.0))
    assert talk.closed == 1
