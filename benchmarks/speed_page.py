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
from speed_targets import interval, rows, verdicts

from mlx_moecache.errors import UsageError

INTRODUCTION = """# Speed

Made by `speed_page.py` from records of `speed.py`, which explains every term. Intervals are 95 % over interleaved
rounds, paired. A target counts as met when the interval reaches it; an interval wider than a fifth of its value, or of
fewer than six rounds or three prompts, decides nothing. *Not used here*: the engine found that it would not pay.
"""

TERMS = """## Every configuration

Ratios are to the first configuration of each comparison, in tokens per second; seconds and counts are per token.

- *wait*: nothing could be computed until experts had come. *host*: looks at the device. *compute*: what is left.
- *misses*: experts per layer that had to be read; *none*: share of the layers that missed nothing; *span*: layers that
  share a look at the device, median [least most].
- *over limit*: token time against the sum of dense part and, per layer, the longer of hits' compute and misses' reads,
  host reads taken off both. *late*: the same with the compute of experts that were missing added to the limit, since
  they cannot run before they have come. *idle*: the same as *over limit* with what idle waits alone cost added to the
  limit: measured on the all-resident model, stopped for as long before each layer's experts.
- *overlap*: how much of what reads and compute could share they do share.
- *ahead*: experts read before their layer had selected, and how many of them it needed.
- *cold*: bytes from the device per byte asked for, padding of direct reads included; below 0.95 it was not cold.
"""

DECODE = (
    "configuration", "tok/s", "ratio", "ms", "compute", "host", "wait", "host reads", "misses", "none", "span", "ahead",
    "MB", "MB/s", "cold", "over limit", "late", "idle", "overlap",
)  # fmt: skip
PREFILL = ("configuration", "first token, s", "tok/s", "ratio", "wait, s", "MB", "of the flash", "cold")


def page(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield INTRODUCTION
    yield "## Targets\n"
    for record in records:
        found = list(verdicts(record))
        if found:
            yield f"### {_title(record)}\n"
            yield from rows(found)
            yield ""
    yield TERMS
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
    if not {"comparisons", "prompts"} <= record.keys():
        raise UsageError(f"{path} holds a record of an older speed.py; measure again")
    return record


def _title(r: dict[str, Any]) -> str:
    return f"{r['checkpoint']}, {r['suite'] or 'chosen configurations'}"


def _section(r: dict[str, Any]) -> Iterator[str]:
    e, comparisons = r["environment"], r["comparisons"]
    first = comparisons[0]
    model = "mlx-lm's own model"
    if first["layers"] is not None:
        size = f"{first['bytes_per_expert'] / 1e6:.2f} MB"
        model = f"{first['layers']} MoE layers, {first['experts']} experts of {size}, top-{first['top_k']}"
    length = f"{r['rounds']} rounds of 2 x {r['tokens_per_segment']} tokens" if r["rounds"] else "prompts only"
    yield f"### {_title(r)}\n"
    yield (
        f"{model}; {e['machine']}, {e['cpus']} cpus, MLX on {e['mlx_device']} (mlx {e['mlx']}, mlx-lm {e['mlx_lm']}), "
        f"load average {e['load_average'][0]} at the start; routing {r['routing_source']}; {length}.\n"
    )
    for c in comparisons:
        yield from _conditions(c)
    yield ""
    decode = [d for c in comparisons for d in c["decode"]]
    if decode:
        yield from _table(DECODE, [_decode(d) for d in decode])
    prompts = [p for c in comparisons for p in c["prefill"]]
    if prompts:
        title = f"prefill of {prompts[0]['tokens']} tokens"
        yield from _table((title, *PREFILL[1:]), [_prompt(p) for p in prompts])


def _conditions(c: dict[str, Any]) -> Iterator[str]:
    """What a comparison found about the machine: one line, for the first configuration names it."""
    said = []
    speeds = {x["flash"]["bytes_per_second"]: x["text"] for x in c["configurations"] if x["flash"]}
    said += [f"flash {speed / 1e6:.4g} MB/s" + (f" (`{x}`)" if len(speeds) > 1 else "") for speed, x in speeds.items()]
    if c["raw_bytes_per_second"]:
        said.append(f"sequential read {c['raw_bytes_per_second'][1] / 1e9:.2f} GB/s")
    if c["parts"]:
        p = c["parts"]
        said.append(
            f"parts, ms per token: dense {1e3 * p['dense']:.2f}, experts {1e3 * p['experts']:.2f}, "
            f"one host read {1e3 * p['host_read']:.3f}"
        )
    if said:
        yield f"- `{c['configurations'][0]['text']}` and what is compared with it: {'; '.join(said)}"


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Without the columns in which nothing stands."""
    kept = [i for i in range(len(names)) if any(line[i] for line in lines)]
    yield "| " + " | ".join(names[i] for i in kept) + " |"
    yield "| --- " * len(kept) + "|"
    for line in lines:
        yield "| " + " | ".join(line[i] for i in kept) + " |"
    yield ""


def _decode(d: dict[str, Any]) -> list[str]:
    x, spans = d["limit"], d["spans"]
    return [
        f"`{d['name']}`",
        interval(d["tps"], 2),
        interval(d["ratio"], 3),
        *(_number(d[f"{part}seconds"], 1e3, 2) for part in ("", "compute_", "host_", "wait_")),
        f"{d['host_reads']:.2f}",
        _number(d["misses_per_layer"], 1, 3),
        "" if d["all_hit_share"] is None else f"{100 * d['all_hit_share']:.1f} %",
        "" if spans is None or spans[2] == 1 else f"{spans[1]:g} [{spans[0]} {spans[2]}]",
        f"{d['read_ahead']:.2f}, {d['read_ahead_used']:.2f}" if d["read_ahead"] else "",
        f"{d['bytes_read'] / 1e6:.2f}",
        _number(d["bandwidth"], 1e-6, 1),
        _number(d["cold"], 1, 2),
        "" if x is None else interval(x["over"], 3),
        "" if x is None else interval(x["over_with_late"], 3),
        "" if x is None or x["over_with_idle"] is None else interval(x["over_with_idle"], 3),
        "" if x is None or x["overlap"] is None else interval(x["overlap"], 2),
    ]


def _prompt(p: dict[str, Any]) -> list[str]:
    return [
        f"`{p['name']}`",
        interval(p["first_token_seconds"], 3),
        f"{p['tps']:.1f}",
        interval(p["ratio"], 3),
        f"{p['wait_seconds']:.3f}",
        f"{p['bytes_read'] / 1e6:.1f}",
        "" if p["flash_share"] is None else interval(p["flash_share"], 3),
        _number(p["cold"], 1, 2),
    ]


def _number(x: float | None, factor: float, digits: int) -> str:
    return "" if x is None else f"{factor * x:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    print("\n".join(page([load(path) for path in parser.parse_args(argv).records])))


if __name__ == "__main__":
    sys.exit(run(main))
