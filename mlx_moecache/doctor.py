"""`mlx_moecache doctor`, also `python -m mlx_moecache.doctor`: does it work on this machine? Lines for a bug report."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .console import arguments
from .console.command import run
from .console.terminal import StatusLine, write_notes
from .demo import demo_model
from .errors import UsageError

if TYPE_CHECKING:
    from .console.doctor_check import Check, Show

FAILED = 1  # exit code

EXAMPLES = """checks, with the bundled demo model:
  device     what MLX computes on
  exact      logits and tokens equal those of stock mlx-lm
  slots      after each of many evictions all slots equal the shard
  host read  what a layer's look at its selected experts costs
  cold read  speed of reads past the page cache, from a temporary file
  budget     peak memory against the budget of a reply

Each line says ok, warning or FAILED. Exit code: 0, or 1 if a check FAILED. The
report names no folders and no user.
"""


@dataclass(frozen=True)
class Sizes:
    """How much is checked."""

    exact: tuple[int, int]  # tokens of prompt and reply
    soak: int  # tokens
    host_reads: int
    file: int  # bytes
    budget: tuple[int, int]  # tokens of prompt and reply


FULL = Sizes(exact=(128, 64), soak=1000, host_reads=1000, file=256 * 2**20, budget=(600, 40))
QUICK = Sizes(exact=(64, 16), soak=100, host_reads=300, file=64 * 2**20, budget=(200, 10))


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; MLX is not imported for it."""
    parser = arguments.Parser(
        prog="mlx_moecache doctor",
        usage="%(prog)s [--quick] [--folder DIR] [--json]",
        description="Check that mlx_moecache works on this machine, in less than a minute, and write a short report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="check less, in some seconds (default: off)")
    parser.add_argument(
        "--folder",
        metavar="DIR",
        help="a folder on the disk whose speed matters, where models lie (default: that of temporary files)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines (default: off)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a check failed (others: see command.py)."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _doctor(given), debug="--debug" in given)


def _doctor(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    folder = Path(args.folder or tempfile.gettempdir())
    if not folder.is_dir():
        raise UsageError(f"--folder {folder} is not a folder; name one on the disk whose speed matters")
    model, sizes = demo_model(), QUICK if args.quick else FULL
    found = []
    with StatusLine(sys.stderr, enabled=not args.json) as status:
        status.show("loading MLX ...")
        from .console import doctor_report
        from .console.doctor_check import run_check
        from .console.doctor_device import machine, packages

        about = packages(), machine()
        status.clear()
        if not args.json:
            write_notes(doctor_report.heading(*about, quick=args.quick), sys.stdout)
        for name, body in _checks(model, folder, sizes, status.show):
            status.show(f"{name} ...")
            with redirect_stdout(sys.stderr):  # stdout is for the report alone
                check = run_check(name, body)
            found.append(check)
            status.clear()
            if not args.json:
                print(doctor_report.check_line(check), flush=True)
    if args.json:
        print(json.dumps(doctor_report.as_json(*about, found, quick=args.quick), allow_nan=False), flush=True)
    else:
        print(doctor_report.verdict(found), flush=True)
    return FAILED if any(check.failed for check in found) else 0


def _checks(model: Path, folder: Path, sizes: Sizes, show: Show) -> Iterator[tuple[str, Callable[[], Check]]]:
    from .console import doctor_device, doctor_model

    yield "device", doctor_device.check_device
    yield "exact", lambda: doctor_model.check_exact(model, *sizes.exact, show)
    yield "slots", lambda: doctor_model.check_slots(model, sizes.soak, show)
    yield "host read", lambda: doctor_device.check_host_read(sizes.host_reads)
    yield "cold read", lambda: doctor_device.check_cold_read(folder, sizes.file, show)
    yield "budget", lambda: doctor_model.check_budget(model, *sizes.budget, show)


if __name__ == "__main__":
    sys.exit(main())
