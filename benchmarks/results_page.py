"""Tables in Markdown from results files of `mlx_moecache sweep` or `evaluate`: one per number of slots.

    python benchmarks/results_page.py benchmarks/results/*.json

Per run: miss rate, misses relative to original routing with LRU, perplexity relative to it (95 % interval, paired over
windows), KL to exact routing per token, top-1 agreement, share of swapped selections, expert lifetime in tokens. Runs
that are not complete are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import run

from mlx_moecache.errors import UsageError
from mlx_moecache.study.result_metrics import Interval
from mlx_moecache.study.results import Results, Run, load, paired

HEADER = (
    "| routing | eviction | misses, % | relative misses | relative perplexity | KL, 1e-3 nats | same top-1, % "
    "| swapped, % | lifetime |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def tables(results: Sequence[Results]) -> Iterator[str]:
    """Lines of all tables. Raises UsageError if original routing with LRU was not measured for a number of slots."""
    runs = [(x, r) for x in results for r in x.runs if r.complete]
    for slots in sorted({r.slots for _, r in runs}):
        here = [(x, r) for x, r in runs if r.slots == slots]
        exact = next((r for _, r in here if r.strategy == "original" and r.eviction == "lru"), None)
        if exact is None:
            raise UsageError(f"no complete run of original routing with lru and {slots} slots to compare with")
        model = here[0][0].model
        bound = exact.metrics(model)["belady_miss_rate"]
        yield f"**{slots} of {model.experts} slots** (Belady's bound for the original routes: {_percent(bound)} %)\n"
        yield HEADER
        for x, r in sorted(here, key=lambda pair: (pair[1].strategy, pair[1].eviction, pair[1].routing)):
            yield _row(x, r, exact)
        yield ""


def _row(results: Results, run_: Run, exact: Run) -> str:
    m = run_.metrics(results.model)
    compared = None if run_ is exact else paired(exact, run_)
    kl = m["kl"]
    cells = [
        run_.routing,
        run_.eviction,
        _percent(m["miss_rate"]),
        "1" if compared is None else _interval(compared.miss_ratio, 3),
        "1" if compared is None else _interval(compared.perplexity_ratio, 4),
        "" if kl is None else f"{1000 * kl:.2f}",
        _percent(m["top1_agreement"]),
        _percent(m["swapped_share"]),
        "" if m["expert_lifetime"] is None else f"{m['expert_lifetime']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f}"


def _interval(x: Interval | None, digits: int) -> str:
    return "" if x is None else f"{x.value:.{digits}f} [{x.low:.{digits}f} {x.high:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables in Markdown from results files.")
    parser.add_argument("results", nargs="+", type=Path)
    print("\n".join(tables([load(path) for path in parser.parse_args().results])))


if __name__ == "__main__":
    sys.exit(run(main))
