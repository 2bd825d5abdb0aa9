"""`mlx_moecache plot`, also `python -m mlx_moecache.plot`: figures from the results of evaluate and sweep."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .console import arguments
from .console.command import run
from .console.terminal import StatusLine
from .errors import UsageError
from .study.figure_data import METRICS, is_simulation, measured, merge, simulated_miss_rates, usable
from .study.figure_style import require_matplotlib, write
from .study.results import Results, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("tradeoff", "slots", "lifetime", "heatmap")
FORMATS = (".png", ".svg")
# Endings of picture files that are not written; any other name is a folder.
OTHER_FORMATS = (".pdf", ".jpg", ".jpeg", ".gif", ".eps", ".ps", ".tif", ".tiff", ".webp", ".bmp")
EXAMPLES = """figures:
  tradeoff  quality against miss rate, a line per strategy over its parameter, a panel per number of slots
  slots     miss rate of original routing against the number of slots, a line per eviction policy; also from what
            simulate --json prints
  lifetime  how many tokens an expert stays in memory, per strategy
  heatmap   how often each expert of each layer is used; needs a trace, recorded with --trace

examples:
  mlx_moecache plot results.json
  mlx_moecache plot results.json --what tradeoff --metric kl --out kl.svg
  mlx_moecache plot lru.json decay.json --what slots --out figures

Several results files must be of the same model, data and settings. Bars are 95 % intervals; for perplexity they are
paired with exact routing, window by window.
"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; matplotlib is not imported for it."""
    parser = arguments.Parser(
        prog="mlx_moecache plot",
        usage="%(prog)s FILE [FILE ...] [--what FIGURE] [--metric METRIC] [--out FOLDER | FILE.png | FILE.svg]",
        description="Draw figures from results of evaluate and sweep, and from traces.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="results files, traces, output of simulate --json")
    parser.add_argument(
        "--what",
        type=arguments.one_of(*KINDS),
        metavar="|".join(KINDS),
        help="the figure (default: all that the files allow; tradeoff if --out is a picture)",
    )
    parser.add_argument(
        "--metric",
        type=arguments.one_of(*METRICS),
        metavar="|".join(METRICS),
        help="the quality in it (default: every metric that was measured; the first one if --out is a picture)",
    )
    parser.add_argument(
        "--out",
        default="plots",
        metavar="PATH",
        help="a folder for .png files, or one picture ending in .png or .svg (default: the folder %(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see command.py)."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _plot(given), debug="--debug" in given)


@dataclass(frozen=True)
class _Picture:
    """A figure to draw. `wanted`: it was asked for by name, so that failing to draw it is an error."""

    name: str  # of the file, without its ending
    draw: Callable[[], Figure]
    wanted: bool


def _plot(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    out = Path(args.out)
    is_picture = _check_out(out)
    require_matplotlib()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its remarks about fonts and folders help nobody here
    pictures = _pictures(args, [Path(f) for f in args.files], single=is_picture)
    if is_picture:
        pictures = pictures[:1]
    written = 0
    with StatusLine(sys.stderr) as status:
        for picture in pictures:
            status.show(f"drawing {picture.name} ...")
            try:
                figure = picture.draw()
            except UsageError as error:
                if picture.wanted:
                    raise
                status.clear()
                print(f"not drawn: {picture.name} ({error})", file=sys.stderr, flush=True)
                continue
            path = out if is_picture else out / f"{picture.name}.png"
            _make_folder(path.parent)
            write(figure, path)
            status.clear()
            print(path, flush=True)
            written += 1
    if not written:
        raise UsageError("none of the figures can be drawn from these files; the reasons are above")
    return 0


def _check_out(out: Path) -> bool:
    """Whether `out` is a picture, not a folder. Raises UsageError for pictures of other formats."""
    if out.is_dir():
        return False
    ending = out.suffix.lower()
    if ending in OTHER_FORMATS:
        raise UsageError(f"--out: {ending} files are not written; end the name in {' or '.join(FORMATS)}")
    if ending not in FORMATS and out.exists():
        raise UsageError(f"--out: {out} is a file, but no picture; give a folder, or a name in {' or '.join(FORMATS)}")
    return ending in FORMATS


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror or error}; give another --out") from error


def _pictures(args: argparse.Namespace, files: Sequence[Path], *, single: bool) -> list[_Picture]:
    """What to draw from the files, which are read and checked first."""
    traces = [f for f in files if is_trace(f)]
    simulated = [f for f in files if is_simulation(f)]
    read = [(str(f), load(f)) for f in files if f not in (*traces, *simulated)]
    wanted = args.what is not None or single
    if args.what == "heatmap" and not traces:
        raise UsageError("--what heatmap needs a trace, recorded with --trace, which is not among the files")
    if args.what is not None and args.what != "heatmap" and not read and not (args.what == "slots" and simulated):
        raise UsageError(f"--what {args.what} needs results of evaluate or sweep, which are not among the files")
    pictures: list[_Picture] = []
    if read and args.what != "heatmap":
        results, notes = usable(merge(read))
        for note in notes:
            print(note, file=sys.stderr, flush=True)
        pictures += _of_results(results, args.what, args.metric, wanted)
    if args.what in (None, "slots"):
        for file in simulated:
            name = "slots" if len(files) == 1 else f"slots-{file.stem}"
            pictures.append(_Picture(name, partial(_simulated, file), wanted))
    if args.what in (None, "heatmap"):
        for trace in traces:
            name = "heatmap" if len(traces) == 1 else f"heatmap-{trace.stem}"
            pictures.append(_Picture(name, partial(_heatmap, trace), wanted))
    return pictures


def _of_results(results: Results, what: str | None, metric: str | None, wanted: bool) -> list[_Picture]:
    from .study import figures

    pictures = []
    metrics = [METRICS[metric]] if metric is not None else measured(results)
    if not metrics:
        raise UsageError("the files hold no quality metric (perplexity, kl, accuracy, top1); evaluate again")
    if what in (None, "tradeoff"):
        draw = figures.tradeoff
        pictures += [_Picture(f"tradeoff-{m.name}", partial(draw, results, m), wanted) for m in metrics]
    if what in (None, "slots"):
        pictures.append(_Picture("slots", partial(figures.slots, results), wanted))
    if what in (None, "lifetime"):
        pictures.append(_Picture("lifetime", partial(figures.lifetime, results, metrics[0]), wanted))
    return pictures


def _simulated(file: Path) -> Figure:
    from .study import figures

    return figures.miss_rate_figure(*simulated_miss_rates(file))


def _heatmap(file: Path) -> Figure:
    from .study import figures
    from .study.trace import read_trace

    trace = read_trace(file)
    if trace.note is not None:
        print(trace.note, file=sys.stderr, flush=True)
    return figures.heatmap([np.bincount(x.own.ravel(), minlength=x.shape.experts) for x in trace.layers])


def is_trace(file: Path) -> bool:
    """Whether a file begins as traces do. Files that cannot be read are left to whoever reads them as results."""
    from .study.trace_format import MAGIC

    try:
        with file.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
