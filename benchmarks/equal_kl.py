"""Which strategy needs fewer misses for the same quality? Compares two families of runs in results files of `sweep`.

    python benchmarks/equal_kl.py results/*.json --of price/lru --against cache-prior/lru

Each family (strategy/eviction; j=1 where the strategy has a J) gives a curve of misses over mean KL to exact routing,
one point per parameter. Between points log(misses) is interpolated linearly in log(KL). At each KL where both curves
have points, the ratio of misses is taken; reported are these ratios and their geometric mean, with 95 % intervals from
drawing windows anew (pairs kept together). Exact points (KL 0) have no place on a logarithmic curve.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import Array, Estimate, bootstrap, run

from mlx_moecache.errors import UsageError
from mlx_moecache.study.results import Results, Run, load

POINTS = 5  # values of KL, evenly spread over the logarithm of the common range


def family(results: Sequence[Results], name: str, slots: int) -> list[Run]:
    """Complete runs of "strategy/eviction" with so many slots, in the order of their KL."""
    strategy, _, eviction = name.partition("/")
    runs = [
        r
        for x in results
        for r in x.runs
        if (r.strategy, r.slots, r.eviction) == (strategy, slots, eviction or "lru")
        and r.parameters.get("j", 1) == 1
        and len(r.units) == r.n
    ]
    return sorted((r for r in runs if _kl(r) > 0), key=_kl)


def _kl(run_: Run) -> float:
    return sum(u.kl or 0.0 for u in run_.units)


def _sums(run_: Run) -> Array:
    """[windows, 2]: KL and misses."""
    return np.array([(u.kl, u.misses) for u in sorted(run_.units, key=lambda u: u.id)], dtype=np.float64)


def _curve(data: Array) -> tuple[Array, Array]:
    """log KL (rising) and log misses of each run from [windows, runs, 2]."""
    total = np.log(np.maximum(data.sum(axis=0), 1e-9))
    order = np.argsort(total[:, 0])
    return total[order, 0], total[order, 1]


def compare(ours: Sequence[Run], theirs: Sequence[Run]) -> tuple[list[float], list[Estimate], Estimate]:
    """KL per token at which both have points, the ratio of misses there, and its geometric mean.

    Raises UsageError if the curves share no KL.
    """
    data = np.stack([_sums(r) for r in (*ours, *theirs)], axis=1)
    n, tokens = len(ours), sum(u.tokens for u in ours[0].units)
    (a, _), (b, _) = _curve(data[:, :n]), _curve(data[:, n:])
    low, high = max(a[0], b[0]), min(a[-1], b[-1])
    if low >= high:
        raise UsageError("the two families have no common range of KL; give them more parameters")
    at = np.linspace(low, high, POINTS)

    def ratios(rows: Array) -> Array:
        (xa, ya), (xb, yb) = _curve(rows[:, :n]), _curve(rows[:, n:])
        return np.asarray(np.interp(at, xa, ya) - np.interp(at, xb, yb))

    each = [bootstrap(data, lambda rows, i=i: float(np.exp(ratios(rows)[i]))) for i in range(POINTS)]  # type: ignore[misc]
    return list(np.exp(at) / tokens), each, bootstrap(data, lambda rows: float(np.exp(ratios(rows).mean())))


def main() -> None:
    parser = argparse.ArgumentParser(description="Misses of two strategies at equal KL.")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--of", required=True, metavar="STRATEGY/EVICTION")
    parser.add_argument("--against", required=True, metavar="STRATEGY/EVICTION")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    results = [load(path) for path in args.results]
    record = []
    for slots in sorted({r.slots for x in results for r in x.runs}):
        ours, theirs = family(results, args.of, slots), family(results, args.against, slots)
        if len(ours) < 2 or len(theirs) < 2:
            print(f"{slots} slots: fewer than two complete runs of one of them", file=sys.stderr)
            continue
        at, each, mean = compare(ours, theirs)
        record.append({"slots": slots, "mean": vars(mean), "kl": at, "ratios": [vars(e) for e in each]})
        if not args.json:
            print(f"{slots} slots: misses of {args.of} / {args.against} at equal KL: {mean.format()}")
            for kl, e in zip(at, each, strict=True):
                print(f"    KL {kl:.4f}: {e.format()}")
    print(json.dumps({"benchmark": "equal_kl", "of": args.of, "against": args.against, "slots": record}))


if __name__ == "__main__":
    sys.exit(run(main))
