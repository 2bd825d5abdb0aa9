"""`mlx_moecache sweep`, also `python -m mlx_moecache.sweep`: strategies x strengths x slots, measured into one file."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from .console import arguments
from .console.command import INTERRUPTED, run
from .console.emulated_run import EmulatedRun
from .console.emulation import check_device
from .console.terminal import is_terminal, write_notes
from .errors import MoeCacheError, UsageError
from .evaluate import add_evaluation_arguments, emulate, open_session
from .study.result_table import heading, table
from .study.results import Results, Run, as_json
from .study.sweep_progress import SweepProgress

if TYPE_CHECKING:
    from .study.evaluation_session import Session
    from .study.result_metrics import Unit
    from .study.sweep_grid import Family, GridRun

EXAMPLES = """examples:
  mlx_moecache sweep demo --task text --data stories.txt --window 256 --limit 20 --output results.json
  mlx_moecache sweep MODEL --task wikitext --data wiki.valid.raw --slots 15,30,45 --eviction lru,decay:0.98 \\
      --routing cache-prior:strength=0.05,0.1,0.2,j=1,2 --routing price --output results.json
  mlx_moecache plot results.json

Everything is combined with everything. Coarse results come first: original routing, the middle value of every strategy,
then both ends, then the rest. A sweep that was interrupted goes on where it was when the same command is given again,
and one with more values adds them to the file.
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; MLX is not imported for it."""
    parser = arguments.Parser(
        prog="mlx_moecache sweep",
        usage="%(prog)s [MODEL] --task TASK --data PATH --output FILE [--routing SPEC ...] [--slots N,N] [flags]",
        description="Measure many routing strategies, strengths and numbers of slots on one model and text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("grid")
    group.add_argument(
        "--routing",
        action="append",
        default=[],
        metavar="SPEC",
        help="a strategy with lists of values, as in cache-prior:strength=0.05,0.1,j=1,2; bare names, as in "
        "cache-prior,price, stand for their default lists; may be given again; original is always measured (default: "
        "every strategy over its parameter)",
    )
    group.add_argument(
        "--slots",
        metavar="LIST",
        help="experts per layer in memory, as numbers or shares: 15,30 or 25%%,50%% (default: 25%%,50%%,75%%; with "
        "--device, as many as fit)",
    )
    group.add_argument(
        "--eviction", default="lru", metavar="LIST", help="who gives up its slot, as in lru,decay:0.98 (default: lru)"
    )
    group.add_argument("--dry-run", action="store_true", help="print the grid and measure nothing (default: off)")
    add_evaluation_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see command.py)."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _sweep(given), debug="--debug" in given)


def _sweep(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    check_device(args)
    if args.output is None and not args.dry_run:
        raise UsageError("a sweep takes long, so it needs --output FILE to keep what it has measured")
    from .study.sweep_grid import check

    evictions = _items(args.eviction, "--eviction")
    args.routing = [x for r in args.routing for x in (_items(r, "--routing") if ":" not in r else [r])]
    check(args.routing, evictions)
    session = open_session(args)
    emulated = emulate(args, session)
    with emulated.explained():
        blocks = _blocks(args, session, evictions)
        planned = [[session.plan(r.strategy.spec, slots=r.slots, eviction=r.eviction) for r in b] for b in blocks]
        if args.dry_run:
            print("\n".join(_describe(blocks, planned, session.units)), flush=True)
            return 0
        interrupted = _measure(args, session, planned, emulated)
    return _report(args, session.results, [r for block in planned for r in block], interrupted, emulated)


def _blocks(args: argparse.Namespace, session: Session, evictions: Sequence[str]) -> list[list[GridRun]]:
    from .study.sweep_grid import default_families, default_slots, expand, make_grid, parse_slots

    k, experts = session.k, session.experts
    defaults = default_families(k=k, experts=experts)
    families: list[Family] = [] if args.routing else defaults
    for routing in args.routing:
        named = [f for f in defaults if f[0].partition(":")[0] == routing]  # a bare name
        families += named or expand(routing)
    if args.slots is not None:
        slots = parse_slots(args.slots, experts)
    else:
        slots = [session.default_slots()] if args.device else default_slots(k=k, experts=experts)
    return make_grid(families, slots, evictions, k=k, experts=experts)


def _measure(
    args: argparse.Namespace, session: Session, planned: Sequence[Sequence[Run]], emulated: EmulatedRun
) -> bool:
    """Measure block after block; the results file is written meanwhile. Returns whether the user stopped it."""
    runs = [r for block in planned for r in block]

    def count(run: Run, unit: Unit) -> None:
        progress.count(run, unit)
        if session.loaded is not None:
            emulated.check(session.loaded)

    try:
        with SweepProgress(session.results, runs, args.output, quiet=args.json) as progress:
            for block in planned:
                with redirect_stdout(sys.stderr):  # model code that users trust may print
                    session.measure(block, count)
    except KeyboardInterrupt:
        return True
    return False


def _report(
    args: argparse.Namespace, results: Results, runs: Sequence[Run], interrupted: bool, emulated: EmulatedRun
) -> int:
    emulation = emulated.emulation
    if args.json:
        facts = as_json(results)
        facts |= {} if emulation is None else {"emulation": emulation.as_json()}
        print(json.dumps(facts, allow_nan=False), flush=True)
    elif any(r.units for r in runs):
        print("\n".join(_tables(results, runs)), flush=True)
        write_notes(() if emulation is None else emulation.lines(), sys.stderr)
    complete = sum(r.complete for r in runs)
    if interrupted:
        print(
            f"interrupted with {complete:,} of {len(runs):,} runs complete; they are in {args.output}, and the same "
            "command continues there",
            file=sys.stderr,
            flush=True,
        )
        return INTERRUPTED
    failed = [r.failed for r in runs if r.failed]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise MoeCacheError(f"{failed[0]}{more}; all other runs are complete in {args.output}")
    if not args.json:
        print(f"{len(runs):,} runs in {args.output}; draw them with: mlx_moecache plot {args.output}", file=sys.stderr)
    return 0


def _tables(results: Results, runs: Sequence[Run]) -> list[str]:
    """One table per number of slots and eviction policy, ordered by strategy and parameter."""
    width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
    lines = heading(results)
    names = list(dict.fromkeys(r.strategy for r in runs))
    runs = [r for r in runs if r.units]
    for slots, eviction in dict.fromkeys((r.slots, r.eviction) for r in runs):
        here = [r for r in runs if (r.slots, r.eviction) == (slots, eviction)]
        here.sort(key=lambda r: (names.index(r.strategy), *r.parameters.values()))
        lines += [*table(results.model, here, width), ""]
    return lines[:-1]


def _describe(blocks: Sequence[Sequence[GridRun]], planned: Sequence[Sequence[Run]], units: int) -> list[str]:
    """The grid in the order of work: blocks, and in each the strategies with their slots and eviction policies."""
    runs = [r for block in planned for r in block]
    lines = []
    for i, block in enumerate(blocks):
        lines.append(f"{i + 1}. {_count(len(block), 'run')}")
        for spec in dict.fromkeys(r.strategy.spec for r in block):
            same = [r for r in block if r.strategy.spec == spec]
            slots = ",".join(map(str, dict.fromkeys(r.slots for r in same)))
            lines.append(f"   {spec} · {slots} slots · {','.join(dict.fromkeys(r.eviction for r in same))}")
    done = sum(r.complete for r in runs)
    already = f", {done:,} of them already complete" if done else ""
    missing = sum(r.n - len(r.units) for r in runs if not r.complete)
    return [*lines, f"{_count(len(runs), 'run')} of {_count(units, 'unit')}{already}: {missing:,} units to measure"]


def _items(text: str, flag: str) -> list[str]:
    items = [x.strip() for x in text.split(",") if x.strip()]
    if not items:
        raise UsageError(f"{flag} is empty; leave it out or give a list such as lru,lfu")
    return list(dict.fromkeys(items))


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
