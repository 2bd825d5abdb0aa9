"""Ctrl-C as a request that is looked at between tokens, instead of an exception in the middle of one.

A KeyboardInterrupt could be raised between two updates that belong together, such as reading an expert and publishing
its slot. So the first signal only sets a flag; the second one ends the process as the system does by default.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """The user asked to stop; raised by `Interrupt.check` where stopping is safe."""


class Interrupt:
    """Inside the block, the first SIGINT sets `requested` and the second one ends the process at once.

    Where signals cannot or must not be handled (another thread than the main one, SIGINT ignored by whoever started
    the process) nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        self._installed = False

    def check(self) -> None:
        """Raise Interrupted if a stop has been requested."""
        if self.requested:
            raise Interrupted

    def __enter__(self) -> Interrupt:
        on_main_thread = threading.current_thread() is threading.main_thread()
        if on_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)
            self._installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # The default action works at once; a Python handler would wait until a long forward pass has ended.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
