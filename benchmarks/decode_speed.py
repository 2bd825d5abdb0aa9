"""How much does the cached block cost when every expert is resident? Decode speed against stock mlx-lm.

Both models come from the same checkpoint and live in one process. A *segment* is a few decode tokens after a short
prompt, timed without the prompt; a *round* is four segments in the order stock, ours, ours, stock, so that a slow
drift of the machine's speed cancels; its ratio is the time of the two stock segments over the time of ours (1.00: as
fast, below: ours is slower). The result is the median ratio over many short rounds. Two things are timed:

step    the model alone: one forward pass and one evaluation per token, the same given tokens on both sides
stream  the whole way to text: our stream_generate against mlx-lm's, greedy, each with its own look-ahead

Where other work disturbs the machine, the ratio of the fastest tenth of the segments of each side is steadier.
The control times stock against itself in the same way: it shows how far from 1.00 chance alone leads.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from common import Array, Estimate, add_model_argument, bootstrap, environment, median, model_folder, positive, run
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

import mlx_moecache

TARGET = 0.97  # ours / stock, tokens per second
TELLING = 0.1  # a wider interval decides nothing
FASTEST = 0.1
SKIPPED = 2  # first tokens of a reply that are not timed: the two sides start their look-ahead differently
CONTROL = "control"
PROMPT = "Once upon a time there was a little dog."


@dataclass(frozen=True)
class Segment:
    seconds: float
    tokens: tuple[int, ...]  # what came out, to see that both sides did the same work


@dataclass(frozen=True)
class Result:
    what: str  # "step" | "stream"
    routing: str  # of our side; "control": stock on both sides
    ratio: Estimate  # ours / stock, median over rounds
    fastest_ratio: Estimate  # of the segment times that a tenth of each side's segments stay below
    stock_tps: float  # median over segments
    ours_tps: float
    same_tokens: bool
    rounds: int

    @property
    def met(self) -> bool | None:
        """The interval reaches the target; None for the control, or where the interval is too wide to tell."""
        if self.routing == CONTROL or self.ratio.high - self.ratio.low > TELLING:
            return None
        return self.ratio.high >= TARGET

    @property
    def verdict(self) -> str:
        if self.routing == CONTROL:
            return ""
        return (
            f"target {TARGET}: " + {True: "met", False: "NOT met", None: "too noisy to tell, use more rounds"}[self.met]
        )


def step_segment(model: nn.Module, prompt: mx.array, tokens: mx.array) -> Segment:
    """Decode the given `tokens` [N] after `prompt` [L], one forward pass and evaluation each; out: the best next."""
    cache = make_prompt_cache(model)
    mx.eval(model(prompt[None], cache=cache))
    out = []
    began = time.perf_counter()
    for token in tokens:
        logits = model(token[None, None], cache=cache)
        mx.eval(logits)
        out.append(logits)
    seconds = time.perf_counter() - began
    best = mx.concatenate(out, axis=1).argmax(axis=-1).squeeze(0)
    return Segment(seconds, tuple(np.array(best).tolist()))


def stream_segment(responses: Iterable[Any], tokens: int) -> Segment:
    """Time `tokens` tokens in the middle of a reply, from the moment one is handed out to that of another."""
    out, moments = [], []
    for response in responses:
        moments.append(time.perf_counter())
        out.append(response.token)
    return Segment(moments[SKIPPED + tokens] - moments[SKIPPED], tuple(out))


def compare(
    what: str, routing: str, stock: Callable[[], Segment], ours: Callable[[], Segment], rounds: int, show: bool
) -> Result:
    """Rounds of stock, ours, ours, stock, after one untimed round."""
    n = len(stock().tokens) - (SKIPPED + 2 if what == "stream" else 0)
    ours()
    times, same = [], True
    for _ in tqdm(range(rounds), desc=f"{what}, {routing}", unit="round", disable=None if show else True):
        segments = [stock(), ours(), ours(), stock()]
        same = same and len({s.tokens for s in segments}) == 1
        times.append([s.seconds for s in segments])
    t = np.array(times)
    stock_seconds, our_seconds = t[:, [0, 3]], t[:, [1, 2]]
    return Result(
        what=what,
        routing=routing,
        ratio=bootstrap(stock_seconds.sum(axis=1) / our_seconds.sum(axis=1), median),
        fastest_ratio=bootstrap(t, fastest_ratio),
        stock_tps=n / median(stock_seconds),
        ours_tps=n / median(our_seconds),
        same_tokens=same,
        rounds=rounds,
    )


def fastest_ratio(times: Array) -> float:
    """Ratio of the times [N, 4] that the machine's other work disturbed least."""
    return float(np.quantile(times[:, [0, 3]], FASTEST) / np.quantile(times[:, [1, 2]], FASTEST))


def measure(folder: Path, *, tokens: int, rounds: int, show: bool) -> list[Result]:
    """Every comparison on the checkpoint in `folder`; `tokens` per segment."""
    stock, tokenizer = mlx_lm.load(str(folder))
    tokenizer.eos_token_ids = []  # a reply that ended early would be a shorter segment
    prompt = mx.array(tokenizer.encode(PROMPT))
    given = mx.array([r.token for r in stream(mlx_lm.stream_generate, stock, tokenizer, prompt, tokens)][:tokens])

    def step(model: nn.Module) -> Segment:
        return step_segment(model, prompt, given)

    def reply(model: nn.Module) -> Segment:
        generate = mlx_lm.stream_generate if model is stock else mlx_moecache.stream_generate
        return stream_segment(stream(generate, model, tokenizer, prompt, tokens), tokens)

    results = []
    for routing in ("original", "cache-prior", CONTROL):
        ours = stock if routing == CONTROL else fully_resident(folder, routing)
        for what, side in (("step", step), ("stream", reply)):
            results.append(compare(what, routing, partial(side, stock), partial(side, ours), rounds, show))
    return results


def stream(
    generate: Callable[..., Iterable[Any]], model: nn.Module, tokenizer: TokenizerWrapper, prompt: mx.array, tokens: int
) -> Iterable[Any]:
    # Two tokens more than are timed: the end of a reply, like its start, is not alike on both sides.
    return generate(model, tokenizer, prompt, max_tokens=SKIPPED + tokens + 2)


def fully_resident(folder: Path, routing: str) -> nn.Module:
    """Our model with a slot for every expert. Numbers of slots above a layer's experts mean all of them."""
    model, _ = mlx_moecache.load(str(folder), slots=sys.maxsize, routing=routing)
    return model


def describe(results: Sequence[Result]) -> str:
    lines = [f"{'':24}{'stock tok/s':>12}{'ours tok/s':>12}   {'ratio, median [95 % interval]':31}fastest tenth"]
    for r in results:
        other = "" if r.same_tokens else "   DIFFERENT TOKENS"
        name = f"{r.what}, {r.routing}"
        figures = f"{r.stock_tps:12.1f}{r.ours_tps:12.1f}   {r.ratio.format():31}{r.fastest_ratio.format():22}"
        lines.append(f"{name:24}{figures}   {r.verdict}{other}".rstrip())
    return "\n".join(lines)


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Decode speed with all experts resident, against stock mlx-lm.")
    add_model_argument(parser)
    parser.add_argument("--tokens", type=positive, default=8, help="timed tokens per segment (default: 8)")
    parser.add_argument("--rounds", type=positive, default=100, help="rounds per comparison (default: 100)")
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = setup_arg_parser().parse_args(argv)
    before = environment()
    folder, name = model_folder(args.model)
    results = measure(folder, tokens=args.tokens, rounds=args.rounds, show=not args.json)
    if not args.json:
        print(f"{name}: {args.rounds} rounds of 4 segments of {args.tokens} tokens for each comparison")
        print(describe(results))
    record = {
        "benchmark": "decode_speed",
        "environment": before,
        "model": name,
        "tokens_per_segment": args.tokens,
        "rounds": args.rounds,
        "target_ratio": TARGET,
        "results": [asdict(r) | {"met": r.met} for r in results],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main))
