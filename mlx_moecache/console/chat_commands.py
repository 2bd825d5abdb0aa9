"""The slash commands of a chat: which there are, what they take, and how a line reaches one. Plain Python.

What a command does stands in the modules beside this one. Each prints at least one line, and raises errors of
errors.py or OSError for the REPL to show.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError
from . import chat_files, chat_routing, chat_settings, chat_status
from .arguments import did_you_mean

if TYPE_CHECKING:
    from .chat_loop import Console
    from .chat_session import ChatSession


@dataclass(frozen=True)
class Outcome:
    """What the REPL does next."""

    leaves: bool = False
    text: str | None = None  # to be answered as if it had been typed


CONTINUE, EXIT = Outcome(), Outcome(leaves=True)

Run = Callable[[str, "ChatSession", "Console"], Outcome | None]  # argument, without blanks around it; None: CONTINUE
Words = Callable[[str], Sequence[str]]  # argument before the cursor -> what its last word may become


def _nothing(argument: str) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Command:
    """One command. `usage` begins with its name; needs: without an argument it only prints its usage."""

    name: str
    usage: str
    help: str
    run: Run
    words: Words = _nothing
    takes: bool = False  # an argument
    needs: bool = False

    def complete(self, line: str, session: ChatSession) -> Sequence[str]:
        """What the last word of `line`, which ends at the cursor, may become."""
        return self.words(line.lstrip().partition(" ")[2].lstrip())


def handle(line: str, session: ChatSession, out: Console) -> Outcome:
    """Do what `line` says, which begins with a slash.

    Raises UsageError for what is no command or has a wrong argument, and what the command itself raises: whatever it
    was about is then as before.
    """
    name, _, rest = line.strip().partition(" ")
    argument = rest.strip()
    command = COMMANDS.get(name.lower())
    if command is None:
        advice = did_you_mean(name.lower(), [x for x in COMMANDS if x[1:].isalpha()])
        raise UsageError(f"unknown command {name}{advice} (/help lists them)")
    if argument and not command.takes:
        raise UsageError(f"{command.name} takes no argument, not {argument!r}; type {command.name} alone")
    if command.needs and not argument:
        out.say(f"usage: {command.usage}")
        out.say(f"  {command.help}")
        return CONTINUE
    return command.run(argument, session, out) or CONTINUE


def help_lines(width: int) -> list[str]:
    """All commands; two columns where there is room."""
    aliases = {x.name: [n for n, other in COMMANDS.items() if other is x and n != x.name] for x in COMMANDS.values()}
    rows = {x.name: (", ".join([x.usage, *aliases[x.name]]), x.help) for x in COMMANDS.values()}
    column = max(len(usage) for usage, _ in rows.values()) + 2
    lines = []
    for usage, text in rows.values():
        if width >= 2 * column:
            first, *more = textwrap.wrap(text, width - column - 1)
            lines += [usage.ljust(column) + first, *(" " * column + x for x in more)]
        else:
            lines += [usage, *textwrap.wrap(text, max(20, width - 1), initial_indent="  ", subsequent_indent="  ")]
    rest = 'Several lines are one message between two """. Everything else is sent to the model.'
    return [*lines, *textwrap.wrap(rest, max(20, width - 1))]


# ---- the commands that are about the conversation itself ----


def _help(argument: str, session: ChatSession, out: Console) -> None:
    out.say("\n".join(help_lines(out.width)))


def _exit(argument: str, session: ChatSession, out: Console) -> Outcome:
    return EXIT


def _clear(argument: str, session: ChatSession, out: Console) -> None:
    session.clear()
    session.attached.clear()
    out.say("the conversation is empty" + ("" if session.system is None else "; the system prompt stays"))


def _regen(argument: str, session: ChatSession, out: Console) -> None:
    out.stream_reply(session, None)


def _ab(argument: str, session: ChatSession, out: Console) -> None:
    from .comparison import ab  # imports MLX

    ab(session, out)


_LIST = (
    Command("/help", "/help", "this list", _help),
    Command("/exit", "/exit", "leave; so does Ctrl-D", _exit),
    Command("/clear", "/clear", "forget the conversation; the system prompt and all settings stay", _clear),
    Command("/regen", "/regen", "answer the last message again", _regen),
    Command(
        "/read",
        "/read FILE",
        "put a text file before the next message",
        chat_files.read,
        chat_files.complete_path,
        takes=True,
        needs=True,
    ),
    Command(
        "/save",
        "/save FILE",
        "write the conversation, system prompt and settings to a file",
        chat_files.save,
        chat_files.complete_path,
        takes=True,
        needs=True,
    ),
    Command(
        "/load",
        "/load FILE",
        "go on with a conversation that /save wrote",
        chat_files.load,
        chat_files.complete_path,
        takes=True,
        needs=True,
    ),
    Command(
        "/set",
        "/set NAME VALUE",
        "change a setting; alone: what there is to set",
        chat_settings.change,
        chat_settings.complete_set,
        takes=True,
    ),
    Command(
        "/show",
        "/show WHAT",
        "model, cache, routing, sampling or system",
        chat_settings.show,
        chat_settings.complete_show,
        takes=True,
        needs=True,
    ),
    Command(
        "/cache",
        "/cache [reset]",
        "hit rate by layer, slots, bytes read; reset: empty slots and counters at zero",
        chat_status.cache,
        chat_status.complete_cache,
        takes=True,
    ),
    Command("/memory", "/memory", "the budget, and who holds what", chat_status.memory),
    Command(
        "/routing",
        "/routing [NAME|VALUE]",
        "switch routing or its strength from the next token on; alone: what is active",
        chat_routing.routing,
        chat_routing.complete_routing,
        takes=True,
    ),
    Command("/exact", "/exact", "switch between the model's own routing and the biased one", chat_routing.exact),
    Command("/ab", "/ab", "answer the last message with exact and with biased routing, and compare", _ab),
)
_ALIASES = {"/?": "/help", "/bye": "/exit", "/quit": "/exit"}
COMMANDS: dict[str, Command] = {x.name: x for x in _LIST}
COMMANDS |= {alias: COMMANDS[name] for alias, name in _ALIASES.items()}
