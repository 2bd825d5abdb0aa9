"""Telling reasoning from answer in text that arrives piece by piece. Plain Python."""

from __future__ import annotations


class ThoughtSplitter:
    """Cuts text at the marks around reasoning; the marks belong to the reasoning.

    A piece that may be the beginning of a mark is held back until the next one decides.
    """

    def __init__(self, start: str | None, end: str | None, *, inside: bool = False) -> None:
        """start, end: the marks, None if the model has none. inside: the prompt ended with the start mark."""
        self._start, self._end = start, end
        self._inside = inside
        self._held = ""

    def feed(self, text: str) -> list[tuple[str, bool]]:
        """What can be shown now, as (text, is it reasoning)."""
        if not self._start or not self._end:
            return [(text, False)] if text else []
        pieces: list[tuple[str, bool]] = []
        self._held += text
        while self._held:
            mark = self._end if self._inside else self._start
            before, found, after = self._held.partition(mark)
            if found:
                pieces.append((before + found, True) if self._inside else (before, False))
                self._inside = not self._inside
                # The start mark is shown with what follows it, as reasoning.
                if self._inside:
                    pieces.append((found, True))
                self._held = after
                continue
            keep = _overlap(self._held, mark)
            ready = len(self._held) - keep
            pieces.append((self._held[:ready], self._inside))
            self._held = self._held[ready:]
            break
        return [(piece, thought) for piece, thought in pieces if piece]

    def rest(self) -> list[tuple[str, bool]]:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return [(held, self._inside)] if held else []


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of `text` that are a beginning of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
