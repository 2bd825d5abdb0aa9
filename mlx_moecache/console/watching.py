"""The flags --trace and --dry-run-strength: who watches the routing of a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    import mlx.nn as nn

    from ..study.dry_run import DryRun, DryRunEstimate


def check_watching(args: argparse.Namespace) -> None:
    """Refuse what contradicts a dry run, exact by definition, or a trace, which begins cold. Raises UsageError."""
    if args.trace is not None and args.warm_start:
        raise UsageError(
            "a trace is replayed from an empty cache, so --trace cannot be recorded with --warm-start; leave one of "
            "them out"
        )
    if args.dry_run_strength is None:
        return
    if args.routing not in (None, "original") or args.strength or args.top_j is not None:
        raise UsageError(
            "--dry-run-strength leaves routing exact and counts what cache-prior of that strength would do; leave "
            "--routing, --strength and --top-j out"
        )


@contextmanager
def watching(args: argparse.Namespace, folder: Path, name: str, model: nn.Module) -> Iterator[DryRun | None]:
    """Record and count what is generated inside; yields the dry run, if there is one. Raises UsageError."""
    from ..routing import CachePrior, default_top_j
    from ..study.dry_run import DryRun
    from ..study.trace import TraceWriter, describe_run

    cache, dry_run = model.expert_cache, None
    with ExitStack() as stack:
        if args.trace is not None:
            path: Path = args.trace
            try:
                writer = stack.enter_context(TraceWriter(path, describe_run(folder, name, cache)))
            except OSError as error:
                raise UsageError(f"cannot write the trace {path}: {error.strerror}; choose another file") from error
            stack.enter_context(cache.observed_by(writer))
            writer.begin_sequence()
        if args.dry_run_strength is not None:
            strategy = CachePrior(args.dry_run_strength, default_top_j(min(x.k for x in cache.layers)))
            dry_run = DryRun(strategy, [(x.k, x.residents) for x in cache.layers])
            stack.enter_context(cache.observed_by(dry_run))
        yield dry_run


def dry_run_line(estimate: DryRunEstimate) -> str:
    """What the strategy would have done, in one line."""
    if not estimate.selections:
        return f"dry run  {estimate.routing}: all experts are in memory, there is nothing to swap"
    saved = estimate.saved / estimate.misses_exact if estimate.misses_exact else 0.0
    lost = estimate.mass_lost / max(1, estimate.selections)
    return (
        f"dry run  {estimate.routing} would have swapped {estimate.swapped / estimate.selections:.1%} of selections "
        f"and saved {saved:.0%} of {estimate.misses_exact:,} misses (estimate), giving up {lost:.2%} of router mass"
    )
