"""How fast is it, and how far from the limit? Configurations of the engine, interleaved in one process.

    python benchmarks/speed.py                                             the standard comparison, Qwen1.5-MoE shapes
    python benchmarks/speed.py "slots=50%" "slots=50% overlaps=off"          two configurations; ratios are to the first
    python benchmarks/speed.py --suite flash --checkpoint olmoe --layers 2
    python benchmarks/speed.py --checkpoint demo --tokens 32 --rounds 30 --suite resident

A configuration is text: slots=30|50%|all|all-1, routing=SPEC|stock|dense, flash=4x|500MB/s[+100us]|none,
hostread=2ms (added to each look at the device), span=N|auto, lookahead=on|off, and any option of the engine by its name
(a field of CacheOptions or an attribute of the expert cache): overlaps=off, threads=8, eviction=decay, direct_io=off.
`stock` is mlx-lm's own model, `dense` ours with experts that compute nothing. flash=4x is as slow as makes the misses
of original routing take four times as long as computing; in a suite that times prompts only, the reads of a prompt.

Suites, each with its own checkpoint and lengths (speed_suites.py):

    standard, overlap, flash, resident, strategies    decode, one comparison each
    span          optimistic decoding against looking after every layer, at host reads 0, 0.5 and 2 ms longer
    look-ahead    the next layer's router asked early, on against off, at three speeds of flash
    prefill       prompts: all experts resident, half of them compute-bound, half of them flash-bound

With configurations, --suite gives the settings only. Checkpoints have real layer shapes (speed_checkpoints.py), routing
is replayed from the demo model (speed_replay.py), limits are explained in speed_limits.py. All reads are direct; the
report says what share the device delivered. speed_page.py makes a page of the records.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common import environment, positive, run
from speed_checkpoints import FAMILIES, cache_folder, synthetic_checkpoint
from speed_compare import Settings, compare
from speed_lines import lines_of
from speed_replay import record
from speed_setup import parse_configuration
from speed_suites import DEMO, SUITES

from mlx_moecache.demo import DEMO_NAME, demo_model
from mlx_moecache.errors import UsageError


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configurations", nargs="*", metavar="CONFIGURATION", help="such as 'slots=50%% overlaps=off'")
    parser.add_argument("--suite", choices=SUITES, default="standard", help="(default: %(default)s)")
    parser.add_argument("--checkpoint", choices=[*FAMILIES, DEMO], help="(default: the suite's)")
    parser.add_argument("--layers", type=positive, help="of a synthetic checkpoint (default: 3, qwen3-30b-a3b: 2)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept (default: the user's cache folder)")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="routing on the held-out ends of these files")
    parser.add_argument("--rounds", type=positive, help="of two segments each (default: the suite's)")
    parser.add_argument("--tokens", type=positive, help="per segment (default: the suite's)")
    parser.add_argument("--warm-up", type=positive, help="tokens before the first round (default: the suite's)")
    parser.add_argument("--prompt", type=positive, help="tokens of a prompt, to time prefill (default: the suite's)")
    parser.add_argument("--prompts", type=positive, default=3, help="prompts per configuration (default: %(default)s)")
    parser.add_argument("--no-limits", action="store_true", help="leave the controls out, and with them the limits")
    parser.add_argument("--json", action="store_true", help="print the line of JSON only")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = setup_arg_parser().parse_args(argv)
    before, show = environment(), not args.json
    suite = SUITES[args.suite]
    wanted = [
        [parse_configuration(x) for x in c]
        for c in ([args.configurations] if args.configurations else suite.comparisons)
    ]
    if any(len({c.text for c in comparison}) < len(comparison) for comparison in wanted):
        raise UsageError("two configurations are the same; a comparison with itself needs 'slots=50%' and 'slots=30'")
    checkpoint = args.checkpoint or suite.checkpoint
    settings = Settings(
        rounds=args.rounds or suite.rounds,
        tokens=args.tokens or suite.tokens,
        warm_up=args.warm_up or suite.warm_up,
        prompt=args.prompt or suite.prompt_for(checkpoint),
        prompts=args.prompts,
        decodes=suite.decodes,
        limits=not args.no_limits,
        show=show,
    )
    keep = args.folder or cache_folder()
    recording = record(keep, args.text)
    replayed = checkpoint != DEMO
    folder = synthetic_checkpoint(checkpoint, keep, layers=args.layers) if replayed else demo_model()
    found = []
    for number, configurations in enumerate(wanted):
        found.append(compare(configurations, settings, folder, recording, replayed=replayed))
        if show and not number:
            title = FAMILIES[checkpoint].title + " shapes" if replayed else DEMO_NAME
            length = f"{settings.rounds} rounds of 2 x {settings.tokens} tokens" if settings.decodes else "prompts only"
            print(f"{title}, {found[0].layers or 'no'} layers with a cache; routing: {recording.source}; {length}")
        if show:
            print("\n".join(["", *lines_of(found[-1])]), flush=True)
    record_ = {
        "benchmark": "speed",
        "environment": before,
        "checkpoint": checkpoint,
        "suite": None if args.configurations else args.suite,
        "routing_source": recording.source,
        "rounds": settings.rounds if settings.decodes else 0,
        "tokens_per_segment": settings.tokens,
        "prompts": settings.prompts if settings.prompt else 0,
        "comparisons": [asdict(c) for c in found],
    }
    print(json.dumps(record_))


if __name__ == "__main__":
    sys.exit(run(main))
