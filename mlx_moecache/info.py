"""`mlx_moecache info`, also `python -m mlx_moecache.info`: what a model needs, from its config and headers alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from . import __version__
from .console import arguments
from .console.command import run
from .console.model_headers import model_headers
from .console.terminal import StatusLine
from .demo import named_model

HIT_RATES = (50.0, 80.0, 90.0, 95.0)  # percent

EXAMPLES = """examples:
  mlx_moecache info demo
  mlx_moecache info mlx-community/Qwen3-30B-A3B-4bit --memory 8GB --memory 12GB
  mlx_moecache info ~/models/olmoe-4bit --json | jq .bytes.total

Weights are not read, and those of a Hugging Face repo not downloaded: config
files and the first bytes of each shard are enough. Slots are experts that are
kept in memory, per layer.
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; MLX is not imported for it."""
    parser = arguments.Parser(
        prog="mlx_moecache info",
        usage="%(prog)s [MODEL] [--memory SIZE] [--hit-rate PERCENT] [--json] [flags]",
        description="Say what a Mixture-of-Experts model is made of and how much memory it needs, without loading it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_model_position(parser)
    parser.add_argument(
        "--memory",
        action="append",
        default=[],
        metavar="SIZE",
        help="a budget to plan: 4GB, 512MB, 60%% (of RAM) or auto; may be repeated (default: round sizes, and auto)",
    )
    parser.add_argument(
        "--max-context",
        type=arguments.whole(1),
        default=4096,  # that of load()
        metavar="TOKENS",
        help="tokens for which KV cache is reserved in these budgets (default: %(default)s)",
    )
    parser.add_argument(
        "--hit-rate",
        action="append",
        type=arguments.number(0, 100),
        default=[],
        metavar="PERCENT",
        help="share of selected experts that are in memory, for the bytes that a token reads; may be repeated "
        f"(default: {', '.join(f'{rate:g}' for rate in HIT_RATES)})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text (default: off)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see command.py)."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _info(given), debug="--debug" in given)


def _info(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    from .loading import budget_here

    for size in args.memory:
        budget_here(size)  # before anything is fetched
    hit_rates = [rate / 100 for rate in args.hit_rate or HIT_RATES]
    with StatusLine(sys.stderr, enabled=not args.json) as status, redirect_stdout(sys.stderr):
        # Model code that users trust may print; stdout is for the facts alone.
        from .console.memory_table import budget_rows
        from .console.model_summary import summarise
        from .loading import OpenedModel

        source, name = named_model(args.model)
        with model_headers(source, args, status) as folder:
            status.show(f"reading the headers of {name} ...")
            opened = OpenedModel(folder, trust_remote_code=args.trust_remote_code)
            summary = summarise(opened)
            rows = budget_rows(opened, max_context=args.max_context, asked=args.memory)
    from .console import info_report

    if args.json:
        facts = info_report.as_json(summary, rows, hit_rates, max_context=args.max_context)
        print(json.dumps({"model": name, **facts, "version": __version__}, allow_nan=False), flush=True)
    else:
        lines = info_report.screen(name, summary, rows, hit_rates, max_context=args.max_context)
        print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
