"""`mlx_moecache plan`, also `python -m mlx_moecache.plan`: will a model run, and how fast will it read? Before any
weights are downloaded.

Exit codes: 0 it runs, 1 it does not (the smallest budget that would do is named), 2 wrong input, as for every command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .budget import parse_memory
from .console import arguments
from .console.command import run
from .console.emulation import Emulation, add_flash_arguments, check_device, emulation_of
from .console.model_headers import model_headers
from .console.terminal import StatusLine
from .demo import named_model
from .errors import BudgetError, MoeCacheError, UsageError

if TYPE_CHECKING:
    from .console.plan_report import Expectation, Machine, Plan
    from .loading import OpenedModel
    from .study.trace import Trace

RUNS, DOES_NOT_RUN = 0, 1
ROUTINGS = ("original", "cache-prior")

EXAMPLES = """examples:
  mlx_moecache plan mlx-community/Qwen1.5-MoE-A2.7B-Chat-4bit
  mlx_moecache plan mlx-community/Qwen3-30B-A3B-4bit --device iphone-16-pro
  mlx_moecache plan MODEL --sim-memory 16GB --flash 3GB/s --max-context 8192
  mlx_moecache plan MODEL --memory 6GB --trace run.trace --flash 2GB/s --json

Config files and the first bytes of each shard are enough; weights are not
read, and those of a Hugging Face repo not downloaded. Exit code 0: it runs,
1: it does not, 2: wrong input.
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; MLX is not imported for it."""
    parser = arguments.Parser(
        prog="mlx_moecache plan",
        usage="%(prog)s [MODEL] [--device NAME | --memory SIZE | --sim-memory SIZE] [--max-context N] [--json]",
        description="Say whether a model will run, with how many experts in memory, and what a token will read.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_model_position(parser)
    group = parser.add_argument_group("memory (default: --memory auto on this machine)")
    group.add_argument(
        "--device",
        metavar="NAME",
        help="a phone, tablet or laptop such as iphone-16-pro: what it gives to one app",
    )
    group.add_argument("--memory", metavar="SIZE", help="a budget: 4GB, 512MB, 60%% (of RAM) or auto")
    group.add_argument("--sim-memory", metavar="SIZE", help="what auto would be on a machine with so much RAM")
    group.add_argument(
        "--max-context",
        type=arguments.whole(1),
        default=4096,  # that of load()
        metavar="TOKENS",
        help="tokens for which KV cache is reserved (default: %(default)s)",
    )
    group = parser.add_argument_group("speed")
    add_flash_arguments(group, otherwise="that of --device, else no times")
    group.add_argument(
        "--compute-ms",
        type=arguments.number(0),
        metavar="MS",
        help="milliseconds per token when nothing is read (default: unknown, times are those of the reads)",
    )
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="routing of this model that was recorded with --trace: replayed at the planned number of slots, it says "
        "more than published hit rates (default: none)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of text (default: off)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _plan(given), debug="--debug" in given)


def _plan(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    check_device(args)
    emulation = emulation_of(args)
    if args.memory is not None and args.sim_memory is not None:
        raise UsageError("--memory and --sim-memory: give one of them; --sim-memory is the RAM of another machine")
    if emulation is None and args.compute_ms is not None:
        raise UsageError("--compute-ms is part of the predicted time, which also needs --flash, such as --flash 2GB/s")
    if args.trace is not None and not args.trace.is_file():
        raise UsageError(f"no trace at {args.trace}; record one with mlx_moecache generate --trace FILE")
    _check_sizes(args)
    with StatusLine(sys.stderr, enabled=not args.json) as status, redirect_stdout(sys.stderr):
        # Model code that users trust may print; stdout is for the plan alone.
        from .loading import OpenedModel

        source, name = named_model(args.model)
        with model_headers(source, args, status) as folder:
            status.show(f"reading the headers of {name} ...")
            opened = OpenedModel(folder, trust_remote_code=args.trust_remote_code)
            plan = _plan_of(opened, name, args, emulation, status)
    from .console import plan_report

    if args.json:
        print(json.dumps({**plan_report.as_json(plan), "version": __version__}, allow_nan=False), flush=True)
    else:
        print("\n".join(plan_report.screen(plan)), flush=True)
    return RUNS if plan.memory is not None else DOES_NOT_RUN


def _check_sizes(args: argparse.Namespace) -> None:
    """Refuse sizes that are none before anything is fetched. Raises UsageError."""
    from .loading import budget_here

    if args.memory is not None:
        budget_here(args.memory)
    if args.sim_memory is not None:
        _simulated_ram(args.sim_memory)


def _plan_of(
    opened: OpenedModel, name: str, args: argparse.Namespace, emulation: Emulation | None, status: StatusLine
) -> Plan:
    from .checkpoints.reader import BOUNCE_BYTES, BOUNCES_PER_THREAD
    from .console.memory_table import budget_rows
    from .console.model_summary import summarise
    from .console.plan_report import Plan
    from .loading import CacheOptions, MemoryOptions

    machine = _machine(opened, args, emulation)
    # An emulated device reads past the page cache, through buffers of our own.
    buffers = 0 if machine.device is None else BOUNCES_PER_THREAD * CacheOptions.threads * BOUNCE_BYTES
    options = MemoryOptions(memory=max(1, machine.budget), max_context=args.max_context)
    try:
        memory = opened.plan(options, host_buffers=buffers)
    except BudgetError:
        memory = None
    rows = {row.label: row for row in budget_rows(opened, max_context=args.max_context, asked=[])}
    smallest = MemoryOptions(memory=rows["smallest"].budget + buffers, max_context=args.max_context)
    return Plan(
        name=name,
        summary=summarise(opened),
        machine=machine,
        max_context=args.max_context,
        memory=memory,
        least=opened.plan(smallest, host_buffers=buffers),
        complete=rows["all experts"].budget + buffers,
        expectations=() if memory is None else _expectations(opened, memory.slots_per_layer, args.trace, status),
        trace=args.trace,
        compute_seconds=None if args.compute_ms is None else args.compute_ms / 1000,
    )


def _machine(opened: OpenedModel, args: argparse.Namespace, emulation: Emulation | None) -> Machine:
    """Whose memory it is, and how much of it is ours."""
    from . import system
    from .console.plan_report import Machine
    from .loading import budget_here

    flash = None if emulation is None else emulation.flash
    if emulation is not None and emulation.device is not None:
        # A run holds the tokenizer, too; of a repo whose weights are not here, it is not here either.
        tokenizer = None
        with suppress(MoeCacheError):
            tokenizer = opened.tokenizer()
        not_charged = system.process_footprint()
        return Machine(
            emulation.device.title,
            emulation.budget(not_charged) or 0,
            not_charged,
            emulation.device,
            flash,
            has_tokenizer=tokenizer is not None,
        )
    if args.sim_memory is not None:
        ram = _simulated_ram(args.sim_memory)
        budget = parse_memory("auto", physical=ram, recommended=None, baseline=system.process_footprint() or 0)
        return Machine(f"a machine with {args.sim_memory} of RAM", budget, None, None, flash)
    memory = args.memory or "auto"
    return Machine(f"this machine, --memory {memory}", budget_here(memory), None, None, flash)


def _simulated_ram(text: str) -> int:
    if text.strip().lower() == "auto" or text.strip().endswith("%"):
        raise UsageError(f"--sim-memory is the RAM of another machine, a size such as 16GB, not {text!r}")
    return parse_memory(text, physical=0, recommended=None)


def _expectations(
    opened: OpenedModel, slots: Sequence[int], trace: Path | None, status: StatusLine
) -> tuple[Expectation, ...]:
    """What original and cache-prior routing will find in memory, by the trace if there is one."""
    from .console.plan_report import Expectation
    from .study.published import expected_hits

    shapes = opened.layer_shapes
    share = sum(slots) / sum(x.num_experts for x in shapes)
    recorded = None if trace is None else _recorded(trace, opened, status)
    if recorded is None or share == 1:
        ranges = {routing: expected_hits(share, cache_prior=routing == "cache-prior") for routing in ROUTINGS}
        return tuple(
            Expectation.from_hits(routing, (r.low, r.high), [(x.k, x.bytes_per_expert) for x in shapes])
            for routing, r in ranges.items()
        )
    from .study.simulation import settings, simulate

    status.show("replaying the trace ...")
    replayed: list[Expectation] = []
    for routing in ROUTINGS:
        chosen = settings(recorded, [routing], ["lru"], [min(slots)])
        with suppress(UsageError):  # cache-prior ranks again, for which the trace may lack scores
            replayed += [Expectation.from_replay(r) for r in simulate(recorded, chosen)]
    return tuple(replayed)


def _recorded(trace: Path, opened: OpenedModel, status: StatusLine) -> Trace:
    """The trace, which is one of this model with tokens of decode. Raises UsageError."""
    from .study.trace import read_trace

    status.show("reading the trace ...")
    recorded, shapes = read_trace(trace), opened.layer_shapes
    found = [(x.shape.experts, x.shape.k) for x in recorded.layers]
    if found != [(x.num_experts, x.k) for x in shapes]:
        raise UsageError(
            f"the trace {trace} is of a model with {len(found)} MoE layers of {found[0][0]} experts, not of this one; "
            "leave --trace out or record one of this model"
        )
    if not any(bool(x.decode.any()) for x in recorded.layers):
        raise UsageError(f"the trace {trace} holds no decoded token; record one with mlx_moecache generate --trace")
    return recorded


if __name__ == "__main__":
    sys.exit(main())
