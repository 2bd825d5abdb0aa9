"""The slash commands of a chat: what each does and says, wrong input, files, and the real command over a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from chat_models import chat_checkpoint
from chat_sessions import open_session, say
from tiny_models import Shelf

from mlx_moecache.console import chat_files
from mlx_moecache.console.chat_commands import COMMANDS, CONTINUE, EXIT, Outcome, handle, help_lines
from mlx_moecache.console.chat_loop import Console
from mlx_moecache.console.chat_session import ChatSession
from mlx_moecache.demo import demo_model
from mlx_moecache.errors import BudgetError, UsageError

Do = Callable[[str], str]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatSession]:
    """A tiny model with a chat template, loaded once; see `session`."""
    session = open_session(chat_checkpoint(Shelf(tmp_path_factory.mktemp("models"))), slots=5, max_tokens=6)
    session.start = session.model.expert_cache.strategy, session.model.memory_plan  # type: ignore[attr-defined]
    yield session
    session.model.expert_cache.close()


@pytest.fixture
def session(loaded: ChatSession) -> ChatSession:
    """The tiny model as after loading."""
    cache = loaded.model.expert_cache
    loaded.clear()
    loaded.attached.clear()
    loaded.system, loaded.biased = None, None
    s = loaded.settings
    s.temp, s.top_p, s.top_k, s.min_p, s.max_tokens, s.seed, s.verbose = 0.0, 1.0, 0, 0.0, 6, 3, False
    strategy, loaded.model.memory_plan = loaded.start  # type: ignore[attr-defined]
    cache.set_strategy(strategy)
    cache.resize(slots=5)
    cache.reset()
    return loaded


@pytest.fixture
def do(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> Do:
    """Runs a command that goes on; returns what it printed on stdout, which is never nothing."""

    def run(line: str) -> str:
        assert handle(line, session, Console()) == CONTINUE
        out = capsys.readouterr().out
        assert out.endswith("\n") and "\x1b" not in out
        return out

    return run


def refused(line: str, session: ChatSession) -> str:
    """The one line of a command that cannot be done."""
    with pytest.raises((UsageError, BudgetError, OSError)) as error:
        handle(line, session, Console())
    text = str(error.value)
    assert text and "\n" not in text
    return text


# ---- the table ----


def test_help_lists_every_command_and_fits_the_terminal() -> None:
    for width in (40, 80, 200):
        lines = help_lines(width)
        assert max(map(len, lines)) <= width
        assert all(any(name in line for line in lines) for name in COMMANDS)


def test_help_and_its_alias_print_the_list(do: Do) -> None:
    assert do("/help") == do("/?") and "/regen" in do("/HELP")


@pytest.mark.parametrize("line", ["/exit", "/bye", "/quit", " /Exit "])
def test_three_ways_to_leave(line: str, session: ChatSession) -> None:
    assert handle(line, session, Console()) is EXIT and EXIT.leaves and Outcome().text is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/rotuing", "unknown command /rotuing, did you mean /routing? (/help lists them)"),
        ("/xyzzy", "unknown command /xyzzy (/help lists them)"),
        ("/", "unknown command / (/help lists them)"),
        ("/usr/bin/env is a path", "unknown command /usr/bin/env"),
        ("/clear all", "/clear takes no argument, not 'all'; type /clear alone"),
        ("/cache rest", "/cache takes nothing or reset, not 'rest'"),
        ("/show me", "nothing called me to show (choose model, cache, routing, sampling, system)"),
        ("/show modell", "did you mean model?"),
    ],
)
def test_what_is_no_command_is_refused_in_one_line(line: str, says: str, session: ChatSession) -> None:
    assert says in refused(line, session)


@pytest.mark.parametrize("name", [c.name for c in COMMANDS.values() if c.needs])
def test_a_command_without_its_argument_prints_its_usage(name: str, do: Do) -> None:
    assert do(name).startswith(f"usage: {COMMANDS[name].usage}\n")


def test_completion_of_arguments(session: ChatSession, tmp_path: Path) -> None:
    def words(line: str) -> list[str]:
        return list(COMMANDS[line.split()[0]].complete(line, session))

    assert words("/set t") == ["temp", "top-p", "top-k"]
    assert words("/set routing max") == ["max-rank"] == words("/routing max")
    assert words("/show s") == ["sampling", "system"]
    assert words("/cache r") == ["reset"] and words("/cache x") == [] == words("/exact ")
    (tmp_path / "story.txt").write_text("x")
    (tmp_path / "stories").mkdir()
    (tmp_path / ".hidden").write_text("x")
    assert words(f"/read {tmp_path}/st") == [f"{tmp_path}/stories/", f"{tmp_path}/story.txt"]
    assert words(f"/load {tmp_path}/") == words(f"/read {tmp_path}/st")
    assert words("/read /no/such/folder/x") == []


# ---- the conversation ----


def test_clear_forgets_the_conversation_and_keeps_the_system_prompt(do: Do, session: ChatSession) -> None:
    assert do("/clear") == "the conversation is empty\n"
    do("/set system You are brief.")
    say(session, "hello")
    assert do("/clear") == "the conversation is empty; the system prompt stays\n"
    assert session.messages == [] == session.conversation.tokens and session.system == "You are brief."


def test_regen_answers_the_last_message_again(do: Do, session: ChatSession) -> None:
    first = say(session, "hello")
    n = len(session.conversation.tokens)
    assert do("/regen").rstrip("\n") == first.rstrip("\n")
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
    assert len(session.conversation.tokens) == n


def test_regen_without_a_message_says_so_and_the_conversation_goes_on(
    session: ChatSession, capsys: pytest.CaptureFixture[str]
) -> None:
    assert handle("/regen", session, Console()) == CONTINUE
    out, err = capsys.readouterr()
    assert out == "" and err == "error: there is no message to answer again yet; write one first\n"


# ---- /set and /show ----


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temp", "0.7", 0.7),
        ("top-p", "0.9", 0.9),
        ("top-k", "40", 40),
        ("min-p", "0.05", 0.05),
        ("max-tokens", "9", 9),
        ("max-tokens", "-1", -1),
        ("seed", "42", 42),
    ],
)
def test_a_sampling_setting_is_set_and_confirmed(
    name: str, text: str, value: float, do: Do, session: ChatSession
) -> None:
    before = getattr(session.settings, name.replace("-", "_"))
    assert do(f"/set {name} {text}") == f"{name} {text}, before: {before:g}\n"
    assert getattr(session.settings, name.replace("-", "_")) == value
    assert f"{name} {text}\n" in do("/show sampling")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set temp hot", "temp needs a number, not 'hot'"),
        ("/set temp -1", "temp must be at least 0, not -1"),
        ("/set temp nan", "temp must be at least 0, not nan"),
        ("/set top-p 2", "top-p must be between 0 and 1, not 2"),
        ("/set top-k 100000", "top-k must be below this model's"),
        ("/set max-tokens 0", "max-tokens must be at least 1 (or -1), not 0"),
        ("/set seed x", "seed needs a whole number, not 'x'"),
        ("/set tempp 1", "unknown setting tempp, did you mean temp? (choose temp, "),
        ("/set eviction lfu", "eviction is fixed when the model is loaded"),
        ("/set verbose yes", "verbose takes no value, not 'yes'"),
        ("/set memory much", "'much' is not a memory size"),
        ("/set memory 1KB", "too small for this model; the smallest that works is"),
        ("/set slots 1", "1 slots are too few"),
        ("/set slots few", "slots needs a whole number, not 'few'"),
        ("/set slots 5,5,5,5,5,5,5", "7 slot counts for"),
    ],
)
def test_a_wrong_value_changes_nothing_and_says_what_is_allowed(line: str, says: str, session: ChatSession) -> None:
    session.vocabulary = 320
    cache = session.model.expert_cache
    before = vars(session.settings).copy(), cache.slots_per_layer, session.model.memory_plan
    assert says in refused(line, session)
    assert (vars(session.settings), cache.slots_per_layer, session.model.memory_plan) == before


def test_set_alone_lists_what_there_is_and_a_name_alone_its_usage_and_value(do: Do) -> None:
    assert all(name in do("/set") for name in ("temp", "top-p", "memory", "routing", "quiet"))
    assert do("/set temp") == "usage: /set temp NUMBER: temperature; 0 takes the likeliest token\ntemp 0\n"
    assert do("/set slots").startswith("usage: /set slots N")
    assert do("/set routing") == "usage: /set routing NAME, NAME:PARAMETER=VALUE or NUMBER\n" + do("/show routing")


def test_a_seed_begins_the_random_numbers_again(do: Do) -> None:
    drawn = []
    for _ in range(2):
        do("/set seed 5")
        drawn.append(np.array(mx.random.uniform(shape=(3,))).tolist())
    assert drawn[0] == drawn[1]


def test_verbose_and_quiet(do: Do, session: ChatSession) -> None:
    assert "all statistics" in do("/set verbose") and session.settings.verbose
    assert "one line" in do("/set quiet") and not session.settings.verbose


def test_a_system_prompt_is_set_shown_used_and_removed(do: Do, session: ChatSession) -> None:
    assert do("/show system") == "system: none\n"
    assert do("/set system You are  a fox.") == "new system prompt from the next message on\n"
    assert do("/show system") == "system: You are  a fox.\n"
    say(session, "hello")
    start = session.tokenizer.encode("<|system|>You are  a fox.", add_special_tokens=False)
    assert session.conversation.tokens[: len(start)] == start
    assert "all before is read again then" in do("/set system You are a bear.")
    assert do("/set system none") == "no system prompt from the next message on\n" and session.system is None


def test_without_a_template_a_system_prompt_is_refused(shelf: Shelf) -> None:
    plain = open_session(shelf.checkpoint("qwen2_moe"), slots=5)
    assert "no chat template" in refused("/set system x", plain) and plain.system is None


def test_slots_and_memory_move_the_slots_and_replies_stay(do: Do, session: ChatSession) -> None:
    cache = session.model.expert_cache
    do("/exact")
    first = say(session, "hello")
    assert "slots per layer 5 -> 4 of 16" in do("/set slots 4") and set(cache.slots_per_layer) == {4}
    assert do("/regen").startswith(first.rstrip("\n"))
    out = do("/set memory 60%")
    assert "-> 16 of 16" in out and "of the budget of " in out and set(cache.slots_per_layer) == {16}
    assert "more than the budget" not in out
    assert do("/regen").startswith(first.rstrip("\n"))


def test_show_model_says_what_it_is(do: Do) -> None:
    lines = do("/show model").splitlines()
    assert "type      qwen2_moe" in lines and "template  the tokenizer's" in lines
    assert any(line.startswith("experts   16 in each of ") for line in lines)
    assert do("/show cache") == do("/cache")


# ---- /cache and /memory ----


def test_cache_shows_what_the_replies_did_and_reset_empties_it(do: Do, session: ChatSession) -> None:
    assert "decode    nothing yet" in do("/cache")
    say(session, "hello")
    cache = session.model.expert_cache
    total, lowest = cache.stats.decode, min(x.stats.decode.hit_rate or 0 for x in cache.layers)
    out = do("/cache")
    assert f"decode    {total.hit_rate:.1%} of {total.selections:,} hit\n" in out
    assert f"lowest {lowest:.1%}, layer " in out and f"{total.evictions:,} evicted" in out
    assert max(map(len, out.splitlines())) <= 40
    assert "the next reply starts cold" in do("/cache reset")
    assert "decode    nothing yet" in do("/cache") and not any(len(x.residents) for x in cache.layers)


def test_memory_shows_the_plan_beside_what_is_there(do: Do, session: ChatSession) -> None:
    say(session, "hello")
    out = do("/memory")
    assert max(map(len, out.splitlines())) <= 40
    rows = {line[:13].strip(): line[13:].split() for line in out.splitlines()}
    assert rows["weights"][:2] == rows["weights"][2:], "planned is what is held"
    assert {"slots", "KV cache", "transients", "sum"} <= rows.keys()
    assert f"KV cache: {len(session.conversation.tokens)} of 600 tokens" in out
    assert "resized" not in out
    do("/set slots 4")
    assert "slots: resized since that plan" in do("/memory")


# ---- /routing and /exact ----


@pytest.mark.parametrize(
    ("argument", "spec"),
    [
        ("original", "exact: the model's own routing"),
        ("price", "routing price:delta=0.02,j=1"),
        ("price:delta=0.5", "routing price:delta=0.5,j=1"),
        ("price 0.5", "routing price:delta=0.5,j=1"),
        ("0.25", "routing cache-prior:strength=0.25,j=2"),
        ("cache-prior 0.25", "routing cache-prior:strength=0.25,j=2"),
        ("max-rank 5", "routing max-rank:j=2,m=5"),
        ("pruning 1", "routing pruning:k=1"),
        ("0", "exact: the model's own routing (cache-prior:strength=0.0,j=2 changes nothing)"),
    ],
)
def test_routing_is_switched_by_name_by_number_or_both(argument: str, spec: str, do: Do, session: ChatSession) -> None:
    assert do(f"/routing {argument}") == f"{spec}\n"
    assert do("/routing").splitlines()[0] == spec
    assert do("/show routing") == f"{spec}\n"
    say(session, "hello")  # and it works


def test_a_number_keeps_the_other_parameters(do: Do) -> None:
    do("/set routing cache-prior:strength=0.1,j=0")
    assert do("/routing 0.3") == "routing cache-prior:strength=0.3,j=0\n"


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("prior", "unknown routing 'prior' (choose cache-prior, price, "),
        ("price:x=1", "unknown parameter 'x' of routing 'price' (allowed: delta, j)"),
        ("price:delta=7", "delta of price must be a finite number from 0 to 1, not 7.0"),
        ("cache-prior -1", "strength of cache-prior must be"),
        ("cache-prior nan", "strength of cache-prior must be"),
        ("original 0.1", "/routing takes a name, a number or both, not 'original 0.1'"),
        ("price much", "/routing takes a name, a number or both"),
        ("a b c", "/routing takes a name, a number or both"),
    ],
)
def test_a_wrong_routing_changes_nothing_and_says_what_is_allowed(
    argument: str, says: str, session: ChatSession
) -> None:
    before = session.model.expert_cache.strategy
    assert says in refused(f"/routing {argument}", session)
    assert session.model.expert_cache.strategy == before


def test_exact_goes_there_and_back_and_says_whether_earlier_turns_were_biased(do: Do, session: ChatSession) -> None:
    assert do("/exact") == "exact: the model's own routing\n"
    say(session, "hello")
    assert do("/show routing") == "exact: the model's own routing\n"
    assert do("/exact") == "routing cache-prior:strength=0.6,j=2\n"
    session.settings.max_tokens = 40
    say(session, "and now biased")
    assert not session.conversation.is_exact, "or this test shows nothing"
    assert do("/exact") == "exact from here: earlier turns were biased; /clear starts over\n"
    do("/clear")
    assert do("/show routing") == "exact: the model's own routing\n"


def test_exact_after_an_exact_start_goes_to_the_usual_routing(do: Do, session: ChatSession) -> None:
    session.model.expert_cache.set_strategy("original")
    assert do("/exact").startswith("routing cache-prior:strength=0.09375")


def test_a_bias_without_effect_says_so(do: Do) -> None:
    do("/set slots 16")
    assert do("/routing price") == ("routing price:delta=0.02,j=1, without effect while all experts are in memory\n")


# ---- /save, /load, /read ----


def test_a_saved_conversation_is_the_same_when_it_is_loaded(do: Do, session: ChatSession, tmp_path: Path) -> None:
    file = tmp_path / "a chat.json"
    do("/exact")
    do("/set system You are a fox.")
    do("/set temp 0.123456789")
    do("/set temp 0")
    do("/set top-p 0.123456789")
    say(session, "héllo 狐")
    messages, settings = [dict(m) for m in session.messages], vars(session.settings).copy()
    assert do(f"/save {file}") == f"2 messages saved in {file}\n"
    following = say(session, "and then?")
    do("/clear")
    do("/set system none")
    do("/set top-p 1")
    out = do(f'/load "{file}"')
    assert out.startswith(f"2 messages from {file}, ") and "warning" not in out and "dropped" not in out
    assert session.messages == messages and session.system == "You are a fox."
    assert vars(session.settings) == settings
    assert say(session, "and then?") == following, "it goes on as if nothing had been between"
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["model"] == session.name and "狐" in file.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["a chat.json"], "no temporary files"


def test_loading_says_what_is_dropped_that_the_model_differs_and_that_an_answer_is_missing(
    do: Do, session: ChatSession, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    write_chat(file, model="other", messages=[{"role": "user", "content": "hi"}])
    say(session, "hello")
    lines = do(f"/load {file}").splitlines()
    assert lines[0].endswith("; 2 messages before it dropped")
    assert lines[1] == f"warning: it was with other, and this is {session.name}"
    assert lines[2] == "its last message has no answer yet: /regen answers it"
    do("/regen")
    assert [m["role"] for m in session.messages] == ["user", "assistant"]


def write_chat(file: Path, **changes: Any) -> None:
    chat: dict[str, Any] = {"format": "mlx_moecache chat", "version": 1, "model": "chat", "system": None}
    file.write_text(json.dumps({**chat, "settings": {}, "messages": [], **changes}))


BROKEN: dict[str, Any] = {
    "not JSON": b"{",
    "another format": b'{"messages": []}',
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "binary": b"\0\1\2",
    "not UTF-8": b"\xff\xfe{}",
    "newer": {"version": 2},
    "messages": {"messages": "hello"},
    "no dict": {"messages": ["hello"]},
    "no content": {"messages": [{"role": "user"}]},
    "a number": {"messages": [{"role": "user", "content": 3}]},
    "a role": {"messages": [{"role": "tool", "content": "x"}]},
    "order": {"messages": [{"role": "assistant", "content": "x"}]},
    "surrogate": {"messages": [{"role": "user", "content": "\ud800"}]},
    "system": {"system": 3},
    "settings": {"settings": []},
    "a setting": {"settings": {"temp": "hot"}},
    "an unknown setting": {"settings": {"seed": "4", "memory": "1GB"}},
    "too long": {"messages": [{"role": "user", "content": "x" * 700}]},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_foreign_or_broken_file_is_refused_and_nothing_changes(
    case: str, session: ChatSession, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    content = BROKEN[case]
    file.write_bytes(content) if isinstance(content, bytes) else write_chat(file, **content)
    session.messages = [{"role": "user", "content": "keep me"}]
    session.system = "keep me, too"
    before = vars(session.settings).copy()
    refused(f"/load {file}", session)
    assert session.messages == [{"role": "user", "content": "keep me"}] and session.system == "keep me, too"
    assert vars(session.settings) == before


def test_save_replaces_its_own_files_only(do: Do, session: ChatSession, tmp_path: Path) -> None:
    mine, other, link = tmp_path / "mine", tmp_path / "other", tmp_path / "link"
    do(f"/save {mine}")
    say(session, "hello")
    assert do(f"/save {mine}") == f"2 messages saved in {mine}, in place of those before\n"
    other.write_text("a diary")
    assert "choose another name" in refused(f"/save {other}", session) and other.read_text() == "a diary"
    link.symlink_to(mine)
    do(f"/save {link}")
    assert link.is_symlink() and not mine.is_symlink()
    assert "is a folder" in refused(f"/save {tmp_path}", session)
    assert "no folder" in refused(f"/save {tmp_path}/none/x", session)


def test_a_save_that_fails_leaves_what_was_there(
    do: Do, session: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine"
    do(f"/save {file}")
    before = file.read_bytes()
    say(session, "hello")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(chat_files.os, "fsync", full)
        assert f"No space left on device: '{file}'" in refused(f"/save {file}", session)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_files_that_were_read_go_before_the_next_message_only(do: Do, session: ChatSession, tmp_path: Path) -> None:
    for name, text in (("a.txt", "\ufeffAlpha\r\nbeta\r\n"), ("b c.txt", "Gamma")):
        (tmp_path / name).write_bytes(text.encode())
    assert do(f"/read {tmp_path}/a.txt") == f"{tmp_path}/a.txt: 10 tokens, before your next message\n".replace(
        "10", str(len("Alpha\nbeta\n"))
    )
    do(f"/read {tmp_path}/b c.txt")
    say(session, "What is this?")
    assert session.messages[0]["content"] == "Alpha\nbeta\n\nGamma\n\nWhat is this?"
    say(session, "And this?")
    assert session.messages[2]["content"] == "And this?"


def test_clear_drops_a_file_that_was_read(do: Do, session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Alpha")
    do(f"/read {tmp_path}/a.txt")
    do("/clear")
    say(session, "hello")
    assert session.messages[0]["content"] == "hello"


def test_what_is_no_text_or_too_long_is_not_read(session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"abc\0def")
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "long").write_text("x" * 600)
    (tmp_path / "huge").write_text("x" * 10**5)
    os.mkfifo(tmp_path / "pipe")
    says = {
        "binary": "is binary; give a text file",
        "latin": "is not UTF-8 text",
        "empty": "is empty",
        "long": "has 600 tokens, and 600 of 600 are left",
        "huge": "is larger than 19,200 bytes",
        "pipe": "is no ordinary file",
        "none": "No such file",
        "": "is a folder",
    }
    for name, text in says.items():
        assert text in refused(f"/read {tmp_path}/{name}", session)
    assert "is no ordinary file" in refused("/read /dev/zero", session)
    assert session.attached == []


def test_two_files_share_the_context(do: Do, session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 400)
    do(f"/read {tmp_path}/a")
    assert "has 400 tokens, and 200 of 600 are left" in refused(f"/read {tmp_path}/a", session)


# ---- the real command, over a pipe ----


def test_a_session_over_a_pipe_with_the_demo_model(tmp_path: Path) -> None:
    saved, text = tmp_path / "chat.json", tmp_path / "story.txt"
    text.write_text("A little fox lived in the forest.")
    lines = [
        "/nonsense",
        "/ab",
        "/routing 0.6",
        "Once upon a time there was a fox.",
        "/cache",
        "/ab",
        "/exact",
        "/memory",
        f"/save {saved}",
        "/clear",
        f"/load {saved}",
        f"/read {text}",
        "What did he do?",
        "/set temp warm",
        "/bye",
        "never read",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_moecache.chat", "--no-warm-start", "--slots", "20", "-m", "12"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONUTF8": "1", "COLUMNS": "100"},
    )
    out, errors = done.stdout, [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert errors == [
        "error: unknown command /nonsense (/help lists them)",
        "error: there is no message to answer again yet; write one first",
        "error: temp needs a number, not 'warm' (temperature; 0 takes the likeliest token)",
    ]
    assert "Traceback" not in done.stderr and "\x1b" not in out + done.stderr
    for part in (
        "routing cache-prior:strength=0.6,j=2\n",
        "20 of 60 per layer, lru\n",
        " | cache-prior:strength=0.6,j=2\n",
        "exact from here: earlier turns were biased",
        "KV cache: ",
        f"2 messages saved in {saved}\n",
        "the conversation is empty\n",
        f"2 messages from {saved}, ",
        f"{text}: 8 tokens, before your next message\n",
    ):
        assert part in out, part
    assert json.loads(saved.read_text())["messages"][0]["content"] == lines[3]


def test_without_unicode_the_picture_is_made_of_digits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_moecache.chat", "--no-warm-start", "--slots", "20", "-m", "5"],
        input="The fox\n/cache\n/routing\n",
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert done.returncode == 0 and "0: below 10%, 9: 90% or more" in done.stdout
    assert "?" not in done.stdout.partition("decode ")[2]


def test_a_model_that_was_started_with_the_demo_folder_keeps_its_name(tmp_path: Path) -> None:
    session = open_session(demo_model(), slots=20)
    handle(f"/save {tmp_path}/x", session, Console())
    assert json.loads((tmp_path / "x").read_text())["model"] == session.name
