"""The chat in a real pseudo-terminal: what a person types, interrupts and sees."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("pexpect")
pytest.importorskip("pyte")

from terminal_screen import Terminal

WITHOUT_TOOLKIT = "import sys; sys.modules['prompt_toolkit'] = None\n"
RUN = "import sys\nfrom mlx_moecache.chat import main\nsys.exit(main(sys.argv[1:]))\n"
FAILING = """
from mlx_moecache.checkpoints.reader import Pending
from mlx_moecache.errors import ReadError
wait, batches = Pending.wait, 0
def look(self):
    global batches
    wait(self)
    batches += 1
    if batches == 40:
        raise ReadError("the disk is gone")
Pending.wait = look
"""
DOG = "Tell me a story about a dog.\r"
PASTE = "\x1b[200~one\ntwo\x1b[201~"

Chat = Callable[..., Terminal]


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    """The chat with the demo model, its prompt already there."""
    open_ones: list[Terminal] = []

    def start(*argv: str, before: str = "", columns: int = 100, **environment: str) -> Terminal:
        t = Terminal(
            ["-c", before + RUN, "--slots", "30", "--no-warm-start", *argv],
            columns=columns,
            **{"HOME": str(tmp_path), "XDG_STATE_HOME": "", **environment},
        )
        open_ones.append(t)
        t.until("Ctrl-D or /exit leaves")
        t.until("\n>")
        return t

    yield start
    for t in open_ones:
        t.process.close(force=True)


@pytest.mark.parametrize("before", ["", WITHOUT_TOOLKIT], ids=["prompt_toolkit", "readline"])
def test_a_conversation_from_banner_to_leaving(chat: Chat, before: str, tmp_path: Path) -> None:
    if not before:
        pytest.importorskip("prompt_toolkit")
    t = chat("-m", "12", "--exact", before=before)
    t.send(DOG)
    t.until("· exact", 2)  # the banner's, and that of the reply
    t.send("/nonsense\r")
    t.until("unknown command /nonsense")
    t.send("/cle\t")
    t.until("> /clear")
    t.send("\r")
    t.until("conversation is empty")
    t.send(PASTE)
    t.until("\ntwo")
    t.settle()
    t.send("\r")
    t.until("12 tokens", 2)
    t.send('"""three\r')
    t.until("...")
    t.send('four"""\r')
    t.until("12 tokens", 3)
    t.send("\x1b[A")
    t.until('"""three', 2)  # comes back as it was typed
    t.interrupt()
    t.settle()
    t.send("\x04")
    assert t.end() == 0
    seen = re.sub(r"[\d.,]+ (tok/s|MB|KB)", r"N \1", t.text())
    seen = re.sub(r"[\d.]+% hit", "N% hit", seen).split("\n")
    dots = " · "
    assert seen[:9] == [
        "demo_model · 60 experts x 6 layers, top-4",
        "30/60 slots per layer (N MB) · lru · plan N MB · exact",
        "/help lists commands · Ctrl-D or /exit leaves",
        "> Tell me a story about a dog.",
        seen[4],
        "12 tokens (cut at max-tokens) · N tok/s · N% hit · N KB/token read · exact",
        "> /nonsense",
        "error: unknown command /nonsense (/help lists them)",
        "> /clear",
    ], "\n".join(seen)
    assert len(seen[4]) > 20 and dots not in seen[4]
    assert "> one\ntwo\n" in t.text() and '> """three\n... four"""\n' in t.text()
    assert f"\x1b[2m{12} tokens" in t.raw, "statistics are dim"
    history = next(tmp_path.rglob("chat_history")).read_text().splitlines()
    assert history[-2:] == [r'"one\ntwo"', r'"\"\"\"three\nfour\"\"\""']

    again = chat("-m", "3", "--exact", before=before)
    again.send("\x1b[A")  # what was typed in an earlier run
    again.until('> """three\nfour"""')


def test_ctrl_c_ends_the_reply_keeps_the_conversation_and_says_how_to_leave(chat: Chat) -> None:
    t = chat("-m", "1000", "--temp", "1", "--seed", "3", "--verbose")
    t.send(DOG)
    t.until("Once upon")
    t.interrupt()
    t.until("chat     cache-prior")  # the last of the long lines
    shown = t.text().split("story about a dog.\n")[1].split("(interrupted)")[0]
    t.interrupt()
    t.until("Ctrl-D or /exit leaves", 2)
    t.send("half a")
    t.until("> half a")
    t.interrupt()
    t.settle()
    assert t.text().count("Ctrl-D or /exit leaves") == 2, "what was typed is dropped, nothing else"
    t.resize(40)
    t.send("/set quiet\r")
    t.until("one line of statistics")
    t.send("Go on\r")
    t.until("> Go on\n")
    t.until(" ", t.text().count(" ") + 3)  # some words
    t.interrupt()
    t.until("(interrupted)", 2)
    t.until("\n>", 6)
    t.send("\x04")
    assert t.end() == 0 and len(shown) > 5
    last = t.text().split("> Go on\n")[1].split("\n")
    line = next(x for x in last if "(interrupted)" in x)
    assert "hit" not in line and "hit" in last[last.index(line) + 1], "broken between its parts at 40 columns"


def test_ctrl_c_twice_in_one_reply_ends_the_program_and_history_is_kept(chat: Chat, tmp_path: Path) -> None:
    t = chat("--flash", "100KB/s")  # a prompt takes half a minute
    t.send(DOG)
    t.until("reading the prompt")
    t.interrupt()
    t.settle(1)
    t.interrupt()
    assert t.end(seconds=10) == 130
    assert "Traceback" not in t.raw
    assert "story about a dog" in next(tmp_path.rglob("chat_history")).read_text()


def test_an_error_of_the_model_ends_the_reply_and_not_the_chat(chat: Chat) -> None:
    t = chat("-m", "60", "--exact", before=FAILING)
    t.send(DOG)
    t.until("error: the disk is gone")
    assert "Once upon a" in t.text(), "in the middle of the reply"
    assert t.text().count("error:") == 1 and "Traceback" not in t.raw
    t.send("/regen\r")
    t.until("60 tokens")
    t.send("/exit\r")
    assert t.end() == 0


def test_no_color_means_none(chat: Chat) -> None:
    t = chat("-m", "3", before=WITHOUT_TOOLKIT, NO_COLOR="1")
    t.send(DOG)
    t.until("3 tokens")
    t.send("/oops\r")
    t.until("unknown command")
    t.send("\x04")
    assert t.end() == 0
    assert not re.search(r"\x1b\[[0-9;]*m", t.raw)


def test_typed_in_a_terminal_but_read_by_another_program(tmp_path: Path) -> None:
    command = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1], shell=True).returncode)"
    program = f"python -m mlx_moecache.chat --slots 30 -m 4 --exact --no-warm-start > {tmp_path}/out"
    path = os.pathsep.join([str(Path(os.sys.executable).parent), os.environ["PATH"]])
    t = Terminal(["-c", command, program], HOME=str(tmp_path), PATH=path)
    t.until("\n>")
    t.send(DOG)
    t.until("4 tokens")
    t.send("\x04")
    assert t.end() == 0
    out = (tmp_path / "out").read_text()
    assert out.count("\n") == 1 and "\x1b" not in out and ">" not in out
