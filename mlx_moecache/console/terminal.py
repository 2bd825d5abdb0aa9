"""What commands write to: streams that cannot fail on a character, dim text, one status line that goes away."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import TextIO

_PLAIN = str.maketrans({"·": "|", "λ": "lambda"})


def make_streams_safe() -> None:
    """Characters that the terminal's encoding lacks come out as "?" instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def dimmed(text: str, stream: TextIO | None) -> str:
    """`text` in dim, if `stream` is a terminal that shows it so and NO_COLOR is unset; else as it is."""
    styled = is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[2m{text}\x1b[0m" if styled and text else text


def write_notes(lines: Iterable[str], stream: TextIO | None) -> None:
    """Write lines in one go, dim where the stream is a terminal and NO_COLOR is unset, in ASCII where it must be."""
    text = "\n".join(lines)
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(_PLAIN)
    if text and stream is not None:
        stream.write(f"{dimmed(text, stream)}\n")
        stream.flush()


class StatusLine:
    """A line such as "loading ..." on a terminal, replaced by the next one and wiped at the end; else nothing.

    Blanks wipe it, not an escape sequence: every terminal understands them.
    """

    def __init__(self, stream: TextIO | None, *, enabled: bool = True) -> None:
        self._stream = stream if enabled and is_terminal(stream) else None
        self._width = 0

    def show(self, text: str) -> None:
        if self._stream is not None:
            line = "\r" + text.ljust(self._width)
            self._width = len(text)  # first, so that an interrupted write is wiped too
            self._stream.write(line)
            self._stream.flush()

    def clear(self) -> None:
        if self._stream is not None and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
