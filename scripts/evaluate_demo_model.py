"""Held-out loss of an mlx-lm checkpoint, as it ships, by stock mlx-lm: per token, per character, perplexity.

    python scripts/evaluate_demo_model.py MODEL TEXT_FOLDER [--limit 20k]

The text is the tail of each source that train_demo_model.py never trains on. Perplexities of models with
different tokenizers cannot be compared; nats per character can.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from demo_data import TextError, parse_count, read_sources, text_digests
from tqdm import tqdm

WINDOW = 512  # predicted tokens per window; each is predicted from the window's earlier tokens only


@dataclass(frozen=True)
class Score:
    """Loss on one held-out source."""

    source: str
    tokens: int  # predicted
    characters: int  # of these tokens
    nats_per_token: float
    nats_per_token_se: float | None  # standard error over windows; one window has none
    nats_per_character: float
    perplexity: float  # per token
    perplexity_se: float | None


def windows(stream: Sequence[int], limit: int) -> np.ndarray:
    """Up to limit // WINDOW evenly spaced windows of `stream`, without overlap: [N, WINDOW + 1] ids.

    Raises TextError when the stream is shorter than one window.
    """
    count = min((len(stream) - 1) // WINDOW, max(1, limit // WINDOW))
    if count < 1:
        raise TextError(f"{len(stream):,} held-out tokens do not fill a window of {WINDOW + 1}; give more text")
    ids = np.asarray(stream, dtype=np.int32)
    starts = np.linspace(0, len(ids) - 1 - WINDOW, num=count).astype(int)
    return np.stack([ids[s : s + WINDOW + 1] for s in starts])


def window_loss(model: Callable[[mx.array], mx.array], ids: np.ndarray) -> float:
    """Mean nats per token of one window [WINDOW + 1]."""
    x = mx.array(ids)[None]
    return float(nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:], reduction="mean").item())


def score(source: str, losses: Sequence[float], characters: int) -> Score:
    """Put the windows' losses together; perplexity's standard error by the delta method."""
    mean, n = float(np.mean(losses)), len(losses)
    se = float(np.std(losses, ddof=1) / math.sqrt(n)) if n > 1 else None
    perplexity = math.exp(mean)
    perplexity_se = None if se is None else perplexity * se
    nats_per_character = mean * n * WINDOW / characters
    return Score(source, n * WINDOW, characters, mean, se, nats_per_character, perplexity, perplexity_se)


def evaluate(model: Callable[[mx.array], mx.array], tokenizer: Any, text: Path, limit: int) -> list[Score]:
    """One Score per source of the folder `text`. Raises TextError."""
    work = []
    for source in read_sources(text):
        stream: list[int] = []
        for doc in source.held_out:
            # verbose=False: no warning that a book is longer than the model's context.
            stream += tokenizer.encode(doc, add_special_tokens=False, verbose=False)
            stream.append(tokenizer.eos_token_id)
        work.append((source.name, windows(stream, limit)))
    scores = []
    with tqdm(total=sum(len(w) for _, w in work), unit="window", disable=None) as bar:
        for name, ids in work:
            losses = []
            for row in ids:
                losses.append(window_loss(model, row))
                bar.update()
            characters = sum(len(tokenizer.decode(r[1:].tolist(), skip_special_tokens=True)) for r in ids)
            scores.append(score(name, losses, characters))
    return scores


def table(scores: Sequence[Score]) -> str:
    """Markdown, one row per source, ± one standard error."""
    lines = ["| held-out source | tokens | nats/token | perplexity | nats/character |", "| --- " * 5 + "|"]
    for s in scores:
        nats = f"{s.nats_per_token:.3f}" + ("" if s.nats_per_token_se is None else f" ± {s.nats_per_token_se:.3f}")
        perplexity = f"{s.perplexity:.2f}" + ("" if s.perplexity_se is None else f" ± {s.perplexity_se:.2f}")
        lines.append(f"| {s.source} | {s.tokens:,} | {nats} | {perplexity} | {s.nats_per_character:.3f} |")
    return "\n".join(lines)


def setup_arg_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("model", type=Path, help="folder of an mlx-lm checkpoint")
    p.add_argument("text", type=Path, help="folder of *.txt files, as given to train_demo_model.py")
    p.add_argument("--limit", type=parse_count, default=20_000, help="tokens per source (default 20k)")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = setup_arg_parser().parse_args(argv)
    try:
        if not (args.model / "config.json").is_file():
            raise TextError(f"no config.json in {args.model}; give the folder of an mlx-lm checkpoint")
        model, tokenizer = mlx_lm.load(str(args.model))
        scores = evaluate(model, tokenizer, args.text, args.limit)
    except (TextError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        result = {
            "model": str(args.model),
            "mlx_lm": mlx_lm.__version__,
            "window": WINDOW,
            "text_sha256": text_digests(args.text),
            "scores": [asdict(s) for s in scores],
        }
        print(json.dumps(result, indent=2))
    else:
        print(table(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
