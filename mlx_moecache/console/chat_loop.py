"""The REPL: reads a message or a command, shows the reply while it is generated, and goes on whatever is typed."""

from __future__ import annotations

import shutil
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import UsageError
from .chat_report import banner, fitted, long_lines, turn_line
from .command import INTERRUPTED, explain
from .interrupt import Interrupt
from .line_editor import Entry, LineEditor
from .terminal import StatusLine, dimmed, is_terminal, write_notes

if TYPE_CHECKING:
    from .chat_session import ChatSession
    from .report import Reply

LEAVE = "Ctrl-D or /exit leaves"


class Console:
    """Where a conversation is shown: replies and answers of commands on stdout, notes about them on stderr."""

    def __init__(self, *, debug: bool = False) -> None:
        self.problems = 0  # errors that were shown
        self._debug = debug

    @property
    def width(self) -> int:
        """Columns of the terminal now; 80 if there is none."""
        return shutil.get_terminal_size((80, 24)).columns

    @property
    def note_width(self) -> int:
        """Columns for notes: without a terminal a line is as long as it is."""
        return self.width if is_terminal(sys.stderr) else sys.maxsize

    @property
    def is_terminal(self) -> bool:
        """True if people see stdout as it appears."""
        return is_terminal(sys.stdout)

    def welcome(self, session: ChatSession, *, interactive: bool) -> None:
        """What is talked to and how, and what a person has to know about it."""
        from .usage import cache_use

        model = session.model
        use, cache = cache_use(model), model.expert_cache
        if interactive:
            k = [x.k for x in cache.layers]
            self.note(banner(session.name, k, use, model.memory_plan, cache.nbytes, self.note_width))
            emulation = session.emulated.emulation
            self.note([] if emulation is None else emulation.lines())
            self.note(fitted(["/help lists commands", LEAVE], self.note_width))
        if not session.has_template:
            self.note(["this model has no chat template: it continues your text"])

    def say(self, text: str) -> None:
        """Print `text` and a line break, plain, on stdout."""
        print(text, flush=True)

    def note(self, lines: Iterable[str]) -> None:
        """Print lines about what happened, dim, on stderr."""
        write_notes(lines, sys.stderr)

    def problem(self, error: Exception) -> None:
        """Print what went wrong as one line on stderr; the conversation goes on."""
        from ..conversation import ContextFullError

        self.problems += 1
        if isinstance(error, ContextFullError):
            error = UsageError(
                f"the context is full: with this message the conversation has {error.tokens:,} tokens, and "
                f"{error.max_context:,} were reserved; /clear forgets it, --max-context reserves more at the next start"
            )
        if self._debug:
            traceback.print_exception(error)
        line, _ = explain(error, debug=self._debug)
        print(line, file=sys.stderr, flush=True)

    def stream_reply(self, session: ChatSession, user: str | None, *, statistics: bool = True) -> Reply | None:
        """Answer `user` (None: the last message again), show the reply as it is generated, then its statistics.

        Ctrl-C ends the reply; a second one ends the process. None: an error ended it, which is shown. Raises
        OverLimitError, the end of an emulated device's memory, and BrokenPipeError if nobody reads any more.
        """
        from ..enforce import OverLimitError

        wrote, at_line_start = False, True
        with StatusLine(sys.stderr) as status, Interrupt() as interrupt:

            def write(text: str) -> None:
                nonlocal wrote, at_line_start
                wrote = True
                status.clear()
                # Each piece ends its own dimming, so that whatever comes between finds the terminal as it should be.
                print(dimmed(text, sys.stdout) if session.in_thought else text, end="", flush=True)
                at_line_start = text.endswith("\n")

            def progress(done: int, total: int) -> None:
                if done < total:
                    tokens = f"{done:,} of {total:,}" if done else f"{total:,}"
                    status.show(f"reading the prompt: {tokens} tokens"[: self.width - 1])

            error: Exception | None = None
            try:
                session.reply(user, write, interrupt, progress)
            except (OverLimitError, BrokenPipeError):
                raise
            except Exception as e:
                error = e
            finally:
                if not at_line_start:
                    print(flush=True)
                if interrupt.requested and not wrote:
                    status.show(" " * (self.width - 1))  # also the ^C that the terminal has put behind it
        if error is not None:
            self.problem(error)
            return None
        turn = session.last_stats
        assert turn is not None
        if statistics:
            self._show_statistics(session)
        return turn.reply

    def _show_statistics(self, session: ChatSession) -> None:
        from .usage import memory_use

        turn, settings = session.last_stats, session.settings
        assert turn is not None
        if not settings.verbose:
            self.note(turn_line(turn, self.note_width))
            return
        kv = session.conversation.kv_cache
        memory = memory_use(session.model, kv, not_charged=session.emulated.not_charged)
        seed = settings.seed if settings.temp > 0 else None
        self.note(long_lines(turn, memory, session.model.memory_plan, seed))


def converse(session: ChatSession, console: Console, editor: LineEditor, before_use: Callable[[], None]) -> int:
    """Read and answer until the input ends or a command leaves; returns the exit code.

    before_use: called when there is something to do, before the model or its cache is touched. Without a person,
    Ctrl-C ends it all, and the exit code says whether every line was answered. Raises what `stream_reply` raises.
    """
    while True:
        try:
            entry = editor.read()
            if not entry.text.strip():
                continue
            with Interrupt():
                before_use()
            if not _answer(entry, session, console):
                break
        except EOFError:
            break
        except KeyboardInterrupt:  # at the prompt, or as a reply has just ended
            if not editor.interactive:
                return INTERRUPTED
            console.note([LEAVE])
            continue
        if not editor.interactive and session.was_interrupted:
            return INTERRUPTED
    return 0 if editor.interactive or not console.problems else 2


def completions(line: str, session: ChatSession) -> list[str]:
    """What the last word of `line`, which ends at the cursor, may become."""
    from . import chat_commands

    if not line.startswith("/"):
        return []
    name, space, _ = line.partition(" ")
    if not space:
        return sorted(known for known in chat_commands.COMMANDS if known.startswith(name))
    command = chat_commands.COMMANDS.get(name)
    return [] if command is None else list(command.complete(line, session))


def _answer(entry: Entry, session: ChatSession, console: Console) -> bool:
    """Do what `entry` asks for; False if the conversation is over."""
    from ..enforce import OverLimitError
    from . import chat_commands

    if not _is_text(entry.text):
        console.problem(UsageError("this line is not UTF-8 text, so it was not sent; convert it first"))
        return True
    text: str | None = entry.text
    if entry.is_command:
        try:
            with Interrupt():  # a command is not cut while it moves slots; those that take long look at their own
                outcome = chat_commands.handle(entry.text, session, console)
        except (OverLimitError, BrokenPipeError):
            raise
        except Exception as e:
            console.problem(e)
            return True
        if outcome.leaves:
            return False
        text = outcome.text
    if text is not None:
        console.stream_reply(session, text)
    return True


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes that are no UTF-8 arrive as lone surrogates
        return False
    return True
