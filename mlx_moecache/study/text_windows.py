"""Text cut into windows of token ids, for perplexity. The WikiText protocol is that of the paper's author.

WikiText (`wiki.valid.raw` of wikitext-2-raw-v1): the rows of the data set are the lines of the file, a row of blanks
only is the empty string, rows are joined with two line breaks, and the result is one text without special tokens. A
window has W predicted tokens, so W + 1 ids; the next one begins `stride` tokens later, and what is left at the end
is not used. With a stride below W windows overlap, and after the first one only their last `stride` tokens are new: the
others are context, neither scored nor counted again (evaluation.window_readings).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

WINDOW = 1024  # predicted tokens, the paper's
READ_AT_ONCE = 1 << 20  # bytes

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Windows:
    """A tokenised text and how it is cut; `windows[i]` are the ids of window i."""

    ids: Sequence[int]
    window: int  # predicted tokens
    stride: int
    available: int  # windows that the text has
    count: int  # windows to use

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> list[int]:
        """window + 1 ids."""
        if not 0 <= i < self.count:
            raise IndexError(i)
        return list(self.ids[i * self.stride : i * self.stride + self.window + 1])


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, line ends as "\\n". Raises UsageError if it cannot be read or is blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; give the text file itself") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; give an existing text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start:,}); convert it or give another file") from error
    if not text.strip():
        raise UsageError(f"{path} holds no text; give a file with text")
    return text


def join_wikitext(raw: str) -> str:
    """The one text of a raw WikiText file.

    A row keeps its line break, as in the data set that is distributed, so three of them part two paragraphs.
    """
    return "\n\n".join(row if row.strip() else "" for row in io.StringIO(raw))


def cut(
    text: str, encode: Encode, *, window: int = WINDOW, stride: int | None = None, limit: int | None = None
) -> Windows:
    """Tokenise `text` as a whole and cut it; `stride` None: windows do not overlap. Raises UsageError."""
    stride = window if stride is None else stride
    for name, value in (("window", window), ("stride", stride), ("limit", limit)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    ids = list(encode(text))
    available = (len(ids) - 1 - window) // stride + 1 if len(ids) > window else 0
    if not available:
        raise UsageError(
            f"the text has {len(ids):,} tokens, one window needs {window + 1:,} ({window:,} predicted); "
            f"give more text or a window of at most {max(1, len(ids) - 1):,}"
        )
    return Windows(ids, window, stride, available, available if limit is None else min(limit, available))


def sha256_of(paths: Sequence[Path]) -> str:
    """SHA-256 of the contents of files, of several as of their concatenation. Raises UsageError."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(READ_AT_ONCE):
                    digest.update(block)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}; give an existing file") from error
    return digest.hexdigest()
