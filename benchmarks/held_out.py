"""Text that the model was not trained on: the ends of text files, cut into windows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_moecache.errors import UsageError

END = "<|endoftext|>"  # between documents

Ids = npt.NDArray[np.int32]


def held_out(path: Path, share: float) -> list[str]:
    """Whole documents from the end of a text file, `share` of its characters at most; of a long last one, its end.

    Raises UsageError if the file cannot be read or holds no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as UTF-8 text: {error}; give another --text") from error
    documents = [d for d in (part.strip() for part in text.split(END)) if d]
    budget = int(share * sum(map(len, documents)))
    tail: list[str] = []
    while documents and len(documents[-1]) <= budget:
        tail.insert(0, documents.pop())
        budget -= len(tail[0])
    if not tail and documents and budget:
        tail = [documents[-1][-budget:].partition("\n")[2] or documents[-1][-budget:]]
    if not tail:
        raise UsageError(f"{path} is too short to take {share:g} of it; give more text or a larger --tail")
    return tail


def text_windows(paths: Sequence[Path], tokenizer: TokenizerWrapper, *, tail: float, count: int, length: int) -> Ids:
    """`count` windows of length + 1 ids, evenly spread over the tails of all files, without overlap.

    Raises UsageError if there are not enough tokens.
    """
    stream: list[int] = []
    for path in paths:
        for document in held_out(path, tail):
            stream += [*tokenizer.encode(document, add_special_tokens=False, verbose=False), tokenizer.eos_token_id]
    if (fit := (len(stream) - 1) // length) < count:
        raise UsageError(
            f"{len(stream):,} tokens of text hold {fit} windows of {length}, not {count}; "
            "give more --text, a larger --tail or fewer --windows"
        )
    ids = np.asarray(stream, dtype=np.int32)
    starts = np.linspace(0, len(ids) - 1 - length, num=count).astype(int)
    return np.stack([ids[s : s + length + 1] for s in starts])
