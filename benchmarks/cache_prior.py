"""What does Cache-Prior cost in quality, and what does it gain in speed, against original routing with the same cache?

Both keep the same number of experts per layer in memory (half of them by default) and evict the least recently used.
Text that the model was not trained on is given to both, token by token, so that both do the same work:

quality  Windows of text, one token per forward pass, every token biased, as the paper scores: the cache is empty at
         the start of a window, the running mean of the ranges D persists. Reported are perplexity and its ratio,
         misses, swapped selections, KL(original || biased) and how often the best next token is the same.
speed    The reader is slowed down to an emulated flash, so slow that original routing waits for reads about as long as
         it computes, or four times as long: the demo model's experts are far too small for a real disk to matter.
         Caches stay warm from window to window. Short segments, interleaved; each is timed for every strength.

Every strength has a model of its own in memory, with its own cache and its own D.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cache_prior_runs import BLOCK, FlashRun, Quality, Setup, calibrate, measure_quality, measure_speed
from common import add_model_argument, environment, model_folder, positive, run
from held_out import text_windows

from mlx_moecache.errors import UsageError
from mlx_moecache.loading import OpenedModel


def describe_quality(results: Sequence[Quality], windows_note: str) -> str:
    lines = [
        f"quality: {results[0].tokens:,} tokens scored, {windows_note}; [95 % intervals over windows, paired]",
        f"{'strength':>9}  {'perplexity':22}{'ratio':24}{'misses %':22}{'/ original':22}"
        f"{'swapped %':>10}  {'KL, nats':26}top-1 same %",
    ]
    for q in results:
        miss, same = q.miss_rate.scaled(100), q.top1_agreement.scaled(100)
        lines.append(
            f"{q.strength:9g}  {q.perplexity.format(2):22}{q.perplexity_ratio.format(4):24}{miss.format(1):22}"
            f"{q.misses_ratio.format(3):22}{100 * q.swapped_share:10.1f}  {q.kl.format(4):26}{same.format(1)}"
        )
    return "\n".join(lines)


def describe_speed(flash_run: FlashRun) -> str:
    lines = [
        f"speed: {flash_run.speeds[0].tokens:,} tokens, emulated flash {flash_run.bytes_per_second / 1e6:.3g} MB/s, "
        f"chosen for reads of {flash_run.wanted_ratio:g} x compute under original routing",
        f"{'strength':>9}  {'tok/s':24}{'/ original':24}{'quartiles':16}{'misses alone':>12}{'read time %':>13}"
        f"{'loads/token/layer':>19}",
    ]
    for s in flash_run.speeds:
        low, high = s.ratio_quartiles
        lines.append(
            f"{s.strength:9g}  {s.tps.format(1):24}{s.ratio.format(3):24}{f'{low:.3f} .. {high:.3f}':16}"
            f"{s.expected_ratio:12.3f}{100 * s.read_share:13.1f}{s.loads_per_token_layer:19.3f}"
        )
    return "\n".join(lines)


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Cache-Prior against original routing with the same cache.")
    add_model_argument(parser)
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="text files, documents divided by <|endoftext|>"
    )
    parser.add_argument(
        "--tail",
        type=share,
        default=0.03,
        help="share of each file, from its end (default: 0.03, what the demo model never saw)",
    )
    parser.add_argument("--slots", type=positive, help="experts in memory per layer (default: half of them)")
    parser.add_argument(
        "--strengths", type=numbers, default=(0.05, 0.1, 0.2), help="(default: 0,0.05,0.1,0.2; 0 = original)"
    )
    parser.add_argument("--windows", type=positive, default=20, help="windows to score (default: 20)")
    parser.add_argument("--window", type=positive, default=256, help="tokens per window (default: 256)")
    parser.add_argument(
        "--flash-ratio", type=numbers, default=(1.0, 4.0), help="read / compute time of original routing (default: 1,4)"
    )
    parser.add_argument("--tokens", type=positive, default=768, help="tokens to time per flash ratio (default: 768)")
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    return parser


def numbers(text: str) -> tuple[float, ...]:
    """ "0.05,0.1" -> (0.05, 0.1)."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= v < float("inf") for v in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.05,0.1")
    return values


def share(text: str) -> float:
    value = numbers(text)[0]
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0.03")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    args = setup_arg_parser().parse_args(argv)
    if args.window < BLOCK:
        raise UsageError(f"--window must be at least {BLOCK} tokens, not {args.window}")
    if 0.0 in args.flash_ratio:
        raise UsageError("--flash-ratio must be above 0: at 0 reads take no time and there is nothing to compare")
    before = environment()
    folder, name = model_folder(args.model)
    opened = OpenedModel(folder)
    shapes = opened.layer_shapes
    slots = args.slots or max(max(x.k for x in shapes), shapes[0].num_experts // 2)
    if slots >= shapes[0].num_experts:
        raise UsageError(f"--slots must be below the {shapes[0].num_experts} experts: else nothing is ever read")
    windows = text_windows(args.text, opened.tokenizer(), tail=args.tail, count=args.windows, length=args.window)
    # Without the 0 of original routing there is nothing to compare with.
    setup = Setup(folder, slots, args.window, (0.0, *(s for s in dict.fromkeys(args.strengths) if s)))
    show = not args.json
    quality = measure_quality(setup, windows, show)
    calibration = calibrate(setup, windows)
    runs = [measure_speed(setup, windows, ratio, calibration, args.tokens, show) for ratio in args.flash_ratio]
    if show:
        print(f"{name}: {slots} of {shapes[0].num_experts} experts in memory, {len(shapes)} layers, LRU")
        print(describe_quality(quality, f"{args.windows} windows of {args.window}"))
        for r in runs:
            print(describe_speed(r))
    record = {
        "benchmark": "cache_prior",
        "environment": before,
        "model": name,
        "slots": slots,
        "experts": shapes[0].num_experts,
        "layers": len(shapes),
        "top_k": shapes[0].k,
        "text": [{"name": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in args.text],
        "tail": args.tail,
        "windows": args.windows,
        "window_tokens": args.window,
        "quality": [asdict(q) for q in quality],
        "speed": [asdict(r) for r in runs],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main))
