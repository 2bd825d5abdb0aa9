"""Text in columns of a terminal: widths as terminals count them, lines that fit, two texts side by side."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

BETWEEN = " | "


def width_of(text: str) -> int:
    """Columns that `text`, one line, takes: two for wide characters, none for those that join the one before."""
    return sum(_width(c) for c in text)


def wrap(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` (at least 2) columns, broken at blanks where there are any."""
    lines: list[str] = []
    for paragraph in text.expandtabs(4).split("\n"):
        line = ""
        for word in _shown(paragraph).split(" "):
            if line and width_of(line) + 1 + width_of(word) > width:
                lines.append(line)
                line = ""
            elif line:
                line += " "
            for piece in _pieces(word, width):
                if width_of(line) + width_of(piece) > width:
                    lines.append(line)
                    line = ""
                line += piece
        lines.append(line)
    return lines


def side_by_side(left: Sequence[str], right: Sequence[str], width: int) -> list[str]:
    """Lines of at most `width` columns with a bar in the middle; each text must fit into `column_width`."""
    column = column_width(width)
    pairs = zip_longest(left, right, fillvalue="")
    return [f"{a}{' ' * (column - width_of(a))}{BETWEEN}{b}".rstrip() for a, b in pairs]


def column_width(width: int) -> int:
    """Columns for each of two texts."""
    return (width - len(BETWEEN)) // 2


def _pieces(word: str, width: int) -> list[str]:
    """`word` cut where it is wider than `width`."""
    pieces = [""]
    for c in word:
        if width_of(pieces[-1]) + _width(c) > width:
            pieces.append("")
        pieces[-1] += c
    return pieces


def _shown(line: str) -> str:
    """Without what would move the cursor: escapes, carriage returns and the like."""
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in line)


def _width(c: str) -> int:
    if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1
