'''Reading what a person types: prompt_toolkit if it is installed, readline otherwise, plain lines without a terminal.

Several lines are one entry between two `"""`, or if they were pasted.
'''

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from .line_history import LineHistory
from .terminal import is_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT, MORE, FENCE = "> ", "... ", '"""'
PASTE_SECONDS = 0.02  # a line that is there so soon after another was pasted with it

Complete = Callable[[str], Sequence[str]]  # the line before the cursor -> what its last word may become


@dataclass(frozen=True)
class Entry:
    """What was typed. Only a single line without quotes can be a command."""

    text: str
    quoted: bool = False

    @property
    def is_command(self) -> bool:
        return self.text.startswith("/") and not self.quoted and "\n" not in self.text


class LineSource(Protocol):
    """One way of reading lines."""

    interactive: bool  # a person sits there

    def line(self, prompt: str) -> str:
        """The next line. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C with nothing typed."""

    def remember(self, text: str) -> None:
        """Offer `text` when the user goes back."""


class LineEditor:
    """Entries from lines."""

    def __init__(self, source: LineSource) -> None:
        self._source = source
        self.interactive = source.interactive

    def read(self) -> Entry:
        """The next entry. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C at an empty prompt."""
        text = self._source.line(PROMPT)
        if not text.lstrip().startswith(FENCE):
            self._source.remember(text)
            return Entry(text)
        body = text.lstrip()[len(FENCE) :]
        while not body.rstrip().endswith(FENCE):
            try:
                body += "\n" + self._source.line(MORE)
            except EOFError:  # as good as the fence that is missing
                self._source.remember(f"{FENCE}{body}{FENCE}")
                return Entry(body.strip("\n"), quoted=True)
        self._source.remember(f"{FENCE}{body}")
        return Entry(body.rstrip()[: -len(FENCE)].strip("\n"), quoted=True)


def open_editor(complete: Complete, history: LineHistory) -> LineEditor:
    """The best editor that standard input and output allow."""
    return LineEditor(_source(complete, history))


def _source(complete: Complete, history: LineHistory) -> LineSource:
    if not is_terminal(sys.stdin) or not is_terminal(sys.stdout) or os.environ.get("TERM") == "dumb":
        return PlainLines()
    with suppress(ImportError):
        return ToolkitLines(complete, history)
    with suppress(ImportError):
        return ReadlineLines(complete, history)
    return PlainLines()


class PlainLines:
    """Lines as they come, without editing; a prompt only if a person types them, and never on stdout."""

    def __init__(self) -> None:
        self.interactive = is_terminal(sys.stdin)
        if sys.stdin is not None and hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # text that is no UTF-8 is refused line by line

    def line(self, prompt: str) -> str:
        if self.interactive and sys.stderr is not None:
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            text = "" if sys.stdin is None else sys.stdin.readline()
        except KeyboardInterrupt:
            if self.interactive and sys.stderr is not None:
                print(file=sys.stderr, flush=True)
            raise
        if not text:
            raise EOFError
        return text.rstrip("\r\n")

    def remember(self, text: str) -> None:
        pass


class ReadlineLines:
    """GNU readline, or libedit as macOS's Python has it, which does not know pasted text from typed text."""

    interactive = True

    def __init__(self, complete: Complete, history: LineHistory) -> None:
        """Raises ImportError where Python lacks it."""
        import readline

        self._readline: ModuleType = readline
        self._history = history
        self._complete = complete
        self._found: Sequence[str] = ()
        self._is_libedit = "libedit" in (readline.__doc__ or "")
        readline.set_auto_history(False)
        readline.set_completer(self._candidate)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("bind ^I rl_complete" if self._is_libedit else "tab: complete")
        if not self._is_libedit:
            readline.parse_and_bind("set enable-bracketed-paste on")
        for text in history.entries:
            readline.add_history(text)

    def line(self, prompt: str) -> str:
        while True:
            try:
                text = input(prompt)
            except EOFError:
                print(flush=True)
                raise
            except KeyboardInterrupt:
                print(flush=True)
                if self._readline.get_line_buffer():
                    continue  # drops what was typed, as shells do
                raise
            return "\n".join([text, *self._pasted()])

    def remember(self, text: str) -> None:
        if self._history.add(text):
            self._readline.add_history(text)

    def _pasted(self) -> Iterator[str]:
        while self._is_libedit and select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
            try:
                yield input("")
            except EOFError:
                return

    def _candidate(self, word: str, state: int) -> str | None:
        if state == 0:
            before = self._readline.get_line_buffer()[: self._readline.get_endidx()]
            self._found = list(self._complete(before))
        return self._found[state] if state < len(self._found) else None


class ToolkitLines:
    """prompt_toolkit: colours none, history and completion ours."""

    interactive = True

    def __init__(self, complete: Complete, history: LineHistory) -> None:
        """Raises ImportError if it is not installed."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.history import InMemoryHistory

        class Commands(Completer):
            def get_completions(self, document, event):  # type: ignore[no-untyped-def]  # names of prompt_toolkit
                before = document.text_before_cursor
                word = before.rpartition(" ")[2]
                for text in complete(before):
                    yield Completion(text, start_position=-len(word))

        class Entries(InMemoryHistory):
            """Entries of several lines are remembered as one, by `remember`."""

            def append_string(self, string: str) -> None:
                pass

        self._history = history
        self._entries = Entries(history.entries)
        self._remember = super(Entries, self._entries).append_string
        self._session: PromptSession[str] = PromptSession(
            history=self._entries, completer=Commands(), complete_while_typing=False, enable_open_in_editor=False
        )

    def line(self, prompt: str) -> str:
        while True:
            try:
                return self._session.prompt(prompt)
            except KeyboardInterrupt:
                if self._session.default_buffer.text:
                    continue
                raise

    def remember(self, text: str) -> None:
        if self._history.add(text):
            self._remember(text)
