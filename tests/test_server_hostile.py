"""Requests that are broken, too large, too slow or malicious; each gets one line and the server goes on."""

from __future__ import annotations

import json
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from serving_helpers import CHAT, HELLO, MadeUpReplies, ask, made_up_server, post_bytes, raw, wait_until

from mlx_moecache.errors import ReadError
from mlx_moecache.serving.access import Access
from mlx_moecache.serving.json_handler import Timeouts

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Any:
    with made_up_server() as s:
        yield s


@pytest.fixture(autouse=True)
def it_still_answers(request: pytest.FixtureRequest) -> Any:
    yield
    if "server" in request.fixturenames:
        assert ask(request.getfixturevalue("server").port, CHAT, HELLO).status == 200


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:80]
    return int(answer.split()[1])


def one_error(answer: bytes) -> str:
    """The message of a refusal, which is JSON and one line."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    message: str = json.loads(body)["error"]["message"]
    assert message and "\n" not in message and "Traceback" not in message
    return message


# ---- bodies ----


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"hello", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (json.dumps(HELLO).encode()[:-1] + b', "temperature": 1e400}', "from 0 to 2"),
        (b'{"temperature": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a":' * 18_000, "nested too deeply"),
        (b"[" * 90_000, "nested too deeply"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"{}" + b"x", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused_with_the_reason(
    server: SimpleNamespace, body: bytes, said: str
) -> None:
    answer = ask(server.port, CHAT, body)
    assert answer.status == 400
    assert said in answer.error["message"]


WRONG: list[tuple[str, Any, str]] = [
    ("messages", None, "messages must be a list"),
    ("messages", [], "messages must be a list"),
    ("messages", "hi", "messages must be a list"),
    ("messages", ["hi"], "messages[0] must be an object"),
    ("messages", [{"content": "x"}], "messages[0].role must be one of system"),
    ("messages", [{"role": "god", "content": "x"}], "not 'god'"),
    ("messages", [{"role": ["user"], "content": "x"}], "messages[0].role"),
    ("messages", [{"role": "user"}], "messages[0].content must be a string"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content must be"),
    ("messages", [{"role": "user", "content": {"text": "x"}}], "messages[0].content must be"),
    ("messages", [{"role": "user", "content": [5]}], "only text is supported"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "only text"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "only text"),
    ("messages", [{"role": "user", "content": "\ud800"}], "lone surrogate"),
    ("messages", [{"role": "user", "content": "x", "name": 5}], "name must be a string"),
    ("messages", [{"role": "assistant", "tool_calls": 5}], "must be a list"),
    ("messages", [{"role": "assistant", "tool_calls": [5]}], "needs function.name"),
    (
        "messages",
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "must be a JSON object",
    ),
    (
        "messages",
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}],
        "must be a JSON object",
    ),
    ("model", 5, "model must be a string"),
    ("model", "gpt-4", "this server has 'tiny'"),
    ("stream", "yes", "stream must be true or false"),
    ("stream", 1, "stream must be true or false"),
    ("stream_options", {"include_usage": True}, "only with stream true"),
    ("stream_options", [], "must be an object"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", -5, "at least 1"),
    ("max_tokens", 1.5, "whole number"),
    ("max_tokens", "10", "whole number"),
    ("max_tokens", True, "whole number"),
    ("max_completion_tokens", {}, "whole number"),
    ("temperature", -1, "from 0 to 2"),
    ("temperature", 3, "from 0 to 2"),
    ("temperature", "hot", "from 0 to 2"),
    ("temperature", True, "from 0 to 2"),
    ("top_p", 1.1, "from 0 to 1"),
    ("top_p", [], "from 0 to 1"),
    ("top_k", 1000, "from 0 to 999"),
    ("min_p", -0.1, "from 0 to 1"),
    ("seed", "x", "whole number"),
    ("seed", 2**64, "whole number"),
    ("stop", 5, "up to 16 strings"),
    ("stop", [""], "none of them empty"),
    ("stop", ["x"] * 17, "up to 16"),
    ("stop", ["a", 5], "strings"),
    ("n", 2, "n must be 1"),
    ("n", "1", "whole number"),
    ("logprobs", 3, "true or false"),
    ("top_logprobs", 3, "needs logprobs true"),
    ("logit_bias", {"x": 1}, "token ids from 0 to 999"),
    ("logit_bias", {"1000": 1}, "token ids from 0 to 999"),
    ("logit_bias", {"-1": 1}, "token ids"),
    ("logit_bias", {"²": 1}, "token ids"),
    ("logit_bias", {"1": "x"}, "from -100 to 100"),
    ("logit_bias", {"1": 101}, "from -100 to 100"),
    ("logit_bias", {"1": 10**400}, "logit_bias must have token ids from 0 to 999 with numbers from -100 to 100"),
    ("logit_bias", {"1": True}, "from -100 to 100"),
    ("logit_bias", {str(i): 1 for i in range(1025)}, "1024 entries"),
    ("logit_bias", [], "must be an object"),
    ("presence_penalty", 3, "from -2 to 2"),
    ("frequency_penalty", "x", "from -2 to 2"),
    ("repetition_penalty", -1, "from 0 to 10"),
    ("repetition_context_size", 0, "whole number from 1"),
    ("response_format", {"type": "json_object"}, 'must be "text"'),
    ("response_format", "text", "must be an object"),
    ("tools", {}, "tools must be a list"),
    ("tools", [5], "tools[0] must be"),
    ("tools", [{"type": "function", "function": {"name": ""}}], "name must be a string"),
    ("tools", [{"type": "function", "function": {"name": "f"}}], "no chat template for tools"),
    ("tool_choice", "required", '"auto" or "none"'),
    ("tool_choice", {"type": "function"}, '"auto" or "none"'),
    ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}, "template's own options"),
    ("chat_template_kwargs", {"x": {}}, "simple values"),
    ("functions", [], "use tools instead"),
    ("suffix", "x", "not supported"),
    ("temprature", 1, "did you mean temperature?"),
    ("x\n\x1b[31m", 1, "unknown field"),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=[f"{n}={str(v)[:20]}" for n, v, _ in WRONG])
def test_every_wrong_field_is_named_with_what_is_allowed(
    server: SimpleNamespace, name: str, value: Any, said: str
) -> None:
    answer = ask(server.port, CHAT, {**HELLO, name: value})
    assert answer.status == (404 if said.startswith("this server") else 400)
    assert said in answer.error["message"]
    assert len(answer.error["message"]) < 600


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "prompt must be one string"),
        (5, "prompt must be one string"),
        ([], "prompt must be one string"),
        (["a", "b"], "prompt must be one string"),
        ([[1], [2]], "prompt must be one string"),
        ([1, "a"], "prompt must be one string"),
        ([True], "prompt must be one string"),
        ([1000], "from 0 to 999"),
        ([-1], "from 0 to 999"),
        ([10**30], "from 0 to 999"),
        ("\udfff", "lone surrogate"),
    ],
)
def test_every_wrong_prompt_is_refused(server: SimpleNamespace, prompt: Any, said: str) -> None:
    answer = ask(server.port, TEXT, {"prompt": prompt})
    assert answer.status == 400
    assert said in answer.error["message"]


def test_null_counts_as_left_out_and_fields_without_effect_are_accepted(server: SimpleNamespace) -> None:
    body = {**HELLO, "temperature": None, "stop": None, "tools": None, "user": "me", "metadata": {}, "max_tokens": 2.0}
    assert ask(server.port, CHAT, body).status == 200


# ---- HTTP ----


@pytest.mark.parametrize(
    ("length", "code"),
    [
        *((text, 400) for text in ("-5", "abc", "1e3", "+5", "0x10", "", "²", "9" * 400)),
        *((text, 413) for text in ("9" * 15, "100001")),
    ],
)
def test_a_content_length_that_is_wrong_or_too_large_is_refused_without_reading(
    server: SimpleNamespace, length: str, code: int
) -> None:
    answer = raw(server.port, post_bytes(b"{}", length=length))
    assert status(answer) == code
    assert one_error(answer)


def test_a_target_may_name_the_server_as_proxies_write_it(server: SimpleNamespace) -> None:
    def get(target: str, host: str = "localhost") -> bytes:
        head = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        return raw(server.port, head.encode())

    assert status(get("http://127.0.0.1:8171/health")) == 200
    assert status(get("HTTP://localhost/health?x=http://y/z")) == 200
    assert get("http://localhost").partition(b"\r\n\r\n")[2] == get("/").partition(b"\r\n\r\n")[2]
    assert status(get("http://localhost/nothing")) == 404
    # The name in the target counts, not the one in Host.
    assert status(get("http://localhost/health", host="elsewhere.example")) == 200
    for named in ("elsewhere.example", "", "me@localhost"):
        assert status(get(f"http://{named}/health")) == 403
    assert status(get("/http://localhost/health")) == 404


def test_two_content_lengths_are_refused(server: SimpleNamespace) -> None:
    answer = raw(server.port, post_bytes(b"{}", CHAT, "Content-Length: 3"))
    assert status(answer) == 400


def test_a_body_without_a_length_and_chunked_bodies_are_refused(server: SimpleNamespace) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
    assert status(raw(server.port, head + b"\r\n")) == 411
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    assert status(raw(server.port, chunked)) == 411
    # Both: nothing of the body may be taken for another request.
    smuggled = post_bytes(
        b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", CHAT, "Transfer-Encoding: chunked"
    )
    answer = raw(server.port, smuggled)
    assert status(answer) == 411
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_truncated_body_is_refused(server: SimpleNamespace) -> None:
    answer = raw(server.port, post_bytes(b'{"mess', length="500"), close_writing=True)
    assert status(answer) == 400
    assert "6 of 500 bytes" in one_error(answer)


def test_a_large_body_that_is_refused_does_not_cut_off_the_answer(server: SimpleNamespace) -> None:
    answer = raw(server.port, post_bytes(b"x" * 3_000_000))
    assert status(answer) == 413
    assert "100,000 are allowed" in one_error(answer)


def test_expect_100_continue_asks_for_a_body_only_if_it_may_come(server: SimpleNamespace) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as s:
        body = json.dumps(HELLO).encode()
        s.sendall(post_bytes(b"", CHAT, "Expect: 100-continue", length=str(len(body))))
        assert s.recv(1000).startswith(b"HTTP/1.1 100 ")
        s.sendall(body)
        assert s.recv(1000).startswith(b"HTTP/1.1 200 ")
    answer = raw(server.port, post_bytes(b"", CHAT, "Expect: 100-continue", length="100001"))
    assert status(answer) == 413


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)) + b"\r\n\r\n",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/x\r\n\r\n",
        b"\x00\x00\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET //evil.org/%2e%2e HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /v1/models/%ff%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ],
)
def test_what_is_no_request_gets_a_json_error(server: SimpleNamespace, data: bytes) -> None:
    answer = raw(server.port, data, close_writing=True)
    assert 400 <= status(answer) < 506
    assert one_error(answer)


def test_unknown_paths_and_methods_say_what_there_is(server: SimpleNamespace) -> None:
    missing = ask(server.port, "/v2/nothing")
    assert missing.status == 404
    assert CHAT in missing.error["message"]
    for method, path in (("GET", CHAT), ("DELETE", "/health"), ("PUT", TEXT), ("POST", "/metrics")):
        answer = ask(server.port, path, b"{}" if method != "GET" else None, method=method)
        assert answer.status == 405, (method, path)
        assert answer.error["code"] == "method_not_allowed"


def test_log_lines_stay_lines_and_made_up_paths_are_not_counted_apart(server: SimpleNamespace) -> None:
    raw(server.port, b"GET /a\x1b[31mb HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    ask(server.port, "/secret-path")
    assert not any("\x1b" in line or "\n" in line for line in server.lines)
    text = ask(server.port, "/metrics").body.decode()
    assert 'path="other",code="404"' in text
    assert "secret" not in text


def test_connections_are_kept_and_a_pipelined_second_request_is_answered(server: SimpleNamespace) -> None:
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    answer = raw(server.port, get + b"\r\n" + get + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 2


# ---- time ----


def test_slow_headers_bodies_and_silent_connections_end_at_a_deadline() -> None:
    quick = Timeouts(headers=0.4, body=0.4, idle=0.4, write=1)
    with made_up_server(timeouts=quick) as server:
        began = time.monotonic()
        assert raw(server.port, b"") == b""
        assert raw(server.port, f"POST {CHAT} HTTP/1.1\r\nHost: loc".encode()) == b""
        assert status(raw(server.port, post_bytes(b'{"a', length="50"))) == 408
        assert time.monotonic() - began < 5

        # One byte at a time, each well within any timeout for a single read.
        for data in (
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100,
            post_bytes(b" " * 50, length="500"),
        ):
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as s:
                s.settimeout(10)
                try:
                    for i in range(len(data)):
                        s.sendall(data[i : i + 1])
                        time.sleep(0.02)
                except OSError:
                    pass  # closed on us: that is the point
                assert time.monotonic() - began < 4
        assert ask(server.port, CHAT, HELLO).status == 200


def test_a_client_that_reads_nothing_does_not_hold_the_model() -> None:
    with made_up_server(MadeUpReplies(words=200_000), timeouts=Timeouts(write=0.5)) as server:
        server.app.limits.__dict__["max_tokens"] = 10**6
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.sendall(post_bytes(json.dumps({**HELLO, "stream": True, "max_tokens": 10**6}).encode()))
            wait_until(lambda: server.app.requests.samples()[1] == 1, seconds=30)
        wait_until(lambda: not server.app.worker.is_busy)
        server.replies.words = 2
        assert ask(server.port, CHAT, HELLO).status == 200


def test_too_many_connections_are_sent_away_and_places_are_freed() -> None:
    with made_up_server(max_connections=3) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        time.sleep(0.2)
        assert status(raw(server.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")) == 503
        for s in held:
            s.close()
        wait_until(lambda: raw(server.port, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200"))


# ---- who may use it ----


def test_foreign_hosts_and_origins_are_refused_and_ours_are_not(server: SimpleNamespace) -> None:
    port = server.port
    for host in ("localhost", "127.0.0.1", f"localhost:{port}", "[::1]:80", "LOCALHOST"):
        assert ask(port, CHAT, HELLO, headers={"Host": host}).status == 200, host
    for host in (
        "evil.org",
        f"evil.org:{port}",
        "127.0.0.1.evil.org",
        "localhost.evil.org",
        "",
        "[",
        "evil.org@localhost:x",
    ):
        assert ask(port, CHAT, HELLO, headers={"Host": host}).status == 403, host
    assert ask(port, CHAT, HELLO, headers={"Origin": f"http://127.0.0.1:{port}"}).status == 200
    for origin in ("http://evil.org", "null", f"http://127.0.0.1:{port + 1}", "http://127.0.0.1", "", "file://"):
        answer = ask(port, CHAT, HELLO, headers={"Origin": origin})
        assert answer.status == 403, origin
        assert "access-control-allow-origin" not in answer.headers


def test_an_allowed_origin_may_read_answers_and_is_told_so_before() -> None:
    with made_up_server(access=Access("127.0.0.1", ("https://app.example",))) as server:
        headers = {"Origin": "https://app.example", "Access-Control-Request-Headers": "authorization,x-foo"}
        before = ask(server.port, CHAT, method="OPTIONS", headers=headers)
        assert before.status == 204
        assert before.headers["access-control-allow-origin"] == "https://app.example"
        assert before.headers["access-control-allow-headers"] == "authorization,x-foo"
        answer = ask(server.port, CHAT, HELLO, headers={"Origin": "https://app.example"})
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert answer.headers["vary"] == "Origin"
        assert ask(server.port, CHAT, HELLO, headers={"Host": "app.example"}).status == 200


def test_with_a_key_everything_but_the_page_and_health_needs_it() -> None:
    with made_up_server(access=Access("0.0.0.0", api_key="s3cret")) as server:
        for path in ("/v1/models", "/metrics", "/live", "/v1/models/tiny"):
            assert ask(server.port, path).status == 401, path
        for given in (
            "",
            "Bearer",
            "Bearer x",
            "Bearer s3cre",
            "Bearer s3crett",
            "Basic s3cret",
            "s3cret",
            "Bearer \xff",
        ):
            answer = ask(server.port, CHAT, HELLO, headers={"Authorization": given} if given else {})
            assert answer.status == 401, given
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "s3cret" not in answer.body.decode()
        right = {"Authorization": "Bearer s3cret", "Host": "my-machine.example"}
        assert ask(server.port, CHAT, HELLO, headers=right).status == 200
        assert ask(server.port, "/health").status == 200
        assert ask(server.port, "/").status == 200
        assert not server.replies.asked[1:]


# ---- the line ----


def test_a_full_line_sends_requests_away_and_says_when_to_come_back() -> None:
    with made_up_server(max_waiting=2) as server:
        server.replies.gate.clear()
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(server.port, CHAT, HELLO))) for _ in range(3)]
        for t in threads:
            t.start()
        wait_until(lambda: server.app.worker.waiting == 2)
        full = ask(server.port, CHAT, HELLO)
        assert full.status == 503
        assert full.error["code"] == "queue_full"
        assert 1 <= int(full.headers["retry-after"]) <= 60
        assert "moecache_requests_waiting 2" in ask(server.port, "/metrics").body.decode()
        server.replies.gate.set()
        for t in threads:
            t.join(10)
        assert [a.status for a in answers] == [200, 200, 200]
        assert ask(server.port, CHAT, HELLO).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_in_line_or_in_a_reply_free_their_place(stream: bool) -> None:
    with made_up_server(max_waiting=1) as server:
        server.replies.gate.clear()
        request = post_bytes(json.dumps({**HELLO, "stream": stream}).encode())
        running = socket.create_connection(("127.0.0.1", server.port))
        running.sendall(request)
        wait_until(lambda: server.app.worker.is_busy)
        waiting = socket.create_connection(("127.0.0.1", server.port))
        waiting.sendall(request)
        wait_until(lambda: server.app.worker.waiting == 1)
        waiting.close()
        wait_until(lambda: server.app.worker.waiting == 0, seconds=2)
        running.close()
        wait_until(lambda: not server.app.worker.is_busy, seconds=2)
        assert server.replies.given_up == 1
        assert len(server.replies.asked) == 1
        server.replies.gate.set()
        assert ask(server.port, CHAT, HELLO).status == 200
        wait_until(lambda: server.app.requests.open == 0)  # counted after the client has its reply
        assert "moecache_requests_abandoned_total 2" in ask(server.port, "/metrics").body.decode()


def test_an_error_before_the_first_token_has_a_status_and_one_after_it_is_in_the_stream() -> None:
    with made_up_server() as server:
        body = {**HELLO, "stream": True}
        server.replies.error_at_once = ReadError("expert 3 cannot be read")
        early = ask(server.port, CHAT, body)
        assert early.status == 500
        assert early.error["message"] == "expert 3 cannot be read"
        server.replies.error_at_once = None
        server.replies.error = RuntimeError("odd\nthing")
        late = ask(server.port, CHAT, body)
        assert late.status == 200
        assert late.events[-2]["error"]["message"] == "unexpected RuntimeError: odd thing"
        assert late.events[-1] == "[DONE]"
        assert server.replies.recovered == 1
        assert ask(server.port, CHAT, HELLO).status == 500
        server.replies.error = None
        assert ask(server.port, CHAT, body).events[-2]["choices"][0]["finish_reason"] == "stop"


def test_stopping_tells_those_who_wait_and_those_who_are_served() -> None:
    with made_up_server() as server:
        server.replies.gate.clear()
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(server.port, CHAT, HELLO))) for _ in range(2)]
        for t in threads:
            t.start()
        wait_until(lambda: server.app.worker.waiting == 1)
        server.app.worker.stop()
        for t in threads:
            t.join(10)
        assert [a.status for a in answers] == [503, 503]
        assert all(a.error["code"] == "stopping" for a in answers)
        assert ask(server.port, "/health").status == 503
        assert ask(server.port, CHAT, HELLO).status == 503


def test_the_live_stream_sends_a_picture_per_change_and_ends_with_its_client() -> None:
    with made_up_server() as server, socket.create_connection(("127.0.0.1", server.port), timeout=5) as s:
        s.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = b""
        while got.count(b"data: ") < 1:
            got += s.recv(4096)
        server.app.live.changes = 7
        while got.count(b"data: ") < 2:
            got += s.recv(4096)
        assert b"text/event-stream" in got
        assert b'"time":2.0' in got and b'"changes":7' in got
