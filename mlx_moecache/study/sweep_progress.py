"""What a sweep shows while it runs, and when it writes its results file."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ..console.terminal import StatusLine, is_terminal, write_notes
from .result_metrics import Unit
from .result_table import RunningMetric
from .results import Results, Run, save

SAVE_EVERY = 5.0  # seconds
QUIET = 60.0  # seconds without a line, at most, where there is no terminal
SAVING_SHARE = 0.02  # of the time at most: large files are written more rarely


class SweepProgress:
    """A status line on a terminal, elsewhere a line per finished run and per minute; saves now and then and at the end.

    stream: stderr by default. quiet: show nothing.
    """

    def __init__(
        self, results: Results, runs: Sequence[Run], output: Path, *, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self._results, self._runs, self._output = results, runs, output
        self._stream = sys.stderr if stream is None else stream
        self._status = StatusLine(self._stream, enabled=not quiet)
        self._lines = not quiet and not is_terminal(self._stream)
        self._running = {id(r): RunningMetric(r.units) for r in runs}
        self._left = sum(r.n - len(r.units) for r in runs)
        self._measured = 0
        self._started = self._saved = self._said = time.monotonic()
        self._pause = SAVE_EVERY

    def count(self, run: Run, unit: Unit) -> None:
        """`unit` was added to `run`."""
        self._measured += 1
        self._left -= 1
        metric = self._running[id(run)]
        metric.add(unit)
        now = time.monotonic()
        text = f"{self._done()} · {_time(self._seconds_left())} left · {_name(run)}: {metric}"
        if self._lines and len(run.units) >= run.n:
            self._say(f"{self._done()} · {_name(run)}: {metric}", now)
        elif self._lines and now - self._said > QUIET:
            self._say(text, now)
        if not self._lines:
            self._status.show(text[: shutil.get_terminal_size().columns - 1])  # a line that wraps could not be wiped
        if now - self._saved > self._pause:
            self.save()

    def save(self) -> None:
        begin = time.monotonic()
        save(self._results, self._output)
        self._saved = time.monotonic()
        self._pause = max(SAVE_EVERY, (self._saved - begin) / SAVING_SHARE)

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._status.clear()
        if any(r.units for r in self._runs):
            self.save()

    def _say(self, line: str, now: float) -> None:
        write_notes([line], self._stream)
        self._said = now

    def _done(self) -> str:
        finished = sum(len(r.units) >= r.n for r in self._runs)
        return f"{finished:,} of {len(self._runs):,} runs"

    def _seconds_left(self) -> float:
        return (time.monotonic() - self._started) / self._measured * self._left


def _name(run: Run) -> str:
    return f"{run.routing}, {run.slots} slots, {run.eviction}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
