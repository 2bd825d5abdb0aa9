"""Cutting a reply that arrives piece by piece: reasoning, tool calls, stop strings. Plain Python.

mlx-lm's TextStateMachine has another interface in every version, and its server ends a reply only where a stop string
is made of the same tokens as it would be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Part = Literal["content", "reasoning", "tool", "tool_end"]
Piece = tuple[Part, str]


@dataclass(frozen=True)
class Marks:
    """The strings around reasoning and tool calls; None where a model has none."""

    reasoning: tuple[str, str] | None = None
    tool: tuple[str, str] | None = None  # the end may be empty: a call then goes on to the end of the reply


class ReplyText:
    """Text in, pieces out, marks taken off. What may be the beginning of a mark is held back until it is decided.

    Stop strings count in the content only, not in reasoning or tool calls.
    """

    def __init__(self, marks: Marks, stops: Sequence[str] = (), *, in_reasoning: bool = False) -> None:
        self.stopped = False  # a stop string was met: what follows is not part of the reply
        self._marks = marks
        self._stops = tuple(stops)
        self._part: Part = "reasoning" if in_reasoning and marks.reasoning else "content"
        self._held = ""

    def feed(self, text: str) -> list[Piece]:
        """What is decided now; a tool call ends with ("tool_end", "")."""
        pieces: list[Piece] = []
        self._held += text
        while not self.stopped:
            marks = self._awaited()
            found = min(((self._held.find(m), len(m), m) for m in marks if m in self._held), default=None)
            if found is None:
                keep = max((_overlap(self._held, m) for m in marks), default=0)
                ready = len(self._held) - keep
                pieces.append((self._part, self._held[:ready]))
                self._held = self._held[ready:]
                break
            at, length, mark = found
            pieces.append((self._part, self._held[:at]))
            self._held = self._held[at + length :]
            self._turn(mark, pieces)
        return [p for p in pieces if p[1] or p[0] == "tool_end"]

    def rest(self) -> list[Piece]:
        """What was held back, at the end of the reply."""
        held, self._held = self._held, ""
        if self.stopped:
            return []
        pieces: list[Piece] = [(self._part, held)] if held else []
        if self._part == "tool":
            self._part = "content"
            pieces.append(("tool_end", ""))
        return pieces

    def _awaited(self) -> list[str]:
        m = self._marks
        if self._part == "reasoning":
            return [m.reasoning[1]] if m.reasoning else []
        if self._part == "tool":
            return [m.tool[1]] if m.tool and m.tool[1] else []
        return [*(x[0] for x in (m.reasoning, m.tool) if x), *self._stops]

    def _turn(self, mark: str, pieces: list[Piece]) -> None:
        if self._part == "content":
            if mark in self._stops:
                self.stopped = True
            elif self._marks.tool and mark == self._marks.tool[0]:
                self._part = "tool"
            else:
                self._part = "reasoning"
            return
        if self._part == "tool":
            pieces.append(("tool_end", ""))
        self._part = "content"


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of `text` that are a beginning of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
