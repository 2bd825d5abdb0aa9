"""`mlx_moecache repack`, also `python -m mlx_moecache.repack`: a copy of a model in which each expert is one read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .budget import format_bytes
from .checkpoints.expert_major import Manifest, read_manifest
from .console import arguments
from .console.command import INTERRUPTED, run
from .console.terminal import StatusLine, is_terminal
from .demo import named_model
from .errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from .checkpoints.repack_plan import RepackPlan
    from .checkpoints.repacking import Advance, Repacker

DESCRIPTION = """Write a copy of a Mixture-of-Experts model in which all tensors of an expert lie side by side.

In ordinary checkpoints an expert is scattered over several places of a file. In the copy it is one piece, which a disk
that is slow to start a read delivers sooner. Results do not change by a bit. The copy takes as much space as the
model; it can be used wherever mlx_moecache takes a model, but mlx-lm itself cannot load it."""

EXAMPLES = """examples:
  mlx_moecache repack mlx-community/Qwen1.5-MoE-A2.7B-Chat-4bit qwen-repacked
  mlx_moecache generate --model ./qwen-repacked --memory 4GB -p "Why is the sky blue?"
  mlx_moecache repack --verify qwen-repacked

An interrupted run is continued by the same command. Every file is read back and compared by hash once it is written."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of this command; MLX is not imported for it."""
    parser = arguments.Parser(
        prog="mlx_moecache repack",
        usage="%(prog)s MODEL OUT [flags]\n       %(prog)s --verify OUT",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, Hugging Face repo id, or demo", nargs="?")
    parser.add_argument("out", metavar="OUT", help="folder for the copy: new, empty, or begun earlier", nargs="?")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read a finished copy again and compare it with its hashes; MODEL may be left out (default: off)",
    )
    arguments.add_source_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see command.py)."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run(lambda: _dispatch(given), debug="--debug" in given)


def _dispatch(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    given = [name for name in (args.model, args.out) if name is not None]
    if args.verify:
        if not given:
            raise UsageError("--verify needs the folder of the copy: mlx_moecache repack --verify OUT")
        return _verify(Path(given[-1]).expanduser())
    if len(given) < 2 or not args.out.strip():
        raise UsageError("give the model and a folder for the copy: mlx_moecache repack MODEL OUT (-h shows more)")
    return _repack(args, Path(args.out).expanduser())


def _repack(args: argparse.Namespace, out: Path) -> int:
    from .checkpoints.repacking import Repacker

    plan = _plan(args)
    repacker = Repacker(plan, out)
    try:
        kept, damaged = _continue(repacker)
        repacker.check_space()
        with _bar("writing", 2 * sum(f.nbytes for f in repacker.pending)) as advance:
            repacker.run(advance)
    except KeyboardInterrupt:
        done = f"{len(repacker.recorded)} of {len(plan.files)} files are finished"
        print(f"interrupted: {done}; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    for name in damaged:
        print(f"{name} did not have its hash any more and was written again")
    if kept:
        print(f"kept from an earlier run: {kept} of {len(plan.files)} files")
    print(_describe(plan, out))
    return 0


def _plan(args: argparse.Namespace) -> RepackPlan:
    with StatusLine(sys.stderr) as status:
        status.show("loading ...")
        from .checkpoints.hub import resolve_model
        from .checkpoints.repack_plan import ExpertLayer, plan_repack
        from .loading import OpenedModel

        source, name = named_model(args.model)
        status.clear()  # a download draws its own bars
        folder = resolve_model(source, revision=args.revision)
        status.show(f"reading the headers of {args.model} ...")
        opened = OpenedModel(folder, trust_remote_code=args.trust_remote_code)
        if Path(name).expanduser().is_dir():
            name = folder.resolve().name
        layers = [ExpertLayer(b.path, b.components, x) for b, x in zip(opened.blocks, opened.extents, strict=True)]
        return plan_repack(opened.index, layers, name)


def _continue(repacker: Repacker) -> tuple[int, list[str]]:
    """Check what an earlier run finished; returns how many files are kept, and which are damaged."""
    recorded = repacker.recorded
    if not recorded:
        return 0, []
    with _bar("checking", sum(repacker.manifest.files[name].nbytes for name in recorded)) as advance:
        damaged = repacker.check_recorded(advance)
    return len(recorded) - len(damaged), damaged


def _verify(out: Path) -> int:
    from .checkpoints.repacking import verify

    manifest = read_manifest(out)
    if manifest is None:
        raise UsageError(f"{out}: is not a folder made by mlx_moecache repack; give the folder of such a copy")
    if not manifest.is_complete:
        raise CheckpointError(f"{out}: is unfinished; run the command that began it again, it goes on where it stopped")
    with _bar("checking", _bytes_of(manifest)) as advance:
        wrong = verify(out, manifest, advance)
    if wrong:
        raise CheckpointError(
            f"{out}: {', '.join(wrong)} missing or changed since the copy was made; run mlx_moecache repack again with "
            "the original, which writes only these anew"
        )
    print(f"{out}: all {len(manifest.files)} files ({format_bytes(_bytes_of(manifest))}) have their SHA-256")
    return 0


def _describe(plan: RepackPlan, out: Path) -> str:
    def part(what: str, files: Sequence[str]) -> str:
        count = f"{len(files)} file{'' if len(files) == 1 else 's'}"
        return f"{what} in {count} ({format_bytes(sum(plan.manifest.files[name].nbytes for name in files))})"

    experts = plan.manifest.expert_files
    return "\n".join(
        [
            f"{out}: {part('experts', experts)}, {part('other tensors', [f.name for f in plan.resident])}, all checked "
            "by SHA-256",
            "use it as --model of mlx_moecache; mlx-lm itself cannot load it, so keep the original for other programs",
        ]
    )


@contextmanager
def _bar(what: str, nbytes: int) -> Iterator[Advance]:
    """A progress bar on a terminal; yields what is told the number of bytes done."""
    from tqdm import tqdm

    with tqdm(
        total=nbytes,
        desc=what,
        unit="B",
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
        disable=not is_terminal(sys.stderr),
    ) as bar:
        yield lambda done: bar.update(done) and None


def _bytes_of(manifest: Manifest) -> int:
    return sum(record.nbytes for record in manifest.files.values())


if __name__ == "__main__":
    sys.exit(main())
