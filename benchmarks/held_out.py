"""Text that the model was not trained on: the ends of text files, cut into windows of token ids.

    python benchmarks/held_out.py --text simple_stories.txt ts_truecased_extra.txt --out held_out.txt

writes the documents of these ends, shuffled, into one file for `mlx_moecache evaluate` and `mlx_moecache sweep`.
"""

from __future__ import annotations

import argparse
import random
import sys
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


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the held-out documents of text files into one file.")
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tail", type=float, default=0.03, help="share of each file (default: %(default)s)")
    parser.add_argument("--piece", type=int, default=2000, help="characters at which long documents are cut")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        documents = [d for path in args.text for d in held_out(path, args.tail)]
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pieces = [d[i : i + args.piece] for d in documents for i in range(0, len(d), args.piece)]
    random.Random(0).shuffle(pieces)
    args.out.write_text(END.join(pieces), encoding="utf-8")
    print(f"{args.out}: {len(pieces)} pieces, {sum(map(len, pieces)):,} characters", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
