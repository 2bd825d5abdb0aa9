"""The server as people use it: with the bundled model, in a process of its own, through OpenAI's client and by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_helpers import CHAT, ServerProcess, ask, post_bytes, wait_until

from mlx_moecache.demo import demo_model

TEXT = "/v1/completions"
STORY = {"messages": [{"role": "user", "content": "Tell me a story about a fox."}]}
END_OF_TEXT = json.loads((demo_model() / "config.json").read_text())["eos_token_id"]
ENDLESS = {"logit_bias": {str(END_OF_TEXT): -100}, "max_tokens": 3000}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    flags = ("--slots", "30", "--max-tokens", "4000", "--max-context", "600", "--max-waiting", "4", "--seed", "1")
    with ServerProcess(*flags) as s:
        yield s


@pytest.fixture(scope="module")
def exact_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    """With few slots, and a copy of the model that may be damaged: its shard."""
    folder = tmp_path_factory.mktemp("models") / "fox"
    shutil.copytree(demo_model(), folder)
    with ServerProcess("--model", str(folder), "--slots", "8", "--max-tokens", "4000", "--exact") as s:
        yield s, folder / "model.safetensors"


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def metric(server: ServerProcess, name: str) -> float:
    for line in ask(server.port, "/metrics").body.decode().splitlines():
        if line.startswith(f"moecache_{name} "):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")


def begin_stream(server: ServerProcess) -> socket.socket:
    """A reply without an end, of which a few tokens have arrived."""
    c = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    c.sendall(post_bytes(json.dumps({**STORY, **ENDLESS, "stream": True}).encode()))
    got = b""
    while got.count(b"data: ") < 3:
        got += c.recv(65536)
    return c


def last_events(c: socket.socket) -> list[Any]:
    """The last two events of a stream that ends."""
    got = b""
    while part := c.recv(65536):
        got += part
    lines = [x.removeprefix("data: ") for x in got.decode().split("\n\n") if x][-2:]
    return [x if x == "[DONE]" else json.loads(x) for x in lines]


# ---- OpenAI's client ----


def test_openais_client_gets_the_same_reply_streamed_and_whole(client: Any) -> None:
    whole = client.chat.completions.create(model="demo_model", max_tokens=24, **STORY)
    assert whole.object == "chat.completion"
    choice = whole.choices[0]
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert whole.usage.completion_tokens == 24
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 24
    cache = whole.usage.expert_cache  # ours: the client keeps what it does not know
    assert 0 < cache["hit_rate"] <= 1
    assert cache["bytes_per_token"] >= 0
    assert whole.usage.timings["decode_tps"] > 0

    stream = list(
        client.chat.completions.create(
            model="demo_model", max_tokens=24, stream=True, stream_options={"include_usage": True}, **STORY
        )
    )
    assert stream[0].choices[0].delta.role == "assistant"
    assert stream[-1].choices == []
    assert stream[-1].usage.completion_tokens == 24
    assert stream[-2].choices[0].finish_reason == "length"
    assert len({c.id for c in stream}) == 1
    text = "".join(c.choices[0].delta.content or "" for c in stream[:-1])
    assert len(text) > 20
    assert text[:10] == choice.message.content[:10]


def test_openais_client_reads_models_text_completions_and_logprobs(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["demo_model"]
    assert client.models.retrieve("demo_model").owned_by == "mlx_moecache"
    made = client.completions.create(model="demo_model", prompt="Once upon a time", max_tokens=3, logprobs=2)
    found = made.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == 3
    assert "".join(found.tokens).strip() == made.choices[0].text.strip()
    for top, chosen in zip(found.top_logprobs, found.token_logprobs, strict=True):
        assert len(top) == 2
        assert chosen == max(top.values()) <= 0  # greedy
    chat = client.chat.completions.create(model="demo_model", max_tokens=2, logprobs=True, top_logprobs=3, **STORY)
    first = chat.choices[0].logprobs.content[0]
    assert [len(first.top_logprobs), first.top_logprobs[0].token] == [3, first.token]
    assert bytes(first.bytes).decode() == first.token


def test_openais_client_raises_its_own_errors(client: Any) -> None:
    import openai

    with pytest.raises(openai.NotFoundError, match="this server has 'demo_model'"):
        client.chat.completions.create(model="gpt-4", **STORY)
    with pytest.raises(openai.BadRequestError, match="n must be 1") as caught:
        client.chat.completions.create(model="demo_model", n=3, **STORY)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="tools: demo_model has no chat template for tools"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model="demo_model", tools=[tool], **STORY)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_streams_a_reply_with_what_people_type(server: ServerProcess) -> None:
    body = json.dumps({**STORY, "max_tokens": 3, "stream": True})
    command = ["curl", "-sSN", "-i", f"{server.url}/chat/completions", "-d", body]
    out = subprocess.run(command, capture_output=True, check=True, timeout=30).stdout
    assert out.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Type: text/event-stream" in out
    assert out.endswith(b"data: [DONE]\n\n")


# ---- what a reply is ----


def test_stop_strings_end_a_reply_before_they_show(exact_server: tuple[ServerProcess, Path]) -> None:
    port = exact_server[0].port
    whole = ask(port, TEXT, {"prompt": "Once upon", "max_tokens": 30}).json["choices"][0]["text"]
    # Cut inside of a word, where no token ends.
    stop = whole[12:17]
    for stream in (False, True):
        answer = ask(port, TEXT, {"prompt": "Once upon", "max_tokens": 30, "stop": [stop], "stream": stream})
        if stream:
            chunks = answer.events[:-1]
            text = "".join(c["choices"][0]["text"] for c in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            text, reason = answer.json["choices"][0]["text"], answer.json["choices"][0]["finish_reason"]
        assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_a_seed_repeats_a_sampled_reply(server: ServerProcess) -> None:
    # The first token comes out of the prompt, for which routing is never biased by what is in memory.
    body = {**STORY, "max_tokens": 8, "temperature": 1.5, "logprobs": True}

    def first_token(seed: int) -> float:
        answer = ask(server.port, CHAT, {**body, "seed": seed})
        return float(answer.json["choices"][0]["logprobs"]["content"][0]["logprob"])

    assert first_token(5) == pytest.approx(first_token(5), abs=1e-3)
    assert len({round(first_token(seed), 4) for seed in range(8)}) > 1


def test_a_conversation_that_goes_on_computes_only_what_is_new(server: ServerProcess) -> None:
    first = ask(server.port, CHAT, {**STORY, "max_tokens": 20}).json
    reply = first["choices"][0]["message"]
    more = [*STORY["messages"], reply, {"role": "user", "content": "And then?"}]
    second = ask(server.port, CHAT, {"messages": more, "max_tokens": 5}).json["usage"]
    kept = first["usage"]["prompt_tokens"] + 19  # the last token of a reply is not computed
    assert second["prompt_tokens_details"]["cached_tokens"] == kept
    other = ask(server.port, CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).json["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] < 3


def test_a_prompt_beyond_the_context_is_refused_and_a_long_reply_is_cut(server: ServerProcess) -> None:
    too_long = ask(server.port, TEXT, {"prompt": [5] * 600})
    assert too_long.status == 400
    assert too_long.error["code"] == "context_length_exceeded"
    cut = ask(server.port, TEXT, {"prompt": [5] * 594, **ENDLESS}).json
    assert (cut["usage"]["completion_tokens"], cut["choices"][0]["finish_reason"]) == (6, "length")


def test_an_exact_server_says_what_generate_says(exact_server: tuple[ServerProcess, Path]) -> None:
    from mlx_moecache import generate, load

    model, tokenizer = load(str(demo_model()), slots=30, routing="original")
    prompt = tokenizer.apply_chat_template(STORY["messages"], tokenize=False, add_generation_prompt=True)
    wanted = generate(model, tokenizer, prompt, max_tokens=40)
    answer = ask(exact_server[0].port, CHAT, {**STORY, "max_tokens": 40}).json
    assert answer["choices"][0]["message"]["content"] == wanted
    assert answer["usage"]["expert_cache"]["exact"] is True
    assert answer["usage"]["expert_cache"]["decode"]["misses"] > 0


# ---- many clients, and clients that leave ----


def test_clients_at_the_same_time_all_get_their_own_replies(server: ServerProcess) -> None:
    replies: dict[int, str] = {}

    def one(i: int) -> None:
        answer = ask(server.port, TEXT, {"prompt": f"Tom has {i} apples", "max_tokens": 5, "stream": i % 2 == 0})
        assert answer.status == 200
        replies[i] = answer.body.decode()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert sorted(replies) == list(range(5))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_model_soon(server: ServerProcess, stream: bool) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(post_bytes(json.dumps({**STORY, **ENDLESS, "stream": stream}).encode()))
        wait_until(lambda: metric(server, "requests_running") == 1)
    wait_until(lambda: metric(server, "requests_running") == 0, seconds=3)
    assert ask(server.port, CHAT, {**STORY, "max_tokens": 2}).status == 200


def test_a_hundred_requests_in_a_row_take_no_more_memory(server: ServerProcess) -> None:
    def batch(n: int) -> None:
        for i in range(n):
            body = {"messages": [{"role": "user", "content": f"Story {i}"}], "max_tokens": 3, "stream": i % 2 == 0}
            assert ask(server.port, CHAT, body).status == 200

    batch(30)
    before, tokens = server.rss(), metric(server, "completion_tokens_total")
    batch(100)
    assert metric(server, "completion_tokens_total") - tokens == 300
    assert server.rss() - before < 8e6
    assert len(list(Path(f"/proc/{server.process.pid}/task").iterdir())) < 40


# ---- the end ----


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_in_the_middle_of_a_reply_ends_the_stream_and_the_server_cleanly(number: int, code: int) -> None:
    with ServerProcess("--slots", "30", "--max-tokens", "4000") as s, begin_stream(s) as c:
        refused: list[Any] = []
        waiting = threading.Thread(target=lambda: refused.append(ask(s.port, CHAT, {**STORY, **ENDLESS})))
        waiting.start()
        wait_until(lambda: metric(s, "requests_waiting") == 1)
        began = time.monotonic()
        assert s.end(number) == code
        assert time.monotonic() - began < 5
        error, done = last_events(c)
        assert (error["error"]["code"], done) == ("stopping", "[DONE]")
        waiting.join(5)
        assert (refused[0].status, refused[0].error["code"]) == (503, "stopping")
        assert not any("Traceback" in line for line in s.lines)


def test_a_read_failure_becomes_an_error_in_the_stream_and_the_server_lives_on(
    exact_server: tuple[ServerProcess, Path],
) -> None:
    s, shard = exact_server
    content, before = shard.read_bytes(), shard.stat()
    with begin_stream(s) as c:
        with shard.open("r+b") as f:
            f.truncate(1000)
        error, done = last_events(c)
        assert (error["error"]["code"], done) == ("ReadError", "[DONE]")
    assert ask(s.port, CHAT, STORY).status == 500  # before the first token: a status of its own
    with shard.open("r+b") as f:
        f.write(content)
    changed = ask(s.port, CHAT, STORY)  # as far as one can tell without reading all of it
    assert changed.status == 500 and "was changed since the model was loaded" in changed.error["message"]
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ask(s.port, CHAT, {**STORY, "max_tokens": 5}).json["usage"]["completion_tokens"] == 5
    assert not any("Traceback" in line for line in s.lines)


def test_clients_do_not_learn_where_the_model_lies(exact_server: tuple[ServerProcess, Path]) -> None:
    s, shard = exact_server
    assert ask(s.port, "/v1/models").json["data"][0]["id"] == "fox"
    for answer in (ask(s.port, CHAT, {**STORY, "model": "x"}), ask(s.port, "/v1/models/x"), ask(s.port, "/metrics")):
        assert str(shard.parent.parent) not in answer.body.decode()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "needs an API key: set MLX_MOECACHE_API_KEY"),
        (["--host", "0.0.0.0", "--api-key", ""], "printable ASCII"),
        (["--allow-origin", "*"], "--allow-origin needs an origin such as"),
        (["--port", "99999"], "--port: must be between 0 and 65535"),
        (["--max-waiting", "-1"], "--max-waiting"),
        (["--host", "no-such-host.invalid", "--api-key", "x"], "cannot listen on no-such-host.invalid"),
        (["--chat-template-config", "["], "--chat-template-config is not JSON"),
        (["--exact", "--strength", "1"], "--exact leaves routing as it is"),
        (["--promt", "x"], "unknown flag --promt"),
    ],
)
def test_a_start_that_cannot_work_is_one_line(
    flags: list[str], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_moecache import server

    monkeypatch.delenv(server.KEY_VARIABLE, raising=False)
    assert server.main(flags) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_flags_are_checked_without_importing_mlx() -> None:
    code = (
        "import sys, mlx_moecache.server as s; "
        "assert s.main(['--allow-origin', 'x']) == 2; sys.exit('mlx.core' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60).returncode == 0


def test_a_key_from_the_environment_counts_and_one_on_the_command_line_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_moecache import server

    def key(*flags: str) -> str | None:
        return server._check(server.setup_arg_parser().parse_args(flags)).api_key

    monkeypatch.setenv(server.KEY_VARIABLE, "from-environment")
    assert key("--host", "0.0.0.0") == "from-environment"
    assert key("--api-key", "from-flag") == "from-flag"
    monkeypatch.delenv(server.KEY_VARIABLE)
    assert key() is None
