"""`mlx_moecache evaluate`, also `python -m mlx_moecache.evaluate`: what routing strategies cost and save."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .console import arguments
from .console.command import INTERRUPTED, run
from .console.emulated_run import EmulatedRun
from .console.emulation import add_device_arguments, check_device, emulation_of
from .console.terminal import StatusLine, is_terminal, write_notes
from .demo import named_model
from .errors import MoeCacheError, UsageError
from .eviction import EVICTION
from .study.evaluation_data import HARNESS, TASKS, Request, read_material
from .study.evaluation_progress import EvaluationProgress
from .study.result_metrics import Unit
from .study.result_table import heading, table
from .study.results import Results, Run, as_json, load
from .study.subject_table import subject_table, subjects_json
from .study.tasks_mmlu import MmluDocument
from .study.text_windows import WINDOW

if TYPE_CHECKING:
    from .study.evaluation_session import Session

DEFAULT_ROUTING = ("original", "cache-prior")

EXAMPLES = """examples:
  mlx_moecache evaluate demo --task text --data stories.txt --window 256 --limit 20 --slots 30
  mlx_moecache evaluate mlx-community/Qwen1.5-MoE-A2.7B-4bit --task wikitext --data wiki.valid.raw \\
      --routing original --routing cache-prior:strength=0.05,j=2 --output results.json
  mlx_moecache evaluate MODEL --task harness:hellaswag --slots 30 --limit 500 --output hellaswag.json
  mlx_moecache evaluate MODEL --task gsm8k --data gsm8k/ --slots 30 --limit 200 --output gsm8k.json

Texts and choices are read with simulated caches of --slots experts per layer, token by token in effect, whatever
memory really holds; gsm8k is generated with a real cache of --slots. An evaluation that was interrupted goes on where
it was when the same command is given with the same --output.
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; MLX is not imported for it."""
    parser = arguments.Parser(
        prog="mlx_moecache evaluate",
        usage="%(prog)s [MODEL] --task TASK --data PATH [--routing SPEC ...] [--slots N] [--output FILE] [flags]",
        description="Measure perplexity or accuracy, and cache misses, of routing strategies on one model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("strategies and cache")
    group.add_argument(
        "--routing",
        action="append",
        metavar="SPEC",
        help="a strategy with its parameters, as for generate; repeat the flag or list several with commas "
        f"(default: {','.join(DEFAULT_ROUTING)})",
    )
    group.add_argument(
        "--slots",
        type=arguments.whole(1),
        metavar="N",
        help="experts per layer that the cache holds (default: half of them; with --device, as many as fit)",
    )
    group.add_argument(
        "--eviction",
        type=arguments.eviction_spec,
        default="lru",
        metavar="|".join(EVICTION),
        help="which expert gives up its slot (default: %(default)s)",
    )
    add_evaluation_arguments(parser)
    return parser


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data, settings and output: all but the strategies and their caches. Shared with sweep."""
    arguments.add_model_position(parser)
    parser.add_argument("--memory", metavar="SIZE", help="budget, as for generate; more is faster (default: auto)")
    parser.add_argument(
        "--direct-io", action="store_true", help="read experts past the system's page cache (default: through it)"
    )
    add_device_arguments(parser)
    group = parser.add_argument_group("data")
    tasks = "; ".join(f"{name}: {data}" for name, data in TASKS.items())
    group.add_argument(
        "--task",
        type=_task,
        metavar=f"{'|'.join(TASKS)}|{HARNESS}NAME",
        help=f"what --data is: {tasks}; {HARNESS}NAME: a task of lm-evaluation-harness, which has its own data",
    )
    group.add_argument(
        "--data", type=Path, metavar="PATH", help=f"where the data are; {HARNESS}NAME: a folder of your own definitions"
    )
    group.add_argument(
        "--limit", type=arguments.whole(1), metavar="N", help="windows or questions to take (default: all)"
    )
    group.add_argument(
        "--window",
        type=arguments.whole(1),
        metavar="TOKENS",
        help=f"tokens of a text that are read together (default: {WINDOW}, the paper's)",
    )
    group.add_argument(
        "--stride",
        type=arguments.whole(1),
        metavar="TOKENS",
        help="from window to window; below the window, all but the first score and count their last so many tokens "
        "only (default: the window)",
    )
    group.add_argument(
        "--shots", type=arguments.whole(0), metavar="N", help="worked examples (default: gsm8k 8, mmlu 5)"
    )
    group.add_argument(
        "--shots-data",
        type=Path,
        metavar="FILE",
        help="gsm8k: file of them (default: the folder's train.jsonl)",
    )
    group.add_argument("--subjects", nargs="+", default=(), metavar="NAME", help="mmlu: only these (default: all)")
    group.add_argument(
        "--max-tokens", type=arguments.whole(1), metavar="N", help="gsm8k: longest reply (default: the task's)"
    )
    group = parser.add_argument_group("settings, recorded in the results")
    group.add_argument(
        "--bias-scope",
        type=arguments.one_of("all", "decode"),
        metavar="all|decode",
        help="tokens that a strategy may bias: all, or those generated only (default: gsm8k decode, else all)",
    )
    group.add_argument(
        "--accounting",
        type=arguments.one_of("engine", "paper"),
        default="engine",
        metavar="engine|paper",
        help="paper: a token may evict an expert that it uses itself (default: %(default)s)",
    )
    group.add_argument(
        "--initial",
        type=arguments.one_of("empty", "random", "warm"),
        default="empty",
        metavar="empty|random|warm",
        help="the cache at the start of a window or question; warm: as the one before left it (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=arguments.whole(0), default=0, metavar="N", help="of all that is drawn (default: %(default)s)"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        "-o",
        type=Path,
        metavar="FILE",
        help="results file; if it exists, it is continued (default: none)",
    )
    arguments.add_trace_argument(group)
    group.add_argument("--json", action="store_true", help="print the results as JSON, not as a table (default: off)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see command.py)."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _evaluate(given), debug="--debug" in given)


def _evaluate(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    check_device(args)
    specs = split_specs(args.routing or DEFAULT_ROUTING)
    session = open_session(args)
    emulated = emulate(args, session)
    with emulated.explained():
        runs = [session.plan(s, slots=args.slots, eviction=args.eviction) for s in specs]
        return measure_and_report(args, session, list({id(r): r for r in runs}.values()), emulated)


def split_specs(given: Sequence[str]) -> list[str]:
    """Routing specs from flags that may hold several: "original,cache-prior:strength=0.1,j=2" are two."""
    specs: list[str] = []
    for part in ",".join(given).split(","):
        if "=" in part and ":" not in part and specs:  # names have no "=": another parameter of the spec before
            specs[-1] += f",{part}"
        elif part.strip():
            specs.append(part.strip())
    if not specs:
        raise UsageError("--routing names no strategy; give one such as original")
    return list(dict.fromkeys(specs))


def open_session(args: argparse.Namespace) -> Session:
    """Read the data, open the model, and take over the runs of an earlier results file at --output.

    Raises UsageError for wrong arguments, data or results files, and what opening a model raises.
    """
    material = read_material(_request(args))
    earlier = _earlier(args.output)
    with StatusLine(sys.stderr, enabled=not args.json) as status, redirect_stdout(sys.stderr):
        # Model code that users trust may print; stdout is for the results alone.
        status.show("loading ...")
        from .checkpoints.hub import resolve_model
        from .loading import budget_here
        from .study.evaluation_session import ModelOptions, Session

        if args.memory is not None:
            budget_here(args.memory)  # before anything is fetched
        source, name = named_model(args.model)
        status.clear()  # a download draws its own bars
        folder = resolve_model(
            source,
            revision=args.revision,
            progress=is_terminal(sys.stderr) and not args.json,
        )
        status.show(f"reading {args.data or args.task} with the tokenizer of {name} ...")
        emulation = emulation_of(args)
        options = ModelOptions(
            args.memory,
            args.direct_io,
            args.trust_remote_code,
            args.trace,
            flash=None if emulation is None else emulation.flash,
        )
        session = Session(folder, name, material, options)
    if earlier is not None:
        session.results.check_continues(earlier, str(args.output))
        session.results.runs, session.results.created = earlier.runs, earlier.created
    return session


def emulate(args: argparse.Namespace, session: Session) -> EmulatedRun:
    """The device or flash that the flags name; a device's limit becomes the session's budget. Raises BudgetError."""
    emulated = EmulatedRun(emulation_of(args))
    if emulated.limits:
        # What the process holds by now counts as interpreter and libraries, the texts among it.
        session.options = replace(session.options, memory=emulated.budget, direct_io=True, fit_slots=True)
    return emulated


def measure_and_report(args: argparse.Namespace, session: Session, runs: Sequence[Run], emulated: EmulatedRun) -> int:
    """Measure what is missing of `runs`, save it to --output now and then, and print all of it; the exit code."""
    results = session.results
    interrupted, emulation = False, emulated.emulation

    def count(run: Run, unit: Unit) -> None:
        progress.count(run, unit)
        if session.loaded is not None:
            emulated.check(session.loaded)

    try:
        with (
            EvaluationProgress(results, runs, args.output, shown=not args.json) as progress,
            redirect_stdout(sys.stderr),
        ):
            session.measure(runs, count)
    except KeyboardInterrupt:
        interrupted = True
    of_subjects = [d for d in session.material.choices if isinstance(d, MmluDocument)]
    if args.json:
        facts = as_json(results)
        facts |= {} if emulation is None else {"emulation": emulation.as_json()}
        for described, run in zip(facts["runs"], results.runs, strict=True):
            described |= {"subjects": subjects_json(run, of_subjects)} if of_subjects else {}
        print(json.dumps(facts, allow_nan=False), flush=True)
    elif any(r.units for r in runs):
        width = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
        lines = [*heading(results), *table(results.model, runs, width)]
        by_subject = subject_table(runs, of_subjects, width)
        lines += ["", *by_subject] if by_subject else []
        print("\n".join(lines), flush=True)
        write_notes(() if emulation is None else emulation.lines(), sys.stderr)
    if interrupted:
        done, wanted = sum(len(r.units) for r in runs), sum(r.n for r in runs)
        kept = "nothing was kept (--output keeps it)"
        if args.output is not None:
            kept = f"they are in {args.output}, and the same command continues there"
        print(f"interrupted after {done:,} of {wanted:,} units; {kept}", file=sys.stderr, flush=True)
        return INTERRUPTED
    failed = [r.failed for r in runs if r.failed]
    if failed:
        raise MoeCacheError(f"{failed[0]}{f' (and {len(failed) - 1} more)' if len(failed) > 1 else ''}")
    return 0


def _task(text: str) -> str:
    """A converter for --task."""
    if text.startswith(HARNESS) and text != HARNESS:
        return text
    name: str = arguments.one_of(*TASKS, f"{HARNESS}NAME")(text)
    return name


def _request(args: argparse.Namespace) -> Request:
    """What to measure on. Raises UsageError for flags that are missing or belong to another task."""
    is_harness = args.task is not None and args.task.startswith(HARNESS)
    if args.task is None or (args.data is None and not is_harness):
        missing = " and ".join(f for f, value in (("--task", args.task), ("--data", args.data)) if value is None)
        raise UsageError(f"say what to measure on: {missing} is missing (tasks: {', '.join(TASKS)})")
    is_text = args.task in ("wikitext", "text")
    for flag, value, fits in (
        ("--window", args.window, is_text),
        ("--stride", args.stride, is_text),
        ("--shots", args.shots, not is_text),
        ("--shots-data", args.shots_data, args.task == "gsm8k"),
        ("--max-tokens", args.max_tokens, args.task == "gsm8k"),
        ("--subjects", args.subjects or None, args.task == "mmlu"),
    ):
        if value is not None and not fits:
            raise UsageError(f"{flag} means nothing for the task {args.task}; leave it out")
    return Request(
        task=args.task,
        path=args.data,
        window=args.window or WINDOW,
        stride=args.stride,
        scope=args.bias_scope,
        accounting=args.accounting,
        initial=args.initial,
        limit=args.limit,
        seed=args.seed,
        shots=args.shots,
        shots_data=args.shots_data,
        subjects=tuple(args.subjects),
        max_tokens=args.max_tokens,
    )


def _earlier(output: Path | None) -> Results | None:
    """The results file that is continued; None if there is none yet. Raises UsageError if it cannot be read or made."""
    if output is None:
        return None
    if output.is_dir() or not output.absolute().parent.is_dir():
        what = "is a folder" if output.is_dir() else "is in a folder that does not exist"
        raise UsageError(f"--output {output} {what}; give the name of a file")
    return load(output) if output.exists() else None


if __name__ == "__main__":
    sys.exit(main())
