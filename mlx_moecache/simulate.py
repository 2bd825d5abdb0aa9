"""`mlx_moecache simulate`, also `python -m mlx_moecache.simulate`: replay a recorded trace through other caches."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import __version__
from .budget import parse_memory
from .console import arguments
from .console.command import run
from .console.terminal import StatusLine, write_notes
from .errors import UsageError

if TYPE_CHECKING:
    from .study.trace import Trace

T = TypeVar("T")
EVICTIONS = ["lru", "lfu", "decay", "lfru", "belady"]
SHARED_EVICTIONS = ["lru", "least-stale"]

EXAMPLES = """examples:
  mlx_moecache generate --exact --trace run.trace -p "Tell me a story about a fox."
  mlx_moecache simulate run.trace
  mlx_moecache simulate run.trace --slots 20,30 --eviction lru,decay:0.99 --flash 2GB/s --compute-ms 8
  mlx_moecache simulate run.trace --routing original --routing cache-prior:strength=0.1,j=2 --json

Exact for a trace of original routing that is replayed with original routing. With ~: an approximation, since other
routes would have led to other scores. belady: the fewest misses that any eviction could reach on these routes;
belady-paper: the same, if an expert may be evicted for another one of its own token.
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; MLX is not imported for it."""
    parser = arguments.Parser(
        prog="mlx_moecache simulate",
        description="Replay a trace of routing through simulated expert caches: misses, reads and predicted speed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", metavar="TRACE", type=Path, help="file that was recorded with --trace")
    group = parser.add_argument_group("caches")
    group.add_argument(
        "--slots",
        type=_list_of(arguments.whole(1)),
        metavar="N,N",
        help="experts per layer to keep in memory (default: a quarter, half and three quarters of them)",
    )
    group.add_argument(
        "--eviction",
        type=_list_of(str),
        metavar="NAME,NAME",
        help=f"who gives up a slot; decay:D sets its factor per token (default: {','.join(EVICTIONS)})",
    )
    group.add_argument(
        "--routing",
        action="append",
        metavar="NAME",
        help="a routing strategy, with parameters as in cache-prior:strength=0.05,j=1; may be given several times "
        "(default: original)",
    )
    group.add_argument(
        "--initial",
        type=arguments.one_of("empty", "random", "warm"),
        default="empty",
        metavar="empty|random|warm",
        help="what is in memory where the recorded caches were empty: nothing, random experts, or those that the trace "
        "uses most (default: %(default)s)",
    )
    group.add_argument("--seed", type=arguments.whole(0), default=0, help="of random contents (default: %(default)s)")
    group.add_argument(
        "--shared-pool",
        action="store_true",
        help="one pool of slots for all layers, as many in total; --eviction lru or least-stale (default: a cache per "
        "layer)",
    )
    group = parser.add_argument_group("device")
    group.add_argument(
        "--flash",
        type=flash_speed,
        metavar="SPEED",
        help="how fast experts are read, such as 2GB/s (default: no times)",
    )
    group.add_argument(
        "--latency",
        type=duration,
        metavar="TIME",
        help="what a layer that has to read waits beside, such as 100us (default: 0us)",
    )
    group.add_argument(
        "--compute-ms",
        type=arguments.number(0),
        metavar="MS",
        help="milliseconds per token when nothing is read (default: 0, which leaves the reads alone)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of a table (default: off)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see command.py)."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _simulate(given), debug="--debug" in given)


def flash_speed(text: str) -> int:
    """ "2GB/s" -> bytes per second."""
    match = re.fullmatch(r"\s*([0-9.]+\s*[kmgt]?i?b)/s\s*", text.lower())
    try:
        if match is None:
            raise UsageError("no speed")
        return parse_memory(match[1], physical=0, recommended=None)
    except UsageError:
        raise argparse.ArgumentTypeError(f"needs a speed such as 2GB/s or 500MB/s, not {text!r}") from None


def duration(text: str) -> float:
    """ "100us" -> seconds."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(us|µs|ms|s)\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"needs a time such as 100us or 0.2ms, not {text!r}")
    return float(match[1]) * {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


def _simulate(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    if args.flash is None and (args.latency is not None or args.compute_ms is not None):
        flag = "--latency" if args.latency is not None else "--compute-ms"
        raise UsageError(f"{flag} is part of the predicted time, which also needs --flash, such as --flash 2GB/s")
    if args.shared_pool and (args.routing not in (None, ["original"]) or args.initial != "empty"):
        flag = "--routing" if args.initial == "empty" else "--initial"
        raise UsageError(
            f"--shared-pool replays original routing from an empty pool, so {flag} has no use; leave it out"
        )
    if not args.trace.is_file():
        raise UsageError(f"no trace at {args.trace}; record one with mlx_moecache generate --trace FILE")
    from .study.simulation import Device, settings, shared_settings, simulate, simulate_shared
    from .study.simulation_report import as_json, table
    from .study.trace import read_trace

    with StatusLine(sys.stderr, enabled=not args.json) as status:
        status.show("reading the trace ...")
        trace = read_trace(args.trace)

        def progress(done: int, total: int) -> None:
            status.show(f"replaying: {done} of {total}")

        slots = args.slots or _default_slots(trace)
        if args.shared_pool:
            chosen = shared_settings(trace, args.eviction or SHARED_EVICTIONS, slots)
            results = simulate_shared(trace, chosen, progress=progress)
        else:
            chosen = settings(trace, args.routing or ["original"], args.eviction or EVICTIONS, slots)
            results = simulate(trace, chosen, initial=args.initial, seed=args.seed, progress=progress)
    device = Device(args.flash, args.latency or 0.0, (args.compute_ms or 0.0) / 1000)
    if args.json:
        facts = {"shared_pool": args.shared_pool, "initial": args.initial, "seed": args.seed, "version": __version__}
        print(json.dumps({**as_json(trace, results, device), **facts}, allow_nan=False))
    else:
        print("\n".join(table(trace, results, device, shared=args.shared_pool)))
        if trace.note:
            write_notes([f"note: {trace.note}"], sys.stderr)
    return 0


def _default_slots(trace: Trace) -> list[int]:
    experts = max(x.shape.experts for x in trace.layers)
    k = max(x.shape.k for x in trace.layers)
    return sorted({max(k, experts * quarters // 4) for quarters in (1, 2, 3)})


def _list_of(convert: Callable[[str], T]) -> Callable[[str], list[T]]:
    def each(text: str) -> list[T]:
        return list(dict.fromkeys(convert(part.strip()) for part in text.split(",")))

    return each


if __name__ == "__main__":
    sys.exit(main())
