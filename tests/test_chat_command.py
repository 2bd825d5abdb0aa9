"""The chat command without a terminal, and its parts: history, reasoning marks, the line after a reply."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_models import chat_checkpoint
from faulty_reads import after_each_read
from tiny_models import Shelf

from mlx_moecache.chat import main
from mlx_moecache.console import chat_loop
from mlx_moecache.console.chat_loop import Console, completions, converse
from mlx_moecache.console.chat_report import fitted, turn_line
from mlx_moecache.console.chat_session import ChatSession, ReplySettings, Turn
from mlx_moecache.console.emulated_run import EmulatedRun
from mlx_moecache.console.interrupt import Interrupt
from mlx_moecache.console.line_editor import Entry, LineEditor
from mlx_moecache.console.line_history import KEPT, MOST_BYTES, LineHistory, state_folder
from mlx_moecache.console.report import CacheUse, Reply
from mlx_moecache.console.thoughts import ThoughtSplitter
from mlx_moecache.conversation import ContextFullError, Conversation
from mlx_moecache.enforce import Account, Holder, OverLimitError
from mlx_moecache.errors import ReadError, UsageError
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel
from mlx_moecache.stats import CacheStats, PhaseStats

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def chat(tmp_path: Path) -> Run:
    """The command in a process of its own, with `lines` on standard input."""

    def run(lines: str | bytes, *argv: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "mlx_moecache.chat", "--no-warm-start", *argv],
            input=lines.encode() if isinstance(lines, str) else lines,
            capture_output=True,
            timeout=100,
            env={**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": "", "PYTHONUTF8": "1"},
        )

    return run


@pytest.fixture
def model(shelf: Shelf) -> str:
    return str(chat_checkpoint(shelf))


# ---- the command, without a terminal ----


def test_each_line_is_answered_plainly_on_stdout_and_statistics_go_to_stderr(chat: Run, tmp_path: Path) -> None:
    done = chat("Tell me a story about a dog.\n\nAnd then?\n", "demo", "--slots", "30", "-m", "12", "--exact")
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0
    assert len(out.splitlines()) == 2 and "\x1b" not in out + err and ">" not in out
    lines = err.splitlines()
    assert len(lines) == 2 and all(line.endswith("· exact") for line in lines)
    assert all("12 tokens (cut at max-tokens) · " in line and "% hit · " in line for line in lines)
    assert not list(tmp_path.rglob("chat_history")), "what a program writes is no history of a person's"


def test_the_model_may_be_named_either_way_but_once(chat: Run, model: str) -> None:
    ways = [chat("hi\n", *way, "--slots", "5", "-m", "5", "--exact") for way in ([model], ["--model", model])]
    assert ways[0].returncode == 0 and ways[0].stdout == ways[1].stdout
    twice = chat("", "a", "--model", "b")
    assert twice.returncode == 2
    assert twice.stderr.decode() == "error: the model is given twice, a and --model b; leave one of them out\n"


def test_what_the_cache_held_is_there_at_the_next_start(chat: Run, tmp_path: Path) -> None:
    flags = ["demo", "--slots", "30", "-m", "3", "--warm-start", "--warm-start-folder", str(tmp_path / "warm")]
    for _ in range(2):
        done = chat("A dog\n", *flags)
        assert done.returncode == 0 and done.stderr.count(b"\n") == 1, done.stderr
    assert [path for path in (tmp_path / "warm").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--memroy", "1GB"], "did you mean --memory?"),
        (["--max-context", "1"], "--max-context: must be at least 2, not 1"),
        (["--draft-model", "x"], "speculative decoding is not supported"),
        (["--device", "nokia-3310"], "nokia-3310"),
        (["--memory", "1GB", "--slots", "3"], "give one of them"),
        (["--trace", "x"], "unknown flag --trace"),
        (["no/such/model/here"], "no/such/model/here"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(chat: Run, argv: list[str], says: str) -> None:
    done = chat("", *argv)
    err = done.stderr.decode()
    assert done.returncode == 2 and says in err and err.count("\n") == 1 and err.startswith("error: ")


def test_help_is_shown_without_importing_mlx() -> None:
    code = "import sys\nfrom mlx_moecache.chat import main\ntry: main(['-h'])\nexcept SystemExit: pass\n"
    code += "print('mlx' in ' '.join(m for m in sys.modules if m.startswith('mlx.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("False\n") and "--max-context" in done.stdout and '"""' in done.stdout


def test_unknown_commands_and_bad_text_get_a_line_each_and_the_rest_is_answered(chat: Run, model: str) -> None:
    lines = b"/nonsense\n\xff\xfe\n/exit now\nhello\n/exit\nnever read\n"
    done = chat(lines.replace(b"/exit now\n", b""), model, "--slots", "5", "-m", "4", "--exact")
    err = done.stderr.decode().splitlines()
    assert done.returncode == 2, "a script can tell that not every line was answered"
    assert "/nonsense" in err[0] and "/help" in err[0]
    assert err[1] == "error: this line is not UTF-8 text, so it was not sent; convert it first"
    assert len(err) == 3 and err[2].startswith("4 tokens")


def test_three_quotes_hold_several_lines_and_slashes_together(chat: Run) -> None:
    flags = ["demo", "--slots", "30", "-m", "6", "--exact", "--verbose"]
    several = chat('"""/a dog\nruns\n"""\n', *flags)
    assert several.returncode == 0 and several.stderr.count(b" tokens (cut") == 1
    other = chat("a dog\nruns\n", *flags)
    assert other.stderr.count(b" tokens (cut") == 2
    unfinished = chat('"""/a dog\nruns', *flags)
    assert unfinished.stdout == several.stdout


def test_a_model_without_a_template_continues_the_text_and_says_so_once(chat: Run, shelf: Shelf) -> None:
    folder = str(shelf.checkpoint("qwen2_moe"))
    done = chat("one\ntwo\n", folder, "--slots", "5", "-m", "4", "--exact")
    assert done.returncode == 0
    assert done.stderr.decode().count("this model has no chat template: it continues your text\n") == 1
    refused = chat("", folder, "--slots", "5", "--system-prompt", "Be brief.")
    assert refused.returncode == 2 and "no chat template, so --system-prompt has no use" in refused.stderr.decode()


def test_a_full_context_says_the_numbers_and_what_to_do_and_clear_helps(chat: Run, model: str) -> None:
    lines = "hello there\nand again\n/clear\nhello there\n"
    done = chat(lines, model, "--slots", "5", "-m", "-1", "--max-context", "80", "--exact")
    full = [x for x in done.stderr.decode().splitlines() if "context is full" in x]
    assert len(full) == 1 and "80" in full[0] and "/clear" in full[0] and "--max-context" in full[0]
    assert done.stderr.decode().count("(cut: context full)") == 2
    assert done.stdout.count(b"\n") >= 2


def test_an_emulated_device_that_is_out_of_memory_ends_the_run(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checks = 0

    def check(self: EmulatedRun, model: object, kv_cache: object = ()) -> None:
        nonlocal checks
        checks += 1
        if checks > 8:
            raise OverLimitError("the phone ends the app", Account(100, (Holder("KV cache", 90, 10),)))

    monkeypatch.setattr(EmulatedRun, "check", check)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\nagain\n"), encoding="utf-8"))
    code = main([model, "--device", "iphone-16-pro", "-m", "50", "--exact", "--no-warm-start"])
    out, err = capsys.readouterr()
    assert code == 2 and checks == 9
    assert err.endswith("error: the phone ends the app\n") and "KV cache" in err
    assert out.endswith("\n") and len(out) > 3


def test_the_next_command_finds_nobody_reading(model: str) -> None:
    code = f"{sys.executable} -m mlx_moecache.chat {model} --slots 5 -m 300 --no-warm-start | head -c 3 >/dev/null"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; yes hello | head -n 50 | {code}"], capture_output=True, timeout=100
    )
    assert done.returncode == 141 and b"Traceback" not in done.stderr


# ---- the session ----


@pytest.fixture
def session(shelf: Shelf) -> Iterator[ChatSession]:
    opened = OpenedModel(chat_checkpoint(shelf))
    tokenizer = opened.tokenizer()
    emulated = EmulatedRun(None)
    model = opened.load(MemoryOptions(slots=5, max_context=900), CacheOptions(routing="original"))
    conversation = Conversation(model, tokenizer, max_context=600)
    yield ChatSession("tiny", opened.folder, conversation, ReplySettings(max_tokens=8), emulated)


def silent(text: str) -> None:
    pass


def test_the_kv_cache_is_kept_between_turns(session: ChatSession) -> None:
    pieces: list[str] = []
    first = session.reply("hello", pieces.append, Interrupt())
    assert first.cached_tokens == 0 and "".join(pieces) == first.text
    second = session.reply("more", silent, Interrupt())
    assert second.cached_tokens == first.prompt_tokens + first.generated_tokens - 1
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    again = session.reply(None, silent, Interrupt())
    assert again.text == second.text and again.prompt_tokens == 1
    assert len(session.messages) == 4


def test_a_reply_is_known_by_its_tokens_not_by_how_its_text_would_be_cut(session: ChatSession) -> None:
    session.reply("hello", silent, Interrupt())  # random bytes are seldom the tokens of their text
    tokens = list(session.conversation.tokens)
    session.messages.append({"role": "user", "content": "more"})
    assert session.prompt_tokens()[: len(tokens)] == tokens


def test_an_interrupt_keeps_what_was_written_and_what_was_held_back(session: ChatSession) -> None:
    session.settings.max_tokens = 200
    interrupt, pieces = Interrupt(), []

    def write(text: str) -> None:
        pieces.append(text)
        interrupt.requested = len(pieces) >= 3

    reply = session.reply("hello", write, interrupt)
    assert reply.finish_reason == "interrupt" and 3 <= reply.generated_tokens < 200
    assert session.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    shown = session.tokenizer.decode(session.prompt_tokens())
    assert session.reply("go on", silent, Interrupt()).cached_tokens > 0 and "hello" in shown


def test_an_interrupt_before_the_first_word_leaves_the_message_for_another_try(session: ChatSession) -> None:
    interrupt = Interrupt()
    interrupt.requested = True
    assert session.reply("hello", silent, interrupt).finish_reason == "interrupt"
    assert session.messages == [{"role": "user", "content": "hello"}]
    session.reply(None, silent, Interrupt())
    before = list(session.messages)
    assert [m["role"] for m in before] == ["user", "assistant"]
    session.reply(None, silent, interrupt)
    assert session.messages == before, "an answer is given up only for another one"


def test_the_next_message_replaces_one_that_got_no_answer(session: ChatSession) -> None:
    interrupt = Interrupt()
    interrupt.requested = True
    session.reply("hello", silent, interrupt)
    session.reply("good day", silent, Interrupt())
    assert [m["content"] for m in session.messages if m["role"] == "user"] == ["good day"]


def test_what_cannot_be_asked_changes_nothing(session: ChatSession) -> None:
    with pytest.raises(UsageError, match="no message to answer again"):
        session.reply(None, silent, Interrupt())
    with pytest.raises(ContextFullError):
        session.reply("x" * 700, silent, Interrupt())
    assert session.messages == []
    session.reply("hello", silent, Interrupt())
    before = list(session.messages)
    session.system = "REFUSE"  # this template raises an exception
    with pytest.raises(UsageError, match="chat template refuses this conversation"):
        session.reply("more", silent, Interrupt())
    assert session.messages == before


def test_a_failed_read_keeps_the_words_so_far_and_the_next_reply_works(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.settings.max_tokens = 100
    written: list[str] = []

    def fail(n: int, requests: object) -> None:
        if len(written) > 4:
            raise ReadError("the disk is gone")

    with monkeypatch.context() as patch, pytest.raises(ReadError):
        after_each_read(patch, fail)
        session.reply("hello", written.append, Interrupt())
    assert session.messages[-1] == {"role": "assistant", "content": "".join(written)}
    assert session.last_stats is not None and session.last_stats.reply.finish_reason == "error"
    session.settings.max_tokens = 5
    assert session.reply("again", silent, Interrupt()).generated_tokens == 5


def test_a_seed_gives_the_same_words_again(session: ChatSession) -> None:
    session.settings.temp, session.settings.seed = 1.0, 7
    texts = []
    for _ in range(2):
        session.reseed()
        session.clear()
        texts.append(session.reply("hello", silent, Interrupt()).text)
    session.clear()
    assert texts[0] == texts[1] != session.reply("hello", silent, Interrupt()).text


# ---- the line after a reply ----


def turn(**changes: Any) -> Turn:
    decode = PhaseStats(selections=1000, hits=713, misses=287, loads=287, bytes_read=41 * 4_100_000, swapped=88)
    cache = CacheUse(
        CacheStats(PhaseStats(), decode), (5,), (8,), "lru", "cache-prior", {"strength": 0.1}, False, "x", None
    )
    given = {"reply": Reply("", "stop", 9, 0, 42, 100.0, 31.42), "cache": cache, "is_exact": False}
    return Turn(**{**given, "cut_by_context": False, **changes})


def test_the_line_says_rate_hits_bytes_and_what_was_swapped() -> None:
    assert turn_line(turn(), 120) == [
        "42 tokens · 31.4 tok/s · 71.3% hit · 4.10 MB/token read · cache-prior, 8.8% swapped"
    ]


def test_the_line_is_broken_between_its_parts_on_a_narrow_terminal() -> None:
    lines = turn_line(turn(), 40)
    assert len(lines) > 1 and all(len(x) <= 40 for x in lines)
    assert " · ".join(lines) == turn_line(turn(), 200)[0].replace("cache-prior, ", "")
    assert len(turn_line(turn(), 80)) == 1, "without the strategy's name, which the banner has"
    assert fitted(["a" * 50, "b"], 40) == ["a" * 50, "b"]


def test_exact_means_the_whole_conversation() -> None:
    t = turn()
    exact = CacheUse(CacheStats(), (5,), (8,), "lru", "original", {}, False, "x", None)
    assert turn_line(turn(cache=exact, is_exact=True), 120)[0].endswith("· exact")
    assert turn_line(turn(cache=exact), 120)[0].endswith("· exact from here")
    assert not turn_line(t, 120)[0].endswith("exact")


# ---- reasoning, history, entries ----


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_reasoning_is_told_from_the_answer_however_the_text_is_cut(size: int) -> None:
    text = "well <think>a <b> </thin c</think>so <th done"
    splitter = ThoughtSplitter("<think>", "</think>")
    pieces = [p for i in range(0, len(text), size) for p in splitter.feed(text[i : i + size])] + splitter.rest()
    assert "".join(p for p, _ in pieces) == text
    assert "".join(p for p, thought in pieces if thought) == "<think>a <b> </thin c</think>"


def test_reasoning_may_have_begun_in_the_prompt_or_not_exist() -> None:
    inside = ThoughtSplitter("<think>", "</think>", inside=True)
    assert inside.feed("hm</think>yes") == [("hm</think>", True), ("yes", False)]
    assert ThoughtSplitter(None, None).feed("<think>") == [("<think>", False)]


def test_history_outlives_a_run_and_is_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "chat_history"
    first, second = LineHistory(path), LineHistory(path)
    assert first.add("one") and first.add("two\nlines") and not first.add("two\nlines") and not first.add("  ")
    second.add("three")
    assert LineHistory(path).entries == ["one", "two\nlines", "three"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_history_that_is_damaged_too_long_or_not_writable_is_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_bytes(b'"good"\n{broken\n\xff\xff\n17\n"fine"\n')
    assert LineHistory(path).entries == ["good", "fine"]
    path.write_text("".join(f'"{i} {"x" * 1000}"\n' for i in range(MOST_BYTES // 1000 + 500)))
    assert len(LineHistory(path).entries) == KEPT
    assert len(path.read_text().splitlines()) == KEPT and list(tmp_path.iterdir()) == [path]
    blocked = LineHistory(path / "under a file")
    assert blocked.add("x") and blocked.entries == ["x"]
    assert LineHistory(None).add("x")


def test_where_the_history_lies() -> None:
    home = Path.home()
    assert state_folder({}, "linux") == home / ".local" / "state" / "mlx_moecache"
    assert state_folder({"XDG_STATE_HOME": "/s"}, "linux") == Path("/s/mlx_moecache")
    assert state_folder({"XDG_STATE_HOME": "relative"}, "linux") == home / ".local" / "state" / "mlx_moecache"
    assert state_folder({}, "darwin") == home / "Library" / "Application Support" / "mlx_moecache"


class Typed:
    """Lines as if typed; remembers what is to be remembered."""

    interactive = True

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines, self.remembered = list(lines), list[str]()

    def line(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def remember(self, text: str) -> None:
        self.remembered.append(text)


@pytest.mark.parametrize(
    ("lines", "entry", "is_command"),
    [
        (["hello"], Entry("hello"), False),
        (["/help"], Entry("/help"), True),
        ([" /etc is a folder"], Entry(" /etc is a folder"), False),
        (["// pasted\ncode"], Entry("// pasted\ncode"), False),
        (['"""/a', "", 'b"""'], Entry("/a\n\nb", quoted=True), False),
        (['"""', "a", '"""'], Entry("a", quoted=True), False),
        (['"""one line"""'], Entry("one line", quoted=True), False),
        (['"""', "the end is missing"], Entry("the end is missing", quoted=True), False),
    ],
)
def test_what_is_one_entry(lines: list[str], entry: Entry, is_command: bool) -> None:
    source = Typed(lines)
    read = LineEditor(source).read()
    assert (read, read.is_command) == (entry, is_command)
    assert len(source.remembered) == 1, "several lines come back as one"
    assert json.loads(json.dumps(source.remembered[0])) == source.remembered[0]


# ---- what is shown ----


def test_reasoning_is_dim_also_where_the_template_begins_it(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_loop, "dimmed", lambda text, stream: f"[{text}]")
    for opens_thought in (False, True):
        opened = OpenedModel(chat_checkpoint(shelf, opens_thought=opens_thought))
        model = opened.load(MemoryOptions(slots=5, max_context=600), CacheOptions(routing="original"))
        conversation = Conversation(model, opened.tokenizer(), max_context=300)
        tiny = ChatSession("tiny", opened.folder, conversation, ReplySettings(max_tokens=6), EmulatedRun(None))
        reply = Console().stream_reply(tiny, "hello")
        out, _ = capsys.readouterr()
        assert reply is not None and (out.replace("[", "").replace("]", "") != out) == opens_thought
        assert out.replace("][", "").rstrip("\n") == (f"[{reply.text}]" if opens_thought else reply.text).rstrip("\n")


def test_an_error_nobody_expected_is_one_line_too(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **how: Any) -> None:
        raise ValueError("something\nodd")

    monkeypatch.setattr(session.conversation, "stream", broken)
    console = Console()
    assert console.stream_reply(session, "hello") is None and console.problems == 1
    assert capsys.readouterr().err == "error: unexpected ValueError: something odd (--debug shows where)\n"
    assert session.messages == [], "nothing was asked"


def test_completion_knows_commands_only_after_a_slash(session: ChatSession) -> None:
    assert "/clear" in completions("/c", session) and completions("c", session) == []
    assert completions("/nonsense x", session) == []


def test_ctrl_c_just_after_a_reply_does_not_lose_the_conversation(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hasty(Console):
        def _show_statistics(self, session: ChatSession) -> None:
            raise KeyboardInterrupt

    editor = LineEditor(Typed(["hello", "/nonsense"]))
    assert converse(session, Hasty(), editor, lambda: None) == 0
    assert capsys.readouterr().err.startswith("Ctrl-D or /exit leaves\nerror: unknown command /nonsense")
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
