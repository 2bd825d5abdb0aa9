"""The parts of the server that need no HTTP: cutting replies, access rules, formats, metrics."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_helpers import MadeUpReplies

from mlx_moecache.errors import UsageError
from mlx_moecache.serving.access import is_loopback, is_origin
from mlx_moecache.serving.api_errors import RequestError
from mlx_moecache.serving.events import Delta, Finished, Likelihood, Timings, TokenLogprob, ToolCall
from mlx_moecache.serving.formats import Reply, usage
from mlx_moecache.serving.http_server import HttpServer
from mlx_moecache.serving.messages import ROLES
from mlx_moecache.serving.metrics import RequestCounts, exposition
from mlx_moecache.serving.reply_text import Marks, ReplyText
from mlx_moecache.serving.requests import CHAT, TEXT, Limits, Sampling, parse_request
from mlx_moecache.stats import CacheStats, PhaseStats

MARKS = Marks(("<think>", "</think>"), ("<tool>", "</tool>"))


def cut(text: str, stops: tuple[str, ...] = (), *, size: int = 1, inside: bool = False) -> tuple[dict[str, str], bool]:
    """The text of each part, fed in pieces of `size` characters."""
    splitter = ReplyText(MARKS, stops, in_reasoning=inside)
    pieces = [p for i in range(0, len(text), size) for p in splitter.feed(text[i : i + size])] + splitter.rest()
    made: dict[str, str] = {}
    for part, piece in pieces:
        made[part] = made.get(part, "") + (piece if part != "tool_end" else "|")
    return made, splitter.stopped


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_reply_is_cut_into_reasoning_calls_and_content_however_it_arrives(size: int) -> None:
    text = "<think>hm </thin</think>A<b <tool>f(1)</tool><tool>g()</tool>end<thi"
    made, stopped = cut(text, size=size)
    assert made == {"reasoning": "hm </thin", "content": "A<b end<thi", "tool": "f(1)g()", "tool_end": "||"}
    assert not stopped


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_stop_string_ends_the_content_and_never_shows(size: int) -> None:
    assert cut("one two STOP three", ("STOP",), size=size) == ({"content": "one two "}, True)
    assert cut("one two STO", ("STOP",), size=size) == ({"content": "one two STO"}, False)
    assert cut("<think>STOP</think>x", ("STOP",), size=size) == ({"reasoning": "STOP", "content": "x"}, False)
    assert cut("aab", ("ab",), size=size) == ({"content": "a"}, True)


def test_a_call_that_is_cut_off_ends_with_the_reply_and_a_prompt_may_begin_the_reasoning() -> None:
    assert cut("<tool>f(") == ({"tool": "f(", "tool_end": "|"}, False)
    assert cut("so</think>x", inside=True) == ({"reasoning": "so", "content": "x"}, False)


@given(st.text("ab<>/think STOP"), st.integers(1, 5))
def test_nothing_is_lost_and_the_size_of_pieces_does_not_matter(text: str, size: int) -> None:
    assert cut(text, ("STOP",), size=size) == cut(text, ("STOP",), size=1000)
    plain = ReplyText(Marks(), ())
    assert "".join(t for _, t in [*plain.feed(text), *plain.rest()]) == text


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("https://example.org", True),
        ("http://localhost:3000", True),
        ("https://example.org/", False),
        ("example.org", False),
        ("*", False),
        ("null", False),
        ("https://", False),
        ("http://x:99999", False),
        ("http://[", False),
    ],
)
def test_origins_are_what_browsers_send(text: str, fine: bool) -> None:
    assert is_origin(text) is fine


def test_loopback_is_what_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.2", "example.org", "", "localhost.evil.org")))


def test_an_address_that_cannot_be_had_is_one_error() -> None:
    taken = HttpServer("127.0.0.1", 0, None, max_connections=1)
    try:
        taken.open()
        with pytest.raises(UsageError, match="cannot listen on"):
            HttpServer("127.0.0.1", taken.port, None, max_connections=1)
        with pytest.raises(UsageError, match="choose another --host"):
            HttpServer("no-such-host.invalid", 0, None, max_connections=1)
    finally:
        taken.server_close()


def test_of_two_servers_that_load_at_the_same_time_one_gets_the_address() -> None:
    first = HttpServer("127.0.0.1", 0, None, max_connections=1)
    try:
        second = HttpServer("127.0.0.1", first.port, None, max_connections=1)
    except UsageError:
        return  # this system refuses the second one at once
    try:
        first.open()
        with pytest.raises(UsageError, match="cannot listen on"):
            second.open()
    finally:
        first.server_close()
        second.server_close()


def test_a_request_takes_its_defaults_and_caps_from_the_server() -> None:
    limits = Limits("m", max_tokens=50, sampling=Sampling(temperature=0.7, top_k=5))
    plain = parse_request("text", {"prompt": "x"}, limits)
    assert (plain.max_tokens, plain.sampling.temperature, plain.sampling.top_k) == (50, 0.7, 5)
    asked = parse_request("text", {"prompt": ["x"], "max_tokens": 9000, "temperature": 0, "stop": "a"}, limits)
    assert (asked.prompt, asked.max_tokens, asked.sampling.temperature, asked.stop) == ("x", 50, 0.0, ("a",))
    both = parse_request("text", {"prompt": [1, 2], "max_tokens": 9, "max_completion_tokens": 3}, limits)
    assert (both.prompt, both.max_tokens) == ((1, 2), 3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLES, None])}, optional={"content": JSON, "tool_calls": JSON}
)


@given(
    st.sampled_from(["chat", "text"]),
    st.dictionaries(st.sampled_from(sorted(CHAT | TEXT)), JSON, max_size=4),
    st.lists(MESSAGE | JSON, max_size=2),
)
def test_any_json_is_a_request_or_one_line_about_it(kind: Any, body: dict[str, Any], messages: list[Any]) -> None:
    try:
        made = parse_request(kind, {"messages": messages, "prompt": "x", **body}, Limits("m", has_tools=True))
    except RequestError as error:
        assert 400 <= error.status < 500
        assert error.message and "\n" not in error.message
        assert json.loads(json.dumps(error.body()))["error"]["message"] == error.message
    else:
        assert made.max_tokens >= 1
        json.dumps([made.messages, made.tools], ensure_ascii=False).encode()  # nothing that no tokenizer takes


def test_content_parts_are_joined_and_developer_is_system() -> None:
    body = {
        "messages": [
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ]
    }
    made = parse_request("chat", body, Limits("m")).messages
    assert [m["role"] for m in made] == ["system", "user", "assistant", "tool"]
    assert made[1]["content"] == "ab"
    assert made[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


def finished(**changes: object) -> Finished:
    stats = CacheStats(PhaseStats(selections=8, hits=2, misses=6), PhaseStats(10, 9, 1, bytes_read=300, swapped=2))
    facts = {"reason": "stop", "prompt_tokens": 7, "cached_tokens": 3, "completion_tokens": 4, "stats": stats}
    facts |= {"is_all_resident": False, "is_exact": False, "timings": Timings(0.5, 1.0, 2.0, 7.0, 1.5)}
    return Finished(**{**facts, **changes})  # type: ignore[arg-type]


def test_usage_says_what_the_expert_cache_did() -> None:
    made = usage(finished())
    assert made["total_tokens"] == 11
    assert made["prompt_tokens_details"] == {"cached_tokens": 3}
    cache = made["expert_cache"]
    assert (cache["hit_rate"], cache["bytes_per_token"], cache["swapped_share"]) == (0.9, 100.0, 0.2)
    assert (cache["exact"], cache["prefill"]["hit_rate"]) == (False, 0.25)
    assert made["timings"]["waiting_seconds"] == 0.5
    one = usage(finished(completion_tokens=1, stats=CacheStats()))["expert_cache"]
    assert (one["hit_rate"], one["bytes_per_token"]) == (None, None)


def test_tool_calls_and_reasoning_have_their_own_fields_in_chunks_and_wholes() -> None:
    deltas = [
        Delta(reasoning="hm"),
        Delta(tool_calls=(ToolCall("a", "f", "{}"),)),
        Delta(tool_calls=(ToolCall("b", "g", "{}"),)),
    ]
    message = Reply("chat", "m").whole(deltas, finished(reason="tool_calls"))["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning_content"] == "hm"
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["f", "g"]
    streamed = Reply("chat", "m")
    chunks = [streamed.chunk(d)["choices"][0]["delta"] for d in deltas]
    assert chunks[0] == {"reasoning_content": "hm"}
    assert [c["tool_calls"][0]["index"] for c in chunks[1:]] == [0, 1]


def test_text_logprobs_have_offsets_that_go_on_from_chunk_to_chunk() -> None:
    r = Reply("text", "m")
    token = (TokenLogprob(Likelihood("ab", -0.5), (Likelihood("ab", -0.5),)),)
    chunks = [r.chunk(Delta("ab", logprobs=token))["choices"][0] for _ in range(2)]
    assert [c["logprobs"]["text_offset"] for c in chunks] == [[0], [2]]


def test_metrics_are_prometheus_text() -> None:
    counts = RequestCounts()
    counts.add("/health", 200)
    counts.add("/health", 200)
    text = exposition(MadeUpReplies().state(), counts, waiting=3, busy=True)
    assert 'moecache_requests_total{path="/health",code="200"} 2\n' in text
    assert 'moecache_memory_bytes{part="kv_cache"} 2\n' in text
    assert 'moecache_expert_hits_total{phase="decode"} 0\n' in text
    assert "moecache_requests_waiting 3\n" in text
    assert "moecache_prompt_seconds_total 0.5\n" in text
    for line in text.splitlines():
        assert line.startswith(("# HELP moecache_", "# TYPE moecache_", "moecache_")), line
    names = [x.split()[2] for x in text.splitlines() if x.startswith("# TYPE")]
    assert len(names) == len(set(names))
