"""/save, /load and /read: a conversation as one JSON file, and text files that go before the next message."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from .chat_loop import Console
    from .chat_session import ChatSession
    from .chat_text import Message

FORMAT, VERSION = "mlx_moecache chat", 1
BYTES_PER_TOKEN = 32  # more than any text has on average, so that what is longer need not be tokenised
MOST_BYTES = 256 * 10**6  # of a saved conversation
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class SavedChat:
    """What a file of /save holds."""

    model: str
    system: str | None
    settings: Mapping[str, str]  # by the names of /set, as they are typed
    messages: Sequence[Message]


def save(argument: str, session: ChatSession, out: Console) -> None:
    """/save FILE: replaces only what is such a file already."""
    from .chat_settings import settings_as_text

    path = named_path(argument)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; add a file name")
    there = path.exists()
    if there:
        try:
            read_saved(path)
        except UsageError:
            raise UsageError(f"{path} is there and no saved conversation; choose another name") from None
    chat = {
        "format": FORMAT,
        "version": VERSION,
        "model": session.name,
        "system": session.system,
        "settings": settings_as_text(session),
        "messages": session.messages,
    }
    write_whole(path, json.dumps(chat, ensure_ascii=False, indent=1) + "\n")
    out.say(f"{_count(len(session.messages), 'message')} saved in {path}" + (", in place of those before" * there))


def load(argument: str, session: ChatSession, out: Console) -> None:
    """/load FILE: messages, system prompt and settings; model, memory and routing stay."""
    from .chat_settings import apply_text

    path = named_path(argument)
    chat = read_saved(path)
    if chat.system is not None and not session.has_template:
        raise UsageError(f"{path} has a system prompt, which this model has no chat template for; load its own model")
    before = session.messages, session.system, replace(session.settings)
    attached = list(session.attached)
    try:
        for name, text in chat.settings.items():
            apply_text(session, name, text)
        session.messages, session.system = [dict(m) for m in chat.messages], chat.system
        session.attached.clear()
        used = _check_fits(session, path)
    except BaseException:
        session.messages, session.system, session.settings = before
        session.attached[:] = attached
        raise
    session.last_stats = None
    gone = f"; {_count(len(before[0]), 'message')} before it dropped" if before[0] else ""
    out.say(f"{_count(len(chat.messages), 'message')} from {path}, {_count(used, 'token')}{gone}")
    if chat.model != session.name:
        out.say(f"warning: it was with {chat.model}, and this is {session.name}")
    if session.messages and session.messages[-1]["role"] == "user":
        out.say("its last message has no answer yet: /regen answers it")


def read(argument: str, session: ChatSession, out: Console) -> None:
    """/read FILE: before the next message. Refuses what is no text, or more than the context has left."""
    path = named_path(argument)
    conversation = session.conversation
    text = read_text_file(path, most=BYTES_PER_TOKEN * conversation.max_context)
    if not text.strip():
        raise UsageError(f"{path} is empty; choose another file")
    tokens = len(session.tokenizer.encode(text, add_special_tokens=False))
    others = sum(len(session.tokenizer.encode(x, add_special_tokens=False)) for x in session.attached)
    used = others + (len(session.prompt_tokens()) if session.messages else 0)
    left = conversation.max_context - used
    if tokens >= left:
        raise UsageError(
            f"{path} has {tokens:,} tokens, and {max(0, left):,} of {conversation.max_context:,} are left for it, your "
            "message and the reply; take a part of it, or start with a larger --max-context"
        )
    session.attached.append(text.rstrip("\n"))
    out.say(f"{path}: {_count(tokens, 'token')}, before your next message")


def complete_path(argument: str) -> Sequence[str]:
    """Files that the last word may mean; names with blanks have to be typed."""
    word = argument.rpartition(" ")[2]
    head, tail = os.path.split(word)
    found = []
    with suppress(OSError), os.scandir(os.path.expanduser(head) or ".") as entries:
        for entry in entries:
            if entry.name.startswith(tail) and (tail or not entry.name.startswith(".")) and " " not in entry.name:
                found.append(os.path.join(head, entry.name) + ("/" if entry.is_dir() else ""))
    return sorted(found)


# ---- files ----


def named_path(argument: str) -> Path:
    """The file that was typed: all of the line, so blanks need no quotes, but quotes around it are taken off."""
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "\"'":
        argument = argument[1:-1]
    if "\0" in argument or not argument:
        raise UsageError("a file needs a name")
    return Path(argument).expanduser()


def read_text_file(path: Path, *, most: int) -> str:
    """The UTF-8 text of a file of at most `most` bytes. Raises UsageError, OSError."""
    # Without waiting: opening a pipe that nobody writes would never return.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
            raise UsageError(f"{path} is {kind}; give a text file")
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(most + 1)
    finally:
        os.close(fd)
    if b"\0" in data:
        raise UsageError(f"{path} is binary; give a text file")
    if len(data) > most:
        raise UsageError(f"{path} is larger than {most:,} bytes, more than can be used here; take a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text; convert it first, for example with iconv") from None
    return text.replace("\r\n", "\n")


def read_saved(path: Path) -> SavedChat:
    """What /save wrote. Raises UsageError for anything else, OSError."""
    broken = f"{path} is not a conversation that /save wrote"
    try:
        data: Any = json.loads(read_text_file(path, most=MOST_BYTES))
    except (ValueError, RecursionError):
        raise UsageError(f"{broken}: no JSON; nothing was loaded") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UsageError(f"{broken}; nothing was loaded")
    if data.get("version") != VERSION:
        raise UsageError(f"{path} was saved by another version of /save; this one reads version {VERSION}")
    wrong = [
        name
        for name, right in (
            ("model", isinstance(data.get("model"), str)),
            ("system", data.get("system") is None or _is_text(data["system"])),
            ("settings", _is_settings(data.get("settings"))),
            ("messages", _is_messages(data.get("messages"))),
        )
        if not right
    ]
    if wrong:
        raise UsageError(f"{broken}: its {wrong[0]} are damaged; nothing was loaded")
    return SavedChat(data["model"], data.get("system"), data["settings"], data["messages"])


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, or leave what was there."""
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}; make it first, or choose another")
    # Through a link, its target is replaced and not the link.
    path = Path(os.path.realpath(path))
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names no file
        with suppress(OSError):
            os.unlink(temporary)
        raise


# ---- inside ----


def _check_fits(session: ChatSession, path: Path) -> int:
    """Tokens of the conversation. Raises UsageError if no reply fits after them."""
    used = len(session.prompt_tokens()) if session.messages else 0
    most = session.conversation.max_context
    if used >= most:
        raise UsageError(
            f"{path} has {used:,} tokens, and {most:,} are reserved for a conversation; start with a larger "
            "--max-context"
        )
    return used


def _is_text(value: object) -> bool:
    """True for a string that can be written as UTF-8: JSON can spell lone surrogates."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def _is_settings(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for x in value.values())


def _is_messages(value: object) -> bool:
    """User and assistant in turn, the user first."""
    return isinstance(value, list) and all(
        isinstance(m, dict) and set(m) == {"role", "content"} and m["role"] == ROLES[i % 2] and _is_text(m["content"])
        for i, m in enumerate(value)
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")
