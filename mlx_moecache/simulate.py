"""`mlx_moecache simulate`, also `python -m mlx_moecache.simulate`: replay a recorded trace through other caches."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import __version__
from .console import arguments
from .console.command import run
from .console.emulation import add_flash_arguments, emulation_of
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
  mlx_moecache simulate run.trace --slots 30 --allocate

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
    group.add_argument(
        "--allocate",
        action="store_true",
        help="share as many slots among the layers by how much each would miss: learnt from the first half of the "
        "trace, judged on the second; prints --slots for generate if that helps (default: the same for each layer)",
    )
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device",
        metavar="NAME",
        help="read as from the flash of a phone, tablet or laptop such as iphone-16-pro (default: no times)",
    )
    add_flash_arguments(group, otherwise="that of --device, else no times")
    group.add_argument("--latency", dest="flash_latency", type=arguments.duration, help=argparse.SUPPRESS)
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


def _simulate(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    emulation = emulation_of(args)
    if emulation is None and args.compute_ms is not None:
        raise UsageError("--compute-ms is part of the predicted time, which also needs --flash, such as --flash 2GB/s")
    if args.shared_pool and (args.routing not in (None, ["original"]) or args.initial != "empty"):
        flag = "--routing" if args.initial == "empty" else "--initial"
        raise UsageError(
            f"--shared-pool replays original routing from an empty pool, so {flag} has no use; leave it out"
        )
    if args.allocate:
        _check_allocate(args)
    if not args.trace.is_file():
        raise UsageError(f"no trace at {args.trace}; record one with mlx_moecache generate --trace FILE")
    if args.allocate:
        return _allocate(args)
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
    device = Device(compute=(args.compute_ms or 0.0) / 1000)
    if emulation is not None:
        flash = emulation.flash
        device = replace(device, flash=flash.bytes_per_second, latency=flash.latency_seconds)
    if args.json:
        facts: dict[str, object] = {
            "shared_pool": args.shared_pool,
            "initial": args.initial,
            "seed": args.seed,
            "version": __version__,
        }
        facts["emulation"] = None if emulation is None else emulation.as_json()
        print(json.dumps({**as_json(trace, results, device), **facts}, allow_nan=False))
    else:
        print("\n".join(table(trace, results, device, shared=args.shared_pool)))
        if emulation is not None and emulation.device is not None:
            write_notes([f"flash of {emulation.device.title}: {emulation.speed}"], sys.stderr)
        if trace.note:
            write_notes([f"note: {trace.note}"], sys.stderr)
    return 0


def _check_allocate(args: argparse.Namespace) -> None:
    """Refuse what has no use beside --allocate. Raises UsageError."""
    given = {
        "--shared-pool": args.shared_pool,
        "--routing": args.routing not in (None, ["original"]),
        "--initial": args.initial != "empty",
        "--device": args.device is not None,
        "--flash": args.flash is not None,
        "--compute-ms": args.compute_ms is not None,
    }
    for flag, is_given in given.items():
        if is_given:
            raise UsageError(f"--allocate counts misses of original routing, so {flag} has no use; leave it out")
    if args.eviction is not None and len(args.eviction) > 1:
        raise UsageError("--allocate works for one eviction policy at a time; give one --eviction")


def _allocate(args: argparse.Namespace) -> int:
    from .eviction import make_policy
    from .study import slot_sharing
    from .study.simulation import check_slots
    from .study.simulation_report import describe
    from .study.trace import read_trace

    eviction = args.eviction[0] if args.eviction else "lru"
    make_policy(eviction)
    with StatusLine(sys.stderr, enabled=not args.json) as status:
        status.show("reading the trace ...")
        trace = read_trace(args.trace)
        slots = args.slots or _default_slots(trace)
        check_slots(trace, slots)
        layers = slot_sharing.halves(
            trace, eviction, progress=lambda done, total: status.show(f"layers: {done} of {total}")
        )
    results = [slot_sharing.share(layers, n) for n in slots]
    if args.json:
        facts = {"format": "mlx_moecache.study.slot_sharing", "eviction": eviction, "version": __version__}
        print(json.dumps({**facts, "results": slot_sharing.as_json(results)}))
        return 0
    decode = any(bool(x.decode.any()) for x in trace.layers)
    print("\n".join([*describe(trace, decode), *slot_sharing.lines(results)]))
    notes = [trace.note] if trace.note else []
    if not trace.is_original:
        notes.append("the trace was recorded under a routing that changed selections: its misses are approximate")
    write_notes([f"note: {n}" for n in notes], sys.stderr)
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
