"""A completion's text, which goes on where its prompt ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Continuation:
    """Token by token, the text of a completion as it stands behind its prompt.

    mlx-lm's detokenizers, and some tokenizers, leave out blanks in front of the first word that they are given. That is
    right for a reply that stands alone, but not for one that is put behind a prompt.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.width = 0  # characters that the last token added; one that waits for the rest of a character adds none
        self._tokenizer = tokenizer
        self._prompt_end = self._last = prompt[-1]
        self._first: list[int] | None = []  # tokens up to the first word; None: it is there
        self._blanks = ""  # their text
        self._held = 0  # characters that are known and were not given out yet

    def shown(self, token: int) -> str:
        """What `token` would add to the text; a token of which nothing can be shown so has the text it has alone."""
        return self._behind(self._last, [token]) or str(self._tokenizer.decode([token]))

    def add(self, token: int | None, text: str, *, is_last: bool) -> str:
        """What to write for the next token, of which the detokenizer gave `text`. token: None at the end of text."""
        if self._first is not None:
            self._first += [] if token is None else [token]
            self._blanks += text
            text = ""
            if is_last or self._blanks.strip(" "):
                text = _with_lost_blanks(self._blanks, self._behind(self._prompt_end, self._first))
                self._first = None
        held = 0
        if not text and token is not None:
            shown = self.shown(token)
            held = self._held + (0 if "\ufffd" in shown else len(shown))
        self.width = len(text) + held - self._held
        self._held = held
        if token is not None:
            self._last = token
        return text

    def _behind(self, before: int, tokens: Sequence[int]) -> str:
        """The text of `tokens` behind the token `before`; "" where the two cannot be told from each other."""
        alone: str = self._tokenizer.decode([before], skip_special_tokens=True)
        both: str = self._tokenizer.decode([before, *tokens], skip_special_tokens=True)
        return both[len(alone) :] if both.startswith(alone) else ""


def _with_lost_blanks(text: str, behind: str) -> str:
    """`text` with as many blanks in front as `behind`, the same behind the prompt, has."""
    words = text.lstrip(" ")
    lost = len(behind) - len(behind.lstrip(" ")) - (len(text) - len(words))
    return " " * lost + text if behind.lstrip(" ").startswith(words) else text
