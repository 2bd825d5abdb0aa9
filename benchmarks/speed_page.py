"""The page of speed results, from records of speed.py.

python benchmarks/speed.py --suite flash --json > flash.json        and other suites, checkpoints
python benchmarks/speed_page.py *.json > benchmarks/results/speed.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import run

from mlx_moecache.errors import UsageError

OVER_LIMIT = 1.1
OF_ALLOWED = 0.9
OF_STOCK = 0.98
TELLING = 0.2  # of a ratio: an interval that is wider decides nothing

INTRODUCTION = """# Speed

Made by `speed_page.py` from records of `speed.py`, which explains every term; intervals are 95 % over interleaved
rounds, paired. Ratios are to the first configuration of each table, in tokens per second.

- *over limit*: token time against the sum of dense part and, per layer, the longer of hits' compute and misses' reads,
  host reads taken off both (target: at most 1.1). *late*: the same with the compute of experts that were missing added
  to the limit, since they cannot run before they have come.
- *overlap*: how much of what reads and compute could share they do share.
- *allowed*: what fewer bytes allow if only the waiting shrinks with them (target: 0.9 of it).
- *cold*: bytes from the device per byte asked for, padding of direct reads included; below 0.95 it was not cold.
"""


def page(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield INTRODUCTION
    for record in records:
        yield from _section(record)


def load(path: Path) -> dict[str, Any]:
    """The record in a file whose last line it is. Raises UsageError if there is none."""
    try:
        record = json.loads(path.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path} holds no record of speed.py: {error}; make one with --json") from error
    if not isinstance(record, dict) or record.get("benchmark") != "speed":
        raise UsageError(f"{path} holds a record of something else than speed.py")
    return record


def _section(r: dict[str, Any]) -> Iterator[str]:
    e = r["environment"]
    yield f"## {r['checkpoint']}, {r['suite'] or 'chosen configurations'}\n"
    yield (
        f"{r['layers']} MoE layers, {r['experts']} experts of {r['bytes_per_expert'] / 1e6:.2f} MB, top-{r['top_k']}; "
        f"{e['machine']}, {e['cpus']} cpus, MLX on {e['mlx_device']} (mlx {e['mlx']}, mlx-lm {e['mlx_lm']}), load "
        f"{e['load_average'][0]}; routing {r['routing_source']}; {r['rounds']} rounds of 2 x {r['tokens_per_segment']} "
        f"tokens; sequential read {r['raw_bytes_per_second'][1] / 1e9:.2f} GB/s.\n"
    )
    for c in r["configurations"]:
        if c["flash"]:
            yield f"- flash of `{c['text']}`: {c['flash']['bytes_per_second'] / 1e6:.4g} MB/s"
    if r["parts"]:
        p = r["parts"]
        yield (
            f"- parts, ms per token: dense {1e3 * p['dense']:.2f}, experts {1e3 * p['experts']:.2f}, "
            f"one host read {1e3 * p['host_read']:.3f}"
        )
    yield (
        "\n| configuration | tok/s | ratio | ms | compute | host | wait | host reads | MB | GB/s | cold | over limit "
        "| late | overlap |\n" + "| --- " * 14 + "|"
    )
    for d in r["decode"]:
        x = d["limit"]
        cells = [
            f"`{d['name']}`",
            _interval(d["tps"], 2),
            _interval(d["ratio"], 3),
            *(_number(d[f"{part}seconds"], 1e3, 2) for part in ("", "compute_", "host_", "wait_")),
            f"{d['host_reads']:.2f}",
            f"{d['bytes_read'] / 1e6:.2f}",
            _number(d["bandwidth"], 1e-9, 2),
            _number(d["cold"], 1, 2),
            "" if x is None else _interval(x["over"], 3),
            "" if x is None else _interval(x["over_with_late"], 3),
            "" if x is None or x["overlap"] is None else _interval(x["overlap"], 2),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    verdicts = list(_verdicts(r))
    yield from verdicts
    if r["prefill"]:
        title = f"prefill of {r['prefill'][0]['tokens']} tokens"
        yield f"\n| {title} | first token, s | tok/s | ratio | wait, s | MB | GB/s | cold |\n" + "| --- " * 8 + "|"
        for p in r["prefill"]:
            cells = [
                f"`{p['name']}`",
                _interval(p["first_token_seconds"], 3),
                f"{p['tps']:.1f}",
                _interval(p["ratio"], 3),
                f"{p['wait_seconds']:.3f}",
                f"{p['bytes_read'] / 1e6:.1f}",
                _number(p["bandwidth"], 1e-9, 2),
                _number(p["cold"], 1, 2),
            ]
            yield f"| {' | '.join(cells)} |"
    yield ""


def _verdicts(r: dict[str, Any]) -> Iterator[str]:
    """Every target that this record can decide: met when the interval, narrow enough to tell, reaches it."""
    first = r["decode"][0]
    partly = [d for d in r["decode"] if d["host_reads"]]
    for d in partly:
        if d["limit"] is not None:
            over = d["limit"]["over"]
            yield f"- `{d['name']}` within {OVER_LIMIT} of the limit: {_met(over['low'] <= OVER_LIMIT, over)}"
    for d in r["decode"][1:]:
        if first["bytes_read"] and 0 < d["bytes_read"] < first["bytes_read"] and d["allowed_ratio"]:
            reached, price = d["ratio"]["high"] / d["allowed_ratio"], r["perplexity"].get(d["name"])
            of_it = d["ratio"]["value"] / d["allowed_ratio"]
            yield (
                f"- `{d['name']}`: {of_it:.3f} of the x {d['allowed_ratio']:.3f} that its bytes allow, target "
                f"{OF_ALLOWED}: {_met(reached >= OF_ALLOWED, d['ratio'])}" + (f"; perplexity {price}" if price else "")
            )
        if first["name"] == "routing=stock":
            yield f"- `{d['name']}` at {OF_STOCK} of stock mlx-lm: {_met(d['ratio']['high'] >= OF_STOCK, d['ratio'])}"
    if len(partly) > 1 and r["suite"] == "strategies":
        same = {round(d["host_reads"], 6) for d in partly}
        yield f"- no strategy reads the host more often than original routing: {_met(len(same) == 1)}"


def _met(met: bool, interval: dict[str, float] | None = None) -> str:
    if interval is not None and interval["high"] - interval["low"] > TELLING * interval["value"]:
        return "too noisy to tell"
    return "met" if met else "**not met**"


def _interval(x: dict[str, float], digits: int) -> str:
    return f"{x['value']:.{digits}f} [{x['low']:.{digits}f} {x['high']:.{digits}f}]"


def _number(x: float | None, factor: float, digits: int) -> str:
    return "" if x is None else f"{factor * x:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    print("\n".join(page([load(path) for path in parser.parse_args(argv).records])))


if __name__ == "__main__":
    sys.exit(run(main))
