"""How fast is it, and how far from the limit? Configurations of the engine, interleaved in one process.

    python benchmarks/speed.py                                             the standard comparison, Qwen1.5-MoE shapes
    python benchmarks/speed.py "slots=50%" "slots=50% overlaps=off"          two configurations; ratios are to the first
    python benchmarks/speed.py --suite flash --checkpoint olmoe --layers 2
    python benchmarks/speed.py --checkpoint demo --tokens 32 --rounds 30 --suite resident

A configuration is text: slots=30|50%|all|all-1, routing=SPEC|stock|dense, flash=4x|500MB/s[+100us]|none, span=N|auto,
and any option of the engine by its name (a field of CacheOptions or an attribute of the expert cache): overlaps=off,
threads=8, eviction=decay, direct_io=off. `stock` is mlx-lm's own model, `dense` ours with experts that compute nothing.
flash=4x is as slow as makes the misses of original routing take four times as long as computing.

Checkpoints have real layer shapes (speed_checkpoints.py), routing is replayed from the demo model (speed_replay.py),
limits are explained in speed_limits.py. All reads are direct; the report says what share the device delivered.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from common import environment, positive, run
from speed_calibrate import resolve
from speed_checkpoints import FAMILIES, cache_folder, synthetic_checkpoint
from speed_limits import CONTROLS, parts
from speed_price import prices
from speed_replay import record
from speed_report import allowed_lines, decode_figures, decode_lines, prefill_figures, prefill_lines
from speed_rounds import START, measure_decode, measure_prefill
from speed_setup import WARM, Side, parse_configuration

from mlx_moecache.demo import DEMO_NAME, demo_model
from mlx_moecache.errors import UsageError

BIASED = "routing=cache-prior:strength=0.1"
SUITES = {
    "standard": ("slots=50%", "slots=50% overlaps=off", f"slots=50% {BIASED}", "slots=50% flash=1x", "slots=all"),
    "overlap": ("slots=50% flash=1x overlaps=off", "slots=50% flash=1x"),
    "span": ("slots=all-1 span=1", "slots=all-1"),
    "resident": ("routing=stock", "slots=all", f"slots=all {BIASED}"),
    "flash": (
        "slots=50% flash=4x",
        f"slots=50% flash=4x {BIASED}",
        "slots=50% flash=4x routing=cache-prior:strength=0.2",
    ),
    "strategies": tuple(
        f"slots=50% routing={spec}"
        for spec in (
            "original",
            "cache-prior",
            "price:delta=0.02",
            "mass-budget:delta=0.01",
            "bounded-regret:epsilon=0.01",
            "max-rank:m=8",
            "cumsum:p=0.6",
        )
    ),
}
DEMO = "demo"


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configurations", nargs="*", metavar="CONFIGURATION", help="such as 'slots=50%% overlaps=off'")
    parser.add_argument(
        "--suite", choices=SUITES, default="standard", help="without configurations (default: standard)"
    )
    parser.add_argument("--checkpoint", choices=[*FAMILIES, DEMO], default="qwen1.5-moe", help="(default: %(default)s)")
    parser.add_argument("--layers", type=positive, help="of a synthetic checkpoint (default: 3, qwen3-30b-a3b: 2)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept (default: the user's cache folder)")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="routing on the held-out ends of these files")
    parser.add_argument("--rounds", type=positive, default=8, help="of two segments each (default: %(default)s)")
    parser.add_argument("--tokens", type=positive, default=4, help="per segment (default: %(default)s)")
    parser.add_argument(
        "--warm-up", type=positive, default=8, help="tokens before the first round (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", type=int, default=0, help="tokens of a prompt, to time prefill (default: not timed)"
    )
    parser.add_argument("--prompts", type=positive, default=3, help="prompts per configuration (default: %(default)s)")
    parser.add_argument("--no-limits", action="store_true", help="leave the controls out, and with them the limits")
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = setup_arg_parser().parse_args(argv)
    before = environment()
    wanted = [parse_configuration(text) for text in args.configurations or SUITES[args.suite]]
    if len({c.text for c in wanted}) < len(wanted):
        raise UsageError("two configurations are the same; a comparison with itself needs 'slots=50%' and 'slots=30'")
    keep = args.folder or cache_folder()
    recording = record(keep, args.text)
    replayed = args.checkpoint != DEMO
    folder = synthetic_checkpoint(args.checkpoint, keep, layers=args.layers) if replayed else demo_model()
    timed = 1 + args.warm_up + 2 * args.rounds * args.tokens
    resolved = resolve(wanted, folder, recording, tokens=timed, replayed=replayed)
    context = max(START + timed, args.prompt) + 2
    controls = [] if args.no_limits else [c for c in CONTROLS if c.text not in {w.text for w in resolved}]
    sides: list[Side] = []
    try:
        for c in [*resolved, *controls]:
            sides.append(Side(c, folder, recording, context=context, replayed=replayed))
        shard = sorted(folder.glob("*.safetensors"))[0]
        show = not args.json
        rounds = measure_decode(
            sides, rounds=args.rounds, tokens=args.tokens, warm_up=args.warm_up, shard=shard, show=show
        )
        ours = sides[: len(resolved)]
        prompts = (
            measure_prefill(ours, rounds=args.prompts, prompt=args.prompt, at=WARM + timed, show=show)
            if args.prompt
            else []
        )
    finally:
        for side in sides:
            side.close()
    cached = next((s.cache for s in sides if s.cache is not None), None)
    known = None
    if not args.no_limits and cached is not None:
        known = parts(rounds, layers=len(cached.layers), k=cached.layers[0].k)
    names = [c.text for c in resolved]
    figures = decode_figures(rounds, names, known, {c.text for c in resolved if c.flash is not None})
    prefills = prefill_figures(prompts, names) if prompts else []
    price = prices([s for s in ours if s.cache is not None])
    raw = np.array([r.raw for r in rounds])
    if show:
        title = DEMO_NAME if not replayed else f"{FAMILIES[args.checkpoint].title} shapes"
        layers = 0 if cached is None else len(cached.layers)
        print(
            f"{title}, {layers} layers; routing: {recording.source}; {args.rounds} rounds of 2 x {args.tokens} tokens"
        )
        for c in resolved:
            if c.flash is not None and c.flash.bytes_per_second is not None:
                print(f"flash of '{c.text}': {c.flash.bytes_per_second / 1e6:.4g} MB/s")
        lines = decode_lines(figures, known, raw) + allowed_lines(figures, price)
        print("\n".join(lines + (prefill_lines(prefills) if prefills else [])))
    record_ = {
        "benchmark": "speed",
        "environment": before,
        "checkpoint": args.checkpoint,
        "suite": None if args.configurations else args.suite,
        "layers": None if cached is None else len(cached.layers),
        "experts": None if cached is None else cached.layers[0].num_experts,
        "top_k": None if cached is None else cached.layers[0].k,
        "bytes_per_expert": None if cached is None else cached.layers[0].bytes_per_expert,
        "routing_source": recording.source,
        "rounds": args.rounds,
        "tokens_per_segment": args.tokens,
        "configurations": [asdict(c) for c in resolved],
        "raw_bytes_per_second": np.quantile(raw, [0.25, 0.5, 0.75]).tolist(),
        "parts": None if known is None else asdict(known),
        "decode": [asdict(d) for d in figures],
        "prefill": [asdict(p) for p in prefills],
        "perplexity": price,
    }
    print(json.dumps(record_))


if __name__ == "__main__":
    sys.exit(run(main))
