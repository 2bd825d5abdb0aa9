"""A program in a real pseudo-terminal, and what a person sees on its screen."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import pexpect
import pyte


class _Screen(pyte.HistoryScreen):  # type: ignore[misc]  # untyped
    """Answers what a terminal is asked, such as where its cursor is."""

    terminal: Terminal

    def write_process_input(self, data: str) -> None:
        self.terminal.send(data)


class Terminal:
    """`python ARGS` in a terminal of `columns`; keys go in with `send`, the screen is waited for with `until`."""

    def __init__(self, args: Sequence[str], *, columns: int = 100, **environment: str) -> None:
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}  # the pseudo-terminal says
        env = {**inherited, "TERM": "xterm", "NO_COLOR": "", "PYTHONUTF8": "1", **environment}
        self.process = pexpect.spawn(
            sys.executable,
            list(args),
            env=env,
            dimensions=(50, columns),
            encoding="utf-8",
            codec_errors="replace",
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.process.delaybeforesend = None
        self.raw = ""
        self._screen = _Screen(columns, 50, history=2000)
        self._screen.terminal = self
        self._stream = pyte.Stream(self._screen)

    def send(self, keys: str) -> None:
        self.process.send(keys)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send("\x03")

    def resize(self, columns: int) -> None:
        self.process.setwinsize(50, columns)
        self._screen.resize(50, columns)

    def lines(self) -> list[str]:
        """All that was on the screen, what has scrolled away included."""
        columns = self._screen.columns
        gone = ["".join(line[i].data for i in range(columns)).rstrip() for line in self._screen.history.top]
        return [*gone, *(line.rstrip() for line in self._screen.display)]

    def text(self) -> str:
        return "\n".join(self.lines()).rstrip()

    def until(self, what: str, times: int = 1, *, seconds: float = 60) -> None:
        """Wait until `what` is there so many times."""
        end = time.monotonic() + seconds
        while self.text().count(what) < times:
            if not self._read() or time.monotonic() > end:
                raise AssertionError(f"no {what!r} ({times} times) in:\n{self.text()}")

    def settle(self, seconds: float = 0.3) -> None:
        """Wait until nothing more comes."""
        while self._read(seconds, quiet_is_end=True):
            pass

    def end(self, *, seconds: float = 30) -> int:
        """The exit code, as a shell reports it, of a program that is about to end."""
        end = time.monotonic() + seconds
        while self._read() and time.monotonic() < end:
            pass
        self.process.close(force=True)
        status: int | None = self.process.exitstatus
        return 128 + self.process.signalstatus if status is None else status

    def _read(self, seconds: float = 0.2, *, quiet_is_end: bool = False) -> bool:
        try:
            piece = self.process.read_nonblocking(65536, timeout=seconds)
        except pexpect.TIMEOUT:
            return not quiet_is_end
        except pexpect.EOF:
            return False
        self.raw += piece
        self._stream.feed(piece)
        return True
